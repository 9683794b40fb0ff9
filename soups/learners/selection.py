"""Learners that only evaluate: best single, uniform, greedy, WiSE-FT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64
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
    """Indices of the kept ingredients, in the order in which they were kept.

    The trials that come next if all before them are rejected are evaluated in one pass; those
    behind the first that is kept are dropped, so the members are those of selection one by one.
    """
    accuracies = session.ingredient_accuracies()
    order = sorted(range(len(accuracies)), key=lambda k: -accuracies[k])
    groups = session.groups(settings)
    bar = tqdm(total=len(order) - 1, desc=session.row, unit="soup", disable=not session.progress)
    evaluated = 0

    def score(members: Sequence[int], ahead: Sequence[int]) -> Sequence[float]:
        nonlocal evaluated
        evaluated += len(ahead)
        bar.set_postfix(at_once=len(ahead), refresh=False)
        session.keep(mean_of(members, len(order)))
        soups = np.stack([mean_of([*members, k], len(order)) for k in ahead])
        return session.evaluate(soups, groups).accuracies.tolist()

    with bar:
        first = accuracies[order[0]]
        members = select_greedily(
            order,
            first,
            score,
            settings.accept,
            # On a CPU, trials together take about as long as one after another.
            patience=4 if session.device.type == "cpu" else 2,
            decided=bar.update,
        )
    session.record |= {
        "order": [session.zoo.names[k] for k in order],
        "evaluated": evaluated,
        "evaluated_for_nothing": evaluated - (len(order) - 1),
    }
    return members


def select_greedily(
    order: Sequence[int],
    first: float,
    score: Callable[[Sequence[int], Sequence[int]], Sequence[float]],
    accept: Literal["gt", "ge"],
    *,
    patience: int = 2,
    decided: Callable[[int], object] = lambda trials: None,
) -> list[int]:
    """Greedy selection from `order`, whose first member scores `first`, several trials at once.

    `score` is given the members and the ingredients to try with them, and scores each trial as if
    it were alone. After r rejections in a row, the next trial is kept with a chance of about
    1/(r + 1), so that 1 + r/patience of them are scored together: about one in `patience` of the
    rejected ones is scored for nothing. `decided` is told how many trials were decided.
    """
    members, best = [order[0]], first
    waiting, rejected = list(order[1:]), 0
    while waiting:
        ahead = waiting[: 1 + rejected // patience]
        scores = score(members, ahead)
        kept = next(
            (i for i, s in enumerate(scores) if s > best or (accept == "ge" and s == best)), None
        )
        if kept is None:
            rejected += len(ahead)
            del waiting[: len(ahead)]
            decided(len(ahead))
        else:
            members, best, rejected = [*members, ahead[kept]], scores[kept], 0
            del waiting[: kept + 1]
            decided(kept + 1)
    return members


def wise_ft(session: Session, settings: WiseFT) -> Coefficients:
    """`(1 − α)·base + α·soup` (2109.01903) with the α that is best on *select*, the larger of
    equals; the whole curve is recorded. Raises SoupError where the base is not known."""
    if session.zoo.base is None:
        raise SoupError(
            f"learners.{session.row}: the base is not known, and wise_ft is the line from it to a "
            "soup; name it with zoo.base, or take this row out"
        )
    count = len(session.zoo.checkpoints)
    members: Sequence[int] = range(count)
    if settings.soup == "greedy":
        members = greedy_members(session, Greedy())
    groups = session.groups(settings)
    soup = mean_of(members, count)
    session.keep(soup)
    line = np.stack([alpha * soup for alpha in settings.alphas])
    accuracies = session.evaluate(line, groups).accuracies.tolist()
    curve = list(zip(settings.alphas, accuracies, strict=True))
    session.record["curve"] = [{"alpha": a, "select_accuracy": s} for a, s in curve]
    alpha, _ = max(curve, key=lambda point: (point[1], point[0]))
    return session.coefficients(groups, alpha * soup, settings, with_base=True)


def _mean_of(
    session: Session, members: Sequence[int], settings: BestSingle | Uniform | Greedy
) -> Coefficients:
    matrix = mean_of(members, len(session.zoo.checkpoints))
    return session.coefficients(session.groups(settings), matrix, settings)


def mean_of(members: Sequence[int], count: int) -> Float64[np.ndarray, "ingredients 1"]:
    """The coefficients of the mean of these of `count` ingredients."""
    matrix = np.zeros((count, 1))
    matrix[list(members)] = 1 / len(members)
    return matrix
