"""A run's table as CSV, as Markdown, and for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from inputs.budget import format_bytes
from inputs.files import write_whole
from soups.caption import Setting, caption
from soups.rows import (
    REPORT,
    CrossFitted,
    Metrics,
    Row,
    baselines_of,
    extra_sets,
    ranked,
)
from soups.significance import Difference
from soups.statistics import Interval

# What stands in the terminal's table.
MARKS = "≈ tied with the best soup; * significant at 5% after Holm's correction for the column"


def write_leaderboard(rows: Sequence[Row], folder: str | Path, setting: Setting) -> None:
    """Write `leaderboard.csv` (all columns, full precision) and `leaderboard.md` (to be read)."""
    folder = Path(folder)
    write_whole(folder / "leaderboard.csv", _csv(ranked(rows)))
    write_whole(folder / "leaderboard.md", f"{markdown_table(rows)}\n{caption(rows, setting)}")


def markdown_table(rows: Sequence[Row]) -> str:
    """The soups and below them the references as Markdown.

    The best report accuracy is bold, and ≈ stands before those that are tied with it.
    """
    best = max((row.report.accuracy for row in rows if row.kind == "soup"), default=math.inf)
    sets, baselines = extra_sets(rows), baselines_of(rows)
    headers, right = ["learner", "ingredients"], ["left", "right"]
    cross_fitted = any(row.out_of_fold for row in rows)
    headers += ["select %", *(["out of fold %"] if cross_fitted else []), "report % [95%]"]
    headers += [text for name in baselines for text in (f"vs {name} [95%]", "p (Holm)")]
    headers += [*(f"{kind} %" for kind in sets), "worst class %"]
    headers += ["loss → scaled", "Brier → scaled", "calibration error % → scaled"]
    headers += ["seconds", "peak memory", "passes forward + back"]
    right += ["right"] * (len(headers) - 2)

    def cells(row: Row) -> list[str]:
        bold = row.kind == "soup" and row.report.accuracy == best
        report = f"**{_percent(row.report.accuracy)}**" if bold else _accuracy(row, best)
        line = [row.learner.replace("|", "\\|"), _used(row), _percent(row.select.accuracy)]
        if cross_fitted:
            line.append(_percent(row.out_of_fold and row.out_of_fold.accuracy))
        line.append(f"{report} {_ends(row.interval)}".strip())
        for name in baselines:
            line += [_difference(row.against(name)), _p_value(row.against(name))]
        line += [_percent(_mean(row, names)) for names in sets.values()]
        line.append(_percent(row.report.worst_class))
        line.append(f"{row.report.loss:.3f} → {row.report.loss_scaled:.3f}")
        line.append(f"{row.report.brier:.3f} → {row.report.brier_scaled:.3f}")
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

    ≈ stands before the accuracies that are tied with the best soup's, * after differences that are
    significant. The first baseline's come with intervals. `shifted` is the mean over all extra
    report sets, `memory` the peak.
    """
    best = max((row.report.accuracy for row in rows if row.kind == "soup"), default=math.inf)
    baselines = baselines_of(rows)
    shifted = [name for names in extra_sets(rows).values() for name in names]
    cross_fitted = any(row.out_of_fold for row in rows)
    headers = ["learner", "used", "select %"]
    headers += [*(["out of fold"] if cross_fitted else []), "report % [95%]"]
    for k, name in enumerate(baselines):
        headers.append(f"vs {_short(name, 11)} [95%]" if k == 0 else f"vs {_short(name, 8)}")
    headers += [*(["shifted %"] if shifted else []), "loss", "seconds", "memory"]

    def cells(row: Row) -> list[str]:
        return [
            _short(row.learner, 22),
            _used(row),
            _percent(row.select.accuracy),
            *([_percent(row.out_of_fold and row.out_of_fold.accuracy)] if cross_fitted else []),
            f"{_accuracy(row, best)} {_ends(row.interval)}".strip(),
            *(
                _difference(row.against(name), interval=k == 0, star=True)
                for k, name in enumerate(baselines)
            ),
            *([_percent(_mean(row, shifted))] if shifted else []),
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


# --- cells --------------------------------------------------------------------------------------


def _percent(fraction: float | None) -> str:
    return "" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"


def _ends(interval: Interval | None) -> str:
    return f"[{_percent(interval.low)}, {_percent(interval.high)}]" if interval else ""


def _accuracy(row: Row, best: float) -> str:
    """The report accuracy, and whether it is tied with the best one."""
    tied = "≈ " if row.tied and row.report.accuracy < best else ""
    return f"{tied}{_percent(row.report.accuracy)}"


def _difference(one: Difference | None, *, interval: bool = True, star: bool = False) -> str:
    if one is None:
        return ""
    low, high = one.interval
    ends = f" [{100 * low:+.2f}, {100 * high:+.2f}]" if interval else ""
    mark = ("*" if one.significant else " ") if star else ""
    return f"{100 * one.value:+.2f}{ends}{mark}"


def _p_value(one: Difference | None) -> str:
    if one is None:
        return ""
    return "< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _used(row: Row) -> str:
    return f"{len(row.ingredients)}/{row.zoo_size}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}"


def _mean(row: Row, names: Sequence[str]) -> float | None:
    """The mean over the severities, where the row has all of them."""
    if not all(name in row.extra for name in names):
        return None
    return sum(row.extra[name] for name in names) / len(names)


# --- files --------------------------------------------------------------------------------------


def _csv(rows: Sequence[Row]) -> str:
    extra = [name for names in extra_sets(rows).values() for name in names]
    table = [_record(row, extra, baselines_of(rows)) for row in rows]
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def _record(row: Row, extra: Sequence[str], baselines: Sequence[str]) -> dict[str, Any]:
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
    record["tied_with_best"] = row.tied
    for name in baselines:
        one = row.against(name)
        low, high = one.interval if one else (None, None)
        record |= {f"vs_{name}": one and one.value}
        record |= {f"vs_{name}_low": low, f"vs_{name}_high": high}
        record |= {f"vs_{name}_p": one and one.p, f"vs_{name}_p_holm": one and one.p_holm}
    record |= {f"{name}_accuracy": row.extra.get(name) for name in extra}
    record |= {
        name: getattr(row, name)
        for name in ("seconds", "peak_bytes", "forward_passes", "backward_passes")
    }
    record["notes"] = "; ".join(row.notes)
    return record
