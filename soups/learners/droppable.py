"""Which ingredients a soup can do without: by the quadratic model of its loss, then checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy.stats import chi2
from torch.nn import functional as F

from soups.learners.plane import Plane
from soups.learners.trials import Gain, logits_of
from soups.norms import Groups
from soups.session import Session
from soups.statistics import fit_temperature

LEVEL = 0.95


def droppable(
    session: Session,
    groups: Groups,
    plane: Plane,
    theta: Float64[np.ndarray, " numbers"],
    covariance: Float64[np.ndarray, "numbers numbers"],
) -> dict[str, Any]:
    """Ingredients that may have no weight, all of them together, without loss on *select*.

    They are found one by one: the next is that without which the penalised loss rises least, in
    the quadratic model at its minimum, as long as what all rise together is within the 95% region
    (half a χ² quantile). Then the soup without them is run: the last is taken back until its loss
    is higher by no more than one paired standard error.
    """
    found: list[int] = []
    while len(found) < plane.ingredients - 1:
        others = [k for k in range(plane.ingredients) if k not in found]
        rise, best = min((_without(plane, theta, covariance, [*found, k])[0], k) for k in others)
        freedom = (len(found) + 1) * min(plane.shape.numbers, plane.start.shape[1])
        if rise > 0.5 * chi2.ppf(LEVEL, freedom):
            break
        found.append(best)
    whole = _losses(session, groups, plane.soup(theta)) if found else np.zeros(1)
    while found:
        _, moved = _without(plane, theta, covariance, found)
        soup = plane.soup(moved)
        soup[found] = 0
        rise = Gain.of(_losses(session, groups, soup / soup.sum(axis=0)) - whole)
        if rise.mean <= rise.standard_error:
            names = [session.zoo.names[k] for k in found]
            return {
                "ingredients": names,
                "loss_change": rise.mean,
                "standard_error": rise.standard_error,
            }
        found.pop()
    return {"ingredients": [], "loss_change": 0.0, "standard_error": 0.0}


def _without(
    plane: Plane,
    theta: Float64[np.ndarray, " numbers"],
    covariance: Float64[np.ndarray, "numbers numbers"],
    dropped: list[int],
) -> tuple[float, Float64[np.ndarray, " numbers"]]:
    """How much the penalised loss rises where these have no weight, and the numbers there."""
    linear = np.kron(plane.without_mean[dropped], np.eye(plane.shape.numbers))
    wanted = np.zeros((len(dropped), plane.shape.numbers))
    wanted[:, 0] = -plane.start[dropped].mean(axis=1)
    away = linear @ theta - wanted.flatten()
    spread = np.linalg.pinv(linear @ covariance @ linear.T, hermitian=True)
    moved = theta - covariance @ linear.T @ spread @ away
    return float(0.5 * away @ spread @ away), moved


def _losses(
    session: Session, groups: Groups, soup: Float64[np.ndarray, "ingredients groups"]
) -> Float64[np.ndarray, " rows"]:
    """The cross-entropy of each image of *select* at the best temperature, in nats."""
    labels = session.select.labels
    logits = logits_of(session, groups, soup, session.select).double()
    scaled = fit_temperature(logits, labels) * logits
    return F.cross_entropy(torch.as_tensor(scaled), labels, reduction="none").numpy()
