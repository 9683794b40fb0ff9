"""What stays of a delta: the selection against a full sort, the random ones in their moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.measuring import Measure
from merge.methods.selection import SORTED, Cut, Kept, Selection, Sort, kept_count
from merge.methods.sparsify import (
    band,
    drop,
    drop_by_rank,
    measure_band,
    measure_drops,
    measure_largest,
    measure_ranked_drops,
)
from merge.part import Part

LARGE = SORTED + 4321


def numbers(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "tiny": normal * 1e-41,  # less than the smallest normal number of fp32
        "wide": normal * torch.exp(20 * torch.randn(count, generator=generator)),
        "coarse": (normal * 4).round() / 4,
        "mostly zero": normal * (torch.rand(count, generator=generator) < 0.1),
        "equal": torch.full((count,), -0.5),
        "float64": normal.double(),
    }[kind]


KINDS = ["normal", "tiny", "wide", "coarse", "mostly zero", "equal", "float64"]


def measured(measure: Measure, delta: Tensor) -> Any:
    """What is measured of a delta that is shown whole."""
    for see in measure.passes:
        see(0, torch.zeros_like(delta), delta)
    return measure.result()


def cuts_of(selection: Selection | Sort, slices: Sequence[Tensor]) -> tuple[Cut, ...]:
    for look in selection.passes:
        start = 0
        for part in slices:
            look(start, part)
            start += part.numel()
    return selection.cuts()


def top(values: np.ndarray, k: int) -> np.ndarray:
    """Which elements are the k largest magnitudes, the first of equal ones."""
    order = np.lexsort((np.arange(values.size), -values))
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:k]] = True
    return mask


def magnitudes(values: Tensor) -> np.ndarray:
    return np.abs(values.float().numpy()).reshape(-1)


@pytest.mark.parametrize("select", [Selection, Sort])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 50, LARGE])
def test_the_largest_are_those_of_a_sort(
    select: type[Selection | Sort], kind: str, count: int
) -> None:
    values = numbers(kind, count).float()
    counts = sorted({0, 1, count // 100, count // 3, count - 1, count})
    cuts = cuts_of(select(counts), values.split(777))
    for k, cut in zip(counts, cuts, strict=True):
        wanted = values.numpy() * top(magnitudes(values), k)
        assert np.array_equal(cut.keep(values, 0).numpy(), wanted)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    share=st.floats(0, 1),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    all_equal=st.booleans(),
)
def test_any_slices_select_the_same(
    values: list[float], share: float, cuts: list[int], all_equal: bool
) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    counts = (round(share * len(values)),)
    slices = torch.tensor_split(whole, sorted(cuts))
    found = [cuts_of(select(counts, all_equal=all_equal), slices) for select in (Selection, Sort)]
    assert found[0] == found[1] == cuts_of(Sort(counts, all_equal=all_equal), [whole])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 1e-6, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5), (4, 3, 2, 2), (LARGE,)])
def test_exactly_so_many_of_the_largest_stay(
    kind: str, density: float, shape: tuple[int, ...]
) -> None:
    delta = numbers(kind, math.prod(shape)).view(shape)
    kept = measured(measure_largest(numel=delta.numel(), density=density, rescale=False), delta)
    k = kept_count(density, delta.numel())
    wanted = delta.numpy().reshape(-1) * top(magnitudes(delta), k)
    assert np.array_equal(kept.keep(delta, 0).numpy().reshape(-1), wanted)
    assert kept.scale == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.8, 0.5), (0.001, 0.0), (0.4, 1.0)])
@pytest.mark.parametrize("count", [1, 9, LARGE])
def test_a_band_is_left_of_the_sorted_magnitudes(
    kind: str, density: float, gamma: float, count: int
) -> None:
    delta = numbers(kind, count)
    measure = measure_band(numel=count, density=density, gamma=gamma, rescale=True)
    kept = measured(measure, delta)
    stays = max(1, int(density * count))
    outliers = min(int(gamma * count), count - stays)
    mask = top(magnitudes(delta), stays + outliers) & ~top(magnitudes(delta), outliers)
    assert mask.sum() == stays
    wanted = delta.numpy() * mask
    assert np.array_equal(kept.keep(delta, 0).numpy(), wanted)
    before = np.abs(delta.double().numpy()).sum()
    after = np.abs(wanted.astype(np.float64)).sum()
    factor = before / after if before > 1e-7 and after > 1e-7 else 1.0
    assert kept.scale == pytest.approx(float(factor), rel=2e-6)


def test_of_a_band_at_least_one_element_stays_unless_the_density_is_zero() -> None:
    assert band(0.5, 0.01, 1) == (1, 0)
    assert band(0.1, 0.5, 3) == (2, 1)
    assert band(0.0, 0.5, 4) == (2, 2)
    assert band(0.5, 0.5, 0) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1], [5, 6], [20, 77, 78, 199], list(range(1, 200))])
def test_slices_keep_what_the_whole_keeps(kind: str, cuts: Sequence[int]) -> None:
    delta = numbers(kind, 200)
    kept = measured(measure_band(numel=200, density=0.4, gamma=0.2, rescale=False), delta)
    starts = [0, *cuts]
    slices = [
        kept.keep(part, start)
        for part, start in zip(torch.tensor_split(delta, list(cuts)), starts, strict=True)
    ]
    assert torch.equal(torch.cat(slices), kept.keep(delta, 0))


def test_the_place_where_equals_end_counts_from_the_start_of_the_tensor() -> None:
    delta = torch.tensor([1.0, -1.0, 2.0, 1.0])
    assert Cut(1.0, until=12).keep(delta, 10).tolist() == [1, -1, 2, 0]
    assert Cut(1.0, until=10).keep(delta, 10).tolist() == [0, 0, 2, 0]
    assert Cut(1.0, until=99).keep(delta, 10).tolist() == [1, -1, 2, 1]
    assert Kept(Cut(1.0), Cut(2.0)).keep(delta, 0).tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_kept_for_the_engine_to_find(bad: float) -> None:
    delta = torch.linspace(-1, 1, 40)
    delta[7] = bad
    kept = measured(measure_largest(numel=40, density=0.2, rescale=False), delta)
    assert not bool(kept.keep(delta, 0).isfinite().all())


# --- over all of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_model_has_one_threshold(density: float, scale: float) -> None:
    deltas = [
        numbers("normal", LARGE) * scale,
        3 * numbers("normal", 60).view(5, 4, 3),
        torch.tensor(-0.25),
        torch.zeros(0, 3),
        numbers("coarse", 500),
    ]
    every = np.concatenate([magnitudes(delta) for delta in deltas])
    measure = measure_largest(numel=every.size, density=density, rescale=True, scope="model")
    for see in measure.passes:
        for delta in deltas:
            see(0, torch.zeros_like(delta), delta)
    kept = measure.result()

    k = max(1, int(density * every.size)) if density else 0
    threshold = np.sort(every)[-k] if k else math.inf
    for delta in deltas:
        wanted = delta.numpy() * (np.abs(delta.numpy()) >= threshold)
        assert np.array_equal(kept.keep(delta, 3).numpy(), wanted)
    stays = every[every >= threshold].sum(dtype=np.float64)
    wanted = every.sum(dtype=np.float64) / stays if stays else 1.0
    assert kept.scale == pytest.approx(float(wanted), rel=1e-6)


def test_a_model_without_elements_keeps_nothing_and_scales_nothing() -> None:
    measure = measure_largest(numel=0, density=0.5, rescale=True, scope="model")
    assert measured(measure, torch.zeros(0)) == Kept(Cut(math.inf))


# --- by chance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (300,), (20, 30), (200_000,)])
def test_the_norm_of_what_is_dropped_is_that_of_the_mask_of_the_merge(
    shape: tuple[int, ...],
) -> None:
    delta = numbers("normal", math.prod(shape)).view(shape)
    part = Part("x", seed=3, start=0)
    arguments: Any = {"numel": delta.numel(), "rescale": True, "rescale_by": "norm"}
    scale = measured(measure_drops(density=0.3, part=part, model=1, **arguments), delta)
    kept = drop(delta.clone(), 0.3, part, 1).double().abs().sum()
    before = delta.double().abs().sum()
    assert scale == pytest.approx(float(before / kept) if kept > 0 else 1.0, rel=1e-6)


def test_a_share_of_the_elements_is_dropped_independently_of_magnitude() -> None:
    delta = torch.linspace(1, 2, 100_000)
    mask = drop(delta.clone(), 0.3, Part(seed=1), 0) != 0
    noise = math.sqrt(0.3 * 0.7 / 50_000)
    for half in mask.split(50_000):
        assert float(half.double().mean()) == pytest.approx(0.3, abs=5 * noise)
    assert torch.equal(delta[mask], drop(delta.clone(), 0.3, Part(seed=1), 0)[mask])


@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
@pytest.mark.parametrize(("density", "rescale"), [(0.0, True), (1.0, True), (0.4, False)])
def test_there_is_nothing_to_rescale(rescale_by: str, density: float, rescale: bool) -> None:
    chosen = {"density": density, "rescale": rescale, "rescale_by": rescale_by}
    arguments = {**chosen, "numel": 50, "part": Part(), "model": 0}
    for measure in (measure_drops(**arguments), measure_ranked_drops(epsilon=0.1, **arguments)):
        assert measure.passes == ()
        assert measure.result() == 1


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_all_or_nothing_needs_no_pass(density: float, scope: Any) -> None:
    measure = measure_largest(numel=LARGE, density=density, rescale=True, scope=scope)
    assert measure.passes == ()
    assert measure.result() == Kept(Cut(0.0 if density else math.inf))


def test_by_probability_the_factor_is_its_inverse() -> None:
    arguments: Any = {"rescale": True, "rescale_by": "probability"}
    measure = measure_drops(numel=5, density=0.25, part=Part(), model=0, **arguments)
    assert measure.passes == ()
    assert measure.result() == 4


# --- by chance that grows with magnitude ---------------------------------------------------------


def stays(delta: Tensor, density: float, epsilon: float, seed: int) -> Tensor:
    part = Part(seed=seed)
    return drop_by_rank(delta.clone(), density, epsilon, part, 0, by_probability=False) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probability_grows_with_the_rank_in_the_row(dtype: torch.dtype) -> None:
    density, epsilon, trials = 0.4, 0.3, 4000
    row = torch.tensor([0.1, -5.0, 0.2, 3.0, -0.3], dtype=dtype)
    delta = torch.stack([row, 1e-3 * row.flip(0)]).repeat(trials, 1)
    share = stays(delta, density, epsilon, seed=5).double().view(trials, 2, 5).mean(0)
    ranks = np.array([0, 4, 1, 3, 2])
    wanted = density - epsilon + 2 * epsilon * ranks / 4
    noise = 5 * math.sqrt(0.25 / trials)
    np.testing.assert_allclose(share[0].numpy(), wanted, atol=noise)
    np.testing.assert_allclose(share[1].numpy(), wanted[::-1], atol=noise)


def test_of_equal_magnitudes_the_first_ranks_lower() -> None:
    trials = 4000
    share = stays(torch.tensor([[1.0, -1.0, 1.0]]).repeat(trials, 1), 0.5, 0.4, seed=1)
    noise = 5 * math.sqrt(0.25 / trials)
    np.testing.assert_allclose(share.double().mean(0).numpy(), [0.1, 0.5, 0.9], atol=noise)


@pytest.mark.parametrize("shape", [(), (1,), (4000, 1), (4000, 1, 1, 1)])
def test_a_row_of_one_element_stays_with_the_density(shape: tuple[int, ...]) -> None:
    kept = [stays(torch.ones(shape), 0.3, 0.2, seed).double().mean() for seed in range(400)]
    count = 400 * max(1, math.prod(shape))
    assert float(np.mean(kept)) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (300,), (20, 30), (6, 5, 3, 3)])
def test_what_stays_by_rank_has_the_norm_that_was_measured(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    delta = numbers("coarse", math.prod(shape)).view(shape).to(dtype)
    part = Part("x", seed=3)
    arguments: Any = {"numel": delta.numel(), "rescale": True, "rescale_by": "norm"}
    measure = measure_ranked_drops(density=0.4, epsilon=0.2, part=part, model=1, **arguments)
    scale = measured(measure, delta)
    kept = drop_by_rank(delta.clone(), 0.4, 0.2, part, 1, by_probability=False)
    after, before = float(kept.double().abs().sum()), float(delta.double().abs().sum())
    assert scale == pytest.approx(before / after if after and before else 1.0, rel=1e-6)


def test_both_precisions_drop_the_same() -> None:
    delta = numbers("coarse", 6000).view(40, 150)
    assert torch.equal(stays(delta, 0.4, 0.2, 9), stays(delta.double(), 0.4, 0.2, 9))


def test_what_stays_is_divided_by_its_probability() -> None:
    delta = torch.tensor([[3.0, 1.0, -2.0]]).repeat(1000, 1)
    kept = drop_by_rank(delta.clone(), 0.5, 0.25, Part(seed=2), 0, by_probability=True)
    for column, probability in enumerate([0.75, 0.25, 0.5]):
        values = sorted(kept[:, column].unique().tolist(), key=abs)
        assert values == pytest.approx([0, float(delta[0, column]) / probability])


def test_rows_may_come_in_slices() -> None:
    delta = numbers("normal", 600).view(12, 5, 5, 2)
    whole = stays(delta, 0.4, 0.2, seed=1)
    parts = [
        drop_by_rank(
            delta[a:b].clone(), 0.4, 0.2, Part(seed=1, start=50 * a), 0, by_probability=False
        )
        != 0
        for a, b in [(0, 1), (1, 7), (7, 12)]
    ]
    assert torch.equal(torch.cat(parts), whole)
