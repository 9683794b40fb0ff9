"""What a search makes large on *select*: metrics of candidates, with or without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int
from torch import Tensor

from soups.evaluate import Scores
from soups.learners.registry import Metric

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
