"""Uniform soups of some of the ingredients, each scored once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from inputs.data import ImageSet
from soups.evaluate import Scores
from soups.session import Session

Coalition = frozenset[int]


class Game:
    """Coalitions of players and their scores; each is run once, however often it is asked for."""

    def __init__(
        self,
        players: int,
        run: Callable[[Sequence[Coalition]], Scores],
        known: Mapping[Coalition, Scores] | None = None,
    ):
        self.players = players
        self.coalitions = {coalition: i for i, coalition in enumerate(known or {})}
        self._run = run
        self._scores = list((known or {}).values())

    def play(self, coalitions: Iterable[Coalition]) -> None:
        """Score those that were not before, in one pass."""
        new = [c for c in dict.fromkeys(coalitions) if c not in self.coalitions]
        if new:
            self._scores.append(self._run(new))
            self.coalitions |= {c: len(self.coalitions) + i for i, c in enumerate(new)}

    @property
    def scores(self) -> Scores:
        """The scores so far, in the order of `coalitions`."""
        return Scores(
            torch.cat([s.right for s in self._scores]), torch.cat([s.losses for s in self._scores])
        )


def run_soups(
    session: Session, coalitions: Sequence[Coalition], images: ImageSet | None = None
) -> Scores:
    """The uniform soups of the coalitions, on *select* or on other images; of nobody the base."""
    candidates = np.zeros((len(coalitions), len(session.zoo.names), 1))
    for candidate, coalition in zip(candidates, coalitions, strict=True):
        candidate[list(coalition)] = 1 / max(len(coalition), 1)
    return session.evaluate(candidates, session.whole_model(), images)
