"""Pictures of a run: coefficients and the leaderboard, as PNG files of one style.

matplotlib is imported when a picture is drawn; figures are drawn without pyplot, so that nothing
is shown and no state is left behind. Colours are told apart with any colour vision.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inputs.files import write_whole
from soups.leaderboard import Row, baselines_of, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from merge.coefficients import Coefficients

DPI = 150
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#262626"
DIVERGING = "RdBu_r"
# Columns of this name hold norm buffers, which follow a rule and are not learned.
BUFFER_GROUP = "norm buffers"
LONGEST_NAME = 30


def plot_coefficients(
    coefficients: Coefficients, path: str | Path, *, weights: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Draw the coefficients and write them to a PNG file.

    Ingredient × group as a heat map, white at 1/K, with each ingredient's mean over the groups
    beside it; bars where there is one group. A base shows as a last row with what the others leave
    to it. Groups of norm buffers are left out.
    `weights` of some ingredients, each with `ingredient`, `weight` (a mean over the groups), `low`
    and `high`, are drawn as points with intervals on the bars.
    """
    names = [ingredient.name for ingredient in coefficients.ingredients]
    shown = [g for g, name in enumerate(coefficients.groups) if not name.startswith(BUFFER_GROUP)]
    shown = shown or list(range(len(coefficients.groups)))
    groups = [list(coefficients.groups)[g] for g in shown]
    matrix = coefficients.matrix[:, shown]
    if coefficients.base is not None:
        names.append("base")
        matrix = np.vstack([matrix, 1 - matrix.sum(axis=0)])
    uniform = 1 / len(coefficients.ingredients)
    title = f"{coefficients.method or 'soup'}: {len(coefficients.ingredients)} ingredients"
    if len(groups) == 1:
        figure = _bars(matrix[:, 0], names, uniform, title, weights)
    else:
        title = f"{title} × {len(groups)} groups"
        figure = _heat_map(matrix, names, groups, uniform, title, weights)
    save_figure(figure, path)
    return figure


