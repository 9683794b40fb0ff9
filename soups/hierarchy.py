"""Differences over several runs: their mean and interval, over zoos, splits and images.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import norm
from scipy.stats import t as student

from soups.errors import SoupError
from soups.statistics import Interval, percentiles


@dataclass(frozen=True)
class PairedRun:
    """right(a) − right(b) on each report image of one run.

    `zoo` and `split` say which draws the run is from, and `seed` which seed learners had; runs with
    the same `images` have the same report images in the same order.
    """

    zoo: str
    split: str
    images: str
    difference: Float64[np.ndarray, " rows"]
    seed: str = ""


def draws(runs: Sequence[PairedRun]) -> list[str]:
    """Which draw each run is of its zoo: its split; where all have the same split, its seed."""
    splits = [run.split for run in runs]
    return splits if len(set(splits)) > 1 else [run.seed for run in runs]


# Of fewer zoos than these nothing is known of others.
FEWEST_ZOOS = 3


def hierarchical_interval(
    runs: Sequence[PairedRun], *, level: float = 0.95, resamples: int = 2000, seed: int
) -> tuple[float, Interval]:
    """The mean difference, over zoos, of their splits, of these runs, and its bootstrap interval.

    Three or more zoos are resampled, whole; of fewer, the splits, whole, and the interval speaks
    of these zoos alone. Resampling whole ones repeats all that varies inside them (Davison &
    Hinkley 1997, section 3.8). A split of one name is one draw for all zoos: where all zoos have
    the same splits, each is resampled with its runs of all zoos, and beside three or more zoos
    too, independently of them (0712.1111; what a split does to one zoo alone then counts twice).
    Else splits are resampled within each zoo. Since they are few, their deviations are widened by
    √(m/(m−1)) · t(m−1)/z, as Student's interval is (1411.5279). What all share is the images:
    these are resampled too, for all runs that have them at once, and their deviations shrunk by the
    variance that zoos and splits have by themselves, so that it counts once. With one split,
    learner seeds take the place of splits; with one seed too, only images are resampled.
    """
    if not runs:
        raise SoupError("hierarchical interval: found no runs; wanted at least one")
    if not 0 < level < 1:
        raise SoupError(f"level is {level}; wanted a number between 0 and 1, such as 0.95")
    zoos = _by_zoo(runs)
    rng = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    by_images: dict[str, Float64[np.ndarray, " rows"]] = {}
    counted: dict[str, float] = {}
    centre = 0.0
    for zoo in zoos:
        centre += float(totals([*zoo.values()]).sum())
        for images, parts in parts_by_images([*zoo.values()]).items():
            by_images[images] = by_images.get(images, np.zeros(1)) + np.sum(parts, axis=0)
    for units in _resampled_units(zoos):
        means = totals(units)
        drawn += _resampled_sums(means - means.mean(), level, resamples, rng)
        for images, parts in parts_by_images(units).items():
            counted[images] = counted.get(images, 0.0) + own_variance(parts, len(units))
    for images, values in by_images.items():
        variance = float(values.var())
        left = max(0.0, variance - counted[images])
        if left > 0:
            # The values are few: drawing how often each comes up is drawing images.
            kinds, counts = np.unique(values.round(12), return_counts=True)
            n = len(values)
            resampled = rng.multinomial(n, counts / n, size=resamples) @ kinds / n
            drawn += (resampled - values.mean()) * np.sqrt(left / variance)
    return centre, percentiles(centre + drawn, level)


# What some runs contribute to a mean of runs: for each set of images, a part for each image.
Unit = dict[str, Float64[np.ndarray, " rows"]]


def _by_zoo(runs: Sequence[PairedRun]) -> list[dict[str, Unit]]:
    """For each zoo, what each of its splits contributes."""
    tree: dict[str, dict[str, list[PairedRun]]] = {}
    for run, draw in zip(runs, draws(runs), strict=True):
        tree.setdefault(run.zoo, {}).setdefault(draw, []).append(run)
    zoos = []
    for splits in tree.values():
        units = {}
        for name, of_split in splits.items():
            weight = 1 / (len(tree) * len(splits) * len(of_split))
            units[name] = weighted_sum([{run.images: run.difference} for run in of_split], weight)
        zoos.append(units)
    return zoos


def _resampled_units(zoos: Sequence[dict[str, Unit]]) -> list[list[Unit]]:
    """Lists of what is resampled among each other: zoos, splits of all zoos, or of each zoo."""
    crossed = all(zoo.keys() == zoos[0].keys() for zoo in zoos)
    by_split = [[weighted_sum([zoo[name] for zoo in zoos]) for name in zoos[0]]] if crossed else []
    if len(zoos) >= FEWEST_ZOOS:
        return [[weighted_sum([*zoo.values()]) for zoo in zoos], *by_split]
    return by_split or [[*zoo.values()] for zoo in zoos]


def totals(units: Sequence[Unit]) -> Float64[np.ndarray, " units"]:
    """What each unit contributes, averaged over its images."""
    return np.array([sum(float(part.mean()) for part in unit.values()) for unit in units])


def parts_by_images(units: Sequence[Unit]) -> dict[str, list[Float64[np.ndarray, " rows"]]]:
    """For each set of images, the parts of the units that have it."""
    return {
        images: [unit[images] for unit in units if images in unit]
        for images in dict.fromkeys(key for unit in units for key in unit)
    }


def weighted_sum(units: Sequence[Unit], weight: float = 1.0) -> Unit:
    """The sum of what the units contribute, times `weight`."""
    found: Unit = {}
    for unit in units:
        for images, values in unit.items():
            found[images] = weight * values + found.get(images, 0.0)
    return found


def own_variance(parts: Sequence[Float64[np.ndarray, " rows"]], units: int) -> float:
    """The variance over images of the parts' sum that the units do not share: resampling them
    has it already. All of it where they do not have the same images; none of a single unit's."""
    if units < 2:
        return 0.0
    if len(parts) < units:
        return float(sum(part.var() for part in parts))
    mean = np.mean(parts, axis=0)
    return float(sum((part - mean).var() for part in parts)) * units / (units - 1)


def _resampled_sums(
    deviations: Float64[np.ndarray, " units"],
    level: float,
    resamples: int,
    rng: np.random.Generator,
) -> Float64[np.ndarray, " resamples"]:
    """Sums of resamples of the deviations, widened since there are few."""
    m = len(deviations)
    if m < 2:
        return np.zeros(resamples)
    tail = (1 + level) / 2
    widened = np.sqrt(m / (m - 1)) * student.ppf(tail, m - 1) / norm.ppf(tail)
    return widened * (rng.multinomial(m, np.full(m, 1 / m), size=resamples) @ deviations)
