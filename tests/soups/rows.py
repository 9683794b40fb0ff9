"""Rows of a table with known scores."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from soups.rows import Metrics, Row

SEVERITIES = (1, 3, 5)


def metrics(accuracy: float) -> Metrics:
    return Metrics(accuracy, accuracy - 0.1, 0.5, 0.25, 0.08, 0.02, 0.3, 0.2)


def row(
    learner: str, report: float, kind: Literal["soup", "reference"] = "soup", **settings: Any
) -> Row:
    defaults: dict[str, Any] = {
        "ingredients": ("00", "03"),
        "zoo_size": 16,
        "extra": {f"report_noise_{s}": report - s / 10 for s in SEVERITIES},
        "seconds": 12.5,
        "peak_bytes": 3 * 2**20,
        "forward_passes": 16.0,
    }
    return Row(learner, kind, select=metrics(0.9), report=metrics(report), **defaults | settings)


def made_predictions() -> dict[str, dict[str, np.ndarray]]:
    """Who is right on 400 report and 100 select images, independently."""
    rng = np.random.default_rng(0)
    accuracies = {"best_single": 0.8, "greedy": 0.85, "mehl": 0.9, "ensemble": 0.95}
    return {
        name: {"report": rng.random(400) < p, "select": rng.random(100) < p}
        for name, p in accuracies.items()
    }


def made_rows(predictions: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    """A row for each of them; the ensemble is a reference."""
    return [
        row(
            name,
            float(sets["report"].mean()),
            kind="reference" if name == "ensemble" else "soup",
            notes=("a note",) if name == "mehl" else (),
        )
        for name, sets in predictions.items()
    ]
