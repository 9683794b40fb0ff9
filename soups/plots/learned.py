"""The picture of what a learner has found: coefficients by ingredient and group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inputs.config import nearest
from inputs.figures import (
    BLUE,
    DIVERGING,
    INK,
    ORANGE,
    TITLE,
    clean_axes,
    elided,
    name_rows,
    new_figure,
    quiet_bar,
    row_height,
)
from soups.errors import SoupError
from soups.plots.reading import LEARN, read_leaderboard, read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from merge.coefficients import Coefficients

# Columns of this name hold norm buffers, which follow a rule and are not learned.
BUFFER_GROUP = "norm buffers"


def coefficients(folder: str | Path, learner: str | None = None) -> Figure:
    """The coefficients of a learner's soup, of the first in the leaderboard if none is named.

    Ingredient × group as a heat map, white at 1/K, with each ingredient's mean over the groups
    beside it; bars where there is one group. Reads `coefficients/<learner>.json`, and `run.json`
    for the intervals that a learner may have found. Raises SoupError where they are not there.
    """
    from merge.coefficients import Coefficients

    folder = Path(folder)
    known = sorted(path.stem for path in (folder / "coefficients").glob("*.json"))
    if learner is None and known:
        rows = read_leaderboard(folder)["learner"]
        learner = next((row for row in rows if row in known), known[0])
    if learner not in known:
        path = folder / "coefficients" / f"{learner or 'LEARNER'}.json"
        named = nearest(learner, known) if learner and known else ""
        raise SoupError(
            f"{path}: is not there; wanted what a learner returned: {LEARN} writes it for each "
            f"row under `learners:`{named}"
        )
    record = read_record(folder).get("learners", {}).get(learner, {}).get("record", {})
    soup = Coefficients.load(folder / "coefficients" / f"{learner}.json")
    return draw_coefficients(soup, weights=record.get("weights", ()))


def draw_coefficients(
    coefficients: Coefficients, *, weights: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Draw coefficients as a heat map, or as bars where there is one group.

    A base shows as a last row with what the others leave to it. Groups of norm buffers are left
    out. `weights` of some ingredients, each with `ingredient`, `weight` (a mean over the groups),
    `low` and `high`, are drawn as points with intervals on the bars.
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
        return _bars(matrix[:, 0], names, uniform, title, weights)
    return _heat_map(matrix, names, groups, uniform, f"{title} × {len(groups)} groups", weights)


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
    axes.set_title(title, loc="left", fontsize=TITLE)
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
    heat.set_title(title, loc="left", fontsize=TITLE)
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
    quiet_bar(bar)
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


def _shared_prefix(groups: list[str]) -> str:
    """The whole parts, each with its dot, that all names begin with."""
    shared = ""
    for parts in zip(*(name.split(".")[:-1] for name in groups), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}."
    return shared
