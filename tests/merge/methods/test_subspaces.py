"""The subspace family against float64 oracles written from the papers, and its edge cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.errors import MergeError
from merge.part import Part
from merge.registry import METHODS

NAMES = ["iso_c", "iso_cts", "tsv_m", "knots", "wudi"]
MATRICES = [(7, 5), (5, 7), (6, 6), (1, 1), (1, 4), (4, 1), (12, 9)]
OTHERS = [(), (1,), (0,), (6,), (0, 3), (3, 0)]
Case = tuple[Tensor, list[Tensor]]
Array = np.ndarray


def case(shape: Sequence[int], models: int = 3, seed: int = 0, rank: int | None = None) -> Case:
    """A base and models; with `rank` the deltas, as matrices, have that one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = draw(*shape)
    if rank is None:
        return base, [base + draw(*shape) for _ in range(models)]
    rows = shape[0]
    columns = base.numel() // rows
    return base, [
        base + (draw(rows, rank) @ draw(rank, columns)).view_as(base) for _ in range(models)
    ]


def matrices(base: Tensor, tensors: Sequence[Tensor]) -> list[Array]:
    return [(t - base).flatten(1).numpy() for t in tensors]


def close(found: Tensor, base: Tensor, delta: Array, tolerance: float = 1e-9) -> None:
    wanted = base.numpy() + delta.reshape(base.shape)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


def whiten(x: Array) -> Array:
    """`X (XᵀX)^(−1/2)` by an eigendecomposition; zero where XᵀX is."""
    values, vectors = np.linalg.eigh(x.T @ x)
    inverse = np.array([1 / np.sqrt(v) if v > 1e-12 else 0.0 for v in values])
    return x @ (vectors * inverse) @ vectors.T


# --- iso_c --------------------------------------------------------------------------------------


def iso_c_oracle(deltas: list[Array]) -> Array:
    total = np.zeros_like(deltas[0])
    for delta in deltas:
        total = total + delta
    tall = total if total.shape[0] >= total.shape[1] else total.T
    mean = np.sqrt(np.clip(np.linalg.eigvalsh(tall.T @ tall), 0, None)).mean()
    merged = mean * whiten(tall)
    return merged if total.shape[0] >= total.shape[1] else merged.T


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("models", [1, 2, 5])
def test_iso_c_is_the_papers(shape: tuple[int, int], models: int) -> None:
    base, tensors = case(shape, models)
    found = METHODS["iso_c"](base, tensors, lambda_=1.3)
    close(found, base, 1.3 * iso_c_oracle(matrices(base, tensors)))


def test_iso_c_has_one_singular_value() -> None:
    base, tensors = case((8, 5))
    values = np.linalg.svd((METHODS["iso_c"](base, tensors) - base).numpy())[1]
    total = np.linalg.svd(sum(matrices(base, tensors)))[1]
    np.testing.assert_allclose(values, total.mean(), rtol=1e-10)


def test_iso_c_keeps_zero_directions_at_zero() -> None:
    base, tensors = case((7, 5), models=2, rank=1)
    delta = (METHODS["iso_c"](base, tensors) - base).numpy()
    total = np.linalg.svd(sum(matrices(base, tensors)))[1]
    mean = total.sum() / 5
    np.testing.assert_allclose(np.linalg.svd(delta)[1], [mean, mean, 0, 0, 0], atol=1e-10)


# --- iso_cts ------------------------------------------------------------------------------------


def iso_cts_oracle(deltas: list[Array], fraction: float) -> Array:
    full, models = min(deltas[0].shape), len(deltas)
    each = min(round((full - int(full * fraction)) / models), full // models)
    shared = full - each * models
    u, s, vt = np.linalg.svd(np.sum(deltas, axis=0), full_matrices=False)
    left, values, right = [], [], []
    for delta in deltas:
        outside = delta - u[:, :shared] @ u[:, :shared].T @ delta
        own = np.linalg.svd(outside, full_matrices=False)
        left += list(own[0].T[:each])
        values += list(own[1][:each])
        right += list(own[2][:each])
    left += list(u.T[:shared])
    values += list(s[:shared])
    right += list(vt[:shared])
    assert len(values) == full
    return np.mean(values) * whiten(np.array(left).T) @ whiten(np.array(right).T).T


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (7, 5), (5, 7), (1, 4), (1, 1)])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_papers(shape: tuple[int, int], fraction: float) -> None:
    base, tensors = case(shape, 2 if fraction else 3)
    found = METHODS["iso_cts"](base, tensors, common_space_fraction=fraction, lambda_=0.7)
    close(found, base, 0.7 * iso_cts_oracle(matrices(base, tensors), fraction), 1e-7)


