"""What a search makes large on *select*: metrics of candidates, with or without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int
from torch import Tensor

from inputs.data import ImageSet
from soups.evaluate import Scores
from soups.learners.registry import Metric

Summary = Callable[[Scores, ImageSet], Float64[np.ndarray, "candidates values"]]
Measure = Callable[[Scores, Int[Tensor, " rows"]], Float64[np.ndarray, " candidates"]]


def accuracy(scores: Scores, labels: Int[Tensor, " rows"]) -> Float64[np.ndarray, " candidates"]:
    """The share of images that are right."""
    return scores.accuracies


def negative_loss(
    scores: Scores, labels: Int[Tensor, " rows"]
) -> Float64[np.ndarray, " candidates"]:
    """Minus the mean cross-entropy in nats."""
    return -scores.mean_losses


def worst_class(scores: Scores, labels: Int[Tensor, " rows"]) -> Float64[np.ndarray, " candidates"]:
    """The accuracy on the class that has the lowest, of the classes that are there."""
    own = [scores.right[:, labels == c].double().mean(1).numpy() for c in labels.unique()]
    return np.min(own, axis=0)


METRICS: dict[Metric, Measure] = {
    "accuracy": accuracy,
    "loss": negative_loss,
    "worst_class": worst_class,
}


def judged_by(metric: Metric) -> Summary:
    """What a search is told of a candidate: the metric, minus the loss, the accuracy.

    What is not a number counts as the worst.
    """

    def summary(scores: Scores, images: ImageSet) -> Float64[np.ndarray, "candidates 3"]:
        values = METRICS[metric](scores, images.labels), -scores.mean_losses, scores.accuracies
        return np.nan_to_num(np.stack(values, axis=1), nan=-np.inf, neginf=-np.inf)

    return summary


def best_first(values: Float64[np.ndarray, "candidates values"]) -> list[int]:
    """Candidates by their first value, the largest first; ties by the second, then by place."""
    return np.lexsort((-values[:, 1], -values[:, 0])).tolist()


def described(values: Float64[np.ndarray, " values"]) -> dict[str, float]:
    """One row of `judged_by` for the run record; `score` is the metric, larger is better."""
    score, negative_loss, accuracy = values.tolist()
    return {"score": score, "loss": -negative_loss, "accuracy": accuracy}
