"""The rows of a run's table: scores, intervals, differences; and who is right on each example."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

from inputs.files import write_whole
from soups.errors import SoupError
from soups.significance import Difference, differences, tied_with_best
from soups.statistics import (
    Interval,
    Labels,
    Logits,
    accuracy,
    bootstrap_interval,
    brier_score,
    correctness,
    expected_calibration_error,
    negative_log_likelihood,
    worst_class_accuracy,
)

# Row → set of images → whether each example is right.
Predictions = Mapping[str, Mapping[str, Bool[np.ndarray, " rows"]]]

REPORT = "report"
SHIFT = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class Metrics:
    """Scores of one row on one split. Accuracies and calibration errors are fractions, losses nats.

    What is `_scaled` is of the logits times the temperature that was fitted on *select*.
    """

    accuracy: float
    worst_class: float
    loss: float
    loss_scaled: float
    ece: float
    ece_scaled: float
    brier: float
    brier_scaled: float


@dataclass(frozen=True)
class CrossFitted:
    """What cross-fitting on *select* has found: each image is judged by a soup of the learner that
    was learned without the image's fold.

    `accuracy` is a fraction, `loss` in nats. `standard_error` is that of the row's accuracy on
    *select* minus this one, paired over the images. `own`: the learner has cross-fitted itself, to
    choose what it returns. Else what it has cost is not in the row's own cost.
    """

    accuracy: float
    folds: int
    loss: float | None = None
    standard_error: float | None = None
    own: bool = False
    seconds: float = 0.0
    forward_passes: float = 0.0
    backward_passes: float = 0.0


@dataclass(frozen=True)
class Row:
    """One learner (kind `soup`), or one thing to compare with (kind `reference`).

    `ingredients` are those it uses, of `zoo_size`. `extra` maps further report sets to accuracies.
    `forward_passes` and `backward_passes` are examples through one model, over the size of
    *select*. `free_coefficients` is how many numbers the learner was free to choose, where that is
    known. `interval` is that of the report accuracy, `differences` are those to baselines, and
    `tied` says of a soup whether it is told from the best one: `with_intervals` fills these.
    """

    learner: str
    kind: Literal["soup", "reference"]
    ingredients: tuple[str, ...]
    zoo_size: int
    select: Metrics
    report: Metrics
    extra: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    forward_passes: float = 0.0
    backward_passes: float = 0.0
    notes: tuple[str, ...] = ()
    free_coefficients: int | None = None
    out_of_fold: CrossFitted | None = None
    interval: Interval | None = None
    differences: tuple[Difference, ...] = ()
    tied: bool | None = None

    def against(self, baseline: str) -> Difference | None:
        """The difference to this baseline, if there is one."""
        return next((one for one in self.differences if one.baseline == baseline), None)


def score(logits: Logits, labels: Labels, *, temperature: float = 1.0) -> Metrics:
    """The metrics of these logits, plain and times a temperature that was fitted on *select*."""
    right = correctness(logits, labels)
    scaled = np.asarray(logits, dtype=np.float64) * temperature
    return Metrics(
        accuracy=accuracy(right),
        worst_class=worst_class_accuracy(right, labels, scaled.shape[1]),
        loss=negative_log_likelihood(logits, labels),
        loss_scaled=negative_log_likelihood(scaled, labels),
        ece=expected_calibration_error(logits, labels),
        ece_scaled=expected_calibration_error(scaled, labels),
        brier=brier_score(logits, labels),
        brier_scaled=brier_score(scaled, labels),
    )


def with_intervals(
    rows: Iterable[Row],
    predictions: Predictions,
    *,
    baselines: Sequence[str] = ("best_single", "greedy"),
    seed: int = 0,
) -> list[Row]:
    """The rows with 95% intervals of the report accuracy, differences to `baselines`, and ties.

    `predictions` has the set `report` of each row. A baseline that has no row is left out.
    """
    rows = list(rows)
    right = {row.learner: predictions[row.learner][REPORT] for row in rows}
    found = [differences(right, name, seed=seed) for name in baselines if name in right]
    soups = {row.learner: right[row.learner] for row in rows if row.kind == "soup"}
    tied = tied_with_best(soups) if soups else set()
    return [
        replace(
            row,
            interval=bootstrap_interval(right[row.learner], seed=seed),
            differences=tuple(of[row.learner] for of in found if row.learner in of),
            tied=row.learner in tied if row.kind == "soup" else None,
        )
        for row in rows
    ]


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Soups before references, each by report accuracy; the first of equals stays first."""
    return sorted(rows, key=lambda row: (row.kind == "reference", -row.report.accuracy))


def baselines_of(rows: Sequence[Row]) -> list[str]:
    """The rows that others are compared with; a baseline itself is compared with the rest only."""
    fullest_first = sorted(rows, key=lambda row: -len(row.differences))
    return list(dict.fromkeys(one.baseline for row in fullest_first for one in row.differences))


def extra_sets(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Kind of shift → its sets, one for each severity; a set without a severity is its own kind."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.extra):
        matched = SHIFT.fullmatch(name)
        kind = (matched[1] if matched else name).removeprefix(f"{REPORT}_")
        kinds.setdefault(kind, []).append(name)
    return kinds


def save_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write whether each example is right, per row and set, as a compressed npz file."""
    arrays = {
        f"{row}/{name}": np.asarray(right, dtype=bool)
        for row, sets in predictions.items()
        for name, right in sets.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    write_whole(path, file.getvalue())


def load_predictions(path: str | Path) -> dict[str, dict[str, Bool[np.ndarray, " rows"]]]:
    """What `save_predictions` wrote; SoupError where the file is not that."""
    predictions: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key, right in arrays.items():
                row, _, name = key.rpartition("/")
                predictions.setdefault(row, {})[name] = right
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise SoupError(
            f"{path}: not a file of predictions ({error}); remove it and run again"
        ) from error
    return predictions