def test_iso_cts_with_all_in_common_is_iso_c() -> None:
    base, tensors = case((9, 6))
    found = METHODS["iso_cts"](base, tensors, common_space_fraction=1.0)
    torch.testing.assert_close(found, METHODS["iso_c"](base, tensors), rtol=1e-10, atol=1e-10)


def test_iso_cts_with_nothing_outside_the_common_space() -> None:
    base, tensors = case((10, 10), models=2, rank=1)
    merged = (METHODS["iso_cts"](base, tensors) - base).numpy()
    mean = np.linalg.svd(sum(matrices(base, tensors)))[1].sum() / 10
    wanted = [mean, mean] + 8 * [0.0]
    np.testing.assert_allclose(np.linalg.svd(merged)[1], wanted, atol=1e-9)


# --- tsv_m --------------------------------------------------------------------------------------


def tsv_m_oracle(deltas: list[Array], each: int | None = None) -> Array:
    each = each or max(min(deltas[0].shape) // len(deltas), 1)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.concatenate([u[:, :each] for u, _, _ in parts], 1)
    right = np.concatenate([vt[:each] for _, _, vt in parts], 0)
    values = np.concatenate([s[:each] for _, s, _ in parts])
    return whiten(left) @ np.diag(values) @ whiten(right.T).T


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("models", [1, 2, 3, 8])
def test_tsv_m_is_the_papers(shape: tuple[int, int], models: int) -> None:
    base, tensors = case(shape, models)
    found = METHODS["tsv_m"](base, tensors, lambda_=0.9)
    close(found, base, 0.9 * tsv_m_oracle(matrices(base, tensors)), 1e-7)


def test_tsv_m_of_one_model_is_that_model() -> None:
    base, tensors = case((7, 5), models=1)
    close(METHODS["tsv_m"](base, tensors), base, matrices(base, tensors)[0])


def test_tsv_m_adds_up_deltas_that_do_not_interfere() -> None:
    base, _ = case((6, 6))
    deltas = [torch.zeros_like(base), torch.zeros_like(base)]
    deltas[0][:3, :3], deltas[1][3:, 3:] = base[:3, :3], base[3:, 3:]
    found = METHODS["tsv_m"](base, [base + delta for delta in deltas])
    close(found, base, (deltas[0] + deltas[1]).numpy())


def test_tsv_m_of_equal_deltas_is_the_delta_once() -> None:
    base, (one, *_) = case((6, 8), rank=3)
    found = METHODS["tsv_m"](base, [one, one.clone()])
    close(found, base, matrices(base, [one])[0], 1e-7)


def test_tsv_m_ignores_a_model_that_is_the_base() -> None:
    base, (one, two, _) = case((6, 8), rank=2)
    found = METHODS["tsv_m"](base, [one, two, base.clone()])
    close(found, base, tsv_m_oracle(matrices(base, [one, two]), each=2), 1e-7)


# --- knots --------------------------------------------------------------------------------------


def knots_oracle(
    deltas: list[Array], weights: Sequence[float], densities: Sequence[float]
) -> Array:
    """KnOTS-TIES."""
    u, s, vt = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    keep = s > 1e-5
    parts = np.split(np.diag(s[keep]) @ vt[keep], len(deltas), axis=1)
    for part, density in zip(parts, densities, strict=True):
        count = max(int(part.size * density), 1)
        part[np.abs(part) < np.sort(np.abs(part).ravel())[-count]] = 0
    merged = np.zeros_like(parts[0])
    for place in np.ndindex(*merged.shape):
        values = [w * part[place] for w, part in zip(weights, parts, strict=True)]
        sign = np.sign(sum(values))
        agree = [k for k, value in enumerate(values) if np.sign(value) == sign and sign != 0]
        if agree:
            merged[place] = sum(values[k] for k in agree) / sum(weights[k] for k in agree)
    return u[:, keep] @ merged


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("rank", [None, 2])
def test_knots_is_the_papers(shape: tuple[int, int], rank: int | None) -> None:
    base, tensors = case(shape, rank=rank)
    weights, densities = [1.0, 0.5, 2.0], [0.2, 0.5, 1.0]
    found = METHODS["knots"](base, tensors, weight=weights, density=densities, lambda_=0.6)
    close(found, base, 0.6 * knots_oracle(matrices(base, tensors), weights, densities), 1e-8)


@pytest.mark.parametrize("shape", [*MATRICES, (4, 3, 2, 2), (5,), ()])
def test_linear_knots_is_a_weighted_mean(shape: tuple[int, ...]) -> None:
    base, tensors = case(shape)
    found = METHODS["knots"](base, tensors, merge="linear", weight=[1, 2, 3])
    deltas = [(t - base).numpy() for t in tensors]
    close(found, base, (deltas[0] + 2 * deltas[1] + 3 * deltas[2]) / 6)


@pytest.mark.parametrize(("shape", "merge"), [((4, 3), "linear"), ((5,), "ties"), ((), "linear")])
def test_knots_says_which_weights_sum_to_0(shape: tuple[int, ...], merge: str) -> None:
    base, tensors = case(shape, models=2)
    with pytest.raises(MergeError, match=r"the weights \[1.0, -1.0\] sum to 0"):
        METHODS["knots"](base, tensors, merge=merge, weight=[1, -1])


def test_knots_with_all_coordinates_kept_is_the_mean_of_agreeing_ones() -> None:
    base, (one, *_) = case((5, 7))
    found = METHODS["knots"](base, [one, one.clone()], density=1.0)
    close(found, base, matrices(base, [one])[0])


def test_knots_drops_small_singular_values() -> None:
    base = torch.zeros(3, 3, dtype=torch.float64)
    delta = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))
    found = METHODS["knots"](base, [delta], density=1.0)
    torch.testing.assert_close(found.diag(), torch.tensor([1.0, 1e-3, 0.0]).double())
    assert torch.equal(METHODS["knots"](base, [1e-7 * delta]), base)


