"""A session whose candidates are scored by a formula: no model, no files but the learner's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from inputs.data import ImageSet
from merge.coefficients import Coefficients, Ingredient
from soups.evaluate import Scores
from soups.session import Session

# Candidates and numbers of images → whether each is right, and its loss, both [candidates, rows].
Formula = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class KilledError(Exception):
    """What a test ends a learner with."""


class Synthetic(Session):
    """Every image is a class of its own, so that its label tells which one it is."""

    def __init__(
        self, formula: Formula, folder: Path, *, ingredients: int, groups: int = 1, images: int = 60
    ):
        names = tuple(f"{k:02d}" for k in range(ingredients))
        rows = torch.arange(images)
        self.zoo = SimpleNamespace(checkpoints=names, names=names)  # type: ignore[assignment]
        self.select = ImageSet("select", tuple(map(str, rows.tolist())), rows, rows, torch.zeros)
        self.seed, self.progress = 0, False
        self.formula, self.count = formula, groups
        self.calls, self.kill_at, self.slow_seconds = 0, -1, 0.0
        self.seen: list[tuple[np.ndarray, int]] = []
        self.begin("row", folder)

    def begin(self, row: str, folder: Path | None) -> None:
        """There is nothing to let go."""
        self.row, self.folder, self.record = row, folder, {}
        self.examples_forward, self.shared_seconds = 0, 0.0

    def skip(self, candidates, groups, images, seconds):
        self.examples_forward += len(candidates) * len(images)
        self.shared_seconds += seconds

    def groups(self, settings):
        return {f"g{g}": (f"t{g}",) for g in range(self.count)}

    def whole_model(self):
        return self.groups(None)

    def evaluate(self, candidates, groups, images=None) -> Scores:
        images = images or self.select
        if self.calls == self.kill_at:
            raise KilledError
        self.calls += 1
        time.sleep(self.slow_seconds)
        self.seen.append((candidates, len(images)))
        self.examples_forward += len(candidates) * len(images)
        right, losses = self.formula(candidates, images.labels.numpy())
        return Scores(torch.from_numpy(right), torch.from_numpy(losses).float())

    def coefficients(self, groups, matrix, settings, *, with_base=False, temperature=1.0):
        return Coefficients(
            tuple(Ingredient(name, name * 32) for name in self.zoo.names), groups, matrix
        )
