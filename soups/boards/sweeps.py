"""A sweep on the page: every learner against each baseline, over the runs that a person chooses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from soups.boards.columns import Column, columns_of
from soups.boards.folders import MEANS, SweepFolder
from soups.boards.payload import plain
from soups.boards.standing import Line, listed, points
from soups.sweeps.tables import ALL

COLUMNS = (
    Column("learner", "learner", "text", "the row's name in the config", shown=True),
    Column(
        "difference",
        "vs the baseline",
        "points",
        "mean report accuracy minus that of the baseline on the same images, in points",
        "high",
        shown=True,
        low="difference_low",
        high="difference_high",
    ),
    Column("ahead", "splits ahead", "share", "splits in which it was ahead, of all", shown=True),
    Column("runs", "runs", "count", "runs that have both rows", shown=True),
    Column("report_accuracy", "report %", "percent", "mean over the runs", "high", shown=True),
    Column("seconds", "seconds", "seconds", "mean over the runs", "low", shown=True),
)
# What is part of other cells, or says which runs the line is over.
OF_OTHERS = {"difference_low", "difference_high", "splits", "splits_ahead", "kind", "is_baseline"}


def sweep_payload(sweep: SweepFolder) -> dict[str, Any]:
    """A sweep: what can be chosen, the columns, and a line for each comparison and baseline."""
    lines = [*_lines(sweep)]
    names = {str(name): None for line in lines for name in line}
    chosen = ("against", *sweep.keys)
    taken = {*chosen, *OF_OTHERS, *(column.key for column in COLUMNS)}
    columns = [column for column in COLUMNS if column.key in names]
    columns += columns_of(name for name in names if name not in taken)
    return {
        "name": sweep.folder.resolve().name,
        "keys": [
            {"column": key, "values": [*{line[key]: None for line in lines}], "all": ALL}
            for key in chosen
        ],
        "columns": [asdict(column) for column in columns],
        "rows": [{key: plain(value) for key, value in line.items()} for line in lines],
    }


def sweep_sentences(sweep: SweepFolder) -> list[str]:
    """Which learners are ahead of the first baseline over all runs, and which are behind."""
    lines = sweep.comparisons.to_dict(orient="records")
    if not lines:
        return ["No learner was compared with another: name baselines under `sweep.compare`."]
    baseline = lines[0]["baseline"]
    lines = [line for line in lines if line["baseline"] == baseline]
    for key in sweep.keys:
        values = [line[key] for line in lines]
        label = ALL if ALL in values else values[0]
        lines = [line for line in lines if line[key] == label]
    references = {row["learner"] for row in _rows(sweep) if row["kind"] == "reference"}
    lines = [line for line in lines if line["learner"] not in references]
    lines.sort(key=lambda line: -line["mean_points"])
    ahead = [line for line in lines if line["low_points"] > 0]
    behind = [line for line in lines if line["high_points"] < 0]
    level = [line for line in lines if line not in ahead and line not in behind]
    found = []
    if ahead:
        best = ahead[0]
        found.append(
            f"Use {best['learner']}: over {best['runs']:.0f} runs it is {_gain(best)} points ahead "
            f"of {baseline}."
        )
        if ahead[1:]:
            found.append(f"Also ahead: {_with_gains(ahead[1:])}.")
    elif lines:
        found.append(
            f"No learner is surely ahead of {baseline} over {lines[0]['runs']:.0f} runs: the best, "
            f"{lines[0]['learner']}, is at {_gain(lines[0])} points."
        )
    if level:
        found.append(f"Not told from {baseline}: {listed([line['learner'] for line in level])}.")
    if behind:
        found.append(f"Behind it: {_with_gains(behind)}.")
    return [
        *found,
        "Intervals are 95%, over other splits and images, and over zoos where there are three; "
        "each by itself: they are not corrected for the number of learners.",
    ]


def _gain(line: Line) -> str:
    mean, low, high = (points(line[name] / 100) for name in MEANS)
    return f"{mean} [{low}, {high}]"


def _with_gains(lines: Sequence[Line]) -> str:
    return listed([f"{line['learner']} {_gain(line)}" for line in lines])


def _lines(sweep: SweepFolder) -> Iterator[dict[str, Any]]:
    """Each comparison with the means of its runs, and each baseline with none."""
    rows: dict[str, list[Line]] = {}
    for row in _rows(sweep):
        rows.setdefault(row["learner"], []).append(row)
    places: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in sweep.comparisons.to_dict(orient="records"):
        labels = {key: line[key] for key in sweep.keys}
        against = {"against": line["baseline"]}
        places.setdefault((line["baseline"], *labels.values()), labels | against)
        mean, low, high = (line[name] / 100 for name in MEANS)
        yield (
            {str(k): v for k, v in line.items() if k not in (*MEANS, "baseline")}
            | against
            | {"difference": mean, "difference_low": low, "difference_high": high}
            | {"ahead": f"{line['splits_ahead']:.0f}/{line['splits']:.0f}"}
            | _means(rows.get(line["learner"], []), labels)
        )
    for (baseline, *_), place in places.items():
        labels = {key: place[key] for key in sweep.keys}
        means = _means(rows.get(baseline, []), labels)
        yield place | {"learner": baseline, "is_baseline": True} | means


def _rows(sweep: SweepFolder) -> Sequence[Line]:
    return [] if sweep.runs is None else sweep.runs.to_dict(orient="records")


def _means(rows: Sequence[Line], labels: Mapping[str, str]) -> dict[str, Any]:
    """Of a learner's rows in the runs with these labels: kind, accuracy on report, seconds."""
    chosen = [row for row in rows if all(label in (ALL, row[key]) for key, label in labels.items())]
    if not chosen:
        return {"kind": "soup"}
    names = [name for name in ("report_accuracy", "seconds") if name in chosen[0]]
    means = {name: statistics.fmean(row[name] for row in chosen) for name in names}
    return {"kind": chosen[0]["kind"]} | means
