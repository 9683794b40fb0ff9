"""The table of a run: rows, their scores and intervals, as CSV, Markdown and for the terminal."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from tabulate import SEPARATING_LINE, tabulate

from inputs.budget import format_bytes
from inputs.files import write_whole
from soups.errors import SoupError
from soups.statistics import (
    Interval,
    Labels,
    Logits,
    accuracy,
    bootstrap_interval,
    correctness,
    expected_calibration_error,
    negative_log_likelihood,
    paired_difference_interval,
    worst_class_accuracy,
)

# Row → set of images → whether each example is right.
Predictions = Mapping[str, Mapping[str, Bool[np.ndarray, " rows"]]]

REPORT = "report"
SHIFT = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class Metrics:
    """Scores of one row on one split. Accuracies and calibration errors are fractions, losses nats.

    `loss_scaled` and `ece_scaled` are those of the logits times the temperature that was fitted on
    *select*.
    """

    accuracy: float
    worst_class: float
    loss: float
    loss_scaled: float
    ece: float
    ece_scaled: float


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
    known. `interval` is that of the report accuracy, `difference` the report accuracy minus
    that of `baseline`, with its paired interval: `with_intervals` fills these.
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
    baseline: str = ""
    difference: float | None = None
    difference_interval: Interval | None = None


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
    )


def with_intervals(
    rows: Iterable[Row],
    predictions: Predictions,
    *,
    baseline: str | None = "best_single",
    seed: int = 0,
) -> list[Row]:
    """The rows with 95% intervals of the report accuracy and of the difference to `baseline`.

    `predictions` has the set `report` of each row. Without a baseline, or where it has no row,
    there are no differences.
    """
    found = []
    against = (
        predictions[baseline][REPORT] if baseline is not None and baseline in predictions else None
    )
    for row in rows:
        right = predictions[row.learner][REPORT]
        row = replace(row, interval=bootstrap_interval(right, seed=seed))
        if against is not None:
            row = replace(
                row,
                baseline=baseline or "",
                difference=accuracy(right) - accuracy(against),
                difference_interval=paired_difference_interval(right, against, seed=seed),
            )
        found.append(row)
    return found


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Soups before references, each by report accuracy; the first of equals stays first."""
    return sorted(rows, key=lambda row: (row.kind == "reference", -row.report.accuracy))


def write_leaderboard(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    data: str,
    select_examples: int,
    report_examples: int,
) -> None:
    """Write `leaderboard.csv` (all columns, full precision) and `leaderboard.md` (to be read).

    `data` names the images in the caption.
    """
    folder = Path(folder)
    write_whole(folder / "leaderboard.csv", _csv(ranked(rows)))
    caption = _caption(rows, data, select_examples, report_examples)
    write_whole(folder / "leaderboard.md", f"{markdown_table(rows)}\n{caption}")


