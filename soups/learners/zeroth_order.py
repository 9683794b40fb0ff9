"""Descent without gradients: two-point differences along random directions."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from tqdm.auto import tqdm

from merge.coefficients import Coefficients
from soups.learners.descent import warmup_cosine
from soups.learners.hyperplane import Hyperplane
from soups.learners.metrics import described, judged_by
from soups.learners.registry import ZerothOrder
from soups.learners.score_log import ScoreLog, numpy_generator, some_of_select
from soups.learners.search import best_on_select, starting_point
from soups.session import Session

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def zeroth_order(session: Session, settings: ZerothOrder) -> Coefficients:
    """`∇ ≈ mean_d u_d·(f(A + h·u_d) − f(A − h·u_d)) / 2h`, f the metric (MeZO, 2305.17333).

    A moves on the hyperplane, in x of `A = start + Q·x`; the u_d of a step are orthogonal with
    `E[u·uᵀ] = 1` (1804.02395), so that as many as there are dimensions give the difference
    quotient's whole gradient. All candidates of a step see the same images and are one pass.
    """
    groups = session.groups(settings)
    plane = Hyperplane(starting_point(session, settings), settings.bounds)
    score = ScoreLog(session, groups, judged_by(settings.metric))
    point = torch.zeros(plane.dimensions, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS[settings.optimizer]([point], lr=settings.lr)
    schedule = warmup_cosine(optimizer, settings.steps, warmup=0.0)
    reach = settings.epsilon / np.sqrt(max(1, len(plane.start) - 1))
    late = np.zeros(plane.dimensions)
    half = settings.steps // 2
    steps = range(settings.steps if plane.dimensions else 0)
    curve = []
    for step in tqdm(steps, desc=session.row, unit="pass", disable=not session.progress):
        directions = orthogonal_directions(
            numpy_generator(session, f"directions/{step}"), settings.directions, plane.dimensions
        )
        here = point.detach().numpy()
        both = np.concatenate([here + reach * directions, here - reach * directions])
        candidates = plane.candidates(both)
        values = score(candidates, some_of_select(session, settings.images, f"images/{step}"))
        gradient = two_point_gradient(directions, values[:, 0], reach)
        point.grad = torch.from_numpy(-gradient)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            point.copy_(torch.from_numpy(plane.points(plane.candidates(point.numpy()[None]))[0]))
        curve.append(described(values.mean(axis=0)))
        if step >= half:
            late += point.detach().numpy() / (settings.steps - half)
    session.record["curve"] = curve
    last = plane.candidates(np.stack([late, point.detach().numpy()]))
    found = best_on_select(session, score, plane.start, list(last))
    return session.coefficients(groups, found, settings)


def orthogonal_directions(
    stream: np.random.Generator, count: int, dimensions: int
) -> Float64[np.ndarray, "directions dimensions"]:
    """Random directions of length √dimensions, orthogonal in runs of at most `dimensions`."""
    runs = []
    for begin in range(0, count, dimensions):
        run = min(dimensions, count - begin)
        orthonormal, _ = np.linalg.qr(stream.standard_normal((dimensions, run)))
        runs.append(orthonormal.T * np.sqrt(dimensions))
    return np.concatenate(runs)


def two_point_gradient(
    directions: Float64[np.ndarray, "directions dimensions"],
    scores: Float64[np.ndarray, " candidates"],
    reach: float,
) -> Float64[np.ndarray, " dimensions"]:
    """The mean estimate; `scores` are those of `+reach·u` for all directions, then of `−reach·u`.

    A direction in which a score is not finite says nothing.
    """
    ahead, behind = np.split(scores, 2)
    known = np.isfinite(ahead) & np.isfinite(behind)
    difference = np.where(known, ahead, 0.0) - np.where(known, behind, 0.0)
    return difference @ directions / (2 * reach * len(directions))
