"""Results folders as they are read: a run, or a sweep, and of either what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool
from pydantic import BaseModel, ValidationError

from inputs.config import DataConfig
from soups.boards.columns import numbers_of
from soups.boards.csv_tables import AGAIN, read_texts, with_numbers
from soups.errors import SoupError
from soups.examples import FILE as EXAMPLES
from soups.examples import ReportExamples
from soups.readings import count_readings, earlier_readings
from soups.rows import REPORT, load_predictions
from soups.sweeps.tables import ALL, report_images

if TYPE_CHECKING:
    from merge.coefficients import Coefficients

LEADERBOARD, RECORD, PREDICTIONS = "leaderboard.csv", "run.json", "predictions.npz"
COMPARISONS, RUNS = "comparisons.csv", "runs.csv"
TEXTS = ("learner", "kind", "ingredients", "baseline", "notes", "tied_with_best")
COUNTS = ("runs", "splits", "splits_ahead")
MEANS = ("mean_points", "low_points", "high_points")
KINDS = ("soup", "reference")


class _Learned(BaseModel):
    record: dict[str, Any] = {}


class _Zoo(BaseModel):
    path: str | None = None


class _Config(BaseModel):
    name: str
    data: DataConfig
    zoo: _Zoo = _Zoo()


class Record(BaseModel):
    """What is read of `run.json`."""

    config: _Config
    seed: int = 0
    started: str = ""
    commit: str | None = None
    device: str = ""
    checkpoints: dict[str, Any] = {}
    learners: dict[str, _Learned] = {}


@dataclass(frozen=True)
class RunFolder:
    """A run: its table, a line for each row; its record; and what else there is.

    Runs with the same `images` have the same report images in the same order. `right` says of each
    row, where that was kept, on which of them it is right. `readings` says how often rows were
    scored on them, where that was counted.
    """

    folder: Path
    record: Record
    table: pd.DataFrame
    images: str
    right: Mapping[str, Bool[np.ndarray, " images"]]
    examples: ReportExamples | None
    coefficients: Mapping[str, Coefficients]
    readings: int = 0

    @property
    def name(self) -> str:
        return self.record.config.name

    @property
    def report_count(self) -> int | None:
        """How many images *report* has, where that was kept."""
        return next((len(right) for right in self.right.values()), None)


@dataclass(frozen=True)
class SweepFolder:
    """A sweep: its comparisons, and the rows of its runs where they are there.

    `keys` are the columns that say which runs a comparison is over: a label of an axis, or `all`.
    """

    folder: Path
    keys: tuple[str, ...]
    comparisons: pd.DataFrame
    runs: pd.DataFrame | None


def read_folders(folders: Sequence[Path]) -> list[RunFolder | SweepFolder]:
    """The runs and sweeps in these folders, or directly below those that are neither.

    Raises SoupError for a folder that has none, that is given twice, or whose files are broken.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for place in _places(folder):
            if place.resolve() in found:
                raise SoupError(f"{place}: is given twice; give each results folder once")
            found[place.resolve()] = place
    return [read_run(p) if _is_run(p) else read_sweep(p) for p in found.values()]


def read_run(folder: Path) -> RunFolder:
    """The run in a results folder; SoupError where one of its files is broken."""
    record = _record(folder / RECORD)
    examples, right = None, {}
    if (folder / EXAMPLES).exists():
        examples = ReportExamples.load(folder / EXAMPLES)
        right = {row: examples.right(row) for row in examples.rows}
    elif (folder / PREDICTIONS).exists():
        sets = load_predictions(folder / PREDICTIONS)
        right = {row: of_row[REPORT] for row, of_row in sets.items() if REPORT in of_row}
    table = _leaderboard(folder / LEADERBOARD)
    images = report_images(record.config.data)
    coefficients = _coefficients(folder, [*table["learner"]])
    readings = count_readings(earlier_readings(folder / RECORD)).times
    return RunFolder(folder, record, table, images, right, examples, coefficients, readings)


def read_sweep(folder: Path) -> SweepFolder:
    """The tables of a sweep; SoupError where one of them is broken."""
    path = folder / COMPARISONS
    found = read_texts(path, needed=("baseline", "learner", *COUNTS, *MEANS), may_be_empty=True)
    names = [*found]
    keys = tuple(names[names.index("learner") + 1 : names.index("runs")])
    comparisons = with_numbers(found, path, but=("baseline", "learner", *keys), needed=MEANS)
    runs = None
    path = folder / RUNS
    if path.exists():
        found = read_texts(path, needed=("learner", "kind", "report_accuracy", *keys[1:]))
        if keys and keys[0] not in found:  # no axis sets the zoo
            found.insert(0, keys[0], ALL)
        labels = [*found][: [*found].index("learner")]
        runs = with_numbers(
            found, path, but=("learner", "kind", *labels), needed=("report_accuracy",)
        )
    return SweepFolder(folder, keys, comparisons, runs)


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SoupError(f"{folder}: is no folder; give results folders, such as results/digits")
    if _is_run(folder) or _is_sweep(folder):
        return [folder]
    below = sorted(p for p in folder.iterdir() if p.is_dir() and (_is_run(p) or _is_sweep(p)))
    if not below:
        raise SoupError(
            f"{folder}: found no run in it or directly below; wanted a folder with {LEADERBOARD} "
            f"and {RECORD}, or with {COMPARISONS}, as `python -m soups.learn` writes them"
        )
    return below


def _is_run(folder: Path) -> bool:
    return (folder / LEADERBOARD).exists() and (folder / RECORD).exists()


def _is_sweep(folder: Path) -> bool:
    return (folder / COMPARISONS).exists()


def _record(path: Path) -> Record:
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise SoupError(
            f"{path}: not the record of a run that this version can read ({problems}); run "
            "`python -m soups.learn` again, which writes it"
        ) from error


def _leaderboard(path: Path) -> pd.DataFrame:
    texts = read_texts(path, needed=("learner", "kind", "report_accuracy"))
    table = with_numbers(
        texts, path, but=TEXTS, needed=("report_accuracy",), known=numbers_of(texts)
    )
    problems = []
    learners = [*table["learner"]]
    twice = sorted({name for name in learners if learners.count(name) > 1})
    if twice:
        problems.append(f"these learners are there twice: {', '.join(twice)}")
    odd = sorted({*table["kind"]} - {*KINDS})
    if odd:
        problems.append(f"found kind {', '.join(map(repr, odd))}; wanted soup or reference")
    if not table["report_accuracy"].between(0, 1).all():
        problems.append("an accuracy in report_accuracy is not between 0 and 1")
    if problems:
        raise SoupError(f"{path}: {'; '.join(problems)}; {AGAIN}")
    return _with_named_baselines(table)


def _with_named_baselines(table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns `vs_<row>` where an earlier version has named the row in a cell."""
    if not {"baseline", "difference", "difference_low", "difference_high"} <= {*table}:
        return table
    for name in filter(None, table["baseline"].unique()):
        own = (table["baseline"] == name) & (table["learner"] != name)
        for end in ("", "_low", "_high"):
            table[f"vs_{name}{end}"] = table[f"difference{end}"].where(own)
    return table.drop(columns=["baseline", *(f"difference{end}" for end in ("", "_low", "_high"))])


def _coefficients(folder: Path, learners: Sequence[str]) -> dict[str, Coefficients]:
    from merge.coefficients import Coefficients

    paths = {row: folder / "coefficients" / f"{row}.json" for row in learners}
    return {row: Coefficients.load(path) for row, path in paths.items() if path.is_file()}