def plot_leaderboard(rows: Sequence[Row], path: str | Path) -> Figure:
    """Draw report accuracies with their intervals, and select accuracies, and write a PNG file.

    Soups are above, references below, each in the table's order.
    """
    rows = ranked(rows)
    figure = new_figure(7.5, 1.5 + 0.3 * len(rows))
    axes = figure.add_subplot()
    positions = np.arange(len(rows), dtype=float)
    soups = sum(row.kind == "soup" for row in rows)
    positions[soups:] += 0.5 if 0 < soups < len(rows) else 0.0
    for kind, colour in (("soup", BLUE), ("reference", GREY)):
        of_kind = [(y, row) for y, row in zip(positions, rows, strict=True) if row.kind == kind]
        if not of_kind:
            continue
        y = [y for y, _ in of_kind]
        report = [100 * row.report.accuracy for _, row in of_kind]
        select = [100 * row.select.accuracy for _, row in of_kind]
        ends = [row.interval or (row.report.accuracy, row.report.accuracy) for _, row in of_kind]
        axes.hlines(
            y, [100 * low for low, _ in ends], [100 * high for _, high in ends], colour, lw=2
        )
        axes.plot(
            report, y, "o", color=colour, ms=6, zorder=4, label=f"{kind}: report, 95% interval"
        )
        axes.plot(
            select,
            y,
            "D",
            mfc="white",
            mec=colour,
            ms=5,
            mew=1.1,
            zorder=3,
            label=f"{kind}: select",
        )
    baselines = baselines_of(rows)
    baseline = next((row for row in rows if row.learner in baselines[:1]), None)
    if baseline is not None:
        axes.axvline(
            100 * baseline.report.accuracy,
            color=GREY,
            lw=0.8,
            ls="--",
            zorder=0,
            label=f"{baseline.learner}: report",
        )
    axes.set_yticks(positions, [row.learner for row in rows])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.margins(x=0.04)
    axes.grid(axis="x", color="#E6E6E6", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy, %")
    clean_axes(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)
    return figure


def _bars(
    values: np.ndarray,
    names: list[str],
    uniform: float,
    title: str,
    weights: Sequence[Mapping[str, Any]],
) -> Figure:
    figure = new_figure(6.5, max(2.0, 1.0 + row_height(len(names)) * len(names)))
    axes = figure.add_subplot()
    _draw_bars(axes, values, uniform)
    ends = _draw_intervals(axes, names, values, weights)
    name_rows(axes, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    intervals = "; line: 95% interval" if weights else ""
    axes.set_xlabel(f"coefficient (dashed: 1/K = {uniform:.3g}{intervals})")
    axes.set_title(title, loc="left", fontsize=10)
    if len(names) <= 40:
        for row, value in enumerate(values):
            axes.annotate(
                f"{value:.3f}",
                (ends[row], row),
                xytext=(3 if value >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
                fontsize=7,
                color=INK,
            )
        axes.margins(x=0.1)
    return figure


def _heat_map(
    matrix: np.ndarray,
    names: list[str],
    groups: list[str],
    uniform: float,
    title: str,
    weights: Sequence[Mapping[str, Any]],
) -> Figure:
    from matplotlib.colors import Normalize

    rows, columns = matrix.shape
    map_width = min(max(0.2 * columns, 3.5), 13.0)
    height = max(3.6, row_height(rows) * rows + 2.2)
    figure = new_figure(map_width + 3.6, height)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[map_width, 1.3])
    # White is 1/K. A few large values would bleach all others, so that the strongest 2% may
    # saturate; the arrows of the colour bar then say so.
    apart = np.abs(matrix - uniform)
    reach = max(float(np.quantile(apart, 0.98)), 0.1 * uniform)
    image = heat.imshow(
        matrix,
        aspect="auto",
        cmap=DIVERGING,
        norm=Normalize(uniform - reach, uniform + reach),
        interpolation="nearest",
    )
    shared = _shared_prefix(groups)
    labels = [elided(name.removeprefix(shared)) for name in groups]
    step = math.ceil(columns * 0.135 / map_width)
    ticks = range(0, columns, step)
    heat.set_xticks(
        ticks, [labels[g] for g in ticks], rotation=90, fontsize=7 if step == 1 else 6.5
    )
    name_rows(heat, names)
    heat.set_title(title, loc="left", fontsize=10)
    remarks = [f"all in {shared[:-1]}"] if shared else []
    remarks += [f"one group in {step} is named"] if step > 1 else []
    heat.set_xlabel("; ".join(remarks), fontsize=7)
    means = matrix.mean(axis=1)
    _draw_bars(bars, means, uniform)
    _draw_intervals(bars, names, means, weights)
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.set_title("mean, 95%" if weights else "mean", loc="left", fontsize=9)
    bars.locator_params(axis="x", nbins=3)
    below, above = matrix.min() < uniform - reach, matrix.max() > uniform + reach
    bar = figure.colorbar(
        image,
        ax=bars,
        fraction=0.35,
        pad=0.12,
        aspect=max(20, 5 * height),
        extendfrac=0.03,
        extend="both" if below and above else "min" if below else "max" if above else "neither",
    )
    bar.set_label(f"white: 1/K = {uniform:.3g}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


def _draw_bars(axes: Axes, values: np.ndarray, uniform: float) -> None:
    colours = [BLUE if value >= 0 else ORANGE for value in values]
    axes.barh(np.arange(len(values)), values, height=0.72, color=colours)
    axes.axvline(uniform, color=INK, lw=0.8, ls="--")
    axes.axvline(0, color=INK, lw=0.6)
    axes.tick_params(axis="x", labelsize=7)
    clean_axes(axes)


def _draw_intervals(
    axes: Axes, names: list[str], values: np.ndarray, weights: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Put each ingredient's weight and interval on its bar; how far bar and interval reach."""
    ends = values.astype(float).tolist()
    for weight in weights:
        row = names.index(weight["ingredient"])
        axes.hlines(row, weight["low"], weight["high"], INK, lw=1.1, zorder=4)
        axes.plot(weight["weight"], row, "o", color=INK, ms=2.8, zorder=5)
        ends[row] = (
            max(ends[row], weight["high"]) if values[row] >= 0 else min(ends[row], weight["low"])
        )
    return ends


def name_rows(axes: Axes, names: list[str]) -> None:
    """Put the names at 0, 1, … of the y axis; every second, third, … where there are very many."""
    step = math.ceil(len(names) / 90)
    ticks = range(0, len(names), step)
    axes.set_yticks(
        ticks, [elided(names[k]) for k in ticks], fontsize=6.5 if len(names) > 40 else 8
    )


def row_height(rows: int) -> float:
    """Inches for one ingredient: as many as 90 names fit below each other."""
    return 0.23 if rows <= 30 else max(0.13, min(0.23, 11 / rows)) if rows <= 90 else 11.7 / rows


def _shared_prefix(groups: list[str]) -> str:
    """The whole parts, each with its dot, that all names begin with."""
    shared = ""
    for parts in zip(*(name.split(".")[:-1] for name in groups), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}."
    return shared


def elided(name: str) -> str:
    """The name, without something in its middle where it is long."""
    if len(name) <= LONGEST_NAME:
        return name
    kept = LONGEST_NAME - 1
    return f"{name[: kept - 2 * kept // 3]}…{name[-(2 * kept // 3) :]}"


def clean_axes(axes: Axes) -> None:
    """Two spines, and quiet ones."""
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(color=GREY)


def new_figure(width: float, height: float) -> Figure:
    """A figure of these inches that makes room for its labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a PNG file; the same figure gives the same bytes: no time and no version is in it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    write_whole(path, file.getvalue())
