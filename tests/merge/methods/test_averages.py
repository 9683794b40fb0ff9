"""linear, passthrough, nearswap and model_stock against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.errors import MergeError
from merge.methods.averages import normalized, weighted_sum
from merge.mixing import combine
from merge.registry import METHODS

SHAPES = [(), (1,), (0,), (17,), (6, 5), (4, 3, 3, 2)]
LINEAR, STOCK = METHODS["linear"], METHODS["model_stock"]


def randoms(shape: Sequence[int], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def close(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=tolerance * scale)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- sums ----------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    st.sampled_from(SHAPES),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_weighted_sum_is_the_sum_of_its_terms(
    weights: list[float], shape: tuple[int, ...], seed: int
) -> None:
    tensors = randoms(shape, len(weights), seed)
    wanted = np.zeros(shape)
    for weight, tensor in zip(weights, tensors, strict=True):
        wanted = wanted + weight * tensor.double().numpy()
    found = weighted_sum(tensors, weights).double().numpy()
    # Weights may cancel: errors are relative to what is added up.
    terms = [np.abs(tensor.numpy()).max(initial=0) for tensor in tensors]
    largest = (1 + np.abs(weights).sum()) * max(terms)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-7 * largest)


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4], [-0.7, 1.2, 0.9, -0.4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tensors_keep_their_bits(weights: list[float], dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, dtype=dtype)
    tensor[:3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny])
    assert bits(weighted_sum([tensor] * 4, weights)) == bits(tensor)


def test_it_has_the_bits_of_a_cooked_soup() -> None:
    tensors, weights = randoms((1001,), 4), [0.3, 0.1, 0.45, 0.15]
    assert bits(weighted_sum(tensors, weights)) == bits(combine(tensors, np.array(weights)))


def test_a_tensor_of_weight_zero_is_left_out() -> None:
    one, two = randoms((5,), 2)
    for weight in (1.0, -1.0):
        found = weighted_sum([two * torch.inf, one], [0.0, weight])
        assert bits(found) == bits(weight * one)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(shape: tuple[int, ...], normalize: bool) -> None:
    tensors, weights = randoms(shape, 3), [0.5, 2.0, -0.3]
    wanted = sum(a * t.double().numpy() for a, t in zip(weights, tensors, strict=True))
    wanted = np.asarray(wanted) / (2.2 if normalize else 1.0)
    close(LINEAR(None, tensors, weight=weights, normalize=normalize), wanted)


def test_linear_gives_one_model_back_whatever_its_weight() -> None:
    (tensor,) = randoms((50,), 1)
    assert bits(LINEAR(None, [tensor], weight=0.3)) == bits(tensor)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [0.1, 0.2, -0.3]])
def test_weights_that_sum_to_zero_cannot_be_normalized(weights: list[float]) -> None:
    with pytest.raises(MergeError, match=r"sum to 0.*normalize: false"):
        normalized(weights)
    with pytest.raises(MergeError, match="sum to 0"):
        LINEAR(None, randoms((3,), len(weights)), weight=weights)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passthrough(shape: tuple[int, ...]) -> None:
    (tensor,) = randoms(shape, 1)
    method = METHODS["passthrough"]
    assert bits(method(None, [tensor])) == bits(tensor)
    close(method(None, [tensor], scale=-0.3), -0.3 * tensor.double().numpy())


# --- near the base -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 1e3])
def test_nearswap(shape: tuple[int, ...], t: float) -> None:
    base, tensor = randoms(shape, 2)
    old, new = base.double().numpy(), tensor.double().numpy()
    wanted = np.empty(shape)
    for place in np.ndindex(shape):
        share = min(1.0, t / abs(new[place] - old[place]))
        wanted[place] = share * new[place] + (1 - share) * old[place]
    close(METHODS["nearswap"](base, [tensor], t=t), wanted)


def test_nearswap_takes_what_is_near_as_it_is() -> None:
    base, tensor = torch.tensor([1.0, 1.0, -0.0]), torch.tensor([1e-9, 3.0, -0.0])
    found = METHODS["nearswap"](base, [tensor], t=1.0)
    assert found.tolist() == [float(np.float32(1e-9)), 2.0, 0.0]


# --- model stock ---------------------------------------------------------------------------------


def stock_ratio(deltas: Sequence[np.ndarray]) -> float:
    cosines = []
    for one, two in combinations(deltas, 2):
        lengths = np.linalg.norm(one) * np.linalg.norm(two)
        cosines.append((one * two).sum() / lengths if lengths else 0.0)
    cosine, count = float(np.mean(cosines)), len(deltas)
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) > 1e-6 else 0.0


def stock_oracle(base: Tensor, tensors: Sequence[Tensor]) -> np.ndarray:
    start = base.double().numpy()
    deltas = [tensor.double().numpy() - start for tensor in tensors]
    return start + stock_ratio(deltas) * sum(deltas) / len(deltas)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 70)], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(shape: tuple[int, ...], count: int) -> None:
    base, shift, *noise = randoms(shape, count + 2)
    tensors = [base + 0.01 * (shift + one) for one in noise]
    close(STOCK(base, tensors), stock_oracle(base, tensors))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 2)], ids=str)
def test_filter_wise_is_model_stock_of_each_filter(shape: tuple[int, ...], count: int) -> None:
    base, shift, *noise = randoms(shape, count + 2)
    tensors = [base + 0.01 * (shift + one) for one in noise]
    wanted = [stock_oracle(base[k], [t[k] for t in tensors]) for k in range(shape[0])]
    close(STOCK(base, tensors, filter_wise=True), np.stack(wanted))


@pytest.mark.parametrize("shape", [(), (1,), (9,)], ids=str)
def test_a_vector_is_one_filter(shape: tuple[int, ...]) -> None:
    base, shift, *noise = randoms(shape, 5)
    tensors = [base + 0.1 * (shift + one) for one in noise]
    found = STOCK(base, tensors, filter_wise=True)
    close(found, STOCK(base, tensors).double().numpy())


@pytest.mark.parametrize("filter_wise", [False, True])
def test_where_the_denominator_vanishes_the_base_stays(filter_wise: bool) -> None:
    base, delta = randoms((3, 8), 2)
    base, delta = base.mul(8).round(), delta.mul(8).round()
    assert torch.equal(STOCK(base, [base + delta, base - delta], filter_wise=filter_wise), base)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_a_delta_of_zeros_is_at_right_angles(filter_wise: bool) -> None:
    base, one, two = randoms((1, 30), 3)
    close(
        STOCK(base, [one, two, base], filter_wise=filter_wise), stock_oracle(base, [one, two, base])
    )


def test_small_deltas_have_the_angle_of_large_ones() -> None:
    base = torch.zeros(40)
    one, two = randoms((40,), 2)
    tensors = [one + two, one - 0.5 * two]
    small = STOCK(base, [1e-6 * tensor for tensor in tensors])
    close(1e6 * small, stock_oracle(base, tensors))


def test_agreeing_models_are_averaged_and_others_stay_at_the_base() -> None:
    base, one = randoms((64,), 2)
    close(STOCK(base, [base + one, base + 3 * one]), (base + 2 * one).double().numpy())
    first, second = torch.zeros(64), torch.zeros(64)
    first[:32], second[32:] = one[:32], one[32:]
    close(STOCK(torch.zeros(64), [first, second]), np.zeros(64))


# --- all of them ---------------------------------------------------------------------------------

CALLS: list[Callable[[Tensor, list[Tensor]], Tensor]] = [
    lambda base, tensors: LINEAR(None, tensors, weight=[0.2, 0.3]),
    lambda base, tensors: METHODS["passthrough"](None, tensors[:1]),
    lambda base, tensors: METHODS["nearswap"](base, tensors[:1], t=0.3),
    lambda base, tensors: STOCK(base, tensors),
    lambda base, tensors: STOCK(base, tensors, filter_wise=True),
]


@pytest.mark.parametrize("call", CALLS)
def test_equal_inputs_keep_the_sign_of_their_zeros(
    call: Callable[[Tensor, list[Tensor]], Tensor],
) -> None:
    (base,) = randoms((7, 9), 1)
    base[0, :2] = torch.tensor([-0.0, 0.0])
    assert bits(call(base, [base.clone(), base.clone()])) == bits(base)
