"""A look before the soup: is there a barrier between each ingredient and the mean of all?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

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
    checkpoints = session.zoo.checkpoints
    probe = session.probe(PROBE_IMAGES)
    groups = session.whole_model()
    everyone = torch.full((len(checkpoints), 1), 1 / len(checkpoints)).double().numpy()
    own = []
    for checkpoint in checkpoints:
        session.load_checkpoint(checkpoint)
        own.append(session.accuracy(probe))
    midpoints = []
    with session.mixture(groups, capacity=1) as mixture:
        mixture.start_at_mean(checkpoints)
        for name, checkpoint, accuracy in tqdm(
            list(zip(session.zoo.names, checkpoints, own, strict=True)),
            desc="midpoints",
            disable=not session.progress,
        ):
            mixture.load_block([checkpoint])
            mixture.apply(torch.full((1, 1), 0.5, device=session.device))
            session.norms.follow(groups, everyone, first_step=True)
            midpoints.append(Midpoint(name, accuracy, session.accuracy(probe)))
    return midpoints
