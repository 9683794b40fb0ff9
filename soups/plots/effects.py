"""Pictures of what each ingredient does: Shapley values, and soups without one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from inputs.figures import (
    BLUE,
    GREY,
    INK,
    LABEL,
    ORANGE,
    SMALL,
    TITLE,
    clean_axes,
    grid_lines,
    legend_below,
    name_rows,
    new_figure,
    remark_above,
    row_height,
)
from soups.plots.reading import effects_of, find_report, read_record, read_table, report_file
from soups.reports.tables import Effects

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EffectPanel:
    """One column of a picture of effects; an ingredient that helps is above 0 or below, `good`."""

    label: str
    effects: Effects
    good: Literal["above", "below"]
    scale: float = 1.0


def shapley(folder: str | Path, report: str | None = None) -> Figure:
    """Each ingredient's part in what the uniform soup gains, in accuracy and in loss.

    Reads a report of type `shapley`, the row `report` of the config if there are several. Raises
    SoupError where there is none.
    """
    stem, remark = find_report(Path(folder), "shapley", report, "shapley: {}")
    table = read_table(report_file(stem, ".csv"), texts=("ingredient",))
    return draw_shapley(
        table["ingredient"].tolist(),
        effects_of(table, "accuracy"),
        effects_of(table, "loss"),
        remark,
    )


def leave_one_out(folder: str | Path, report: str | None = None) -> Figure:
    """What a soup loses or gains without each of its ingredients, in accuracy and in loss.

    Reads a report of type `leave_one_out`, the row `report` of the config if there are several.
    Raises SoupError where there is none.
    """
    example = "leave_one_out: {of: uniform}"
    stem, remark = find_report(Path(folder), "leave_one_out", report, example)
    table = read_table(report_file(stem, ".csv"), texts=("ingredient",))
    of = read_record(Path(folder))["config"]["reports"][stem.name]["of"]
    accuracy, loss = (effects_of(table, f"{metric}_change") for metric in ("accuracy", "loss"))
    return draw_leave_one_out(of, table["ingredient"].tolist(), accuracy, loss, remark)


def draw_shapley(names: Sequence[str], accuracy: Effects, loss: Effects, remark: str) -> Figure:
    """The largest part in accuracy above; of equals, the largest in loss."""
    panels = [
        EffectPanel("accuracy, points", accuracy, good="above", scale=100.0),
        EffectPanel("loss, nats", loss, good="below"),
    ]
    return draw_effects(
        names,
        best_first(accuracy, loss),
        panels,
        title="Shapley values of the ingredients",
        remark=remark,
    )


def draw_leave_one_out(
    of: str, names: Sequence[str], accuracy: Effects, loss: Effects, remark: str
) -> Figure:
    """The ingredient that `of` misses most above."""
    panels = [
        EffectPanel("change of accuracy, points", accuracy, good="below", scale=100.0),
        EffectPanel("change of loss, nats", loss, good="above"),
    ]
    return draw_effects(
        names,
        missed_first(accuracy, loss),
        panels,
        title=f"{of} without one ingredient",
        remark=remark,
    )


def best_first(accuracy: Effects, loss: Effects) -> list[int]:
    """The order of the largest accuracies, and among equals of the least losses."""
    return np.lexsort((loss.values, -accuracy.values)).tolist()


def missed_first(accuracy: Effects, loss: Effects) -> list[int]:
    """The order of the largest losses of accuracy, and among equals of the largest of loss."""
    return np.lexsort((-loss.values, accuracy.values)).tolist()


def draw_effects(
    names: Sequence[str],
    order: Sequence[int],
    panels: Sequence[EffectPanel],
    *,
    title: str,
    remark: str,
) -> Figure:
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
        grid_lines(axes, "x")
        axes.set_xlabel(panel.label, fontsize=LABEL)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=SMALL)
        clean_axes(axes)
    name_rows(columns[0], [names[k] for k in order])
    columns[0].set_ylim(count - 0.4, -0.6)
    columns[0].set_title(title, loc="left", fontsize=TITLE)
    legend_below(figure, columns, columns_at_most=3)
    remark_above(figure, f"{remark}; lines: 95% intervals")
    return figure
