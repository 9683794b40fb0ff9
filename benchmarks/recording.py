"""Keeps what benchmarks measured in results/benchmarks.csv."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmarks.csv"


def append_rows(
    benchmark: str, rows: Iterable[Mapping[str, Any]], repeats: int, settings: str
) -> None:
    """Add one line per case and column; a row has its `case`, and numbers by column."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    origin = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": _processor(),
        "benchmark": benchmark,
        "settings": settings,
    }
    fields = [*origin, "case", "column", "value", "repeats"]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            for column, value in row.items():
                if column != "case" and value == value:
                    entry = {"column": column, "value": f"{value:.6g}", "repeats": repeats}
                    writer.writerow(origin | {"case": row["case"]} | entry)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
