"""Loss and accuracy over straight lines and planes of weight space."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from inputs.figures import save_figure
from soups.evaluate import Scores
from soups.plots.landscape import Curve, Grid, Mark, draw_lines, draw_plane, line_label
from soups.reports.geometry import Frame, distance
from soups.reports.material import Material
from soups.reports.points import BASE, shared_groups
from soups.reports.registry import Line, Plane
from soups.reports.tables import Effects, beside, standard_error, write_csv
from soups.session import Session

log = logging.getLogger(__name__)

JUMPS = (
    "norm_buffers is `uniform`: the statistics are the plain mean over all ingredients that have a "
    "part in the soup, so that the map jumps where one gets or loses it, as at an end that is one "
    "ingredient; with `convex` it bends at most, with `recalibrate` it is of the weights alone"
)


def positions(points: int, margin: float) -> Float64[np.ndarray, " positions"]:
    """`points` positions from 0 to 1, both included, and on with that step up to the margin."""
    steps = points - 1
    further = math.floor(margin * steps + 1e-9)
    return np.arange(-further, steps + further + 1) / steps


def line(material: Material, settings: Line, path: Path) -> list[Path]:
    """Loss and accuracy at `(1 − t)·a + t·b` for all lines, in one pass; a table and a picture."""
    session = material.session
    _warn_of_jumps(session)
    ends = np.stack([material.point(name) for pair in settings.between for name in pair])
    groups, points = shared_groups([*session.numels], ends)
    t = positions(settings.points, settings.margin)
    at = t[:, None, None]
    candidates = (1 - at) * points[0::2, None] + at * points[1::2, None]
    scores = session.evaluate(candidates.reshape(-1, *points.shape[1:]), groups)
    accuracy, loss = _effects(scores)
    curves, rows = [], []
    for number, (first, last) in enumerate(settings.between):
        length = distance(ends[2 * number], ends[2 * number + 1], material.grams)
        of_line = slice(number * len(t), (number + 1) * len(t))
        curve = Curve(
            line_label(first, last, length),
            t,
            Effects(accuracy.values[of_line], accuracy.errors[of_line]),
            Effects(loss.values[of_line], loss.errors[of_line]),
        )
        curves.append(curve)
        rows += [
            {"from": first, "to": last, "position": float(at), "distance": float(at) * length}
            | curve.accuracy.record("accuracy", i)
            | curve.loss.record("loss", i)
            for i, at in enumerate(t)
        ]
    return [
        write_csv(beside(path, ".csv"), rows),
        *save_figure(draw_lines(curves, remark=material.remark), beside(path, ".png")),
    ]


def plane(material: Material, settings: Plane, path: Path) -> list[Path]:
    """Loss and accuracy on a grid over the plane through three points, in one pass.

    Writes the grid and the projections of all that is known as CSV, and a picture. Three points
    on one line have no plane: then a warning is all there is.
    """
    session = material.session
    a, b, c = (material.point(name) for name in settings.through)
    frame = Frame.through(a, b, c, material.grams)
    if frame is None:
        warning = (
            f"{', '.join(settings.through)} are on one line (or two are the same "
            "weights), so that there is no plane and no picture; name another point"
        )
        _warn(session, warning)
        return []
    _warn_of_jumps(session)
    marks = list(_marks(material, settings, frame))
    x, y = (
        _spread([getattr(mark, axis) for mark in marks[:3]], settings.margin, settings.resolution)
        for axis in "xy"
    )
    groups, (origin, right, up) = shared_groups(
        [*session.numels], np.stack([frame.origin, frame.right, frame.up])
    )
    candidates = origin + y[:, None, None, None] * up + x[:, None, None] * right
    scores = session.evaluate(candidates.reshape(-1, *origin.shape), groups)
    accuracy, loss = _effects(scores)
    shape = (len(y), len(x))
    grid = Grid(x, y, accuracy.values.reshape(shape), loss.values.reshape(shape))
    rows = [
        {"x": float(at_x), "y": float(at_y)}
        | accuracy.record("accuracy", i)
        | loss.record("loss", i)
        for i, (at_y, at_x) in enumerate((v, u) for v in y for u in x)
    ]
    return [
        write_csv(beside(path, ".csv"), rows),
        write_csv(beside(path, "_points.csv"), [vars(mark) for mark in marks]),
        *save_figure(draw_plane(grid, marks, remark=material.remark), beside(path, ".png")),
    ]


def _warn_of_jumps(session: Session) -> None:
    if session.norms.names and session.norms.rule == "uniform":
        _warn(session, JUMPS)


def _warn(session: Session, text: str) -> None:
    log.warning("%s: %s", session.row, text)
    session.record.setdefault("warnings", []).append(f"{session.row}: {text}")


def _marks(material: Material, settings: Plane, frame: Frame) -> Iterator[Mark]:
    """The three points, then the other soups, the base and the ingredients, projected."""
    zoo = material.session.zoo
    kinds = dict.fromkeys(settings.through, "corner")
    for kind, names in (
        ("soup", material.soups),
        ("base", [BASE] if zoo.base else []),
        ("ingredient", zoo.names),
    ):
        kinds |= {name: kind for name in names if name not in kinds}
    for name, kind in kinds.items():
        yield Mark(name, kind, *frame.place(material.point(name)))


def _spread(ends: list[float], margin: float, count: int) -> Float64[np.ndarray, " positions"]:
    low, high = min(ends), max(ends)
    return np.linspace(low - margin * (high - low), high + margin * (high - low), count)


def _effects(scores: Scores) -> tuple[Effects, Effects]:
    """Accuracy and loss of each candidate, with their errors over the images."""
    return (
        Effects(scores.accuracies, standard_error(scores.right.double())),
        Effects(scores.mean_losses, standard_error(scores.losses)),
    )
