"""The picture of an inspection: how alike the models' deltas are, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from inputs.figures import (
    BLUE,
    DIVERGING,
    INK,
    ORANGE,
    PALE,
    SEQUENTIAL,
    SMALL,
    TITLE,
    clean_axes,
    elided,
    grid_lines,
    legend_below,
    new_figure,
    quiet_bar,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

LONGEST_NAME = 26
SHORT_NAME = 2
MOST_NUMBERS = 12  # more models than this, and the numbers in the cells are left out
LEAST_REACH = 0.1

Pairs = Float64[np.ndarray, "models models"]


def plot_inspection(tables: Mapping[str, DataFrame]) -> Figure:
    """Draw the tables of an `Inspection`, as it has them or as they were saved and read again.

    Cosines of each pair of models and the share of elements in which their deltas have opposite
    signs as maps, and by layer how much of it is in dispute. Without a base signs say nothing:
    then the models' distance to their mean is shown by layer.
    """
    names = [str(name) for name in tables["cosine"]["model"]]
    cosines = tables["cosine"].drop(columns="model").to_numpy(dtype=float, copy=True)
    np.fill_diagonal(cosines, np.nan)  # 1 with itself says nothing
    layers = tables["layers"]
    anchored = "sign conflict" in layers.columns
    maps = 2 if anchored and len(names) > 1 else 1
    side = min(max(0.25 * len(names), 2.6), 7.0)
    tall = min(max(0.2 * len(layers), 2.4), 12.0)
    figure = new_figure(maps * (side + 0.9) + 5.6, max(side, tall) + 1.3)
    panels = figure.subplots(1, maps + 1, width_ratios=[*[side + 0.9] * maps, 4.0])
    reach = _reach(cosines)
    _draw_map(panels[0], names, cosines, (-reach, reach), DIVERGING, form="{:.2f}")
    anchor = "the base" if anchored else "the mean"
    panels[0].set_title(f"cosine of deltas to {anchor}", loc="left", fontsize=TITLE)
    _name_models(panels[0], names)
    if maps == 2:
        percent = 100 * _opposed(tables["pairs"], names)
        low = float(math.floor(np.nanmin(percent)))
        high = max(float(math.ceil(np.nanmax(percent))), low + 1)
        _draw_map(panels[1], names, percent, (low, high), SEQUENTIAL, form="{:.0f}")
        title = "opposite signs, % of elements (by chance 50)"
        panels[1].set_title(title, loc="left", fontsize=TITLE)
        panels[1].set_yticks([])
    _draw_layers(panels[-1], layers, models=len(names))
    if panels[-1].get_legend_handles_labels()[1]:
        legend_below(figure, [panels[-1]], columns_at_most=2)
    return figure


def _opposed(pairs: DataFrame, names: Sequence[str]) -> Pairs:
    """The share of opposite signs of each pair over the whole models; NaN on the diagonal."""
    matrix = np.full((len(names), len(names)), np.nan)
    first, second = np.triu_indices(len(names), 1)
    # The pairs of the whole models come first, in this order; a layer may be called `all` too.
    matrix[first, second] = pairs["opposed"].head(len(first)).to_numpy(dtype=float)
    matrix[second, first] = matrix[first, second]
    return matrix


def _draw_map(
    axes: Axes,
    names: Sequence[str],
    values: Pairs,
    ends: tuple[float, float],
    colours: str,
    *,
    form: str,
) -> None:
    """Pairs as colours between the `ends`; as numbers too where there is room."""
    from matplotlib.colors import Normalize

    axes.set_facecolor(PALE)
    image = axes.imshow(values, cmap=colours, norm=Normalize(*ends), interpolation="nearest")
    size = SMALL if len(names) <= 20 else 6.5
    short = max(map(len, names)) <= SHORT_NAME
    below = names if short else [str(k) for k in range(1, len(names) + 1)]
    axes.set_xticks(range(len(names)), below, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.to_rgba(value)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                colour = "white" if dark else INK
                text = form.format(round(float(value), 2) + 0)  # + 0: no -0.00
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.03, aspect=24)
    bar.set_ticks([ends[0] + share * (ends[1] - ends[0]) for share in (0, 0.25, 0.5, 0.75, 1)])
    quiet_bar(bar)


def _name_models(axes: Axes, names: Sequence[str]) -> None:
    """Names on the left; with the numbers that stand below where names are too long for that."""
    size = SMALL if len(names) <= 20 else 6.5
    labels = [elided(name, LONGEST_NAME) for name in names]
    if max(map(len, names)) > SHORT_NAME:
        labels = [f"{label}  {k}" for k, label in enumerate(labels, 1)]
    axes.set_yticks(range(len(names)), labels, fontsize=size)


def _draw_layers(axes: Axes, layers: DataFrame, *, models: int) -> None:
    positions = np.arange(len(layers))
    if "sign conflict" not in layers.columns:
        axes.barh(positions, layers["delta rms"], height=0.72, color=BLUE)
        axes.set_title("distance to the mean by layer", loc="left", fontsize=TITLE)
        axes.set_xlabel("root mean square of an element", fontsize=SMALL)
    else:
        conflict = 100 * layers["sign conflict"].to_numpy(dtype=float)
        label = "not all of one sign" if models > 2 else "opposite signs"
        axes.barh(positions, conflict, height=0.72, color=BLUE, label=label)
        if models > 2:
            look = {"ls": "", "marker": "o", "color": ORANGE, "mec": "white", "mew": 0.6, "ms": 5}
            mean = 100 * layers["of two models"].to_numpy(dtype=float)
            axes.plot(mean, positions, label="opposite in two models, mean", **look)
        axes.set_xlim(0, min(100.0, max(5.0, 105 / 100 * float(np.nanmax(conflict, initial=0)))))
        axes.set_title("sign conflict by layer", loc="left", fontsize=TITLE)
        axes.set_xlabel("elements, %", fontsize=SMALL)
    step = math.ceil(len(layers) / 60)
    shown = range(0, len(layers), step)
    names = _without_shared([str(name) for name in layers["layer"]])
    size = SMALL if len(layers) <= 30 else 6.5
    axes.set_yticks(shown, [elided(names[k], LONGEST_NAME) for k in shown], fontsize=size)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    grid_lines(axes, "x")
    clean_axes(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)


def _reach(apart: Pairs) -> float:
    """Where the colours end: at the strongest pair, in tenths, so that weak ones show."""
    strongest = np.nanmax(np.abs(apart), initial=0.0)
    return max(LEAST_REACH, math.ceil(10 * strongest) / 10)


def _without_shared(names: Sequence[str]) -> list[str]:
    """Layers with the last part of their tower's name alone, where there is one tower."""
    towers = {name.rstrip("0123456789.") for name in names if "." in name}
    if len(towers) != 1:
        return list(names)
    (tower,) = towers
    return [name.replace(tower, tower.rpartition(".")[2], 1) for name in names]
