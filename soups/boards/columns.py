"""What the columns of a leaderboard are called, how their numbers are written, and which are shown.

The page, Markdown and LaTeX have it from here; CSV and Parquet have all columns, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "text", "percent", "points", "number", "probability", "count", "share", "seconds", "bytes"
]


@dataclass(frozen=True)
class Column:
    """A column of `leaderboard.csv` as it is shown.

    `low` and `high` are the columns with the ends of its interval. `better` says which end of it is
    the good one. `shown`: before a person chooses.
    """

    key: str
    header: str
    kind: Kind
    help: str = ""
    better: Literal["high", "low"] | None = None
    shown: bool = False
    low: str | None = None
    high: str | None = None


FIRST = (
    Column("run", "run", "text", "the run that the row is from"),
    Column("learner", "learner", "text", "the row's name in the config", shown=True),
    Column(
        "report_accuracy",
        "report %",
        "percent",
        "accuracy on images that nothing was learned or chosen on",
        "high",
        shown=True,
        low="report_accuracy_low",
        high="report_accuracy_high",
    ),
)
THEN = (
    Column(
        "out_of_fold_accuracy",
        "out of fold %",
        "percent",
        "accuracy on select, each image judged by a soup that was learned without it",
        "high",
        shown=True,
    ),
    Column("select_accuracy", "select %", "percent", "accuracy where it was learned", "high"),
    Column(
        "ingredients_used",
        "ingredients",
        "count",
        "how many ingredients of the zoo the row uses",
        shown=True,
    ),
    Column("report_worst_class", "worst class %", "percent", "accuracy on the worst class", "high"),
    Column("report_loss", "loss", "number", "mean −log probability of the label, nats", "low"),
    Column("report_loss_scaled", "loss, scaled", "number", "after one temperature", "low"),
    Column("report_brier", "Brier", "number", "mean squared error of the probabilities", "low"),
    Column("report_brier_scaled", "Brier, scaled", "number", "after one temperature", "low"),
    Column("report_ece", "ECE %", "percent", "expected calibration error, 15 bins", "low"),
    Column("report_ece_scaled", "ECE %, scaled", "percent", "after one temperature", "low"),
    Column("free_coefficients", "free numbers", "count", "numbers the learner could choose", "low"),
    Column("seconds", "seconds", "seconds", "to choose or to learn", "low", shown=True),
    Column("peak_bytes", "memory", "bytes", "peak while choosing or learning", "low", shown=True),
    Column("forward_passes", "passes forward", "number", "images over the size of select", "low"),
    Column("backward_passes", "passes back", "number", "images over the size of select", "low"),
)
# What is part of other cells, or no number.
OF_OTHERS = {"zoo_size", "ingredients", "kind", "notes", "tied_with_best"}
SHIFTED = re.compile(r"report_(.+)_accuracy")
LOW_OF_BASELINE = re.compile(r"vs_(.+)_low")
OF_DIFFERENCE = ("", "_low", "_high", "_p", "_p_holm")


def columns_of(table: Iterable[str], texts: Collection[str] = ()) -> list[Column]:
    """The columns that the table has, in the order in which they are read: the known ones, and
    after them what else there is: numbers, but for those that are `texts`."""
    names = [str(name) for name in table]
    of_baselines = [c for k, name in enumerate(baselines_of(names)) for c in _against(name, k == 0)]
    known = [column for column in (*FIRST, *of_baselines, *THEN) if column.key in names]
    ends = {end for column in known for end in (column.low, column.high)}
    taken = {column.key for column in known} | ends | OF_OTHERS
    unknown = [_unknown(name, name in texts) for name in names if name not in taken]
    return [
        column
        if column.low in names and column.high in names
        else replace(column, low=None, high=None)
        for column in [*known, *unknown]
    ]


def baselines_of(table: Iterable[str]) -> list[str]:
    """The rows that the others of a table are compared with, by its columns `vs_<row>`."""
    names = [str(name) for name in table]
    found = [match[1] for name in names if (match := LOW_OF_BASELINE.fullmatch(name))]
    return [name for name in found if f"vs_{name}" in names]


def numbers_of(table: Iterable[str]) -> list[str]:
    """Those of the table's columns that are known to have numbers alone."""
    names = [str(name) for name in table]
    known = {column.key for column in (*FIRST, *THEN) if column.kind != "text"}
    known |= {end for column in FIRST for end in (column.low, column.high) if end}
    known |= {f"vs_{name}{end}" for name in baselines_of(names) for end in OF_DIFFERENCE}
    return [name for name in names if name in known]


def _against(baseline: str, shown: bool) -> tuple[Column, ...]:
    key = f"vs_{baseline}"
    return (
        Column(
            key,
            f"vs {baseline}",
            "points",
            f"report accuracy minus that of {baseline}, on the same images, in points",
            "high",
            shown,
            low=f"{key}_low",
            high=f"{key}_high",
        ),
        Column(
            f"{key}_p_holm",
            f"p vs {baseline}",
            "probability",
            "exact McNemar test, corrected by Holm for all rows",
            "low",
        ),
        Column(f"{key}_p", f"p vs {baseline}, alone", "probability", "exact McNemar test", "low"),
    )


def _unknown(name: str, is_text: bool) -> Column:
    if is_text:
        return Column(name, name.replace("_", " "), "text")
    shifted = SHIFTED.fullmatch(name)
    if shifted:
        header = shifted[1].replace("_", " ")
        return Column(name, f"{header} %", "percent", f"report accuracy under {header}", "high")
    kind: Kind = "percent" if name.endswith("_accuracy") else "number"
    return Column(name, name.replace("_", " ") + " %" * (kind == "percent"), kind)
