"""Learners that only evaluate: best single, uniform, greedy, WiSE-FT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from merge.coefficients import Coefficients
from soups.errors import SoupError
from soups.learners.registry import BestSingle, Greedy, Uniform, WiseFT
from soups.session import Session


def best_single(session: Session, settings: BestSingle) -> Coefficients:
    """All weight on the ingredient with the best accuracy on *select* (the first of equals)."""
    best = int(np.argmax(session.ingredient_accuracies()))
    return _mean_of(session, [best], settings)


def uniform(session: Session, settings: Uniform) -> Coefficients:
    """`A[k] = 1/K` (2203.05482)."""
    return _mean_of(session, range(len(session.zoo.checkpoints)), settings)


def greedy(session: Session, settings: Greedy) -> Coefficients:
    """The mean of the ingredients that greedy selection keeps (2203.05482, recipe 1)."""
    return _mean_of(session, greedy_members(session, settings), settings)


def greedy_members(session: Session, settings: Greedy) -> list[int]:
    """Indices of the kept ingredients. Each is read once; two sets of weights are in memory."""
    accuracies = session.ingredient_accuracies()
    order = sorted(range(len(accuracies)), key=lambda k: -accuracies[k])
    checkpoints = session.zoo.checkpoints
    groups = session.groups(settings)
    members, best = order[:1], accuracies[order[0]]
    with session.mixture(groups, capacity=1) as mixture:
        mixture.start_at_mean([checkpoints[order[0]]])
        for k in tqdm(order[1:], desc=session.row, unit="soup", disable=not session.progress):
            mixture.load_block([checkpoints[k]])
            mixture.apply(torch.full((1, 1), 1 / (len(members) + 1), device=session.device))
            trial = _uniform_over([*members, k], len(order))
            session.norms.follow(groups, trial, first_step=True)
            accuracy = session.accuracy()
            if accuracy > best or (settings.accept == "ge" and accuracy == best):
                members.append(k)
                best = accuracy
                mixture.fold()
    session.record["order"] = [session.zoo.names[k] for k in order]
    return members


def wise_ft(session: Session, settings: WiseFT) -> Coefficients:
    """`(1 − α)·base + α·soup` (2109.01903) with the α that is best on *select*, the larger of
    equals; the whole curve is recorded. Raises SoupError where the base is not known."""
    base = session.zoo.base
    if base is None:
        raise SoupError(
            f"learners.{session.row}: the base is not known, and wise_ft is the line from it to a "
            "soup; name it with zoo.base, or take this row out"
        )
    count = len(session.zoo.checkpoints)
    members: Sequence[int] = range(count)
    if settings.soup == "greedy":
        members = greedy_members(session, Greedy())
    groups = session.groups(settings)
    soup = _uniform_over(members, count)
    curve: list[tuple[float, float]] = []
    with session.mixture(groups, capacity=1) as mixture:
        mixture.start_at_mean([session.zoo.checkpoints[k] for k in members])
        mixture.load_block([base])
        for alpha in tqdm(settings.alphas, desc=session.row, disable=not session.progress):
            mixture.apply(torch.full((1, 1), 1 - alpha, device=session.device))
            session.norms.follow(groups, alpha * soup, first_step=True)
            curve.append((alpha, session.accuracy()))
    session.record["curve"] = [{"alpha": a, "select_accuracy": s} for a, s in curve]
    alpha, _ = max(curve, key=lambda point: (point[1], point[0]))
    return session.coefficients(groups, alpha * soup, settings, with_base=True)


def _mean_of(
    session: Session, members: Sequence[int], settings: BestSingle | Uniform | Greedy
) -> Coefficients:
    matrix = _uniform_over(members, len(session.zoo.checkpoints))
    return session.coefficients(session.groups(settings), matrix, settings)


def _uniform_over(members: Sequence[int], count: int) -> np.ndarray:
    matrix = np.zeros((count, 1))
    matrix[list(members)] = 1 / len(members)
    return matrix