def markdown_table(rows: Sequence[Row]) -> str:
    """The soups and below them the references as Markdown; the best report accuracy is bold."""
    best = max((row.report.accuracy for row in rows if row.kind == "soup"), default=math.inf)
    sets = _extra_sets(rows)
    headers, right = ["learner", "ingredients"], ["left", "right"]
    cross_fitted = any(row.out_of_fold for row in rows)
    headers += ["select %", *(["out of fold %"] if cross_fitted else []), "report % [95%]"]
    headers += [f"vs {name} [95%]" for name in _baselines(rows)]
    headers += [*(f"{kind} %" for kind in sets), "worst class %"]
    headers += ["loss → scaled", "calibration error % → scaled", "seconds", "peak memory"]
    headers += ["passes forward + back"]
    right += ["right"] * (len(headers) - 2)

    def cells(row: Row) -> list[str]:
        bold = row.kind == "soup" and row.report.accuracy == best
        report = f"**{_percent(row.report.accuracy)}**" if bold else _percent(row.report.accuracy)
        line = [row.learner.replace("|", "\\|"), _used(row), _percent(row.select.accuracy)]
        if cross_fitted:
            line.append(_percent(row.out_of_fold and row.out_of_fold.accuracy))
        line.append(f"{report} {_ends(row.interval)}".strip())
        if _baselines(rows):
            line.append(_difference(row))
        line += [_percent(_mean(row, names)) for names in sets.values()]
        line.append(_percent(row.report.worst_class))
        line.append(f"{row.report.loss:.3f} → {row.report.loss_scaled:.3f}")
        line.append(f"{_percent(row.report.ece)} → {_percent(row.report.ece_scaled)}")
        line += [_seconds(row.seconds), format_bytes(row.peak_bytes)]
        line.append(f"{row.forward_passes:.3g} + {row.backward_passes:.3g}")
        return line

    blocks = []
    for kind, title in (("soup", "## Soups"), ("reference", "## References (not soups)")):
        lines = [cells(row) for row in ranked(rows) if row.kind == kind]
        if lines:
            table = tabulate(lines, headers, tablefmt="pipe", colalign=right, disable_numparse=True)
            blocks.append(f"{title}\n\n{table}\n")
    return "\n".join(blocks)


def terminal_table(rows: Sequence[Row]) -> str:
    """The main columns as plain text, at most 160 wide; soups above the line, references below it.

    `shifted` is the mean over all extra report sets, `worst` the accuracy of the worst
    class, `memory` the peak.
    """
    baselines = _baselines(rows)
    shifted = [name for names in _extra_sets(rows).values() for name in names]
    cross_fitted = any(row.out_of_fold for row in rows)
    headers = ["learner", "used", "select %"]
    headers += [*(["out of fold"] if cross_fitted else []), "report % [95%]"]
    headers += [f"vs {name} [95%]" for name in baselines]
    headers += [
        *(["shifted %"] if shifted else []),
        "worst",
        "loss",
        "seconds",
        "memory",
    ]

    def cells(row: Row) -> list[str]:
        return [
            textwrap.shorten(row.learner, 26, placeholder=" …"),
            _used(row),
            _percent(row.select.accuracy),
            *([_percent(row.out_of_fold and row.out_of_fold.accuracy)] if cross_fitted else []),
            f"{_percent(row.report.accuracy)} {_ends(row.interval)}".strip(),
            *([_difference(row)] if baselines else []),
            *([_percent(_mean(row, shifted))] if shifted else []),
            _percent(row.report.worst_class),
            f"{row.report.loss:.3f}",
            _seconds(row.seconds),
            format_bytes(row.peak_bytes),
        ]

    lines: list[Any] = [cells(row) for row in ranked(rows) if row.kind == "soup"]
    references = [cells(row) for row in ranked(rows) if row.kind == "reference"]
    if lines and references:
        lines.append(SEPARATING_LINE)
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(
        lines + references, headers, tablefmt="simple", colalign=align, disable_numparse=True
    )


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


# --- cells --------------------------------------------------------------------------------------


def _percent(fraction: float | None) -> str:
    return "" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"


def _ends(interval: Interval | None) -> str:
    return f"[{_percent(interval.low)}, {_percent(interval.high)}]" if interval else ""


def _difference(row: Row) -> str:
    if row.difference is None or row.difference_interval is None or row.learner == row.baseline:
        return ""
    low, high = row.difference_interval
    return f"{100 * row.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _used(row: Row) -> str:
    return f"{len(row.ingredients)}/{row.zoo_size}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}"


def _baselines(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.baseline for row in rows if row.baseline))


