"""slerp, nuslerp, multislerp and karcher against their formulas on whole vectors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.errors import MergeError
from merge.registry import METHODS

SHAPES = [(), (1,), (0,), (17,), (6, 5), (4, 3, 3, 2), (300, 70)]
SLERP, NUSLERP = METHODS["slerp"], METHODS["nuslerp"]
MULTISLERP, KARCHER = METHODS["multislerp"], METHODS["karcher"]


def randoms(shape: Sequence[int], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def doubles(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def close(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    scale = float(np.abs(wanted).max(initial=1e-30))
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=tolerance * scale)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def norm(array: np.ndarray) -> float:
    return math.sqrt(float((array**2).sum()))


def at_angle(angle: float, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Two fp64 unit vectors at this angle."""
    one, other = (x.double() for x in randoms((count,), 2, seed=3))
    one = one / one.norm()
    other = other - (other @ one) * one
    return one, math.cos(angle) * one + math.sin(angle) * other / other.norm()


def arc(pair: Sequence[np.ndarray], t: float, straight: float) -> np.ndarray:
    """Between two arrays along the arc, or along the chord where sin² of the angle is small."""
    one, two = pair
    lengths = norm(one) * norm(two)
    cosine = float((one * two).sum()) / lengths if lengths else 0.0
    if 1 - cosine**2 <= straight:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)


# --- slerp ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-0.2, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slerp(shape: tuple[int, ...], t: float) -> None:
    base, tensor = randoms(shape, 2)
    close(SLERP(base, [tensor], t=t), arc(doubles([base, tensor]), t, straight=1 - 0.9995**2))


@pytest.mark.parametrize("cosine", [0.9999, 0.9996, 0.9994, 0.99, -0.9994, -0.9996])
def test_slerp_goes_along_the_chord_above_a_cosine_of_9995(cosine: float) -> None:
    base, tensor = at_angle(math.acos(cosine))
    found = SLERP(base, [tensor], t=0.3)
    close(found, arc(doubles([base, tensor]), 0.3, straight=1 - 0.9995**2))
    on_the_chord = torch.allclose(found, 0.7 * base + 0.3 * tensor, rtol=0, atol=1e-12)
    assert on_the_chord == (abs(cosine) > 0.9995)


def test_slerp_takes_zeros_as_a_right_angle() -> None:
    (tensor,) = randoms((9,), 1)
    zeros = torch.zeros(9)
    close(SLERP(zeros, [tensor], t=0.3), math.sin(0.15 * math.pi) * tensor.double().numpy())
    close(SLERP(tensor, [zeros], t=0.3), math.sin(0.35 * math.pi) * tensor.double().numpy())
    assert torch.equal(SLERP(zeros, [zeros], t=0.3), zeros)


def test_slerp_keeps_the_length_of_vectors_of_one_length() -> None:
    base, tensor = at_angle(1.1)
    for t in (0.1, 0.5, 0.8):
        assert float(SLERP(base, [tensor], t=t).norm()) == pytest.approx(1, abs=1e-12)


# --- nuslerp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.6], [1.5, -0.5], [1.0, -1.0]])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nuslerp(shape: tuple[int, ...], weights: list[float]) -> None:
    base, *tensors = randoms(shape, 3)
    start, one, two = doubles([base, *tensors])
    total = sum(weights)
    t = weights[1] / total if total else 0.5
    found = NUSLERP(None, tensors, weight=weights)
    close(found, arc([one, two], t, straight=1e-6))
    found = NUSLERP(base, tensors, weight=weights)
    close(found, start + arc([one - start, two - start], t, straight=1e-6))


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", [(1,), (17,), (0,), (6, 5), (4, 3, 3, 2)], ids=str)
def test_nuslerp_of_runs(shape: tuple[int, ...], with_base: bool, row_wise: bool) -> None:
    base, *tensors = randoms(shape, 3)
    tensors = [base + 2 + tensor for tensor in tensors]  # runs of two are not opposites
    start, one, two = doubles([base, *tensors])
    if not with_base:
        start = np.zeros(shape)
    axis = 0 if row_wise else -1
    turned = [np.moveaxis(array - start, axis, -1) for array in (one, two)]
    wanted = np.empty(turned[0].shape)
    for place in np.ndindex(wanted.shape[:-1]):
        wanted[place] = arc([turned[0][place], turned[1][place]], 0.75, straight=1e-6)
    found = NUSLERP(
        base if with_base else None,
        tensors,
        weight=[1.0, 3.0],
        nuslerp_flatten=False,
        nuslerp_row_wise=row_wise,
    )
    close(found, start + np.moveaxis(wanted, -1, axis))


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_of_parallel_and_opposite_vectors_goes_along_the_chord(flatten: bool) -> None:
    (one,) = randoms((2, 50), 1)
    for factor in (3.0, -3.0):
        found = NUSLERP(None, [one, factor * one], weight=[0.9, 0.1], nuslerp_flatten=flatten)
        close(found, (0.9 + 0.1 * factor) * one.double().numpy())


