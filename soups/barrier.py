"""A look before the soup: is there a barrier between each ingredient and the mean of all?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from soups.session import Session

PROBE_IMAGES = 1024
LARGE_DROP = 0.10


@dataclass(frozen=True)
class Midpoint:
    """Accuracies on a few batches of *select*: the ingredient's, and half-way to the mean."""

    name: str
    ingredient: float
    midpoint: float

    @property
    def warning(self) -> str | None:
        """What to say where the midpoint is far below the ingredient."""
        if self.ingredient - self.midpoint <= LARGE_DROP:
            return None
        return (
            f"{self.name}: {self.ingredient:.1%} by itself, but {self.midpoint:.1%} half-way to "
            "the mean of all ingredients: there is a barrier, and a soup of them may not work; "
            "check that it was fine-tuned from the same base, or leave it out"
        )


def probe_midpoints(session: Session) -> list[Midpoint]:
    """Accuracy of each ingredient and of `(w_k + mean)/2`, norm buffers by the run's rule."""
    probe = session.probe(PROBE_IMAGES)
    count = len(session.zoo.checkpoints)
    halfway = (np.eye(count) + 1 / count)[:, :, None] / 2
    own = session.evaluate_ingredients(probe).accuracies
    midpoints = session.evaluate(halfway, session.whole_model(), probe).accuracies
    return [
        Midpoint(*found)
        for found in zip(session.zoo.names, own.tolist(), midpoints.tolist(), strict=True)
    ]
