"""The picture of a sweep: how far learners are from a baseline, as small multiples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from inputs.config import nearest
from inputs.figures import (
    COLOURS,
    INK,
    LABEL,
    MARKERS,
    SMALL,
    clean_axes,
    grid_lines,
    name_rows,
    new_figure,
)
from soups.errors import SoupError
from soups.plots.reading import LEARN, needed, read_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# What the tables call the runs of all labels of an axis.
ALL = "all"


@dataclass(frozen=True)
class Compared:
    """How far a learner is from the baseline, in points, with the ends of its interval.

    Over the runs of `zoo`, or of all, with the labels `fixed`.
    """

    learner: str
    zoo: str
    fixed: Mapping[str, str]
    mean: float
    low: float
    high: float


def comparisons(folder: str | Path, baseline: str | None = None) -> Figure:
    """How far the soups of a sweep are from those of a baseline, with their intervals.

    Reads `comparisons.csv` and `runs.csv` in the sweep's folder; without `baseline`, the first one
    in it. Raises SoupError where they are not there, or have no such baseline.
    """
    folder = Path(folder)
    remedy = f"{LEARN} writes it for a config with `sweep:`"
    path = needed(folder / "comparisons.csv", "the comparisons of a sweep", remedy)
    columns = [*read_table(path, texts=("baseline", "learner", "runs")).columns]
    texts = columns[: columns.index("runs")]
    table = read_table(path, texts=texts)
    runs = read_table(
        needed(folder / "runs.csv", "the runs of a sweep", remedy), texts=("learner", "kind")
    )
    soups = [*dict.fromkeys(runs["learner"][runs["kind"] == "soup"])]
    known = [*dict.fromkeys(table["baseline"])]
    baseline = baseline or str(next(iter(known), ""))
    if baseline not in known:
        raise SoupError(
            f"{path}: has no baseline {baseline!r}{nearest(baseline, known)}; name it in "
            f"sweep.compare, and run {LEARN} again"
        )
    zoo, axes = texts[2], texts[3:]
    own = cast(
        "pd.DataFrame", table[(table["baseline"] == baseline) & table["learner"].isin(soups)]
    )
    found = [
        Compared(
            learner=row["learner"],
            zoo=row[zoo],
            fixed={axis: row[axis] for axis in axes if row[axis] != ALL},
            mean=row["mean_points"],
            low=row["low_points"],
            high=row["high_points"],
        )
        for row in own.to_dict("records")
    ]
    return draw_comparisons(found, baseline, axes)


def draw_comparisons(found: Sequence[Compared], baseline: str, axes: Sequence[str]) -> Figure:
    """Draw differences to one baseline with their intervals.

    A row of panels for each zoo and one for all, a column for each label of the first of `axes`; in
    a panel the learners, each with a mark for each label of the second axis. Further axes are
    averaged over.
    """
    columns_of = axes[0] if axes else None
    marks_of = axes[1] if len(axes) == 2 else None
    # What is of all zoos comes last.
    zoos = sorted(dict.fromkeys(one.zoo for one in found), key=lambda zoo: zoo == ALL)
    learners = [*dict.fromkeys(one.learner for one in found)]
    wanted = {axis for axis in (columns_of, marks_of) if axis}
    shown = [one for one in found if set(one.fixed) == wanted]
    columns = [*dict.fromkeys(one.fixed[columns_of] for one in shown)] if columns_of else [""]
    marks = [*dict.fromkeys(one.fixed[marks_of] for one in shown)] if marks_of else [""]
    height = max(0.3, 0.13 * len(marks)) * len(learners) + 0.9
    figure = new_figure(2.2 + 2.6 * len(columns), height * len(zoos) + 0.8)
    grid = figure.subplots(len(zoos), len(columns), sharex=True, sharey=True, squeeze=False)
    for one in shown:
        column = columns.index(one.fixed[columns_of] if columns_of else "")
        mark = marks.index(one.fixed[marks_of] if marks_of else "")
        panel = grid[zoos.index(one.zoo), column]
        _draw(panel, one, learners.index(one.learner), mark, len(marks))
    for row, zoo in enumerate(zoos):
        for column, label in enumerate(columns):
            of_zoo = [] if len(zoos) == 1 else ["all zoos" if zoo == ALL else f"zoo {zoo}"]
            of_column = [f"{columns_of} {label}"] if columns_of else []
            _dress(grid[row, column], ", ".join(of_zoo + of_column))
        name_rows(grid[row, 0], learners)
    grid[0, 0].set_ylim(len(learners) - 0.4, -0.6)
    figure.supxlabel(
        f"report accuracy minus that of {baseline}, points; 95% intervals", fontsize=LABEL
    )
    if marks_of:
        handles = [
            grid[0, 0].plot([], [], MARKERS[m % len(MARKERS)], ms=4.5, color=_colour(m))[0]
            for m in range(len(marks))
        ]
        names = [f"{marks_of} {label}" for label in marks]
        figure.legend(
            handles,
            names,
            loc="outside upper center",
            ncols=len(marks),
            frameon=False,
            fontsize=SMALL,
        )
    return figure


def _draw(axes: Axes, one: Compared, learner: int, mark: int, marks: int) -> None:
    y = learner + (mark - (marks - 1) / 2) * 0.75 / marks
    axes.hlines(y, one.low, one.high, _colour(mark), lw=1.4)
    axes.plot(one.mean, y, MARKERS[mark % len(MARKERS)], ms=4, color=_colour(mark), zorder=3)


def _dress(axes: Axes, title: str) -> None:
    axes.axvline(0, color=INK, lw=0.8)
    grid_lines(axes, "x")
    axes.set_title(title, loc="left", fontsize=LABEL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.locator_params(axis="x", nbins=6)
    clean_axes(axes)


def _colour(mark: int) -> str:
    return COLOURS[mark % len(COLOURS)]
