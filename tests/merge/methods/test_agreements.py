"""The agreement family against float64 oracles written from the papers, and its edge cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.errors import MergeError
from merge.mixing import CHUNK
from merge.part import Part
from merge.registry import METHODS

SHAPES = [(), (1,), (0,), (17,), (3, 5), (0, 4), (2, 3, 2, 2), (40, 50)]
NAMES = ["sce", "magmax", "consensus", "lines", "pcb"]
Case = tuple[Tensor, list[Tensor]]


def case(shape: Sequence[int], models: int = 3, seed: int = 0, scale: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = scale * torch.randn((models, *shape), generator=generator, dtype=torch.float64)
    deltas *= torch.rand((models, *shape), generator=generator) < 0.8  # some stay as they were
    return base, [base + delta for delta in deltas]


def deltas_of(base: Tensor, tensors: Sequence[Tensor]) -> np.ndarray:
    return np.stack([(t - base).numpy().reshape(-1) for t in tensors]).astype(np.float64)


def close(found: Tensor, base: Tensor, delta: np.ndarray, tolerance: float = 1e-10) -> None:
    wanted = base.numpy().astype(np.float64) + delta.reshape(base.shape)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


# --- sce ----------------------------------------------------------------------------------------


def sce_oracle(deltas: np.ndarray, topk: float = 1.0, equal_below: float = 1e-6) -> np.ndarray:
    models, count = deltas.shape
    if topk < 1:
        variance = [sum((x - sum(c) / models) ** 2 for x in c) / models for c in deltas.T]
        varied = [v for v in variance if v > 1e-28]
        kept = sorted(varied, reverse=True)[: int(len(varied) * topk + 1e-9)]
        deltas = np.stack([c * (v in kept) for c, v in zip(deltas.T, variance, strict=True)], 1)
    energy = np.array([np.mean(row**2) for row in deltas])
    total = energy.sum()
    weights = np.ones(models) / models if total < equal_below else energy / total
    result = np.zeros(count)
    for i in range(count):
        sign = 1 if sum(deltas[:, i]) >= 0 else -1
        agree = [k for k in range(models) if np.sign(deltas[k, i]) == sign]
        if agree:
            share = max(sum(weights[k] for k in agree), 1e-6)
            result[i] = sum(weights[k] * deltas[k, i] for k in agree) / share
    return result


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s])
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.29, 0.0])
def test_sce_is_the_papers(shape: tuple[int, ...], topk: float) -> None:
    base, tensors = case(shape)
    found = METHODS["sce"](base, tensors, select_topk=topk)
    close(found, base, sce_oracle(deltas_of(base, tensors), topk))


def test_sce_reaches_over_several_parts() -> None:
    base, tensors = case((2 * CHUNK + 7,), models=2)
    found = METHODS["sce"](base, tensors)
    close(found, base, sce_oracle(deltas_of(base, tensors)))


def test_sce_weighs_small_deltas_alike_unless_told() -> None:
    base, tensors = case((30,), scale=1e-4)
    deltas = deltas_of(base, tensors)
    close(METHODS["sce"](base, tensors), base, sce_oracle(deltas), 1e-14)
    found = METHODS["sce"](base, tensors, equal_below=0)
    close(found, base, sce_oracle(deltas, equal_below=0), 1e-14)
    assert np.abs(sce_oracle(deltas) - sce_oracle(deltas, equal_below=0)).max() > 1e-6


def test_sce_of_equal_variances_takes_the_first() -> None:
    base = torch.zeros(6)
    tensors = [torch.tensor([2.0, 1, 1, 1, 1, 0]), torch.tensor([4.0, 3, 3, 3, 3, 0])]
    found = METHODS["sce"](base, tensors, select_topk=0.4)
    assert (found != 0).tolist() == [True, True, False, False, False, False]


def test_sce_counts_only_elements_in_which_the_models_differ() -> None:
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1: only exact zeros may count as equal.
    tensors = [torch.tensor([0.1, 0.1, x, y]) for x, y in ((1.0, 3.0), (2.0, 1.0), (1.5, 2.0))]
    found = METHODS["sce"](torch.zeros(4), tensors, select_topk=0.5)
    assert (found != 0).tolist() == [False, False, False, True]


def test_sce_ignores_int8_mask() -> None:
    base, tensors = case((9,))
    plain = METHODS["sce"](base, tensors)
    assert torch.equal(plain, METHODS["sce"](base, tensors, int8_mask=True))


# --- magmax -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_magmax_is_the_papers(shape: tuple[int, ...], scale: float) -> None:
    base, tensors = case(shape, models=4)
    wanted = [max(column, key=abs) for column in deltas_of(base, tensors).T]
    found = METHODS["magmax"](base, tensors, lambda_=scale)
    close(found, base, scale * np.array(wanted))


def test_magmax_takes_the_positive_of_equal_magnitudes() -> None:
    base, one = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    for tensors in ([one, -one], [-one, one]):
        assert METHODS["magmax"](base, tensors).tolist() == [1, 2, 0]


# --- consensus ----------------------------------------------------------------------------------


def consensus_oracle(deltas: np.ndarray, mask_lambda: Sequence[float], k: int) -> np.ndarray:
    total = deltas.sum(0)
    result = np.zeros_like(total)
    for i in range(total.size):
        votes = sum(
            abs(row[i]) >= one * abs(total[i] - row[i])
            for row, one in zip(deltas, mask_lambda, strict=True)
        )
        result[i] = total[i] if votes >= k else 0.0
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_consensus_is_the_papers(shape: tuple[int, ...], k: int) -> None:
    base, tensors = case(shape, models=4)
    mask_lambda = [0.2, 0.4, 0.6, 1.3]
    found = METHODS["consensus"](base, tensors, mask_lambda=mask_lambda, k=k, lambda_=0.7)
    close(found, base, 0.7 * consensus_oracle(deltas_of(base, tensors), mask_lambda, k))


def test_consensus_drops_selfish_and_catastrophic_elements() -> None:
    base = torch.zeros(3)
    tensors = [torch.tensor([1.0, 1, 1.0]), torch.tensor([1.0, 0, -0.9])]
    found = METHODS["consensus"](base, tensors, mask_lambda=2.0)
    assert found.tolist() == [0, 0, 0]
    found = METHODS["consensus"](base, tensors)
    assert found.tolist() == pytest.approx([2, 0, 0.1])


def test_consensus_takes_two_models_or_more() -> None:
    with pytest.raises(MergeError, match="at least 2"):
        METHODS["consensus"](torch.zeros(2), [torch.ones(2)])


# --- lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [0.0, 4 / 11, 1.0])
def test_lines_is_the_papers(shape: tuple[int, ...], depth: float) -> None:
    base, tensors = case(shape)
    total = deltas_of(base, tensors).sum(0)
    found = METHODS["lines"](base, tensors, alpha=0.2, beta=0.5, part=Part(depth=depth))
    close(found, base, (0.2 + 0.5 * depth) * total)
    found = METHODS["lines"](base, tensors, part=Part(depth=depth))
    close(found, base, (1 / 3 + 2 / 3 * depth) * total)
    found = METHODS["lines"](base, tensors, alpha=0.3, part=Part(depth=depth))
    close(found, base, (0.3 + 0.7 * depth) * total)


def test_lines_of_one_model_is_that_model_by_default() -> None:
    base, tensors = case((5,), models=1)
    close(METHODS["lines"](base, tensors), base, deltas_of(base, tensors)[0])


# --- pcb ----------------------------------------------------------------------------------------


def pcb_oracle(deltas: np.ndarray, density: float, clamp: float) -> np.ndarray:
    models, count = deltas.shape
    outside = int(count * clamp)
    scales, clamped = np.zeros_like(deltas), np.zeros_like(deltas)
    for k in range(models):
        ranked = np.sort(np.abs(deltas[k]))
        low, high = ranked[outside], ranked[count - 1 - outside]
        magnitudes = np.clip(np.abs(deltas[k]), low, high)
        clamped[k] = np.sign(deltas[k]) * magnitudes
        width = magnitudes.max() - magnitudes.min()
        own = (magnitudes - magnitudes.min()) / width if width else np.zeros(count)
        score = np.exp(models * own**2) * np.tanh(deltas[k] * deltas.sum(0))
        least = np.sort(score)[min(int(count * (1 - density)), count - 1)]
        if score.max() > least:
            scales[k] = (np.maximum(score, least) - least) / (score.max() - least)
        else:
            scales[k] = (score >= least) & (deltas[k] != 0)
    return (clamped * scales).sum(0) / np.maximum(scales.sum(0), 1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s])
@pytest.mark.parametrize(("density", "clamp"), [(0.1, 1e-4), (0.5, 0.0), (1.0, 0.1)])
def test_pcb_is_the_papers(shape: tuple[int, ...], density: float, clamp: float) -> None:
    base, tensors = case(shape)
    found = METHODS["pcb"](base, tensors, density=density, clamp=clamp, lambda_=1.2)
    close(found, base, 1.2 * pcb_oracle(deltas_of(base, tensors), density, clamp))


def test_pcb_keeps_the_density_that_agrees() -> None:
    base, tensors = case((2000,), models=2)
    found = METHODS["pcb"](base, tensors, density=0.1)
    assert 150 <= int((found != base).sum()) <= 400


def test_pcb_of_single_elements_is_their_mean() -> None:
    base = torch.tensor([1.0])
    found = METHODS["pcb"](base, [torch.tensor([3.0]), torch.tensor([2.0])])
    assert found.item() == pytest.approx(2.5)


def test_pcb_does_not_overflow_with_many_models() -> None:
    base, tensors = case((50,), models=100)
    found = METHODS["pcb"](base.float(), [t.float() for t in tensors])
    assert bool(found.isfinite().all())


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_kept_and_the_result_is_fresh(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = case(shape)
    before = [t.clone() for t in (base, *tensors)]
    found = METHODS[name](base, tensors)
    assert (found.shape, found.dtype) == (base.shape, base.dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *tensors), strict=True))
    addresses = {t.data_ptr() for t in (base, *tensors) if t.numel()}
    assert found.data_ptr() not in addresses


@pytest.mark.parametrize("name", NAMES)
def test_views_give_what_their_copies_give(name: str) -> None:
    base, tensors = case((6, 8))
    views = [t.t()[1:] for t in (base, *tensors)]
    copies = [view.contiguous().clone() for view in views]
    found = METHODS[name](views[0], views[1:])
    assert torch.equal(found, METHODS[name](copies[0], copies[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_near_fp64(name: str) -> None:
    base, tensors = case((30, 20))
    small, smalls = base.float(), [t.float() for t in tensors]
    found = METHODS[name](small, smalls)
    assert found.dtype == torch.float32
    wanted = METHODS[name](small.double(), [t.double() for t in smalls])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equal_inputs_give_that_tensor(name: str) -> None:
    base, _ = case((4, 5))
    assert torch.equal(METHODS[name](base, [base.clone(), base.clone(), base.clone()]), base)


@given(st.permutations(range(4)), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_models_does_not_matter(order: list[int], seed: int) -> None:
    base, tensors = case((7, 6), models=4, seed=seed)
    for name in NAMES:
        found = METHODS[name](base, [tensors[k] for k in order])
        torch.testing.assert_close(found, METHODS[name](base, tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["magmax", "consensus", "lines"])
@pytest.mark.parametrize("step", [1, 7, 64])
def test_slices_give_the_bits_of_the_whole(name: str, step: int) -> None:
    base, tensors = case((9, 11))
    whole = METHODS[name](base, tensors).reshape(-1)
    flat, flats = base.reshape(-1), [t.reshape(-1) for t in tensors]
    for start in range(0, flat.numel(), step):
        part = slice(start, start + step)
        assert torch.equal(METHODS[name](flat[part], [t[part] for t in flats]), whole[part])


@pytest.mark.parametrize("topk", [0.1, 0.29, 0.5, 0.9])
def test_sce_selects_what_the_peer_selects(topk: float) -> None:
    peer = pytest.importorskip("mergekit.merge_methods.sce")
    base, tensors = case((100,))
    deltas = torch.stack(tensors) - base
    mask = peer.sce_mask(deltas, topk).bool()
    found = METHODS["sce"](base, tensors, select_topk=topk)
    close(found, base, sce_oracle((deltas * mask).numpy()))


@pytest.mark.parametrize("topk", [1.0, 0.29])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_sce_is_the_peers(topk: float, scale: float) -> None:
    peer = pytest.importorskip("mergekit.merge_methods")
    base, tensors = case((30, 10), scale=scale)
    group = peer.base.TensorGroup.from_tensors([base, *tensors], base_index=0)
    wanted = peer.sce.sce_merge.implementation(group, select_topk=topk)
    found = METHODS["sce"](base, tensors, select_topk=topk)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
