"""Searches that sample whole populations of candidates: random soups and CMA-ES."""

from __future__ import annotations

import numpy as np
from tqdm.auto import tqdm

from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.learners.metrics import best_first, described, judged_by
from soups.learners.registry import FINALISTS, CmaEs, Greedy, RandomSearch, Search
from soups.learners.samplers import Evolution, Matrix, Population, RandomSoups
from soups.learners.score_log import ScoreLog, numpy_generator, some_of_select
from soups.learners.selection import greedy_members
from soups.session import Session


def random_search(session: Session, settings: RandomSearch) -> Coefficients:
    """The best of random soups: Dirichlet columns, from sparse to dense, and steps towards such.

    A candidate is a soup s, or `b + t·(s − b)` from the best so far b with t drawn on a log scale.
    From a convex start all of them are convex.
    """
    start = starting_point(session, settings)
    sampler = RandomSoups(start, settings, numpy_generator(session, "soups"))
    return _search(session, settings, start, sampler)


def cmaes(session: Session, settings: CmaEs) -> Coefficients:
    """CMA-ES (1604.00772) over `A = start + Q·x`, with ingredients − 1 numbers x in each group.

    A population is one pass. A candidate outside of `bounds` is moved to the nearest inside, and
    the search learns from where it was scored.
    """
    start = starting_point(session, settings)
    seed = generator(session.seed, f"{session.row}/evolution").initial_seed() % 2**32
    return _search(session, settings, start, Evolution(start, settings, seed))


def starting_point(session: Session, settings: Search) -> Matrix:
    """Equal weights over all ingredients, or over greedy's, in every group."""
    shape = (len(session.zoo.checkpoints), len(session.groups(settings)))
    members = range(shape[0])
    if settings.start == "greedy":
        members = greedy_members(session, Greedy())
    start = np.zeros(shape)
    start[list(members)] = 1 / len(members)
    return start


def best_on_select(
    session: Session, score: ScoreLog, start: Matrix, others: list[Matrix]
) -> Matrix:
    """The best of the start and the others on all of *select*; the start where it is as good."""
    finalists = np.stack([start, *others])
    values = score(finalists)
    best = best_first(values)[0]
    session.record |= {
        "candidates": score.candidates,
        "start": described(values[0]),
        "found": described(values[best]),
    }
    return finalists[best]


def _search(
    session: Session,
    settings: RandomSearch | CmaEs,
    start: Matrix,
    sampler: RandomSoups | Evolution,
) -> Coefficients:
    groups = session.groups(settings)
    score = ScoreLog(session, groups, judged_by(settings.metric))
    winners: list[Matrix] = []
    curve: list[np.ndarray] = []
    generations = -(-settings.evaluations // sampler.population) if len(start) > 1 else 0
    bar = tqdm(range(generations), desc=session.row, unit="pass", disable=not session.progress)
    for number in bar:
        candidates = sampler.ask()
        values = score(candidates, some_of_select(session, settings.images, f"images/{number}"))
        order = best_first(values)
        sampler.tell(candidates, order)
        winners.append(candidates[order[0]])
        curve.append(values[order[0]])
        bar.set_postfix(score=f"{curve[-1][0]:.4f}", refresh=False)
        if isinstance(settings, CmaEs) and _spread(candidates) < settings.tolerance:
            break
    session.record["curve"] = [described(values) for values in curve]
    finalists = winners[-FINALISTS:]
    if finalists and (settings.images is None or settings.images >= len(session.select)):
        finalists = [winners[best_first(np.stack(curve))[0]]]
    found = best_on_select(session, score, start, [*finalists, sampler.centre()])
    return session.coefficients(groups, found, settings)


def _spread(candidates: Population) -> float:
    """How far apart a coefficient is, at most, within a population."""
    return float(np.ptp(candidates, axis=0).max())
