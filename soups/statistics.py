"""What a table says about logits and labels, and how sure it can be; imports no torch.

Arrays may be numpy's or torch tensors on the CPU. Everything is computed in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

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


def brier_score(logits: Logits, labels: Labels) -> float:
    """The mean over rows of Σ_c (p_c − [c is the label])², from 0 to 2 (Brier 1950).

    A proper score, like the likelihood, that no single row can make infinite.
    """
    values, classes = _checked(logits, labels)
    errors = softmax(values, axis=1)
    errors[np.arange(len(classes)), classes] -= 1
    return float(np.square(errors).sum(axis=1).mean())


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
    return percentiles(counts / n, level)


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
    wins, losses = wins_and_losses(correct_a, correct_b)
    n = len(correct_a)
    shares = np.array([losses, n - wins - losses, wins]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    return percentiles((counts[:, 2] - counts[:, 0]) / n, level)


def wins_and_losses(correct_a: Correct, correct_b: Correct) -> tuple[int, int]:
    """How many rows only a has right, and how many only b; SoupError for unlike numbers of rows."""
    a, b = _outcomes(correct_a), _outcomes(correct_b)
    if len(a) != len(b):
        raise SoupError(
            f"paired rows: found {len(a)} and {len(b)} outcomes; wanted those of the same rows"
        )
    return int(np.count_nonzero(a & ~b)), int(np.count_nonzero(b & ~a))


def percentiles(values: Float64[np.ndarray, " resamples"], level: float) -> Interval:
    """The interval that holds the middle `level` of what resamples gave."""
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