@pytest.mark.parametrize("merge", ["dare_linear", "dare_ties"])
def test_knots_draws_by_seed_and_keeps_the_mean(merge: str) -> None:
    base, tensors = case((6, 8), models=2)
    run = METHODS["knots"]
    found = run(base, tensors, merge=merge, density=0.5, part=Part("w", seed=1))
    assert torch.equal(found, run(base, tensors, merge=merge, density=0.5, part=Part("w", seed=1)))
    assert not torch.equal(found, run(base, tensors, merge=merge, density=0.5, part=Part("w")))
    parts = (Part("w", seed=seed) for seed in range(400))
    runs = torch.stack([run(base, tensors, merge=merge, density=0.5, part=p) for p in parts])
    if merge == "dare_linear":
        error = (runs.mean(0) - torch.stack(tensors).mean(0)).abs()
        assert bool((error < 5 * runs.std(0) / 20).all())
    full = run(base, tensors, merge=merge, density=1.0)
    inner = merge.removeprefix("dare_")
    torch.testing.assert_close(full, run(base, tensors, merge=inner, density=1.0))


# --- wudi ---------------------------------------------------------------------------------------


def wudi_oracle(deltas: list[Array], iterations: int, lr: float) -> Array:
    """torch's Adam on the paper's loss."""
    targets = [torch.from_numpy(delta) for delta in deltas]
    merged = torch.nn.Parameter(torch.stack(targets).sum(0))
    optimiser = torch.optim.Adam([merged], lr=lr)
    for _ in range(iterations):
        optimiser.zero_grad()
        losses = [((merged - t) @ t.T).square().sum() / t.square().sum() for t in targets]
        torch.stack(losses).sum().backward()
        optimiser.step()
    return merged.detach().numpy()


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize(("iterations", "lr"), [(0, 1e-5), (300, 1e-5), (50, 1e-2)])
def test_wudi_is_the_papers(shape: tuple[int, int], iterations: int, lr: float) -> None:
    base, tensors = case(shape)
    found = METHODS["wudi"](base, tensors, iterations=iterations, lr=lr)
    close(found, base, wudi_oracle(matrices(base, tensors), iterations, lr), 1e-7)