@pytest.mark.parametrize("angle", [1e-4, 0.9e-3, 1.1e-3, 0.03])
def test_nuslerp_near_the_chord_is_as_good_as_on_the_arc(angle: float) -> None:
    one, two = at_angle(angle)
    close(NUSLERP(None, [one, two], weight=[0.7, 0.3]), arc(doubles([one, two]), 0.3, 0.0), 2e-7)


# --- multislerp ----------------------------------------------------------------------------------


def multislerp_oracle(
    tensors: Sequence[np.ndarray], weights: Sequence[float], eps: float = 1e-8
) -> np.ndarray:
    """Step by step on the sphere: mean direction, tangents there, their mean, back."""
    norms = [norm(tensor) for tensor in tensors]
    units = [tensor / (length + eps) for tensor, length in zip(tensors, norms, strict=True)]
    mean = np.tensordot(weights, units, 1)
    mean = mean / norm(mean)
    tangents = [unit - (unit * mean).sum() * mean for unit in units]
    tangent = np.tensordot(weights, tangents, 1)
    length = norm(tangent) + eps
    direction = mean * math.cos(length) + tangent * (math.sin(length) / length)
    return direction * float(np.dot(weights, norms))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("shape", [(1,), (17,), (6, 5), (4, 3, 3, 2), (300, 70)], ids=str)
def test_multislerp(shape: tuple[int, ...], count: int, normalize: bool) -> None:
    base, *tensors = randoms(shape, count + 1)
    weights = [0.2, 0.5, 0.7, 0.9][:count]
    used = [a / sum(weights) for a in weights] if normalize else weights
    start, *arrays = doubles([base, *tensors])
    found = MULTISLERP(None, tensors, weight=weights, normalize_weights=normalize)
    close(found, multislerp_oracle(arrays, used))
    found = MULTISLERP(base, tensors, weight=weights, normalize_weights=normalize)
    wanted = start + multislerp_oracle([array - start for array in arrays], used)
    close(found, wanted, 2e-6)


def test_multislerp_gives_one_model_back() -> None:
    base, tensor = randoms((20,), 2)
    for start in (None, base):
        found = MULTISLERP(start, [tensor], weight=0.3, normalize_weights=False)
        assert bits(found) == bits(tensor)


def test_multislerp_averages_two_opposites_and_refuses_more() -> None:
    (one,) = randoms((20,), 1)
    close(MULTISLERP(None, [one, -3 * one]), -one.double().numpy())
    close(
        MULTISLERP(torch.ones(20), [1 + one, 1 - 3 * one]), 1 - one.double().numpy(), tolerance=1e-6
    )
    with pytest.raises(MergeError, match=r"balance out.*change the weights"):
        MULTISLERP(None, [one, -one, 2 * one, -2 * one])
    (long,) = randoms((9999,), 1)
    close(MULTISLERP(None, [long, -3 * long]), -long.double().numpy())


def test_multislerp_leaves_out_deltas_of_zeros() -> None:
    base, one = randoms((20,), 2)
    found = MULTISLERP(base, [base, base + one, base], weight=[1, 2, 1])
    close(found, (base + 0.5 * one).double().numpy())


def test_multislerp_cannot_normalize_weights_that_sum_to_zero() -> None:
    with pytest.raises(MergeError, match=r"sum to 0.*normalize_weights"):
        MULTISLERP(None, randoms((3,), 2), weight=[1.0, -1.0])


# --- karcher -------------------------------------------------------------------------------------


