"""MEHL-Soup+ with all ingredients in memory at once, in few bits, beside blocks of four in fp32.

    python benchmarks/compressed_rows.py              # ViT-S/16, 72 ingredients
    python benchmarks/compressed_rows.py --quick      # ViT-Ti/16, 8 ingredients

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from recording import append_rows
from soup_construction import (
    BATCH,
    FULL,
    IMAGES,
    QUICK,
    Case,
    Size,
    measure_case,
    measure_limits,
    require_memory,
    run_baseline,
    run_fresh,
    write_zoo,
)

from soups.deltas import row_bytes
from soups.learners.mehl import mehl
from soups.learners.registry import MehlLayerwise, Precision
from soups.session import Session

BLOCK = 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4", "sign")


@dataclass(frozen=True)
class Rounded(Case):
    """MEHL-Soup+ with rows in one precision."""

    precision: Precision = "fp32"


def cases_of(size: Size) -> list[Case]:
    """One model, blocks of four in fp32, and all ingredients at once in every precision."""
    blocks = Rounded(
        f"fp32 B={BLOCK}", "mehl", ingredients=size.most, block=BLOCK, copies=BLOCK + 1
    )
    return [
        Case("one model", "baseline", passes=3),
        blocks,
        *(
            Rounded(
                f"{precision} B={size.most}",
                "mehl",
                ingredients=size.most,
                block=size.most,
                passes=3,
                copies=size.most * row_bytes(1 << 20, precision) // (4 << 20) + 2,
                precision=precision,
            )
            for precision in PRECISIONS
        ),
    ]


# --- the parent process --------------------------------------------------------------------------


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the ingredients are kept (6.4 GB); else temporary.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; medians count.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every process.")] = (
        os.cpu_count() or 1
    ),
    only: Annotated[str, typer.Option(help="Run the cases with this in their name.")] = "",
    quick: Annotated[bool, typer.Option(help="A small model and few ingredients.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure seconds per step and memory of rows in each precision."""
    size = QUICK if quick else FULL
    cases = cases_of(size)
    if case:
        torch.set_num_threads(threads)
        print(json.dumps(measure(size, case, folder or Path())))
        return
    blocks = cases[1]
    cases = [c for c in cases if only in c.name or c.learner == "baseline" or c == blocks]
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        write_zoo(folder, size, size.most)
        limits = run_fresh("limits", size, folder, threads, __file__)
        runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in cases}
        for repeat in range(repeats):
            for c in cases:
                print(f"{repeat + 1}/{repeats}  {c.name}", file=sys.stderr, flush=True)
                require_memory(c, limits["weight_bytes"])
                runs[c.name].append(run_fresh(c.name, size, folder, threads, __file__))
    medians = {
        name: {key: median(m[key] for m in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    rows = table(cases, medians, limits)
    report(rows)
    if record and not quick:
        append_rows(Path(__file__).stem, rows, repeats, f"{threads} threads")


def table(
    cases: list[Case], medians: dict[str, dict[str, float]], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per case, with ratios to one model and to the rows of the blocks."""
    one_model, blocks = medians[cases[0].name], medians[cases[1].name]
    rows = []
    for c in cases:
        found = medians[c.name]
        row = {
            "case": c.name,
            "step_seconds": found["step_seconds"],
            "step_over_one_model": found["step_seconds"] / one_model["step_seconds"],
            "excess_bytes": found["peak_bytes"] - one_model["peak_bytes"],
        }
        if isinstance(c, Rounded):
            held = c.block * row_bytes(int(limits["weight_bytes"]) // 4, c.precision)
            steps = c.published_steps
            row |= {
                "step_over_blocks": found["step_seconds"] / blocks["step_seconds"],
                "row_bytes": found["row_bytes"],
                "row_bytes_predicted": held,
                "row_bytes_over_blocks": found["row_bytes"] / blocks["row_bytes"],
                "load_seconds": found["run_seconds"] - found["all_steps_seconds"],
                "published_run_steps": steps,
                "published_run_seconds_computed": found["run_seconds"]
                - found["all_steps_seconds"]
                + steps * found["step_seconds"],
            }
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    shown = pd.DataFrame(rows)
    for column in [c for c in shown if "_bytes" in c and "over" not in c]:
        shown[column.replace("_bytes", "_MB")] = (shown.pop(column) / 1e6).round(1)
    memory = ["case", "row_MB", "row_MB_predicted", "row_bytes_over_blocks", "excess_MB"]
    time = ["case", "step_seconds", "step_over_one_model", "step_over_blocks", "load_seconds"]
    run = ["case", "published_run_steps", "published_run_seconds_computed"]
    for columns, digits in ((memory, ".4g"), (time, ".4g"), (run, ",.0f")):
        print(shown[columns].to_markdown(index=False, floatfmt=digits), end="\n\n")


# --- the fresh process ---------------------------------------------------------------------------


def measure(size: Size, name: str, folder: Path) -> dict[str, float]:
    """Run the case `name` here and now."""
    if name == "limits":
        return measure_limits(size, folder)
    case = next(c for c in cases_of(size) if c.name == name)
    return measure_case(
        size, case, folder, run_rounded if isinstance(case, Rounded) else run_baseline
    )


def run_rounded(session: Session, case: Case) -> None:
    assert isinstance(case, Rounded)
    assert len(session.select) == IMAGES
    settings = MehlLayerwise(
        batch_size=BATCH,
        block_size=case.block,
        inner_epochs=case.passes,
        precision=case.precision,
    )
    mehl(session, settings)


if __name__ == "__main__":
    typer.run(main)
