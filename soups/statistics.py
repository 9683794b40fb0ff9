"""What a table says about logits and labels, and how sure it can be; imports no torch.

Arrays may be numpy's or torch tensors on the CPU. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from scipy.stats import norm
from scipy.stats import t as student

from soups.errors import SoupError

Logits = Float[Any, "rows classes"]
Labels = Int[Any, " rows"]
Correct = Bool[Any, " rows"]

# The temperature is looked for in this range; at its ends sit logits that are always right (the
# loss falls for ever) or that know less than nothing (it rises from the start).
TEMPERATURES = (1e-3, 1e3)


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


def correctness(logits: Logits, labels: Labels) -> Bool[np.ndarray, " rows"]:
    """Whether the largest logit (of equal ones the first) is the label's.

    Raises SoupError for a logit that is not finite, a label that is no class, or no rows.
    """
    values, classes = _checked(logits, labels)
    return values.argmax(axis=1) == classes


def accuracy(correct: Correct) -> float:
    """The fraction of rows that are right."""
    return float(_outcomes(correct).mean())


def worst_class_accuracy(correct: Correct, labels: Labels, classes: int) -> float:
    """The smallest of the classes' own accuracies; classes without a row do not count."""
    right, where = _outcomes(correct), np.asarray(labels)
    if where.shape != right.shape or where.min() < 0 or where.max() >= classes:
        raise SoupError(
            f"worst class: found {right.shape} outcomes and {where.shape} labels from "
            f"{where.min(initial=0)} to {where.max(initial=0)}; wanted one label below {classes} "
            "for each outcome"
        )
    counts = np.bincount(where, minlength=classes)
    hits = np.bincount(where, weights=right, minlength=classes)
    present = counts > 0
    return float((hits[present] / counts[present]).min())


def negative_log_likelihood(logits: Logits, labels: Labels) -> float:
    """The mean over rows of −log softmax(logits)[label], in nats."""
    values, classes = _checked(logits, labels)
    return float((logsumexp(values, axis=1) - _of_label(values, classes)).mean())


def expected_calibration_error(logits: Logits, labels: Labels, bins: int = 15) -> float:
    """Σ_b n_b/n · |accuracy_b − confidence_b| over bins of equal width (1706.04599).

    The confidence is the largest probability; bin b of B holds those in (b/B, (b+1)/B].
    """
    values, classes = _checked(logits, labels)
    confidence = softmax(values, axis=1).max(axis=1)
    right = values.argmax(axis=1) == classes
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(classes))


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """The β > 0 for which β · logits has the least negative log-likelihood (1706.04599).

    β is one over the usual temperature T; the loss is convex in it. It is found between 0.001
    and 1000.
    """
    values, classes = _checked(logits, labels)
    values -= values.max(axis=1, keepdims=True)
    of_label = _of_label(values, classes).mean()

    def loss(log_beta: float) -> float:
        beta = np.exp(log_beta)
        return float(np.log(np.exp(beta * values).sum(axis=1)).mean() - beta * of_label)

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(min((low, high, found.x), key=loss)))


def bootstrap_interval(
    correct: Correct, *, level: float = 0.95, resamples: int = 2000, seed: int
) -> Interval:
    """The percentile bootstrap interval of the accuracy.

    A resample of n rows, of which a fraction p is right, has Binomial(n, p) right ones: these
    counts are drawn, and no rows.
    """
    right = _outcomes(correct)
    n = len(right)
    counts = np.random.default_rng(seed).binomial(n, right.mean(), size=resamples)
    return _percentiles(counts / n, level)