def karcher_oracle(tensors: Sequence[np.ndarray], max_iter: int, tol: float) -> np.ndarray:
    """The iteration on whole vectors."""
    norms = [norm(tensor) for tensor in tensors]
    units = [t / length for t, length in zip(tensors, norms, strict=True) if length]
    mean = np.mean(units, axis=0)
    mean = units[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        logs = []
        for unit in units:
            cosine = min(max(float((mean * unit).sum()), -1.0), 1.0)
            angle = math.acos(cosine)
            if tol <= angle <= math.pi - tol:
                logs.append(angle / math.sin(angle) * (unit - cosine * mean))
        step = np.sum(logs, axis=0) / len(units) if logs else np.zeros_like(mean)
        length = norm(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
    return float(np.mean(norms)) * mean


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", [(1,), (17,), (6, 5), (4, 3, 3, 2), (300, 70)], ids=str)
def test_karcher(shape: tuple[int, ...], count: int) -> None:
    tensors = [(k + 1) * tensor for k, tensor in enumerate(randoms(shape, count))]
    for max_iter, tol in ((10, 1e-5), (0, 1e-5), (1, 1e-5), (100, 1e-9)):
        found = KARCHER(None, tensors, max_iter=max_iter, tol=tol)
        close(found, karcher_oracle(doubles(tensors), max_iter, tol), 2e-6)


def test_karcher_has_no_pull_left_at_its_mean() -> None:
    tensors = [tensor.double() for tensor in randoms((400,), 4)]
    tensors = [tensor + 2 * tensors[0] for tensor in tensors]
    found = KARCHER(None, tensors, max_iter=100, tol=1e-12)
    assert float(found.norm()) == pytest.approx(np.mean([float(t.norm()) for t in tensors]))
    mean, pull = found / found.norm(), torch.zeros(400, dtype=torch.float64)
    for tensor in tensors:
        unit = tensor / tensor.norm()
        angle = torch.acos(mean @ unit)
        pull += angle / angle.sin() * (unit - (mean @ unit) * mean)
    assert float(pull.norm()) < 1e-10


def test_karcher_of_two_of_one_length_is_half_way_along_the_arc() -> None:
    one, two = at_angle(2.0)
    close(KARCHER(None, [one, two]), SLERP(one, [two], t=0.5).numpy())


def test_karcher_of_zeros_opposites_small_tensors_and_one() -> None:
    (one,) = randoms((20,), 1)
    zeros = torch.zeros(20)
    assert bits(KARCHER(None, [one])) == bits(one)
    assert torch.equal(KARCHER(None, [zeros, zeros]), zeros)
    close(KARCHER(None, [zeros, one]), 0.5 * one.double().numpy())
    close(KARCHER(None, [one, -one]), one.double().numpy())
    close(KARCHER(None, [1e-9 * one, 3e-9 * one]), 2e-9 * one.double().numpy())


# --- all of them ---------------------------------------------------------------------------------

Call = Callable[[Tensor, list[Tensor]], Tensor]
CALLS: list[Call] = [
    lambda base, tensors: SLERP(base, tensors[:1], t=0.3),
    lambda base, tensors: NUSLERP(None, tensors[:2], weight=[0.3, 0.9]),
    lambda base, tensors: NUSLERP(base, tensors[:2]),
    lambda base, tensors: MULTISLERP(None, tensors, weight=[0.1, 0.2, 0.4]),
    lambda base, tensors: MULTISLERP(base, tensors),
    lambda base, tensors: KARCHER(None, tensors),
]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(), (7, 9), (1023,), (70, 1001)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_equal_inputs_keep_their_bits(call: Call, shape: tuple[int, ...], scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        base = (scale * randoms(shape, 1)[0]).to(dtype)
        if base.numel() > 1:
            base.view(-1)[:2] = torch.tensor([-0.0, 0.0])
        assert bits(call(base, [base.clone() for _ in range(3)])) == bits(base)


@pytest.mark.parametrize("call", CALLS)
def test_close_models_are_all_but_averaged(call: Call) -> None:
    """Of fine-tuned models the arcs are short: what the inner products miss must not show."""
    base, *noise = randoms((300, 100), 4)
    tensors = [base + 1e-4 * one for one in noise]
    exact = call(base.double(), [tensor.double() for tensor in tensors])
    close(call(base, tensors), exact.numpy(), 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", CALLS)
def test_numbers_that_are_not_finite_stay_so(call: Call, bad: float) -> None:
    base, *tensors = randoms((30,), 4)
    tensors[0][3] = bad
    assert not call(base, tensors).isfinite().all()
