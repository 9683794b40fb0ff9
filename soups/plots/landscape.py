"""Pictures of loss and accuracy along lines and over planes of weight space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from jaxtyping import Float64

from inputs.figures import (
    COLOURS,
    DASHES,
    GREY,
    INK,
    ORANGE,
    SEQUENTIAL,
    TITLE,
    clean_axes,
    elided,
    grid_lines,
    legend_below,
    new_figure,
    quiet_bar,
    remark_above,
)
from soups.plots.reading import effects_of, find_report, read_table, report_file
from soups.reports.tables import Effects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light is good, dark is bad.
BRIGHT_IS_MORE, BRIGHT_IS_LESS = SEQUENTIAL, f"{SEQUENTIAL}_r"
# Of the plane's three points, then of other soups.
CORNERS = ("o", "s", "^")
OTHERS = ("D", "v", "P", "X", "<", ">", "*", "p", "h", "d")
# A loss that spans more than this is shown on a log scale.
WIDE = 20.0


@dataclass(frozen=True)
class Curve:
    """Scores along a line: 0 is its first end, 1 its second. Low and high are 95% intervals."""

    label: str
    positions: Float64[np.ndarray, " points"]
    accuracy: Effects
    loss: Effects


@dataclass(frozen=True)
class Mark:
    """A named point projected on the plane, and how far `off` the plane it is.

    `kind` is `corner` (one of the plane's three points), `soup`, `base` or `ingredient`.
    """

    name: str
    kind: str
    x: float
    y: float
    off: float


@dataclass(frozen=True)
class Grid:
    """Scores on a grid over a plane; x and y are distances in weight space."""

    x: Float64[np.ndarray, " columns"]
    y: Float64[np.ndarray, " rows"]
    accuracy: Float64[np.ndarray, "rows columns"]
    loss: Float64[np.ndarray, "rows columns"]

    def holds(self, mark: Mark) -> bool:
        """Whether the mark is inside of the grid."""
        across = self.x[0] <= mark.x <= self.x[-1]
        return bool(across and self.y[0] <= mark.y <= self.y[-1])


def lines(folder: str | Path, report: str | None = None) -> Figure:
    """Loss and accuracy along straight lines of weight space, with their 95% intervals.

    Reads a report of type `line`, the row `report` of the config if there are several. Raises
    SoupError where there is none.
    """
    example = "line: {between: [[base, uniform]]}"
    stem, remark = find_report(Path(folder), "line", report, example)
    table = read_table(report_file(stem, ".csv"), texts=("from", "to"))
    curves = []
    for ends, own in table.groupby(["from", "to"], sort=False):
        first, last = cast(tuple[str, str], ends)
        distances, positions = own["distance"].to_numpy(), own["position"].to_numpy()
        length = float((distances[positions != 0] / positions[positions != 0]).max())
        curves.append(
            Curve(
                line_label(first, last, length),
                positions,
                effects_of(own, "accuracy"),
                effects_of(own, "loss"),
            )
        )
    return draw_lines(curves, remark=remark)


def plane(folder: str | Path, report: str | None = None) -> Figure:
    """Loss and accuracy over a plane of weight space, with the soups and ingredients on it.

    Reads a report of type `plane`, the row `report` of the config if there are several. Raises
    SoupError where there is none.
    """
    example = "plane: {through: [base, best_single, uniform]}"
    stem, remark = find_report(Path(folder), "plane", report, example)
    table = read_table(report_file(stem, ".csv"))
    marks = read_table(report_file(stem, "_points.csv"), texts=("name", "kind"))
    x, y = (np.unique(table[axis].to_numpy()) for axis in "xy")
    accuracy, loss = (
        table.pivot(index="y", columns="x", values=metric).to_numpy()
        for metric in ("accuracy", "loss")
    )
    return draw_plane(
        Grid(x, y, accuracy, loss),
        [Mark(**mark) for mark in marks.to_dict("records")],
        remark=remark,
    )


def line_label(first: str, last: str, length: float) -> str:
    """What a line is called: its ends, and how far they are apart."""
    return f"{first} → {last}, {length:.3g} apart"


def draw_lines(curves: Sequence[Curve], *, remark: str) -> Figure:
    """Draw loss and accuracy along lines, with their 95% intervals."""
    figure = new_figure(6.5, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    losses = np.concatenate([curve.loss.values for curve in curves])
    if losses.max() > WIDE * losses.min() > 0:
        above.set_yscale("log")
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        for axes, effects, scale in ((above, curve.loss, 1.0), (below, curve.accuracy, 100.0)):
            low = scale * effects.low
            if axes.get_yscale() == "log":
                low = np.maximum(low, 0.5 * losses.min())
            axes.fill_between(
                curve.positions, low, scale * effects.high, color=colour, alpha=0.15, lw=0
            )
            axes.plot(
                curve.positions,
                scale * effects.values,
                color=colour,
                ls=dash,
                lw=1.6,
                label=curve.label,
            )
    for axes, label in ((above, "loss, nats"), (below, "accuracy, %")):
        for end in (0, 1):
            axes.axvline(end, color=GREY, lw=0.8, ls="--", zorder=0)
        axes.set_ylabel(label)
        grid_lines(axes, "y")
        axes.margins(x=0)
        clean_axes(axes)
    below.set_xlabel("position: 0 is the first end, 1 the second")
    legend_below(figure, [below], columns_at_most=2)
    remark_above(figure, f"{remark}; bands: 95% intervals")
    return figure


def draw_plane(grid: Grid, marks: Sequence[Mark], *, remark: str) -> Figure:
    """Draw loss and accuracy over a plane as filled contours, with the marks that are on it."""
    width, height = grid.x[-1] - grid.x[0], grid.y[-1] - grid.y[0]
    figure = new_figure(10.5, min(max(3.9 * height / width, 2.4), 7.0) + 1.4)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    _contours(figure, panels[0], grid, grid.loss, "loss, nats", good="below")
    _contours(figure, panels[1], grid, 100 * grid.accuracy, "accuracy, %", good="above")
    inside = [mark for mark in marks if grid.holds(mark)]
    for axes in panels:
        _draw_marks(axes, inside)
        axes.set_aspect("equal")
        axes.set_xlabel("distance in weight space")
    panels[0].set_ylabel("distance in weight space")
    outside = len(marks) - len(inside)
    remarks = [remark]
    if outside:
        remarks.append(f"{outside} projection{'s are' if outside > 1 else ' is'} outside")
    legend_below(figure, [panels[0]], columns_at_most=6)
    remark_above(figure, "; ".join(remarks))
    return figure


def _contours(
    figure: Figure,
    axes: Axes,
    grid: Grid,
    values: Float64[np.ndarray, "rows columns"],
    label: str,
    *,
    good: Literal["above", "below"],
) -> None:
    """Filled contours whose levels are for the better three quarters of the grid: what is far from
    all points is often so bad that everything else would have one colour."""
    from matplotlib.ticker import MaxNLocator

    low, high = values.min(), values.max()
    if good == "below":
        high = np.quantile(values, 0.75)
    else:
        low = np.quantile(values, 0.25)
    levels = MaxNLocator(12).tick_values(low, high)
    extend = ("min" if values.min() < levels[0] else "") + (
        "max" if values.max() > levels[-1] else ""
    )
    filled = axes.contourf(
        grid.x,
        grid.y,
        values,
        levels=levels,
        cmap=BRIGHT_IS_LESS if good == "below" else BRIGHT_IS_MORE,
        extend={"": "neither", "minmax": "both"}.get(extend, extend),
    )
    lines = axes.contour(grid.x, grid.y, values, levels=levels, colors="white", linewidths=0.4)
    lines.set_alpha(0.6)
    bar = figure.colorbar(filled, cax=axes.inset_axes((1.03, 0, 0.035, 1)))
    axes.set_title(label, loc="left", fontsize=TITLE)
    quiet_bar(bar)


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Each mark with a shape of its own for the legend; all ingredients with one."""
    corners = iter(CORNERS)
    others = iter(OTHERS * math.ceil(len(marks) / len(OTHERS)))
    for mark in marks:
        if mark.kind == "corner":
            look = {"marker": next(corners), "color": ORANGE, "mec": "white", "ms": 9, "zorder": 5}
        elif mark.kind == "ingredient":
            look = {"marker": ".", "color": "white", "mec": INK, "ms": 7, "zorder": 3}
        else:
            look = {"marker": next(others), "color": "white", "mec": INK, "ms": 7, "zorder": 4}
        label = "ingredient" if mark.kind == "ingredient" else elided(mark.name)
        axes.plot(mark.x, mark.y, ls="", mew=0.9, label=label, **look)
