"""The picture of overfitting: what learners lose out of fold against their free coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inputs.figures import BLUE, GREY, INK, LABEL, clean_axes, grid_lines, new_figure
from soups.errors import SoupError
from soups.plots.reading import LEARN, read_leaderboard

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox, Transform

DODGE_POINTS = 10.0
MARKER_POINTS = 6.0
# Where a label may stand from its point, nearest first: how far out, and in which directions.
LABEL_POINTS = (8.0, 13.0, 20.0, 28.0, 38.0, 50.0, 65.0, 85.0, 110.0)
DIRECTIONS = (
    *((1, 0), (-1, 0), (1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6)),
    *((0, 1), (0, -1), (0.3, 1), (-0.3, 1), (0.3, -1), (-0.3, -1)),
)


@dataclass(frozen=True)
class _Point:
    """A row of the picture: accuracies in points, `beside` how far it is moved on the page."""

    label: str
    count: float
    apart: float
    error: float | None
    beside: float

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of its bar."""
        return self.apart - (self.error or 0.0), self.apart + (self.error or 0.0)


def overfitting(folder: str | Path) -> Figure:
    """In-sample minus out-of-fold accuracy on *select*, in points, over the number of free
    coefficients.

    Bars are ± one paired standard error; a point is hollow where none is known. Rows of the same
    number stand side by side. Reads `leaderboard.csv`; raises SoupError where it is not there, or
    where no row was cross-fitted.
    """
    rows = read_leaderboard(Path(folder))
    points = _points(rows)
    if not points:
        raise SoupError(
            f"{Path(folder) / 'leaderboard.csv'}: no row was cross-fitted, nothing is known out of "
            f"fold; set out_of_fold to 2 or more, and run {LEARN} again"
        )
    figure = new_figure(7.5, 4.6)
    axes = figure.add_subplot()
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xlim(-0.5, 8.0 * max(p.count for p in points) + 1)
    for point in points:
        axes.errorbar(
            [point.count],
            [point.apart],
            yerr=None if point.error is None else [point.error],
            fmt="o",
            ms=MARKER_POINTS,
            color=BLUE,
            mfc="white" if point.error is None else BLUE,
            capsize=2.5,
            lw=1.2,
            transform=_moved(figure, axes, point),
            label=point.label,
        )
    ends = [0.0, *(end for point in points for end in point.ends)]
    margin = 0.2 * max(max(ends) - min(ends), 0.5)
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.axhline(0, color=GREY, lw=0.8, ls="--", zorder=0)
    grid_lines(axes, "y")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("free coefficients")
    axes.set_ylabel("in-sample − out-of-fold accuracy on select, points")
    hollow = "; hollow: not known" if any(point.error is None for point in points) else ""
    axes.set_title(f"bars: ± one paired standard error{hollow}", loc="left", fontsize=LABEL)
    clean_axes(axes)
    _write_labels(figure, axes, points)
    return figure


def _points(rows: pd.DataFrame) -> list[_Point]:
    known = rows.dropna(subset=["out_of_fold_accuracy", "free_coefficients"])
    found = [
        _Point(
            row["learner"],
            float(row["free_coefficients"]),
            100 * (row["select_accuracy"] - row["out_of_fold_accuracy"]),
            None if math.isnan(error) else 100 * error,
            0.0,
        )
        for row in known.to_dict("records")
        for error in [row["out_of_fold_standard_error"]]
    ]
    points = []
    for count in sorted({point.count for point in found}):
        alike = sorted((p for p in found if p.count == count), key=lambda p: p.apart)
        middle = (len(alike) - 1) / 2
        points += [replace(p, beside=DODGE_POINTS * (n - middle)) for n, p in enumerate(alike)]
    return points


def _moved(figure: Figure, axes: Axes, point: _Point) -> Transform:
    """Data to page, moved aside."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(point.beside / 72, 0, figure.dpi_scale_trans)


def _write_labels(figure: Figure, axes: Axes, points: Sequence[_Point]) -> None:
    """Each label in the first place near its point, or near an end of its bar, where it touches
    nothing that is drawn; if there is none, where its line alone does; else right of the point.
    """
    figure.draw_without_rendering()  # so that the axes are where they will be
    page, boxes = axes.get_window_extent(), [_box(figure, axes, point) for point in points]
    labels: list[Bbox] = []
    for number, point in enumerate(points):
        where = _moved(figure, axes, point)
        others = [box for n, box in enumerate(boxes) if n != number] + labels
        text = axes.annotate(
            point.label,
            (point.count, point.apart),
            xycoords=where,
            xytext=(LABEL_POINTS[0], 0.0),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            zorder=5,
        )
        text.set_in_layout(False)
        free = [
            (start, place)
            for start, place in _places(point)
            if _is_free(_set(text, (point.count, start), place), page, [boxes[number], *others])
        ]
        clear = (
            (start, place)
            for start, place in free
            if not _crosses(where.transform((point.count, start)), place, figure.dpi / 72, others)
        )
        nearest = free[0] if free else (point.apart, (LABEL_POINTS[0], 0.0))
        start, place = next(clear, nearest)
        labels.append(_set(text, (point.count, start), place).padded(6, 0))
        if max(map(abs, place)) > LABEL_POINTS[0] or start != point.apart:
            line = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
            axes.annotate(
                "",
                (point.count, start),
                xycoords=where,
                xytext=place,
                textcoords="offset points",
                arrowprops=line,
                zorder=1,
            ).set_in_layout(False)


def _set(text: Annotation, start: tuple[float, float], place: tuple[float, float]) -> Bbox:
    """The box of the label when it stands there."""
    x, y = place
    text.xy, text.xyann = start, place
    text.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    text.set_verticalalignment("bottom" if y > 0 else "top" if y < 0 else "center_baseline")
    return text.get_window_extent()


def _is_free(box: Bbox, page: Bbox, taken: Sequence[Bbox]) -> bool:
    """Whether a label there is on the page and touches nothing."""
    inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    return bool(inside) and not any(box.overlaps(other) for other in taken)


def _crosses(start: Any, place: tuple[float, float], point: float, others: Sequence[Bbox]) -> bool:
    """Whether the line from a label to its point runs through something else."""
    steps = [n / 20 for n in range(21)]
    line = [[start[axis] + t * place[axis] * point for axis in (0, 1)] for t in steps]
    return any(box.contains(x, y) for box in others for x, y in line)


def _box(figure: Figure, axes: Axes, point: _Point) -> Bbox:
    """What the point and its bar take on the page."""
    from matplotlib.transforms import Bbox

    where, half = _moved(figure, axes, point), 0.5 * MARKER_POINTS * figure.dpi / 72
    low, high = (where.transform((point.count, end)) for end in point.ends)
    return Bbox([[low[0] - half, low[1] - half], [high[0] + half, high[1] + half]])


def _places(point: _Point) -> Iterator[tuple[float, tuple[float, float]]]:
    """Where on the bar, and the offset from there in points; nearest first."""
    low, high = point.ends
    for distance in LABEL_POINTS:
        for x, y in DIRECTIONS:
            place = (x * distance, y * distance)
            yield point.apart, place
            if y:
                yield (high if y > 0 else low), place
