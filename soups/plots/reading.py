"""What pictures read from a results folder, and what to do where it is not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inputs.config import nearest
from soups.csv_lines import check_whole
from soups.errors import SoupError
from soups.reports.tables import Effects

if TYPE_CHECKING:
    import pandas as pd

LEARN = "`python -m soups.learn CONFIG`"


def needed(path: Path, what: str, remedy: str) -> Path:
    """The path, where it is a file; SoupError that says what is missing, and what makes it."""
    if path.is_file():
        return path
    raise SoupError(f"{path}: is not there; wanted {what}: {remedy}")


def read_table(path: Path, *, texts: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file with the columns `texts` as they stand there: '00' is a name, not a number.

    Raises SoupError for a file that is no such table.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            # A name may well be `none`; a number that is not known is written as nothing or nan.
            path,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values=["", "nan"],
        )
        check_whole(path)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise SoupError(
            f"{path}: is not a table ({reason}); remove it, and run {LEARN} again"
        ) from error
    missing = [name for name in texts if name not in table.columns]
    if missing:
        raise SoupError(
            f"{path}: has no column {missing[0]!r}; it was not written by this version: run "
            f"{LEARN} again"
        )
    return table


def read_leaderboard(folder: Path) -> pd.DataFrame:
    """The rows of a run's leaderboard, in its order."""
    path = needed(
        folder / "leaderboard.csv", "the leaderboard of a run", f"{LEARN} writes it, as its last"
    )
    return read_table(path, texts=("learner", "kind"))


def read_record(folder: Path) -> dict[str, Any]:
    """What a run says of itself."""
    path = needed(folder / "run.json", "the record of a run", f"{LEARN} writes it")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise SoupError(
            f"{path}: is not the record of a run ({error}); run {LEARN} again"
        ) from error


def find_report(folder: Path, kind: str, report: str | None, example: str) -> tuple[Path, str]:
    """Where a report of this kind is, without an ending, and what its scores are of.

    `report` is its row in the config; None where the run has one of the kind. `example` is how a
    config asks for one. Raises SoupError where there is none, or a choice.
    """
    record = read_record(folder)
    rows = [
        row for row, settings in record["config"]["reports"].items() if settings["type"] == kind
    ]
    if report is None and len(rows) > 1:
        raise SoupError(
            f"{folder}: has {len(rows)} reports of type {kind!r}; say which with report=: "
            f"{', '.join(map(repr, rows))}"
        )
    if report is not None and report not in rows and rows:
        raise SoupError(
            f"{folder}: has no report {report!r} of type {kind!r}{nearest(report, rows)}"
        )
    row = report or next(iter(rows), kind)
    if row not in rows:
        raise SoupError(
            f"{folder / 'reports' / row}: is not there; wanted a report of type {kind!r}: put "
            f"`{example}` under `reports:` in the config, and {LEARN} makes it"
        )
    return folder / "reports" / row / row, record.get("reports", {}).get(row, {}).get("remark", "")


def report_file(stem: Path, ending: str) -> Path:
    """A file of a report that is in the config; SoupError where the run has not made it yet."""
    path = stem.with_name(f"{stem.name}{ending}")
    return needed(path, "what the report has found", f"{LEARN} makes it again where it is missing")


def effects_of(table: pd.DataFrame, name: str) -> Effects:
    """The numbers `name` of a table that a report has written, with their errors."""
    return Effects(*(table[f"{name}{part}"].to_numpy(dtype=float) for part in ("", "_error")))