def paired_difference_interval(
    correct_a: Correct,
    correct_b: Correct,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """The percentile bootstrap interval of accuracy(a) − accuracy(b) on the same rows.

    A row counts −1, 0 or +1, so that a resample is one draw of Multinomial(n, shares of the three).
    """
    a, b = _outcomes(correct_a), _outcomes(correct_b)
    if len(a) != len(b):
        raise SoupError(
            f"paired interval: found {len(a)} and {len(b)} outcomes; wanted those of the same rows"
        )
    n = len(a)
    wins, losses = np.count_nonzero(a & ~b), np.count_nonzero(b & ~a)
    shares = np.array([losses, n - wins - losses, wins]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    return _percentiles((counts[:, 2] - counts[:, 0]) / n, level)


def _percentiles(values: Float64[np.ndarray, " resamples"], level: float) -> Interval:
    if not 0 < level < 1:
        raise SoupError(f"level is {level}; wanted a number between 0 and 1, such as 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _outcomes(correct: Any) -> Bool[np.ndarray, " rows"]:
    outcomes = np.asarray(correct)
    if outcomes.dtype != bool or outcomes.ndim != 1 or len(outcomes) == 0:
        raise SoupError(
            f"correctness: found {outcomes.dtype} {list(outcomes.shape)}; wanted one bool for each "
            "of at least one row"
        )
    return outcomes


def _checked(
    logits: Any, labels: Any
) -> tuple[Float64[np.ndarray, "rows classes"], Int[np.ndarray, " rows"]]:
    """A float64 copy of the logits, and the labels."""
    values, classes = np.asarray(logits).astype(np.float64), np.asarray(labels)
    if values.ndim != 2 or classes.shape != values.shape[:1] or values.size == 0:
        raise SoupError(
            f"logits and labels: found {list(values.shape)} and {list(classes.shape)}; wanted "
            "[rows, classes] and [rows], with at least one row"
        )
    if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= values.shape[1]:
        raise SoupError(
            f"labels: found {classes.dtype} from {classes.min()} to {classes.max()}; wanted "
            f"integers from 0 to {values.shape[1] - 1}, one for each column of the logits"
        )
    if bad := np.count_nonzero(~np.isfinite(values)):
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise SoupError(
            f"logits: {bad} of {values.size} are not finite, the first in row {row}; the model's "
            "weights or norm buffers are broken, or its numbers overflow: look at the "
            "coefficients, or lower the learning rate"
        )
    return values, classes


def _of_label(
    values: Float64[np.ndarray, "rows classes"], classes: Int[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    return np.take_along_axis(values, classes[:, None], axis=1)[:, 0]


# --- over several runs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedRun:
    """right(a) − right(b) on each report image of one run.

    `zoo` and `split` say which draws the run is from; runs with the same `images` have the same
    report images in the same order.
    """

    zoo: str
    split: str
    images: str
    difference: Float64[np.ndarray, " rows"]


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
    variance that zoos and splits have by themselves, so that it counts once. With one split, only
    images are resampled.
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
        centre += float(_totals([*zoo.values()]).sum())
        for images, parts in _parts([*zoo.values()]).items():
            by_images[images] = by_images.get(images, np.zeros(1)) + np.sum(parts, axis=0)
    for units in _resampled_units(zoos):
        totals = _totals(units)
        drawn += _resampled_sums(totals - totals.mean(), level, resamples, rng)
        for images, parts in _parts(units).items():
            counted[images] = counted.get(images, 0.0) + _own_variance(parts, len(units))
    for images, values in by_images.items():
        variance = float(values.var())
        left = max(0.0, variance - counted[images])
        if left > 0:
            # The values are few: drawing how often each comes up is drawing images.
            kinds, counts = np.unique(values.round(12), return_counts=True)
            n = len(values)
            means = rng.multinomial(n, counts / n, size=resamples) @ kinds / n
            drawn += (means - values.mean()) * np.sqrt(left / variance)
    return centre, _percentiles(centre + drawn, level)


# That part of the mean over zoos, of splits, of runs, which some runs contribute, for each image.
_Unit = dict[str, Float64[np.ndarray, " rows"]]


def _by_zoo(runs: Sequence[PairedRun]) -> list[dict[str, _Unit]]:
    """For each zoo, what each of its splits contributes."""
    tree: dict[str, dict[str, list[PairedRun]]] = {}
    for run in runs:
        tree.setdefault(run.zoo, {}).setdefault(run.split, []).append(run)
    zoos = []
    for splits in tree.values():
        units = {}
        for name, of_split in splits.items():
            weight = 1 / (len(tree) * len(splits) * len(of_split))
            units[name] = _sums([{run.images: weight * run.difference} for run in of_split])
        zoos.append(units)
    return zoos


def _resampled_units(zoos: Sequence[dict[str, _Unit]]) -> list[list[_Unit]]:
    """Lists of what is resampled among each other: zoos, splits of all zoos, or of each zoo."""
    crossed = all(zoo.keys() == zoos[0].keys() for zoo in zoos)
    by_split = [[_sums([zoo[name] for zoo in zoos]) for name in zoos[0]]] if crossed else []
    if len(zoos) >= FEWEST_ZOOS:
        return [[_sums([*zoo.values()]) for zoo in zoos], *by_split]
    return by_split or [[*zoo.values()] for zoo in zoos]


def _totals(units: Sequence[_Unit]) -> Float64[np.ndarray, " units"]:
    return np.array([sum(float(part.mean()) for part in unit.values()) for unit in units])


def _parts(units: Sequence[_Unit]) -> dict[str, list[Float64[np.ndarray, " rows"]]]:
    """For each set of images, the parts of the units that have it."""
    return {
        images: [unit[images] for unit in units if images in unit]
        for images in dict.fromkeys(key for unit in units for key in unit)
    }


def _sums(parts: Sequence[_Unit]) -> _Unit:
    found: _Unit = {}
    for part in parts:
        for images, values in part.items():
            found[images] = found[images] + values if images in found else values
    return found


def _own_variance(parts: Sequence[Float64[np.ndarray, " rows"]], units: int) -> float:
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
