"""Which models stop early: patience for one model, successive halving across models.

Scores are accuracies: higher is better. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from fleet.errors import FleetError
from inputs.config import Settings


class Halving(Settings):
    """Successive halving across models: at epochs first_epochs · factor^r the worst leave."""

    first_epochs: PositiveInt = 1
    """The epoch of the first rung."""
    factor: Annotated[int, Field(ge=2)] = 3
    """Of those judged at a rung so far the best 1/factor go on; rungs are so many times as late,
    one after another."""
    at_once: PositiveInt | None = None
    """How many are trained at a time, the place of one that leaves being given to a new one;
    without it as many as the memory budget allows."""


class Rungs:
    """The scores of all models at each rung, and who stays.

    Asynchronous successive halving in its stopping form (1810.05934): a model is judged when it
    gets to a rung, against those that were there before it, and waits for nobody. It stays if it is
    among the best ⌈judged / factor⌉ of them, itself included; of equal scores the earlier is
    better. So the first to get to a rung always stays.
    """

    def __init__(self, halving: Halving):
        self.halving = halving
        self._scores: dict[int, dict[str, float]] = {}

    def stays(self, name: str, epoch: int, score: float) -> bool:
        """Whether `name` goes on after `epoch` (1, 2, …); keeps the score if a rung is there.

        FleetError for a score that is not a number.
        """
        if not self._is_rung(epoch):
            return True
        _check(score, f"{name}: at epoch {epoch}")
        scores = self._scores.setdefault(epoch, {})
        scores[name] = score
        order = sorted(scores, key=lambda other: -scores[other])
        return order.index(name) < math.ceil(len(order) / self.halving.factor)

    def state(self) -> dict[str, list[list[Any]]]:
        """The scores for a snapshot, as JSON: epoch → [name, score] in the order of judging."""
        return {
            str(epoch): [[name, score] for name, score in scores.items()]
            for epoch, scores in self._scores.items()
        }

    def load(self, state: Mapping[str, list[list[Any]]]) -> None:
        """Go on from what `state()` gave."""
        self._scores = {
            int(epoch): {name: float(score) for name, score in scores}
            for epoch, scores in state.items()
        }

    def _is_rung(self, epoch: int) -> bool:
        rung = self.halving.first_epochs
        while rung < epoch:
            rung *= self.halving.factor
        return rung == epoch


class Patience:
    """Whether one model still gets better: it stops after `patience` epochs without a new best.

    An equal score is not better. With None it never stops.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self._best: float | None = None
        self._worse = 0

    def stays(self, score: float) -> bool:
        """Whether the model goes on after an epoch with this score."""
        _check(score, "patience")
        if self._best is None or score > self._best:
            self._best, self._worse = score, 0
        else:
            self._worse += 1
        return self.patience is None or self._worse < self.patience

    def state(self) -> dict[str, Any]:
        """The counts for a snapshot, as JSON."""
        return {"best": self._best, "worse": self._worse}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self._best, self._worse = state["best"], state["worse"]


def _check(score: float, where: str) -> None:
    if math.isnan(score):
        raise FleetError(f"{where}: the score is not a number; give an accuracy")