def _extra_sets(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Kind of shift → its sets, one for each severity; a set without a severity is its own kind."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.extra):
        matched = SHIFT.fullmatch(name)
        kind = (matched[1] if matched else name).removeprefix(f"{REPORT}_")
        kinds.setdefault(kind, []).append(name)
    return kinds


def _mean(row: Row, names: Sequence[str]) -> float | None:
    """The mean over the severities, where the row has all of them."""
    if not all(name in row.extra for name in names):
        return None
    return sum(row.extra[name] for name in names) / len(names)


# --- files --------------------------------------------------------------------------------------


def _csv(rows: Sequence[Row]) -> str:
    extra = [name for names in _extra_sets(rows).values() for name in names]
    table = [_record(row, extra) for row in rows]
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def _record(row: Row, extra: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "learner": row.learner,
        "kind": row.kind,
        "ingredients_used": len(row.ingredients),
        "zoo_size": row.zoo_size,
        "ingredients": " ".join(row.ingredients),
    }
    for split, metrics in (("select", row.select), (REPORT, row.report)):
        record |= {f"{split}_{f.name}": getattr(metrics, f.name) for f in fields(Metrics)}
    found = row.out_of_fold
    record |= {
        f"out_of_fold_{f.name}": getattr(found, f.name) if found else None
        for f in fields(CrossFitted)
    }
    record["free_coefficients"] = row.free_coefficients
    low, high = row.interval or (None, None)
    record |= {"report_accuracy_low": low, "report_accuracy_high": high}
    low, high = row.difference_interval or (None, None)
    record |= {"baseline": row.baseline, "difference": row.difference}
    record |= {"difference_low": low, "difference_high": high}
    record |= {f"{name}_accuracy": row.extra.get(name) for name in extra}
    record |= {
        name: getattr(row, name)
        for name in ("seconds", "peak_bytes", "forward_passes", "backward_passes")
    }
    record["notes"] = "; ".join(row.notes)
    return record


def _caption(rows: Sequence[Row], data: str, select_examples: int, report_examples: int) -> str:
    sets, baselines = _extra_sets(rows), _baselines(rows)
    lines = [
        f"Data: {data}. Soups were learned on *select* ({select_examples:,} images) and measured "
        f"on *report* ({report_examples:,} images); report accuracy decides the order."
    ]
    folds = sorted({row.out_of_fold.folds for row in rows if row.out_of_fold})
    if folds:
        lines.append(
            "“Out of fold” is the accuracy on *select* where each image is judged by a soup that "
            f"was learned without it ({' or '.join(map(str, folds))} folds)."
        )
    if any(row.out_of_fold and not row.out_of_fold.own for row in rows):
        lines[-1] += (
            " What that has cost is in `leaderboard.csv`, and not in the seconds and passes of the "
            "row."
        )
    own = [row.learner for row in ranked(rows) if row.out_of_fold and row.out_of_fold.own]
    if own:
        lines[-1] += (
            f" {', '.join(own)}: on the folds by which the learner itself has chosen, so slightly "
            "flattering; what that has cost is in its row."
        )
    if any(row.interval for row in rows):
        lines.append(
            "[low, high] are 95% percentile bootstrap intervals over the report images: what "
            "another draw of images would change, not another draw of ingredients or seeds."
        )
    if baselines:
        lines.append(
            f"“vs {baselines[0]}” is the difference in report accuracy, in points, with the paired "
            "interval over the same images; one that excludes 0 is more than the choice of images."
        )
    averaged = [
        f"{kind} ({', '.join(matched[2] for name in names if (matched := SHIFT.fullmatch(name)))})"
        for kind, names in sets.items()
        if len(names) > 1
    ]
    if averaged:
        lines.append(
            f"Shifted report sets are means over severities: {', '.join(averaged)}; "
            "`leaderboard.csv` has each."
        )
    lines.append(
        "“Ingredients” are those that the row uses. Worst class, loss (nats) and expected "
        "calibration error (15 bins) are on *report*; “→ scaled” is after one temperature, fitted "
        "on *select*. Passes are examples through one model over the size of *select*. Seconds and "
        "peak memory are of choosing or learning, on this machine."
    )
    notes = [f"- {row.learner}: {note}" for row in ranked(rows) for note in row.notes]
    return "\n\n".join(lines) + ("\n\nNotes:\n\n" + "\n".join(notes) if notes else "") + "\n"
