"""The picture of soups of fewer ingredients, as 2203.05482 and 2407.03641 have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inputs.figures import (
    BLUE,
    GREY,
    INK,
    LABEL,
    ORANGE,
    TITLE,
    clean_axes,
    grid_lines,
    legend_below,
    new_figure,
    remark_above,
)
from soups.plots.reading import find_report, read_table, report_file
from soups.reports.tables import NORMAL_95

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Which ingredients a soup is of; what a report of type `subsets` calls them.
BEST, REMOVED, RANDOM = "best n", "without the best n", "random n"
LOOKS = {
    "best_single": {"color": INK, "marker": "", "ls": "--", "lw": 1.2},
    "uniform": {"color": BLUE, "marker": "o", "ms": 4, "lw": 1.4},
    "greedy": {"color": ORANGE, "marker": "s", "ms": 4, "lw": 1.4},
}


def subsets(folder: str | Path, report: str | None = None) -> Figure:
    """Accuracy on *report* against the number of ingredients, and against the best ones removed.

    Reads a report of type `subsets`, the row `report` of the config if there are several. Raises
    SoupError where there is none.
    """
    stem, remark = find_report(Path(folder), "subsets", report, "subsets: {}")
    table = read_table(report_file(stem, ".csv"), texts=("of", "soup"))
    return draw_subsets(table.to_dict("records"), remark)


def draw_subsets(rows: Sequence[Mapping[str, Any]], remark: str) -> Figure:
    """Draw the rows of the report's table: the best n on the left, all but the best n right.

    Random soups are a band from the least to the largest, with their mean.
    """
    figure = new_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_random(left, [row for row in rows if row["of"] == RANDOM])
    for axes, of in ((left, BEST), (right, REMOVED)):
        for soup, look in LOOKS.items():
            own = [row for row in rows if row["of"] == of and row["soup"] == soup]
            counts = [row["count"] for row in own]
            axes.plot(counts, [100 * row["accuracy"] for row in own], label=soup, **look)
        axes.locator_params(axis="x", integer=True, nbins=9)
        grid_lines(axes, "y")
        clean_axes(axes)
    left.set_xlabel("ingredients, the best on select first", fontsize=LABEL)
    right.set_xlabel("how many of the best are taken out", fontsize=LABEL)
    left.set_ylabel("accuracy on report, %", fontsize=LABEL)
    left.set_title("soups of the best n", loc="left", fontsize=TITLE)
    right.set_title("soups without the best n", loc="left", fontsize=TITLE)
    _draw_ruler(right, float(np.median([row["accuracy_error"] for row in rows])))
    legend_below(figure, [left], columns_at_most=4)
    remark_above(figure, remark)
    return figure


def _draw_random(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    counts = sorted({row["count"] for row in rows})
    values = [[100 * row["accuracy"] for row in rows if row["count"] == n] for n in counts]
    low, high = [min(own) for own in values], [max(own) for own in values]
    axes.fill_between(counts, low, high, color=GREY, alpha=0.25, lw=0)
    label = f"uniform, random n: mean and range of {len(values[0])} orders"
    axes.plot(counts, [np.mean(own) for own in values], color=GREY, lw=1.4, label=label)


def _draw_ruler(axes: Axes, error: float) -> None:
    """How long the 95% interval of one point is, which the lines would bury."""
    from matplotlib.transforms import blended_transform_factory

    middle = sum(axes.get_ylim()) / 2
    where = blended_transform_factory(axes.transAxes, axes.transData)
    ends = [middle - 100 * NORMAL_95 * error, middle + 100 * NORMAL_95 * error]
    axes.plot([1.04, 1.04], ends, color=INK, lw=1.2, marker="_", transform=where, clip_on=False)
    axes.annotate(
        "95% interval of one point",
        (1.04, middle),
        xycoords=where,
        xytext=(4, 0),
        textcoords="offset points",
        rotation=90,
        ha="left",
        va="center",
        fontsize=7,
        color=INK,
    )
