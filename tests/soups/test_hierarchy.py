"""Intervals over several runs: do they cover the truth, and are they what they say?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from soups.errors import SoupError
from soups.hierarchy import PairedRun, hierarchical_interval
from soups.statistics import paired_difference_interval


def simulated_runs(
    rng: np.random.Generator,
    *,
    zoos: int = 1,
    splits: int = 8,
    images: int = 200,
    of_zoos: float = 0.0,
    of_splits: float = 0.0,
    of_images: float = 0.0,
    of_draws: float = 0.0,
    shared: bool = True,
) -> list[PairedRun]:
    """Runs of which the true difference is 0: each image is won or lost with probabilities that
    its zoo, its split (in one zoo, and as one draw for all zoos) and (where it is shared) the image
    itself change."""
    runs = []
    common = of_images * rng.normal(size=images)
    draws = of_draws * rng.normal(size=splits)
    for zoo in range(zoos):
        of_zoo = of_zoos * rng.normal()
        for split in range(splits):
            effect = of_zoo + draws[split] + of_splits * rng.normal()
            own = common if shared else of_images * rng.normal(size=images)
            drawn = rng.random(images)
            won, lost = (np.clip(0.15 + s * (effect + own) / 2, 0, 0.5) for s in (1, -1))
            difference = np.where(drawn < won, 1.0, np.where(drawn > 1 - lost, -1.0, 0.0))
            key = "all" if shared else f"{zoo}/{split}"
            runs.append(PairedRun(str(zoo), str(split), key, difference))
    return runs


@pytest.mark.parametrize(
    "kind",
    [
        # Which level the uncertainty comes from: splits and the images' difficulty, or splits and
        # images of their own.
        {"of_splits": 0.04, "of_images": 0.1},
        {"of_splits": 0.03, "shared": False},
    ],
)
def test_the_hierarchical_interval_covers_the_truth(kind: dict):
    assert 0.93 <= coverage(**kind) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        # From the images alone, and from the splits above all.
        {"splits": 10},
        {"splits": 10, "of_splits": 0.08},
        # A split is one draw for all zoos.
        {"zoos": 2, "splits": 10, "of_draws": 0.06},
        {"zoos": 2, "of_draws": 0.03, "of_images": 0.1},
        {"zoos": 5, "of_draws": 0.06},
        {"zoos": 5, "of_draws": 0.05, "of_images": 0.1},
    ],
)
def test_from_one_source_and_over_zoos_it_covers_too(kind: dict):
    assert 0.93 <= coverage(**kind) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"splits": 5, "of_zoos": 0.05, "of_splits": 0.03},
        {"of_zoos": 0.05, "of_draws": 0.06},
    ],
)
def test_with_zoos_and_splits_it_errs_on_the_safe_side(kind: dict):
    assert 0.95 <= coverage(zoos=5, **kind) <= 0.99


def coverage(**kind) -> float:
    tables, hits = 1000, 0
    for seed in range(tables):
        runs = simulated_runs(np.random.default_rng(seed), **kind)
        _, (low, high) = hierarchical_interval(runs, resamples=500, seed=seed)
        hits += low <= 0 <= high
    return hits / tables


def test_zoos_with_other_splits_are_resampled_by_themselves():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=8)

    def width(names: list[str]) -> float:
        runs = [
            PairedRun(zoo, name, f"{zoo}{k}", np.full(5, effect))
            for zoo, own in (("a", range(8)), ("b", names))
            for k, (name, effect) in enumerate(zip(map(str, own), effects, strict=True))
        ]
        _, (low, high) = hierarchical_interval(runs, seed=0, resamples=20_000)
        return high - low

    # The same draws in both zoos say no more than they do in one.
    crossed, apart = width([*map(str, range(8))]), width([*map(str, range(8, 16))])
    assert apart == pytest.approx(crossed / np.sqrt(2), rel=0.05)


def test_images_that_all_splits_share_are_resampled_together():
    rng = np.random.default_rng(0)
    difference = rng.choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.7, 0.2])
    same = [PairedRun("zoo", str(split), "all", difference) for split in range(10)]
    draws = rng.choice([-1.0, 0.0, 1.0], size=(10, 400), p=[0.1, 0.7, 0.2])
    other = [PairedRun("zoo", str(split), str(split), own) for split, own in enumerate(draws)]
    centre, together = hierarchical_interval(same, seed=0)
    _, apart = hierarchical_interval(other, seed=0)
    assert centre == pytest.approx(difference.mean())
    deviation = difference.std() / 20
    # Ten copies of one set of images say no more than one does.
    assert together.high - together.low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    assert apart.high - apart.low < 0.6 * (together.high - together.low)


def test_the_interval_of_splits_alone_is_student_s():
    """Where images add nothing, it is mean ± t s/√m, up to the shape of the bootstrap."""
    effects = np.random.default_rng(3).normal(size=12)
    runs = [
        PairedRun("zoo", str(split), str(split), np.full(5, effect))
        for split, effect in enumerate(effects)
    ]
    centre, (low, high) = hierarchical_interval(runs, resamples=20_000, seed=0)
    assert centre == pytest.approx(effects.mean())
    expected = stats.t.interval(0.95, 11, effects.mean(), effects.std(ddof=1) / len(effects) ** 0.5)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.07)


def test_zoos_weigh_the_same_and_runs_of_a_split_are_averaged():
    def run(zoo: str, split: str, mean: float) -> PairedRun:
        return PairedRun(zoo, split, f"{zoo}{split}{mean}", np.full(4, mean))

    runs = [run("a", "0", 0.4), run("a", "0", 0.2), run("a", "1", 0.1), run("b", "0", -0.6)]
    centre, _ = hierarchical_interval(runs, seed=0)
    assert centre == pytest.approx(((0.3 + 0.1) / 2 - 0.6) / 2)


def test_an_interval_of_one_split_is_that_of_its_images():
    right = np.random.default_rng(1).random((2, 500)) < [[0.8], [0.75]]
    difference = right[0].astype(float) - right[1]
    _, found = hierarchical_interval([PairedRun("zoo", "0", "all", difference)], seed=0)
    expected = paired_difference_interval(right[0], right[1], seed=1)
    assert found == pytest.approx(expected, abs=0.01)
    with pytest.raises(SoupError, match="found no runs"):
        hierarchical_interval([], seed=0)
    with pytest.raises(SoupError, match="level is 2"):
        hierarchical_interval([PairedRun("zoo", "0", "all", difference)], level=2.0, seed=0)
