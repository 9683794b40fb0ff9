"""Where the spread of a difference over several runs comes from: zoos, splits, seeds or images.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from soups.errors import SoupError
from soups.hierarchy import (
    PairedRun,
    Unit,
    own_variance,
    parts_by_images,
    totals,
    weighted_sum,
)


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a difference in accuracy, as fractions.

    `zoos`: from zoo to zoo; `splits`: from split to split in one zoo; `seeds`: from one learner
    seed to another on one split; each without what the levels below it, and the report images,
    add to means over them, and 0 where these explain all. `images`: of one run's difference, from
    one draw of as many report images to another. None where there is only one of a kind.
    """

    zoos: float | None
    splits: float | None
    seeds: float | None
    images: float


def spread(runs: Sequence[PairedRun]) -> Spread:
    """The components of variance by the analysis of variance of nested draws.

    Mean squares are equated with what is expected of them (Searle, Casella & McCulloch 1992, ch. 3
    and 5), where numbers differ with the mean of their inverses. Runs that differ in something else
    than zoo, split and seed are averaged first. Where all zoos have the same splits, a split is one
    draw for all of them, and only what it does to one zoo alone is taken off the zoos' variance.
    Raises SoupError where there are no runs.
    """
    if not runs:
        raise SoupError("spread: found no runs; wanted at least one")
    tree = _tree(runs)
    of_split = [seeds for splits in tree.values() for seeds in splits.values()]
    zoos = [{name: _mean(seeds) for name, seeds in splits.items()} for splits in tree.values()]
    of_seeds = _pooled(of_split)
    # With seeds in it, of which each split's mean has as many as were run.
    with_seeds = _pooled([[*splits.values()] for splits in zoos])
    of_splits = of_zoos = None
    if with_seeds is not None:
        of_splits = with_seeds - _of_mean(of_seeds, [len(seeds) for seeds in of_split])
    if len(zoos) > 1:
        left = _of_mean(_of_zoos_alone(zoos, with_seeds), [len(splits) for splits in zoos])
        of_zoos = _between([_mean([*splits.values()]) for splits in zoos]) - left
    images = np.mean([_of_images(unit) for seeds in of_split for unit in seeds])
    deviations = [_deviation(variance) for variance in (of_zoos, of_splits, of_seeds)]
    return Spread(*deviations, images=float(np.sqrt(images)))


def _tree(runs: Sequence[PairedRun]) -> dict[str, dict[str, list[Unit]]]:
    """Zoo → split → what each learner seed gives."""
    found: dict[str, dict[str, dict[str, list[Unit]]]] = {}
    for run in runs:
        seeds = found.setdefault(run.zoo, {}).setdefault(run.split, {})
        seeds.setdefault(run.seed, []).append({run.images: run.difference})
    return {
        zoo: {split: [_mean(own) for own in seeds.values()] for split, seeds in splits.items()}
        for zoo, splits in found.items()
    }


def _mean(units: Sequence[Unit]) -> Unit:
    return weighted_sum(units, 1 / len(units))


def _of_images(unit: Unit) -> float:
    """The variance of the unit's mean from one draw of its images to another."""
    return float(sum(part.var() / len(part) for part in unit.values()))


def _between(units: Sequence[Unit]) -> float:
    """The variance of two or more units, less what their images add; in expectation, so that it
    may be below 0."""
    from_images = sum(
        own_variance(parts, len(units)) / len(parts[0]) for parts in parts_by_images(units).values()
    )
    return float(totals(units).var(ddof=1)) - from_images / len(units)


def _pooled(families: Sequence[Sequence[Unit]]) -> float | None:
    """The variance in each family, weighted by its degrees of freedom; None if none has two."""
    several = [units for units in families if len(units) > 1]
    if not several:
        return None
    freedom = [len(units) - 1 for units in several]
    return float(np.average([_between(units) for units in several], weights=freedom))


def _of_mean(variance: float | None, counts: Sequence[int]) -> float:
    """The variance of means of so many."""
    return 0.0 if variance is None else variance * float(np.mean([1 / n for n in counts]))


def _of_zoos_alone(zoos: Sequence[Mapping[str, Unit]], splits: float | None) -> float | None:
    """What of the splits' variance is not shared by all zoos."""
    if len(zoos[0]) < 2 or any(zoo.keys() != zoos[0].keys() for zoo in zoos):
        return splits
    shared = {name: _mean([zoo[name] for zoo in zoos]) for name in zoos[0]}
    rest = [
        [weighted_sum([unit, weighted_sum([shared[name]], -1.0)]) for name, unit in zoo.items()]
        for zoo in zoos
    ]
    found = _pooled(rest)
    return None if found is None else found * len(zoos) / (len(zoos) - 1)


def _deviation(variance: float | None) -> float | None:
    return None if variance is None else float(np.sqrt(max(0.0, variance)))
