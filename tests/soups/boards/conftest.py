"""Results folders of runs that never were, with all that a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from merge.coefficients import Coefficients, Ingredient
from soups.examples import ReportExamples, RowOutcomes, disagreements
from soups.significance import differences

CLASSES = ("cat", "dog", "<i>fox</i>", "hen")
IMAGES = 240
# Row → kind, share of images that are right, seconds, memory in MiB.
ROWS: dict[str, tuple[str, float, float, int]] = {
    "mehl": ("soup", 0.90, 12.0, 900),
    "greedy": ("soup", 0.88, 3.0, 800),
    "best_single": ("soup", 0.70, 0.5, 700),
    "ensemble": ("reference", 0.92, 0.0, 0),
}


def shares(count: int = IMAGES, seed: int = 0) -> dict[str, np.ndarray]:
    """Which images each row has right: the share of `ROWS`, in the order of one difficulty with
    some noise, so that rows err together."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(count)
    found = {}
    for row, (_, share, _, _) in ROWS.items():
        noisy = difficulty + rng.normal(0, 0.05, count)
        found[row] = noisy <= np.quantile(noisy, share)
    return found


def examples_of(right: Mapping[str, np.ndarray], *, seed: int = 0) -> ReportExamples:
    """Outcomes that are right where they should be, and thumbnails of a square of 8 pixels."""
    rng = np.random.default_rng(seed)
    count = len(next(iter(right.values())))
    labels = rng.integers(0, len(CLASSES), count).astype(np.int64)
    rows = {}
    for row, own in right.items():
        predicted = np.where(own, labels, (labels + 1) % len(CLASSES)).astype(np.int16)
        confidence = rng.uniform(0.4, 1, count).astype(np.float32)
        rows[row] = RowOutcomes(predicted, confidence, -np.log(confidence))
    shown = disagreements([*right.values()])
    pixels = rng.integers(0, 256, (len(shown), 1, 8, 8), dtype=np.uint8)
    return ReportExamples(labels, CLASSES, shown, pixels, rows)


def table_of(right: Mapping[str, np.ndarray], renamed: Mapping[str, str]) -> pd.DataFrame:
    """A leaderboard as a run writes it, with what the page reads."""
    against = differences(right, "best_single", seed=0)
    lines = []
    for row, own in right.items():
        kind, _, seconds, mib = ROWS[row]
        low, high = own.mean() - 0.04, own.mean() + 0.04
        line: dict[str, Any] = {
            "learner": renamed.get(row, row),
            "kind": kind,
            "ingredients_used": 4,
            "zoo_size": 5,
            "ingredients": "00 01 02 03",
            "report_accuracy": own.mean(),
            "report_loss": 1 - own.mean(),
            "report_accuracy_low": low,
            "report_accuracy_high": high,
        }
        one = against.get(row)
        key = f"vs_{renamed.get('best_single', 'best_single')}"
        line |= {key: one and one.value, f"{key}_low": one and one.interval.low}
        line |= {f"{key}_high": one and one.interval.high, f"{key}_p_holm": one and one.p_holm}
        line |= {"seconds": seconds, "peak_bytes": mib * 2**20}
        lines.append(line | {"notes": f"of {row}" if kind == "reference" else ""})
    return pd.DataFrame(lines)


def record_of(name: str, **data: Any) -> dict[str, Any]:
    """A `run.json` with what is read of it; `data` replaces keys of the config's."""
    split = {"from": "all", "fraction": 0.25}
    settings = {"path": "digits", "channels": 1, **dict.fromkeys(("fit", "tune", "select"), split)}
    return {
        "config": {"name": name, "data": settings | {"report": split} | data},
        "seed": 3,
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "device": "a machine",
        "learners": {
            "wise_ft": {
                "record": {
                    "curve": [{"alpha": k / 4, "select_accuracy": 0.8 + k / 50} for k in range(5)]
                }
            }
        },
    }


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run into `tmp_path/<folder>`: `renamed` rows, without the files in `lacks`."""

    def write(
        folder: str = "small",
        *,
        name: str | None = None,
        renamed: Mapping[str, str] | None = None,
        lacks: tuple[str, ...] = (),
        right: Mapping[str, np.ndarray] | None = None,
        **data: Any,
    ) -> Path:
        renamed = renamed or {}
        place = tmp_path / folder
        place.mkdir(parents=True)
        right = right or shares()
        table_of(right, renamed).to_csv(place / "leaderboard.csv", index=False)
        record = record_of(name or place.name, **data)
        (place / "run.json").write_text(json.dumps(record))
        if "examples.npz" not in lacks:
            own = {renamed.get(row, row): values for row, values in right.items()}
            examples_of(own).save(place / "examples.npz")
        if "coefficients" not in lacks:
            ingredients = tuple(Ingredient(f"{k:02d}", "0" * 64) for k in range(5))
            for row, groups in (("mehl", 3), ("greedy", 1)):
                matrix = np.random.default_rng(0).dirichlet(np.ones(5), groups).T
                tensors = {f"layer{g}": (f"layer{g}.weight",) for g in range(groups)}
                path = place / "coefficients" / f"{renamed.get(row, row).replace('/', '-')}.json"
                Coefficients(ingredients, tensors, matrix, method=row).save(path)
        return place

    return write


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[[], Path]:
    """Writes a sweep over two numbers of images into `tmp_path/sweep`."""

    def write() -> Path:
        place = tmp_path / "sweep"
        place.mkdir()
        numbers = {
            ("pooled", "all"): (0.4, 0.1, 0.7),
            ("pooled", "250"): (0.5, 0.2, 0.8),
            ("uniform", "all"): (0.1, -0.2, 0.4),
            ("uniform", "250"): (0.3, 0.1, 0.5),
            ("mehl", "all"): (-0.5, -0.8, -0.2),
            ("mehl", "250"): (-0.6, -0.9, -0.3),
        }
        comparisons = pd.DataFrame(
            [
                ("greedy", learner, images, 4, 4, 3, *points)
                for (learner, images), points in numbers.items()
            ],
            columns=[
                *("baseline", "learner", "images", "runs", "splits", "splits_ahead"),
                *("mean_points", "low_points", "high_points"),
            ],
        )
        comparisons.to_csv(place / "comparisons.csv", index=False)
        runs = pd.DataFrame(
            [
                (split, images, learner, "soup", 0.6 + 0.01 * split + images / 1e5, 2.0)
                for split in range(2)
                for images in (250, 1000)
                for learner in ("greedy", "pooled", "uniform", "mehl")
            ],
            columns=["split", "images", "learner", "kind", "report_accuracy", "seconds"],
        )
        runs.to_csv(place / "runs.csv", index=False)
        return place

    return write
