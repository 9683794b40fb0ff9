"""CSV tables of a results folder, as texts and then as numbers, with errors that name the cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from soups.csv_lines import check_whole
from soups.errors import SoupError

AGAIN = "run `python -m soups.learn` again, which writes it"


def read_texts(path: Path, *, needed: Sequence[str], may_be_empty: bool = False) -> pd.DataFrame:
    """The table at `path`, every cell as a text; SoupError where a column, every row, or a cell
    of a line is not there."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        if not isinstance(table.index, pd.RangeIndex):  # as pandas reads lines that are longer
            raise ValueError("a line has more cells than the header")
        check_whole(path)
    except ValueError as error:  # also an empty file, one that is not UTF-8, and pandas' own
        said = " ".join(str(error).split())
        raise SoupError(f"{path}: not a table ({said}); {AGAIN}") from error
    missing = [name for name in needed if name not in table]
    if missing:
        raise SoupError(f"{path}: there is no column {', '.join(missing)}; {AGAIN}")
    if table.empty and not may_be_empty:
        raise SoupError(f"{path}: has no rows; {AGAIN}")
    return table


def with_numbers(
    table: pd.DataFrame,
    path: Path,
    *,
    but: Sequence[str],
    needed: Sequence[str],
    known: Sequence[str] = (),
) -> pd.DataFrame:
    """The table with numbers in all columns that have nothing else, `but` some; an empty cell is
    NaN. SoupError where a cell of a `known` column is no number, or one of a `needed` is empty."""
    found = {}
    for name in table:
        cells = table[name]
        values = pd.Series(pd.to_numeric(cells.replace("", "nan"), errors="coerce"))
        empty = () if name in needed else ("", "nan")
        wrong = [
            cell
            for cell, bad in zip(cells, values.isna(), strict=True)
            if bad and cell not in empty
        ]
        if wrong and name in (*needed, *known):
            raise SoupError(f"{path}: {name} has {wrong[0]!r}; wanted a number; {AGAIN}")
        found[name] = cells if wrong or name in but else values
    return pd.DataFrame(found)
