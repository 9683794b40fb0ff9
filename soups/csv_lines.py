"""Whether a CSV file has all its cells, which pandas does not ask; no torch and no pandas."""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def check_whole(path: Path) -> None:
    """ValueError where a line has fewer cells than the header, as the last one has of a file that
    was cut off. Empty lines are none."""
    longest = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = len(next(lines, ()))
            for line in lines:
                if 0 < len(line) < header:
                    raise ValueError(
                        f"line {lines.line_num} has {len(line)} cells and the header {header}: "
                        "the file was cut off"
                    )
    except csv.Error as error:
        raise ValueError(str(error)) from error
    finally:
        csv.field_size_limit(longest)