def test_wudi_default_settings_are_the_papers() -> None:
    base, tensors = case((4, 6))
    close(METHODS["wudi"](base, tensors), base, wudi_oracle(matrices(base, tensors), 300, 1e-5))


def test_wudi_finds_deltas_that_do_not_interfere() -> None:
    base, (one, *_) = case((4, 6))
    deltas = [one.clone(), one.clone()]
    deltas[0][:, 3:], deltas[1][:, :3] = 0, 0
    found = METHODS["wudi"](base, [base + delta for delta in deltas], lr=1e-2)
    close(found, base, one.numpy(), 1e-6)


def test_wudi_ignores_a_model_that_is_the_base() -> None:
    base, (one, two, _) = case((4, 6))
    found = METHODS["wudi"](base, [one, base.clone(), two], lr=1e-3)
    torch.testing.assert_close(found, METHODS["wudi"](base, [one, two], lr=1e-3))


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", OTHERS)
def test_vectors_and_scalars_are_averaged(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = case(shape)
    wanted = torch.stack(tensors).mean(0)
    torch.testing.assert_close(METHODS[name](base, tensors), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "wudi"])
def test_lambda_scales_averages_too(name: str) -> None:
    base, tensors = case((5,))
    wanted = base + 0.5 * (torch.stack(tensors).mean(0) - base)
    torch.testing.assert_close(METHODS[name](base, tensors, lambda_=0.5), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 2, 3), (3, 1, 1, 1)])
def test_convolutions_are_averaged_or_flattened(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = case(shape)
    found = METHODS[name](base, tensors, convolutions="average")
    torch.testing.assert_close(found, torch.stack(tensors).mean(0), rtol=1e-12, atol=1e-12)
    found = METHODS[name](base, tensors, convolutions="matrix")
    flat = METHODS[name](base.flatten(1), [t.flatten(1) for t in tensors])
    torch.testing.assert_close(found, flat.view(shape), rtol=1e-12, atol=1e-12)
    default = METHODS[name](base, tensors)
    kind = "matrix" if name == "knots" else "average"
    assert torch.equal(default, METHODS[name](base, tensors, convolutions=kind))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3,)])
def test_equal_inputs_give_that_tensor(name: str, shape: tuple[int, ...]) -> None:
    base, _ = case(shape)
    assert torch.equal(METHODS[name](base, [base.clone(), base.clone()]), base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 5), (5,), (4, 3, 2, 2)])
def test_inputs_are_kept_and_views_give_the_same(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = case((*shape, 2))
    views = [t[..., 0] for t in (base, *tensors)]
    before = [view.clone() for view in views]
    found = METHODS[name](views[0], views[1:])
    assert (found.shape, found.dtype) == (views[0].shape, views[0].dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, views, strict=True))
    assert torch.equal(found, METHODS[name](before[0], before[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_near_fp64(name: str) -> None:
    base, tensors = case((16, 12), models=2)
    small, smalls = base.float(), [t.float() for t in tensors]
    found = METHODS[name](small, smalls)
    assert found.dtype == torch.float32
    wanted = METHODS[name](small.double(), [t.double() for t in smalls])
    assert float((found.double() - wanted).norm()) < 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("name", NAMES)
def test_rank_deficient_fp32_deltas_stay_finite(name: str) -> None:
    base, tensors = case((16, 12), rank=1)
    same = [t.float() for t in (tensors[0], tensors[0], tensors[1])]
    found = METHODS[name](base.float(), same)
    assert bool(found.isfinite().all())
    assert float((found - base.float()).norm()) < 10 * float((same[0] - base.float()).norm())


@given(st.permutations(range(3)), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_models_does_not_matter(order: list[int], seed: int) -> None:
    base, tensors = case((9, 7), seed=seed)
    for name in (name for name in NAMES if "order" in METHODS[name].laws):
        found = METHODS[name](base, [tensors[k] for k in order])
        torch.testing.assert_close(found, METHODS[name](base, tensors), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    base, tensors = case((4, 5))
    tensors[1][2, 3] = bad
    assert not bool(METHODS[name](base, tensors).isfinite().all())
