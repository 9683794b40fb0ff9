"""Ways to learn a soup, tried out of fold: which one is taken, and whether it beats greedy."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from inputs.data import ImageSet
from inputs.randomness import generator
from soups.candidates import Candidates
from soups.evaluate import Scores
from soups.folds import STREAM, fold_count, split_folds
from soups.learners.score_log import ScoreLog
from soups.learners.selection import mean_of
from soups.norms import Groups
from soups.session import Session
from soups.statistics import fit_temperature

log = logging.getLogger(__name__)

Members = tuple[int, ...]
# How much of each ingredient's weight is free in what needs no descent.
NUMBERS = {"uniform": 0, "greedy": 1}


@dataclass(frozen=True)
class Trial:
    """One way to learn, tried on every fold: its soups, and their logits on what they did not see.

    `soups` are those learned without each fold in turn, with so many free `numbers` for each
    ingredient.
    """

    name: str
    numbers: int
    soups: Float64[np.ndarray, "folds ingredients groups"]
    logits: Float[Tensor, "rows classes"]
    labels: Int[Tensor, " rows"]

    @cached_property
    def right(self) -> Bool[np.ndarray, " rows"]:
        """Whether each image is right, out of fold."""
        return (self.logits.argmax(1) == self.labels).numpy()

    @cached_property
    def temperature(self) -> float:
        """The β > 0 that is best for the logits out of fold."""
        return fit_temperature(self.logits, self.labels)

    @cached_property
    def losses(self) -> Float[np.ndarray, " rows"]:
        """The cross-entropy of β · logits on each image out of fold, in nats."""
        scaled = self.temperature * self.logits.double()
        return F.cross_entropy(scaled, self.labels, reduction="none").numpy()

    def mean_loss(self) -> float:
        """The mean of `losses`."""
        return float(self.losses.mean())

    def described(self) -> dict[str, Any]:
        """The trial in the run record."""
        return {
            "trial": self.name,
            "accuracy": float(self.right.mean()),
            "loss": self.mean_loss(),
            "temperature": self.temperature,
        }


@dataclass(frozen=True)
class Gain:
    """How much better one trial is than another on the same images, and how surely."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, apart: Float[np.ndarray, " rows"]) -> Gain:
        """The mean of paired differences, and its standard error."""
        return cls(float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart))))


class Folds:
    """The folds of *select* that a learner tries itself on: those of all rows, if as many."""

    def __init__(self, session: Session, wanted: int) -> None:
        labels = session.select.labels
        count = fold_count(labels, wanted, where=f"learners.{session.row}.folds")
        stream = generator(session.seed, STREAM)
        self.held_out = split_folds(labels, count, stream)
        everything = torch.arange(len(labels))
        self.learned_on = [everything[~torch.isin(everything, rows)] for rows in self.held_out]

    def __len__(self) -> int:
        return len(self.held_out)


def greedy_on_folds(session: Session, folds: Folds) -> list[Members]:
    """Greedy's members (2203.05482, recipe 1, `ge`) without each fold, then on all of *select*.

    The walks go in step: what they ask for next is scored in one pass over all of *select*, and
    what is known of a soup serves every walk. They are walked once in a run and counted by every
    learner that asks for them.
    """
    session.ingredient_accuracies()  # which counts what measuring them took
    return session.once(f"greedy on {len(folds)} folds", lambda: _walk(session, folds))


def _walk(session: Session, folds: Folds) -> list[Members]:
    count = len(session.zoo.checkpoints)
    singles = session.ingredients.right
    if singles is None:
        singles = session.evaluate_ingredients().right
    elif session.rows is not None:
        singles = singles[:, session.rows]
    groups = session.whole_model()
    score = ScoreLog(session, groups, _right)
    known: dict[Members, Bool[np.ndarray, " rows"]] = {}
    views = [*folds.learned_on, torch.arange(len(session.select))]
    walks = [_greedy_walk(singles.numpy(), known, view.numpy()) for view in views]
    asked = {number: next(walk) for number, walk in enumerate(walks)}
    members: dict[int, Members] = {}
    while asked:
        unknown = sorted(set(asked.values()) - known.keys())
        if unknown:
            soups = np.stack([mean_of(soup, count) for soup in unknown])
            known |= dict(zip(unknown, score(soups).astype(bool), strict=True))
        for number in [*asked]:
            try:
                while asked[number] in known:
                    asked[number] = next(walks[number])
            except StopIteration as end:
                members[number] = end.value
                del asked[number]
    return [members[number] for number in range(len(walks))]


def _greedy_walk(
    singles: Bool[np.ndarray, "ingredients rows"],
    known: dict[Members, Bool[np.ndarray, " rows"]],
    view: Int[np.ndarray, " seen"],
) -> Generator[Members, None, Members]:
    """One greedy selection on some rows; asks for soups until it has its members."""
    accuracies = singles[:, view].mean(axis=1)
    first, *others = sorted(range(len(singles)), key=lambda k: -accuracies[k])
    members, best = (first,), accuracies[first]
    if not others:
        yield members
    for k in others:
        trial = tuple(sorted((*members, k)))
        yield trial
        if (accuracy := known[trial][view].mean()) >= best:
            members, best = trial, accuracy
    return members


def _right(scores: Scores, images: ImageSet) -> Float64[np.ndarray, "candidates rows"]:
    return scores.right.double().numpy()


Starts = dict[str, Float64[np.ndarray, "views ingredients groups"]]


def try_starts(session: Session, groups: Groups, folds: Folds) -> tuple[Starts, list[Trial]]:
    """The soups that are there without descent, for each fold and, last, for all of *select*; and
    how they do out of fold."""
    count = len(session.zoo.checkpoints)
    greedy = greedy_on_folds(session, folds)
    members = {"uniform": [tuple(range(count))] * len(greedy), "greedy": greedy}
    starts, trials = {}, []
    for name, soups in members.items():
        whole = np.stack([mean_of(own, count) for own in soups])
        logits = session.once(
            f"{name} on {len(folds)} folds, out of fold",
            lambda whole=whole: logits_of_folds(session, session.whole_model(), folds, whole[:-1]),
        )
        starts[name] = np.repeat(whole, len(groups), axis=2)
        trials.append(Trial(name, NUMBERS[name], starts[name][:-1], logits, session.select.labels))
    return starts, trials


def logits_of_folds(
    session: Session,
    groups: Groups,
    folds: Folds,
    soups: Float64[np.ndarray, "folds ingredients groups"],
) -> Float[Tensor, "rows classes"]:
    """The logits of each soup on the fold that it has not seen; equal soups are run together."""
    together: dict[bytes, list[int]] = {}
    for fold, soup in enumerate(soups):
        together.setdefault(soup.tobytes(), []).append(fold)
    order, parts = [], []
    for its_folds in together.values():
        rows = torch.cat([folds.held_out[fold] for fold in its_folds])
        order.append(rows)
        images = session.select.subset(rows)
        parts.append(logits_of(session, groups, soups[its_folds[0]], images))
    return torch.cat(parts)[torch.cat(order).argsort()]


def logits_of(
    session: Session,
    groups: Groups,
    soup: Float64[np.ndarray, "ingredients groups"],
    images: ImageSet,
) -> Float[Tensor, "rows classes"]:
    """The logits of one soup."""
    session.examples_forward += len(images)
    candidate = Candidates(soup[None], groups, session.sources, session.norms)
    (chunk,) = session.chunks(candidate, [images])
    return torch.cat([found.cpu() for _, found in chunk.logits(images)], dim=1)[0]
