"""TensorBoard's event files of a zoo's training; TensorBoard is imported when they are written."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from soups.errors import SoupError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fleet.train import Point

PATTERN = "events.out.tfevents.*"


def require_tensorboard() -> None:
    """SoupError with the command that installs it, where TensorBoard is missing."""
    if find_spec("tensorboard") is None:
        raise SoupError(
            "zoo.finetune.tensorboard: TensorBoard is not installed; "
            "`pip install 'model-soups-toolkit[tensorboard]'`, or set tensorboard: false"
        )


def remove_event_files(folder: Path) -> None:
    """Remove the event files in the folder, and the folders that are empty then."""
    if not folder.is_dir():
        return
    for file in sorted(folder.rglob(PATTERN)):
        file.unlink()
    for place in sorted((place for place in folder.rglob("*") if place.is_dir()), reverse=True):
        if not any(place.iterdir()):
            place.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


class EventFiles:
    """Writes each model's points as a run of its own, its head epochs as `name/head`.

    What a killed run had written after the moment at which it goes on is purged from the picture.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """Nothing: a model's file is opened with its first point."""

    def advance(self, steps: int) -> None:
        """Nothing: points are written."""

    def point(self, point: Point) -> None:
        """Add one point to the model's curves."""
        run = point.name if point.phase == "fit" else f"{point.name}/{point.phase}"
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[run] = SummaryWriter(str(self._folder / run), purge_step=point.step)
        writer = self._writers[run]
        values = {
            "train/loss": point.loss,
            "train/lr": point.lr,
            "train/gradient norm": point.grad_norm,
            "tune/accuracy": point.tune_accuracy,
            "tune/loss": point.tune_loss,
        }
        for tag, value in values.items():
            if value is not None:
                writer.add_scalar(tag, value, point.step)

    def end(self) -> None:
        """Write what is not written yet, and close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
