"""The picture of an inspection: how alike the models' deltas are, and where they disagree.

Drawn without pyplot, so that nothing is shown and no state is left behind. Colours are told apart
with any colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from merge.inspection.inspection import Inspection, mean_of_pairs

BLUE, ORANGE, GREY, INK, PALE = "#0072B2", "#D55E00", "#8C8C8C", "#262626", "#E6E6E6"
DIVERGING = "RdBu_r"
LONGEST_NAME = 26
MOST_NUMBERS = 12  # more models than this, and the numbers in the cells are left out
LEAST_REACH = 0.1


def plot_inspection(inspection: Inspection) -> Figure:
    """Cosines of each pair of models as a heat map, and sign conflicts by layer beside it.

    Without a base there are no sign conflicts, and the models' distance to their mean is shown.
    """
    models, layers = len(inspection.models), len(inspection.layers)
    side = min(max(0.42 * models, 2.4), 8.5)
    tall = min(max(0.2 * layers, 2.4), 12.0)
    figure = Figure(
        figsize=(side + 7.2, max(side, tall) + 1.2), layout="constrained", facecolor="white"
    )
    heat, rows = figure.subplots(1, 2, width_ratios=[side + 1.6, 4.6])
    _draw_cosines(heat, inspection)
    _draw_layers(figure, rows, inspection)
    return figure


def _draw_cosines(axes: Axes, inspection: Inspection) -> None:
    names, cosines = inspection.names, inspection.cosines()
    apart = np.where(np.eye(len(names), dtype=bool), np.nan, cosines)  # 1 with itself says nothing
    reach = _reach(apart)
    axes.set_facecolor(PALE)
    image = axes.imshow(apart, cmap=DIVERGING, norm=Normalize(-reach, reach))
    anchor = "the base" if inspection.anchor == "base" else "the mean"
    axes.set_title(f"cosine similarity of deltas to {anchor}", loc="left", fontsize=10)
    size = 8 if len(names) <= 20 else 6.5
    numbers = range(1, len(names) + 1)
    labels = [f"{_elided(name)}  {k}" for k, name in zip(numbers, names, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=size)
    axes.set_xticks(range(len(names)), map(str, numbers), fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(apart):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.65 * reach else INK
                text = f"{round(float(value), 2) + 0:.2f}"  # + 0: no -0.00
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.03, aspect=24)
    bar.set_ticks([-reach, -reach / 2, 0, reach / 2, reach])
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _draw_layers(figure: Figure, axes: Axes, inspection: Inspection) -> None:
    conflict = inspection.conflict()
    layers = len(inspection.layers)
    positions = np.arange(layers)
    if conflict is None:
        axes.barh(positions, inspection.distances(), height=0.72, color=BLUE)
        axes.set_title("distance to the mean by layer", loc="left", fontsize=10)
        axes.set_xlabel("root mean square of an element", fontsize=8)
    else:
        pairs = [_mean_opposition(inspection, k) for k in range(layers)]
        label = "not all of one sign" if len(inspection.models) > 2 else "opposite signs"
        axes.barh(positions, 100 * conflict, height=0.72, color=BLUE, label=label)
        if len(inspection.models) > 2:
            axes.plot(
                100 * np.array(pairs),
                positions,
                "o",
                color=ORANGE,
                mec="white",
                mew=0.6,
                ms=5,
                label="opposite in two models, mean",
            )
        axes.set_xlim(0, min(100.0, max(5.0, 105 * float(np.nanmax(conflict, initial=0)))))
        axes.set_title("sign conflict by layer", loc="left", fontsize=10)
        axes.set_xlabel("elements, %", fontsize=8)
        legend = {"loc": "outside lower right", "ncols": 2, "frameon": False, "fontsize": 8}
        figure.legend(**legend)
    step = math.ceil(layers / 60)
    shown = range(0, layers, step)
    names = _without_shared(inspection.layers)
    axes.set_yticks(shown, [_elided(names[k]) for k in shown], fontsize=8 if layers <= 30 else 6.5)
    axes.set_ylim(layers - 0.4, -0.6)
    axes.grid(axis="x", color=PALE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", color=GREY, labelsize=7)


def _mean_opposition(inspection: Inspection, layer: int) -> float:
    opposition = inspection.opposition(layer)
    return float("nan") if opposition is None else mean_of_pairs(opposition)


def _reach(cosines: Float64[np.ndarray, "models models"]) -> float:
    """Where the colours end: at the strongest pair, in tenths, so that weak ones show."""
    strongest = np.nanmax(np.abs(cosines), initial=0.0)
    return max(LEAST_REACH, math.ceil(10 * strongest) / 10)


def _without_shared(names: Sequence[str]) -> list[str]:
    """Layers with the last part of their tower's name alone, where there is one tower."""
    towers = {name.rstrip("0123456789.") for name in names if "." in name}
    if len(towers) != 1:
        return list(names)
    (tower,) = towers
    return [name.replace(tower, tower.rpartition(".")[2], 1) for name in names]


def _elided(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 3]}…{name[-2 * LONGEST_NAME // 3 + 1 :]}"
