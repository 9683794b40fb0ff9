"""The components of a difference's variance: by hand, and where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from soups.errors import SoupError
from soups.hierarchy import PairedRun
from soups.variance import spread


def simulated(
    rng: np.random.Generator,
    *,
    zoos: int = 1,
    splits: int = 1,
    seeds: int = 1,
    images: int = 50,
    of_zoos: float = 0.0,
    of_splits: float = 0.0,
    of_draws: float = 0.0,
    of_seeds: float = 0.0,
    shared: float = 0.0,
    own: float = 0.0,
) -> list[PairedRun]:
    """Runs as sums of independent normal effects; an image has one for all runs and one for each.

    A split has an effect on all zoos (`of_draws`) and one in its own zoo (`of_splits`).
    """
    common = shared * rng.normal(size=images)
    draws = of_draws * rng.normal(size=splits)
    runs = []
    for zoo in range(zoos):
        of_zoo = of_zoos * rng.normal()
        for split in range(splits):
            of_split = draws[split] + of_splits * rng.normal()
            for seed in range(seeds):
                mean = of_zoo + of_split + of_seeds * rng.normal()
                difference = mean + common + own * rng.normal(size=images)
                runs.append(PairedRun(str(zoo), str(split), "all", difference, seed=str(seed)))
    return runs


def mean_variances(tables: int = 400, **kind) -> dict[str, float]:
    """The mean over simulated tables of each component's square; None where there is none."""
    found = [spread(simulated(np.random.default_rng(k), **kind)) for k in range(tables)]
    squares: dict[str, float] = {}
    for name in ("zoos", "splits", "seeds", "images"):
        values = [getattr(one, name) for one in found]
        if None not in values:
            squares[name] = float(np.mean(np.square(values)))
    return squares


def test_one_level_by_hand():
    """Of splits with other images each, the variance of their means less that of an image's."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(6, 40)) + rng.normal(size=(6, 1))
    runs = [PairedRun("zoo", str(k), str(k), own) for k, own in enumerate(differences)]
    found = spread(runs)
    of_images = differences.var(axis=1).mean() / 40
    expected = differences.mean(axis=1).var(ddof=1) - of_images
    assert found.splits == pytest.approx(np.sqrt(expected))
    assert found.images == pytest.approx(np.sqrt(of_images))
    assert (found.zoos, found.seeds) == (None, None)


def test_the_nested_table_of_a_textbook():
    """Two-level nested data: Snedecor & Cochran, Statistical Methods, table 10.17.1 (calcium in
    turnip greens): 4 plants, 3 leaves of each, 2 determinations of each leaf. They find
    0.0067 for determinations, 0.1611 for leaves and 0.3652 for plants."""
    calcium = [
        [[3.28, 3.09], [3.52, 3.48], [2.88, 2.80]],
        [[2.46, 2.44], [1.87, 1.92], [2.19, 2.19]],
        [[2.77, 2.66], [3.74, 3.44], [2.55, 2.55]],
        [[3.78, 3.87], [4.07, 4.12], [3.31, 3.31]],
    ]
    runs = [
        # Names of their own: a leaf belongs to one plant.
        PairedRun(str(plant), f"{plant}/{leaf}", f"{plant}/{leaf}/{k}", np.full(3, value), str(k))
        for plant, leaves in enumerate(calcium)
        for leaf, values in enumerate(leaves)
        for k, value in enumerate(values)
    ]
    found = spread(runs)
    variances = [value**2 for value in (found.seeds, found.splits, found.zoos) if value is not None]
    assert variances == pytest.approx([0.0067, 0.1611, 0.3652], abs=5e-5)
    assert found.images == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "kind",
    [
        {"zoos": 4, "splits": 3, "seeds": 2, "of_zoos": 2.0, "of_splits": 1.5, "of_seeds": 1.0},
        {"splits": 6, "seeds": 2, "of_splits": 1.0, "of_seeds": 1.0, "own": 3.0},
        {"splits": 8, "of_splits": 1.0, "shared": 4.0, "own": 3.0},
        {"seeds": 6, "of_seeds": 1.0, "own": 4.0},
        # A split that is one draw for all zoos does not spread them.
        {"zoos": 4, "splits": 3, "of_zoos": 1.5, "of_splits": 0.7, "of_draws": 2.0, "own": 2.0},
    ],
)
def test_known_components_are_found(kind: dict):
    found = mean_variances(**kind)
    wanted = {
        "zoos": kind.get("of_zoos", 0) ** 2,
        "splits": kind.get("of_splits", 0) ** 2 + kind.get("of_draws", 0) ** 2,
        "seeds": kind.get("of_seeds", 0) ** 2,
        "images": (kind.get("shared", 0) ** 2 + kind.get("own", 0) ** 2) / 50,
    }
    counted = {name for name in ("zoos", "splits", "seeds") if kind.get(name, 1) > 1} | {"images"}
    assert found.keys() == counted
    for name in counted:
        # 400 tables know a variance to a few percent; what is below 0 counts as 0.
        assert found[name] == pytest.approx(wanted[name], rel=0.12, abs=0.02), name


def test_runs_that_differ_in_something_else_are_averaged():
    values = np.array([[0.1, 0.3], [0.4, 0.8]])
    runs = [
        PairedRun("zoo", str(split), f"{split}{size}", np.full(4, value))
        for split, of_split in enumerate(values)
        for size, value in enumerate(of_split)
    ]
    assert spread(runs).splits == pytest.approx(values.mean(axis=1).std(ddof=1))


def test_nothing_below_zero_and_no_runs():
    rng = np.random.default_rng(0)
    runs = [PairedRun("zoo", str(k), str(k), rng.normal(size=10_000)) for k in range(3)]
    level = [
        PairedRun(one.zoo, one.split, one.images, one.difference - one.difference.mean())
        for one in runs
    ]
    assert spread(level).splits == 0
    with pytest.raises(SoupError, match="found no runs"):
        spread([])
