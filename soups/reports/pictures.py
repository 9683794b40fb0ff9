"""Pictures of the reports, in the style of a run's other pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float64

from soups.plots import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    clean_axes,
    elided,
    name_rows,
    new_figure,
    row_height,
    save_figure,
)
from soups.reports.tables import Effects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with any colour vision (Okabe and Ito); then again, dashed.
CURVE_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
CURVE_DASHES = ("-", "--", ":", "-.")
# Evenly from dark (bad) to light (good) with any colour vision, and in grey.
BRIGHT_IS_MORE, BRIGHT_IS_LESS = "cividis", "cividis_r"
# Of the plane's three points, then of other soups.
CORNERS = ("o", "s", "^")
OTHERS = ("D", "v", "P", "X", "<", ">", "*", "p", "h", "d")
# A loss that spans more than this is shown on a log scale.
WIDE = 20.0


@dataclass(frozen=True)
class EffectPanel:
    """One column of a picture of effects; an ingredient that helps is above 0 or below, `good`."""

    label: str
    effects: Effects
    good: Literal["above", "below"]
    scale: float = 1.0


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


def plot_effects(
    names: Sequence[str],
    order: Sequence[int],
    panels: Sequence[EffectPanel],
    path: Path,
    *,
    title: str,
    remark: str,
) -> Path:
    """Draw each ingredient's numbers with their 95% intervals, in this order from the top.

    An ingredient helps or hurts where the interval is all on one side of 0.
    """
    count = len(names)
    height = max(0.16, row_height(count)) * count
    figure = new_figure(3.4 + 2.4 * len(panels), max(2.2, 1.6 + height))
    columns = [*figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]]
    positions = np.arange(count)
    for axes, panel in zip(columns, panels, strict=True):
        values, low, high = (
            panel.scale * part[list(order)]
            for part in (panel.effects.values, panel.effects.low, panel.effects.high)
        )
        above, below = low > 0, high < 0
        helps, hurts = (above, below) if panel.good == "above" else (below, above)
        for which, colour, label in (
            (helps, BLUE, "helps"),
            (hurts, ORANGE, "hurts"),
            (~helps & ~hurts, GREY, "can be either"),
        ):
            if which.any():
                axes.hlines(positions[which], low[which], high[which], colour, lw=1.6)
                axes.plot(values[which], positions[which], "o", color=colour, ms=4.5, label=label)
        axes.axvline(0, color=INK, lw=0.8)
        axes.grid(axis="x", color="#E6E6E6", lw=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(panel.label, fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        clean_axes(axes)
    name_rows(columns[0], [names[k] for k in order])
    columns[0].set_ylim(count - 0.4, -0.6)
    columns[0].set_title(title, loc="left", fontsize=10)
    _legend(figure, columns, columns_at_most=3)
    figure.suptitle(f"{remark}; lines: 95% intervals", fontsize=7, color=GREY)
    save_figure(figure, path)
    return path


def plot_lines(curves: Sequence[Curve], path: Path, *, remark: str) -> Path:
    """Draw loss and accuracy along lines, with their 95% intervals."""
    figure = new_figure(6.5, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    losses = np.concatenate([curve.loss.values for curve in curves])
    if losses.max() > WIDE * losses.min() > 0:
        above.set_yscale("log")
    for number, curve in enumerate(curves):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        dash = CURVE_DASHES[number // len(CURVE_COLOURS) % len(CURVE_DASHES)]
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
        axes.grid(axis="y", color="#E6E6E6", lw=0.7)
        axes.margins(x=0)
        clean_axes(axes)
    below.set_xlabel("position: 0 is the first end, 1 the second")
    _legend(figure, [below], columns_at_most=2)
    figure.suptitle(f"{remark}; bands: 95% intervals", fontsize=7, color=GREY)
    save_figure(figure, path)
    return path


def plot_plane(grid: Grid, marks: Sequence[Mark], path: Path, *, remark: str) -> Path:
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
    _legend(figure, [panels[0]], columns_at_most=6)
    figure.suptitle("; ".join(remarks), fontsize=7, color=GREY)
    save_figure(figure, path)
    return path


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
    axes.set_title(label, loc="left", fontsize=10)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


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


def _legend(figure: Figure, axes: Sequence[Axes], *, columns_at_most: int) -> None:
    """One legend below for all axes, each label once."""
    handles = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(columns_at_most, len(handles)),
        frameon=False,
        fontsize=8,
    )
