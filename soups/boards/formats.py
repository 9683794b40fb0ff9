"""A task's table as CSV, Markdown, LaTeX and Parquet."""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from inputs.budget import format_bytes
from inputs.files import write_whole
from soups.boards.columns import Column, columns_of
from soups.boards.joining import Task

Line = Mapping[Hashable, Any]


def write_formats(task: Task, path: Path, *, about: Sequence[str]) -> list[Path]:
    """Write `<path>.csv` and `.parquet` (all columns, full precision), and `.md` and `.tex` (the
    main columns, to be read); `about` are sentences above the Markdown table."""
    whole = task.table.convert_dtypes()
    parquet = io.BytesIO()
    whole.to_parquet(parquet, index=False)
    contents: dict[str, str | bytes] = {
        "csv": whole.to_csv(index=False, lineterminator="\n"),
        "md": markdown(task, about),
        "tex": latex(task),
        "parquet": parquet.getvalue(),
    }
    files = {kind: path.with_name(f"{path.name}.{kind}") for kind in contents}
    for kind, content in contents.items():
        write_whole(files[kind], content)
    return [*files.values()]


def markdown(task: Task, about: Sequence[str]) -> str:
    """The main columns as a pipe table, references below the soups and marked."""
    sentences = "\n\n".join(_markdown_text(sentence) for sentence in about)
    return f"# {task.name}\n\n{sentences}\n\n{_tabulated(task, 'pipe', _markdown_text)}\n"


def latex(task: Task) -> str:
    """The main columns as a `tabular` for the package booktabs."""
    data = f"{task.data}, report split: {task.report}".replace("\n", " ")
    return f"% {data}\n% \\usepackage{{booktabs}}\n{_tabulated(task, 'latex_booktabs', str)}\n"


def shown_columns(task: Task) -> list[Column]:
    """Those that are shown before a person chooses, where any row has a value."""
    several = len(task.runs) > 1
    return [
        column
        for column in columns_of(task.table, task.texts)
        if (several if column.key == "run" else column.shown)
        and any(task.table[column.key].notna())
    ]


def _tabulated(task: Task, style: str, text: Any) -> str:
    columns = shown_columns(task)
    lines = [
        [text(_cell(column, line)) for column in columns]
        for line in task.table.to_dict(orient="records")
    ]
    headers = [text(column.header) + " [95%]" * (column.low is not None) for column in columns]
    align = ["left" if column.kind == "text" else "right" for column in columns]
    return tabulate(lines, headers, tablefmt=style, colalign=align, disable_numparse=True)


def _cell(column: Column, line: Line) -> str:
    """The value as text, with its interval."""
    value = line[column.key]
    if column.kind == "text":
        reference = column.key == "learner" and line["kind"] == "reference"
        return f"{value} (no soup)" if reference else str(value)
    if not math.isfinite(value):
        return ""
    if column.key == "ingredients_used" and math.isfinite(line.get("zoo_size", math.nan)):
        return f"{value:.0f}/{line['zoo_size']:.0f}"
    ends = [line.get(end, math.nan) for end in (column.low, column.high) if end]
    known = ends and all(math.isfinite(end) for end in ends)
    interval = f" [{', '.join(_number(column, end) for end in ends)}]" if known else ""
    return _number(column, float(value)) + interval


def _number(column: Column, value: float) -> str:
    match column.kind:
        case "percent":
            return f"{100 * value:.2f}"
        case "points":
            return f"{100 * value:+.2f}"
        case "seconds":
            return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
        case "bytes":
            return format_bytes(int(value))
        case "count":
            return f"{value:,.0f}"
        case "probability":
            return f"{value:.3f}" if value >= 0.001 else "<0.001"
        case _:
            return f"{value:.4g}"


def _markdown_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
