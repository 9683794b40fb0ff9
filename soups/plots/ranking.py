"""Pictures of the leaderboard: how good the rows are, and what they have cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inputs.figures import (
    BLUE,
    GREY,
    INK,
    SMALL,
    TITLE,
    clean_axes,
    elided,
    grid_lines,
    legend_below,
    new_figure,
    remark_above,
    row_height,
)
from soups.plots.reading import read_leaderboard

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"soup": BLUE, "reference": GREY}
GAP = 0.5


def leaderboard(folder: str | Path) -> Figure:
    """Report accuracies with their intervals, and select accuracies, of all rows.

    Soups are above, references below, each in the table's order. Reads `leaderboard.csv`; raises
    SoupError where it is not there.
    """
    rows = read_leaderboard(Path(folder))
    figure = new_figure(7.5, 1.5 + 0.3 * len(rows))
    axes = figure.add_subplot()
    positions = _positions(rows)
    report, select = (100 * rows[f"{name}_accuracy"].to_numpy() for name in ("report", "select"))
    low, high = (
        100 * rows[f"report_accuracy_{end}"].fillna(rows["report_accuracy"]).to_numpy()
        for end in ("low", "high")
    )
    for kind, colour in KINDS.items():
        own = (rows["kind"] == kind).to_numpy()
        if not own.any():
            continue
        y = positions[own]
        axes.hlines(y, low[own], high[own], colour, lw=2)
        label = f"{kind}: report, 95% interval"
        axes.plot(report[own], y, "o", color=colour, ms=6, zorder=4, label=label)
        look = {"mfc": "white", "mec": colour, "ms": 5, "mew": 1.1, "zorder": 3}
        axes.plot(select[own], y, "D", label=f"{kind}: select", **look)
    for row in np.flatnonzero(rows["learner"].to_numpy() == _first_baseline(rows))[:1]:
        label = f"{rows['learner'].iloc[row]}: report"
        axes.axvline(float(report[row]), color=GREY, lw=0.8, ls="--", zorder=0, label=label)
    axes.set_yticks(positions, [elided(name) for name in rows["learner"]])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.margins(x=0.04)
    grid_lines(axes, "x")
    axes.set_xlabel("accuracy, %")
    clean_axes(axes)
    legend_below(figure, [axes], columns_at_most=3)
    return figure


def _first_baseline(rows: pd.DataFrame) -> str | None:
    """The row that others are compared with first: the table has a column with its p-values."""
    compared = [name for name in rows.columns if f"{name}_p_holm" in rows.columns]
    return compared[0].removeprefix("vs_") if compared else None


def _positions(rows: pd.DataFrame) -> np.ndarray:
    """Where each row stands: references a little below the soups."""
    positions = np.arange(len(rows), dtype=float)
    soups = np.count_nonzero(rows["kind"].to_numpy() == "soup")
    positions[soups:] += GAP if 0 < soups < len(rows) else 0.0
    return positions


def costs(folder: str | Path) -> Figure:
    """What each row of the leaderboard has cost: seconds, passes over *select* and peak memory.

    What cross-fitting has cost, beside what the row itself has, is pale; a learner that cross-fits
    to choose has it in its own. Reads `leaderboard.csv`; raises SoupError where it is not there.
    """
    rows = read_leaderboard(Path(folder))
    figure = new_figure(10.5, 1.5 + row_height(len(rows)) * 1.15 * len(rows))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[1.15, 1.15, 1])
    own = [rows["seconds"], rows["forward_passes"] + rows["backward_passes"]]
    beside = [
        rows["out_of_fold_seconds"],
        rows["out_of_fold_forward_passes"] + rows["out_of_fold_backward_passes"],
    ]
    positions = _positions(rows)
    colours = [KINDS[kind] for kind in rows["kind"]]
    for axes, values, more, label in zip(
        panels, own, beside, ["seconds", "passes over select"], strict=False
    ):
        values, more = values.to_numpy(), more.fillna(0.0).to_numpy()
        axes.barh(positions, values, height=0.72, color=colours)
        axes.barh(positions, more, left=values, height=0.72, color=colours, alpha=0.3)
        texts = [
            f"{_short(value)} + {_short(extra)}" if extra else _short(value)
            for value, extra in zip(values, more, strict=True)
        ]
        _write_beside(axes, positions, values + more, texts)
        axes.set_xlabel(label)
    memory = rows["peak_bytes"].to_numpy() / 2**30
    panels[2].barh(positions, memory, height=0.72, color=colours)
    _write_beside(panels[2], positions, memory, [_short(value) for value in memory])
    panels[2].set_xlabel("peak memory of the process, GiB")
    for axes in panels:
        axes.set_xlim(0, 1.35 * max((axes.dataLim.x1, 1e-9)))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=SMALL)
        grid_lines(axes, "x")
        clean_axes(axes)
    panels[0].set_yticks(positions, [elided(name) for name in rows["learner"]], fontsize=SMALL)
    panels[0].set_ylim(positions[-1] + 0.6, -0.6)
    panels[0].set_title("what choosing or learning has cost", loc="left", fontsize=TITLE)
    for kind in dict.fromkeys(rows["kind"]):
        panels[0].barh([0], [0], color=KINDS[kind], label=kind)
    if any(more.fillna(0.0).any() for more in beside):
        panels[0].barh([0], [0], color=BLUE, alpha=0.3, label="+ cross-fitting it, for the table")
    legend_below(figure, [panels[0]], columns_at_most=3)
    if rows["learner"].str.startswith("ensemble_").any():
        remark_above(figure, "ensembles cost nothing to choose: each prediction runs all of them")
    return figure


def _short(number: float) -> str:
    """Two digits behind the point, or none of a large number."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number < 10 else f"{number:,.0f}"


def _write_beside(axes: Axes, y: np.ndarray, ends: np.ndarray, texts: list[str]) -> None:
    for place, end, text in zip(y, ends, texts, strict=True):
        look = {"textcoords": "offset points", "va": "center", "fontsize": 7, "color": INK}
        axes.annotate(text, (end, place), xytext=(3, 0), **look)
