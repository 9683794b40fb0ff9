"""Curves that runs have kept: the training of the zoo, and what learners say of their search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soups.boards.folders import RunFolder
from soups.curves import CURVES_FILE, read_curves

# So many points of a line are drawn at most.
LONGEST_LINE = 80


@dataclass(frozen=True)
class Line:
    """One line of a picture: x and y of its points."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curves:
    """Lines over one x axis; where `percent`, y is a fraction that is shown in percent."""

    title: str
    x: str
    y: str
    percent: bool
    lines: tuple[Line, ...]


def curves_of(run: RunFolder) -> Iterator[Curves]:
    """The pictures of a run; none of what it has not kept."""
    yield from _training(run)
    for learner, learned in run.record.learners.items():
        curve = learned.record.get("curve", [])
        if _has(curve, "alpha", "select_accuracy") or _has(curve, "loss"):
            yield _search(learner, curve)


def _training(run: RunFolder) -> Iterator[Curves]:
    """Accuracy on *tune* over the epochs, of the run's own ingredients, where the zoo is there."""
    zoo = run.record.config.zoo.path
    if zoo is None:
        return
    table = read_curves(Path(zoo) / CURVES_FILE)
    table = table.loc[
        table["name"].isin([*run.record.checkpoints]) & table["tune_accuracy"].notna()
    ]
    lines = [
        _line(str(name), of_model["trained_epochs"], of_model["tune_accuracy"])
        for name, of_model in table.groupby("name", sort=False)
    ]
    if lines:
        title = "Training of the ingredients"
        yield Curves(title, "epochs", "accuracy on tune, %", True, tuple(lines))


def _has(curve: Any, *keys: str) -> bool:
    """Whether these are points that all have the keys: what a learner notes is its own affair."""
    return (
        isinstance(curve, list)
        and len(curve) > 0
        and all(isinstance(point, dict) and {*keys} <= point.keys() for point in curve)
    )


def _search(learner: str, curve: Sequence[Mapping[str, Any]]) -> Curves:
    """What a learner has tried: points of a line, or the best (or mean) of each pass."""
    if "alpha" in curve[0]:
        line = _line(learner, [p["alpha"] for p in curve], [p["select_accuracy"] for p in curve])
        return Curves(
            f"{learner}: from the base to the soup", "α", "accuracy on select, %", True, (line,)
        )
    line = _line(learner, range(1, len(curve) + 1), [p["loss"] for p in curve])
    return Curves(f"{learner}: its search", "pass", "loss on select, nats", False, (line,))


def _line(name: str, x: Any, y: Any) -> Line:
    points = np.column_stack([x, y]).astype(float)
    points = points[np.isfinite(points).all(axis=1)]
    step = -(-len(points) // LONGEST_LINE) or 1
    return Line(name, tuple((float(a), float(b)) for a, b in points[::step]))
