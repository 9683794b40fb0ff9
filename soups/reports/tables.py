"""Numbers with their uncertainty, and the small tables that reports write; imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from tabulate import tabulate

from inputs.files import write_whole

# Half of a 95% interval in standard errors.
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Effects:
    """One number for each of some things, with its standard error."""

    values: Float64[np.ndarray, " things"]
    errors: Float64[np.ndarray, " things"]

    @property
    def low(self) -> Float64[np.ndarray, " things"]:
        """Where the 95% intervals begin."""
        return self.values - NORMAL_95 * self.errors

    @property
    def high(self) -> Float64[np.ndarray, " things"]:
        """Where the 95% intervals end."""
        return self.values + NORMAL_95 * self.errors

    def record(self, name: str, k: int) -> dict[str, float]:
        """Number k as columns of a table."""
        parts = {"": self.values, "_error": self.errors, "_low": self.low, "_high": self.high}
        return {f"{name}{part}": float(numbers[k]) for part, numbers in parts.items()}

    def cell(self, k: int, *, scale: float = 1.0, digits: int = 2) -> str:
        """Number k as text with its interval."""
        value, low, high = (scale * part[k] for part in (self.values, self.low, self.high))
        return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def standard_error(values: Float[Any, "*many rows"]) -> Float64[np.ndarray, "*many"]:
    """The standard error of the mean over the rows; infinite where there is one row."""
    values = np.asarray(values, dtype=np.float64)
    rows = values.shape[-1]
    if rows < 2:
        return np.full(values.shape[:-1], np.inf)
    return values.std(axis=-1, ddof=1) / rows**0.5


def beside(path: Path, ending: str) -> Path:
    """The file of a report that is called `path`: a row's name may have dots."""
    return path.with_name(f"{path.name}{ending}")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows, all with the same keys, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
    return path


def write_markdown(
    path: Path, title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], caption: str
) -> Path:
    """Write a table, names left and numbers right, under a title and above what it means."""
    align = ["left", *["right"] * (len(headers) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    table = tabulate(cells, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    write_whole(path, f"## {title}\n\n{table}\n\n{caption}\n")
    return path
