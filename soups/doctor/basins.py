"""Which checkpoints share a basin: the loss half-way between two of them, on a few images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float64
from scipy.sparse.csgraph import connected_components

from inputs.command import choose_device
from inputs.data import load_learning_data
from inputs.models import build_model
from soups.config import LearnConfig
from soups.ingredients import open_zoo
from soups.norms import NormBuffers
from soups.reports.tables import NORMAL_95, standard_error
from soups.session import Session

# More pairs than this, and each is only joined with the one that is nearest to all.
MOST_PAIRS = 150
# Two minima are connected if the error between them is at most so much above theirs (1912.05671).
STABLE = 0.02


@dataclass(frozen=True)
class Barrier:
    """Between two checkpoints: the midpoint's loss minus the mean of theirs, in nats.

    `error` is its standard error, paired over the images; `accuracy_lost` how far the midpoint's
    accuracy is below the mean of theirs.
    """

    first: str
    second: str
    loss: float
    error: float
    accuracy_lost: float

    @property
    def stands(self) -> bool:
        """Whether there is a barrier: the loss is higher beyond its 95% interval, and more than 2
        points of accuracy are lost (1912.05671)."""
        return self.loss > NORMAL_95 * self.error and self.accuracy_lost > STABLE


@dataclass(frozen=True)
class Basins:
    """Barriers of pairs, accuracy and loss of each checkpoint, and who shares a basin.

    `groups` are connected by midpoints without a barrier, the largest first.
    """

    images: int
    accuracies: Mapping[str, float]
    losses: Mapping[str, float]
    barriers: tuple[Barrier, ...]
    groups: tuple[tuple[str, ...], ...]


@contextmanager
def open_session(
    config: LearnConfig,
    folder: Path,
    members: Sequence[str],
    base: str | None,
    *,
    root: Path,
    progress: bool,
) -> Iterator[Session]:
    """A session on these files of the folder, with the model, the images and the rules of a config.

    Raises InputError, SoupError, MergeError: what is wrong with the config, or does not fit it.
    """
    device = choose_device(config.device)
    data = load_learning_data(config.data, memory_budget=config.memory_budget)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model, classes=len(data.classes), channels=config.data.channels, root=root
    )
    model = model.to(device).eval()
    own = {"path": folder, "ingredients": [*members], "base": base, "subset": None}
    with TemporaryDirectory() as scratch:
        zoo = open_zoo(
            config.zoo.model_copy(update=own),
            model,
            cache=Path(scratch) / "scans.json",
            memory_budget=config.memory_budget,
            progress=progress,
            seed=config.seed,
        )
    session = Session(
        model=model,
        zoo=zoo,
        select=data.select,
        norms=NormBuffers(model, config.norm_buffers, zoo, data.fit),
        seed=config.seed,
        eval_batch_size=config.eval_batch_size,
        memory_budget=config.memory_budget,
        progress=progress,
    )
    try:
        yield session
    finally:
        session.release()
        for checkpoint in (*zoo.checkpoints, *([zoo.base] if zoo.base else [])):
            checkpoint.close()


def find_basins(session: Session, names: Sequence[str], centre: int, *, images: int) -> Basins:
    """Measure midpoints on the first `images` of *select*, norm buffers by the session's rule.

    All pairs; where these are many, each with the checkpoint `centre`.
    """
    count = len(names)
    pairs = [*combinations(range(count), 2)]
    if len(pairs) > MOST_PAIRS:
        pairs = [(min(k, centre), max(k, centre)) for k in range(count) if k != centre]
    probe = session.probe(images)
    session.begin("doctor", None)
    own = session.evaluate_ingredients(probe)
    halves = np.zeros((len(pairs), count, 1))
    for half, pair in zip(halves, pairs, strict=True):
        half[list(pair)] = 0.5
    between = session.evaluate(halves, session.whole_model(), probe)
    barriers = []
    for (a, b), losses, accuracy in zip(pairs, between.losses, between.accuracies, strict=True):
        apart = losses.double() - (own.losses[a].double() + own.losses[b].double()) / 2
        lost = (own.accuracies[a] + own.accuracies[b]) / 2 - accuracy
        error = float(standard_error(apart[None])[0])
        barriers.append(Barrier(names[a], names[b], float(apart.mean()), error, float(lost)))
    joined = np.zeros((count, count))
    for (a, b), barrier in zip(pairs, barriers, strict=True):
        joined[a, b] = not barrier.stands
    return Basins(
        images=len(probe),
        accuracies=dict(zip(names, own.accuracies.tolist(), strict=True)),
        losses=dict(zip(names, own.mean_losses.tolist(), strict=True)),
        barriers=tuple(barriers),
        groups=_groups(joined, names),
    )


def _groups(
    joined: Float64[np.ndarray, "models models"], names: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    _, labels = connected_components(joined, directed=False)
    groups = [
        tuple(name for name, own in zip(names, labels, strict=True) if own == label)
        for label in dict.fromkeys(labels.tolist())
    ]
    return tuple(sorted(groups, key=len, reverse=True))
