"""The picture of a zoo's training: loss, and accuracy on *tune*, of all models over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inputs.figures import (
    GREY,
    ORANGE,
    SMALL,
    TITLE,
    clean_axes,
    elided,
    grid_lines,
    new_figure,
)
from soups.plots.reading import needed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light yellow cannot be seen on white.
COLOURS, LIGHTEST = "viridis", 0.88
MOST_NAMES = 40
NAMES_BELOW_EACH_OTHER = 20
MOST_MARKERS = 30
LEFT = {"failed": ORANGE, "stopped": GREY}
# How far above and below its curves the page of losses reaches, in spreads of most losses.
REACH = 0.25


@dataclass(frozen=True)
class _Curve:
    """One model's numbers: NaN where there is none; accuracies in percent.

    A loss is the mean over the epoch before it: single batches differ by more than models do.
    """

    name: str
    state: str
    epochs: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @property
    def is_left(self) -> bool:
        return self.state in LEFT

    @property
    def last(self) -> float:
        """The last accuracy; below all others where there is none."""
        known = self.accuracy[np.isfinite(self.accuracy)]
        return float(known[-1]) if len(known) else -1.0

    @property
    def label(self) -> str:
        name = elided(self.name)
        if self.is_left:
            return f"{name} {self.state}"
        return f"{name}  {self.last:.1f}%" if self.last >= 0 else name


def curves(zoo: str | Path) -> Figure:
    """Loss and accuracy on *tune* of all models of a zoo over the epochs of their training.

    Reads `curves.parquet` in the zoo's folder; raises SoupError where it is not there.
    """
    from soups.curves import CURVES_FILE, ingredients_of, read_curves

    remedy = (
        "`python -m soups.finetune CONFIG` writes it; of models trained elsewhere there is none"
    )
    path = needed(Path(zoo) / CURVES_FILE, "the curves of a zoo's training", remedy)
    return draw_curves(ingredients_of(read_curves(path)))


def draw_curves(table: pd.DataFrame) -> Figure:
    """Draw the table of `soups.curves`.

    Models are coloured by their last accuracy on *tune*, the best dark, and listed in that order.
    One that failed is orange, one that was stopped grey; both end in a cross. Losses far above all
    others are off the page.
    """
    curves = sorted(_curves(table), key=lambda curve: (curve.is_left, -curve.last))
    colours = _colours([curve for curve in curves if not curve.is_left])
    columns = -(-min(len(curves), MOST_NAMES + 1) // NAMES_BELOW_EACH_OTHER)
    figure = new_figure(8.5 + 1.4 * columns, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    # The best last, so that nothing lies on it.
    for curve in reversed(curves):
        look = {"color": colours.get(curve.name, LEFT.get(curve.state)), "lw": 1.2, "alpha": 0.9}
        left.plot(curve.epochs, np.where(_is_drawn(curve.loss), curve.loss, np.nan), **look)
        known = np.isfinite(curve.accuracy)
        marker = "o" if known.sum() <= MOST_MARKERS else ""
        x, y = curve.epochs[known], curve.accuracy[known]
        right.plot(x, y, marker=marker, ms=2.5, label=curve.label, **look)
    left.set_title("training loss, mean of the last epoch", loc="left", fontsize=TITLE)
    right.set_title("accuracy on tune, %", loc="left", fontsize=TITLE)
    _limit(left, curves)
    has_head = any((curve.epochs < 0).any() for curve in curves)
    for axes in (left, right):
        grid_lines(axes, "y")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch (before 0: the head alone)" if has_head else "epoch")
        if has_head:
            axes.axvline(0, color=GREY, lw=0.8, ls="--", zorder=0)
        clean_axes(axes)
    for curve in curves:
        if curve.is_left:
            _mark_end(left, curve.epochs, curve.loss, LEFT[curve.state])
            _mark_end(right, curve.epochs, curve.accuracy, LEFT[curve.state])
    _write_names(figure, right, columns)
    return figure


def _curves(table: pd.DataFrame) -> list[_Curve]:
    names = table["name"].to_numpy(dtype=object)
    states = table["state"].to_numpy(dtype=object)
    epochs = table["trained_epochs"].to_numpy(dtype=float)
    loss = table["loss"].to_numpy(dtype=float)
    accuracy = 100 * table["tune_accuracy"].to_numpy(dtype=float)
    curves = []
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        x, smooth = epochs[own], _means_of_an_epoch(epochs[own], loss[own])
        curves.append(_Curve(name, states[own][-1], x, smooth, accuracy[own]))
    return curves


def _means_of_an_epoch(epochs: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """At each point the mean of the points of the epoch before it; nothing is carried over 0,
    where all parameters begin to be trained.
    """
    first = np.searchsorted(epochs, epochs - 1 + 1e-9)
    first = np.where(epochs > 0, np.maximum(first, np.searchsorted(epochs, 1e-9)), first)
    means = [loss[start : end + 1].mean() for end, start in enumerate(first)]
    return np.array(means)


def _is_drawn(values: np.ndarray) -> np.ndarray:
    """Where a number is one that the page can have."""
    return np.isfinite(values) & (np.abs(values) < 1e30)


def _colours(best_first: Sequence[_Curve]) -> Mapping[str, tuple[float, ...]]:
    from matplotlib import colormaps

    shades = colormaps[COLOURS]
    step = LIGHTEST / max(1, len(best_first) - 1)
    return {curve.name: shades(place * step) for place, curve in enumerate(best_first)}


def _mark_end(axes: Axes, epochs: np.ndarray, values: np.ndarray, colour: str) -> None:
    """A cross at the last point; at the edge of the page where that is off it."""
    known = ~np.isnan(values)
    if known.any():
        y = min(float(values[known][-1]), axes.get_ylim()[1])
        axes.plot(epochs[known][-1], y, "x", color=colour, ms=6, mew=1.6, clip_on=False)


def _limit(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Leave room for the losses that most points have."""
    usual = [curve for curve in curves if not curve.is_left] or curves
    losses = np.concatenate([curve.loss for curve in usual])
    losses = losses[_is_drawn(losses)]
    if len(losses):
        low, usual_low, usual_high, high = np.quantile(losses, [0, 0.05, 0.95, 0.99])
        margin = REACH * max(usual_high - usual_low, 1e-3 * abs(high), 1e-9)
        axes.set_ylim(low - 0.2 * margin, high + margin)


def _write_names(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = handles[::-1], labels[::-1]
    if len(handles) > MOST_NAMES:
        half = MOST_NAMES // 2
        between = len(handles) - 2 * half
        handles, labels = handles[:half] + handles[-half:], labels[:half] + labels[-half:]
        labels[half - 1] += f"\n({between} between)"
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        ncols=columns,
        frameon=False,
        fontsize=7.5,
        title="accuracy on tune",
        title_fontsize=SMALL,
    )
