"""What the page is told: tasks, sweeps and quoted rows as plain values for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pandas as pd

from soups.boards.columns import baselines_of, columns_of
from soups.boards.curves import curves_of
from soups.boards.formats import shown_columns
from soups.boards.images import image_sets, outcomes
from soups.boards.joining import Task
from soups.boards.standing import Standing
from soups.plots.learned import BUFFER_GROUP

if TYPE_CHECKING:
    from merge.coefficients import Coefficients

# So many digits of a number are kept.
DIGITS = 7


def task_payload(task: Task, standing: Standing | None) -> dict[str, Any]:
    """A task: its columns, a line for each row, what rows are compared by, and its pictures."""
    images = image_sets(task.runs)
    return {
        "name": task.name,
        "columns": _columns(task),
        "rows": [
            {
                **{key: plain(value) for key, value in line.items()},
                "standing": standing.of(line["run"], line["learner"]) if standing else "",
                "outcomes": outcomes(
                    (run := task.run(line["run"])), line["learner"], _shown(images, run.images)
                ),
            }
            for line in task.table.to_dict(orient="records")
        ],
        "several": len(task.runs) > 1,
        "baseline": next(iter(baselines_of(task.table)), None),
        "images": images,
        "heatmaps": [
            {"run": name, "learner": learner, **_heatmap(coefficients)}
            for name, run in zip(task.names, task.runs, strict=True)
            for learner, coefficients in run.coefficients.items()
        ],
        "curves": [
            {"run": name, **asdict(curves)}
            for name, run in zip(task.names, task.runs, strict=True)
            for curves in curves_of(run)
        ],
        "runs": [
            {
                "name": name,
                "folder": str(run.folder),
                "seed": run.record.seed,
                "started": run.record.started,
                "commit": run.record.commit or "",
                "device": run.record.device,
            }
            for name, run in zip(task.names, task.runs, strict=True)
        ],
    }


def published() -> dict[str, Any]:
    """Rows of papers, each with its source: quoted, not measured here."""
    return json.loads(files("soups.boards").joinpath("published.json").read_text("utf-8"))


def _columns(task: Task) -> list[dict[str, Any]]:
    shown = {column.key for column in shown_columns(task)}
    return [
        asdict(column) | {"shown": column.key in shown}
        for column in columns_of(task.table, task.texts)
        if column.key in shown or any(task.table[column.key].notna())
    ]


def _shown(images: Mapping[str, Mapping[str, Any]], name: str) -> Sequence[int]:
    return images[name]["shown"] if name in images else []


def _heatmap(coefficients: Coefficients) -> dict[str, Any]:
    """Ingredient × group; a base is the last row, with what the others leave to it."""
    columns = [g for g, name in enumerate(coefficients.groups) if not name.startswith(BUFFER_GROUP)]
    columns = columns or [*range(len(coefficients.groups))]
    groups = list(coefficients.groups)
    matrix = coefficients.matrix[:, columns]
    names = [ingredient.name for ingredient in coefficients.ingredients]
    lines = matrix.tolist()
    if coefficients.base is not None:
        names.append("base")
        lines.append((1 - matrix.sum(axis=0)).tolist())
    return {
        "ingredients": names,
        "groups": [groups[g] for g in columns],
        "matrix": [[round(value, 4) for value in line] for line in lines],
        "uniform": 1 / len(coefficients.ingredients),
    }


def plain(value: Any) -> Any:
    """A value that JSON has; None for a number that is not finite."""
    if pd.isna(value):
        return None
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
