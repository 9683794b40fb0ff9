"""Tables over the runs of a sweep: every row of every run, and learners against each other.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from tabulate import tabulate

from inputs.config import DataConfig
from inputs.figures import picture_files, save_figure
from inputs.files import write_whole
from soups.config import LearnConfig, SweepConfig
from soups.leaderboard import REPORT, load_predictions
from soups.plots.sweeps import ALL, draw_comparisons
from soups.record import fingerprint
from soups.statistics import FEWEST_ZOOS, Interval, PairedRun, hierarchical_interval

# Of a run's leaderboard, what its rows in `runs.csv` have.
COLUMNS = (
    "learner",
    "kind",
    "ingredients_used",
    "zoo_size",
    "select_accuracy",
    "out_of_fold_accuracy",
    "report_accuracy",
    "select_loss",
    "report_loss",
    "free_coefficients",
    "seconds",
    "forward_passes",
    "backward_passes",
)
SHOWN = ("select_accuracy", "out_of_fold_accuracy", "report_accuracy")
COSTS = ("seconds", "forward_passes", "backward_passes")


@dataclass(frozen=True)
class RunResult:
    """A finished run: axis → label, its leaderboard's rows, and who was right on *report*.

    Runs with the same `images` have the same report images in the same order.
    """

    labels: Mapping[str, str]
    rows: tuple[Mapping[str, str], ...]
    right: Mapping[str, Bool[np.ndarray, " rows"]]
    images: str


@dataclass(frozen=True)
class Comparison:
    """Report accuracy of `learner` minus that of `baseline`, as fractions.

    It is the mean over the runs of `zoo` (or of all) with the labels `fixed`; of `splits` splits
    the learner was `ahead` in so many.
    """

    baseline: str
    learner: str
    zoo: str
    fixed: Mapping[str, str]
    runs: int
    splits: int
    ahead: int
    mean: float
    interval: Interval


def read_run(folder: Path, labels: Mapping[str, str], config: LearnConfig) -> RunResult:
    """What a run has left in its folder."""
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = tuple(csv.DictReader(file))
    predictions = load_predictions(folder / "predictions.npz")
    right = {learner: sets[REPORT] for learner, sets in predictions.items()}
    return RunResult(labels, rows, right, _report_images(config.data))


def write_tables(folder: Path, runs: Sequence[RunResult], settings: SweepConfig) -> str:
    """Write `runs.csv`, `comparisons.csv`, `comparisons.md` and their picture; the main table."""
    write_whole(folder / "runs.csv", _runs_csv(runs))
    found = [*compare(runs, settings)]
    write_whole(folder / "comparisons.csv", _comparisons_csv(found, settings))
    text = comparison_tables(found, settings)
    write_whole(
        folder / "comparisons.md",
        f"{mean_table(runs, settings)}\n{text}\n{_caption(runs, settings)}",
    )
    # Models fine-tuned on few images are so far below that soups could not be told apart.
    soups = {row["learner"] for run in runs for row in run.rows if row["kind"] == "soup"}
    for baseline in settings.compare:
        of_baseline = [one for one in found if one.baseline == baseline and one.learner in soups]
        path = folder / "pictures" / f"comparisons_{baseline}.png"
        for file in picture_files(path):
            file.unlink(missing_ok=True)
        if of_baseline:
            save_figure(draw_comparisons(of_baseline, other_axes(settings), all_label=ALL), path)
    return text


def other_axes(settings: SweepConfig) -> list[str]:
    """The axes that are neither repeats nor zoos."""
    return [axis for axis in settings.axes if axis not in (settings.repeats, settings.zoos)]


def compare(runs: Sequence[RunResult], settings: SweepConfig) -> Iterator[Comparison]:
    """Every learner with every baseline: over all runs, for each label of each other axis, and for
    each combination of their labels; for each zoo and over all of them."""
    axes = other_axes(settings)
    kept = dict.fromkeys([(), *((axis,) for axis in axes), tuple(axes)])
    zoos = [*settings.axes.get(settings.zoos, {})]
    for baseline, fixed_axes in itertools.product(settings.compare, kept):
        for values in itertools.product(*(settings.axes[axis] for axis in fixed_axes)):
            fixed = dict(zip(fixed_axes, values, strict=True))
            for zoo in [*zoos, *([ALL] if len(zoos) != 1 else [])]:
                where = fixed | ({settings.zoos: zoo} if zoo in zoos else {})
                chosen = [
                    run
                    for run in runs
                    if all(run.labels[axis] == label for axis, label in where.items())
                ]
                for learner in dict.fromkeys(name for run in chosen for name in run.right):
                    if learner != baseline:
                        yield from _compared(chosen, learner, baseline, zoo, fixed, settings)


def _compared(
    runs: Sequence[RunResult],
    learner: str,
    baseline: str,
    zoo: str,
    fixed: Mapping[str, str],
    settings: SweepConfig,
) -> Iterator[Comparison]:
    """The comparison, if any run has both rows."""
    paired = [
        PairedRun(
            zoo=run.labels.get(settings.zoos, ALL),
            split=run.labels.get(settings.repeats, ALL),
            images=run.images,
            difference=run.right[learner].astype(np.float64) - run.right[baseline],
        )
        for run in runs
        if learner in run.right and baseline in run.right
    ]
    if not paired:
        return
    splits: dict[tuple[str, str], list[float]] = {}
    for run in paired:
        splits.setdefault((run.zoo, run.split), []).append(float(run.difference.mean()))
    mean, interval = hierarchical_interval(paired, seed=0)
    ahead = sum(float(np.mean(values)) > 0 for values in splits.values())
    yield Comparison(baseline, learner, zoo, fixed, len(paired), len(splits), ahead, mean, interval)


def mean_table(runs: Sequence[RunResult], settings: SweepConfig) -> str:
    """Means over all runs of each zoo as Markdown: accuracies in percent, and costs."""
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for run in runs:
        for row in run.rows:
            place = (run.labels.get(settings.zoos, ALL), row["learner"])
            groups.setdefault(place, []).append(row)
    lines = []
    for (zoo, learner), rows in groups.items():
        accuracies = [_mean(rows, column) for column in SHOWN]
        costs = [_mean(rows, column) for column in COSTS]
        lines.append(
            [zoo, learner, len(rows)]
            + ["" if a is None else f"{100 * a:.2f}" for a in accuracies]
            + ["" if c is None else f"{c:.3g}" for c in costs]
        )
    headers = ["zoo", "learner", "runs", "select %", "out of fold %", "report %"]
    headers += ["seconds", "passes forward", "passes back"]
    return f"## Means over the runs\n\n{_pipe(lines, headers, texts=2)}\n"


def comparison_tables(found: Sequence[Comparison], settings: SweepConfig) -> str:
    """Differences in points with their intervals as Markdown, for each baseline and other axis."""
    blocks = []
    axes = other_axes(settings)
    for baseline in settings.compare:
        of_baseline = [one for one in found if one.baseline == baseline]
        rows = [*dict.fromkeys((one.zoo, one.learner) for one in of_baseline)]
        for axis in axes or [None]:
            labels = [*settings.axes[axis]] if axis else []
            columns: list[dict[str, str]] = [{axis: label} for label in labels if axis]
            columns.append({})
            cells = {(o.zoo, o.learner, tuple(o.fixed.items())): o for o in of_baseline}
            lines = [
                [*row, *(_points(cells.get((*row, tuple(column.items())))) for column in columns)]
                for row in rows
            ]
            headers = ["zoo", "learner", *(f"{axis} {label}" for label in labels), "all runs"]
            title = f"## Report accuracy minus that of {baseline}, points [95%]"
            by = f", by {axis}" if axis else ""
            blocks.append(f"{title}{by}\n\n{_pipe(lines, headers, texts=2)}\n")
    return "\n".join(blocks)


def _points(one: Comparison | None) -> str:
    if one is None:
        return ""
    low, high = one.interval
    return f"{100 * one.mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _pipe(lines: list[list], headers: list[str], *, texts: int) -> str:
    align = ["left"] * texts + ["right"] * (len(headers) - texts)
    return tabulate(lines, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _mean(rows: Sequence[Mapping[str, str]], column: str) -> float | None:
    """The mean of a column, where every row has it."""
    values = [row.get(column, "") for row in rows]
    return float(np.mean([float(value) for value in values])) if all(values) else None


def _runs_csv(runs: Sequence[RunResult]) -> str:
    table = [
        [*run.labels.values(), *(row.get(column, "") for column in COLUMNS)]
        for run in runs
        for row in run.rows
    ]
    return _csv([*runs[0].labels, *COLUMNS], table)


def _comparisons_csv(found: Sequence[Comparison], settings: SweepConfig) -> str:
    axes = other_axes(settings)
    numbers = ("runs", "splits", "splits_ahead", "mean_points", "low_points", "high_points")
    table = []
    for one in found:
        points = [100 * value for value in (one.mean, *one.interval)]
        table.append(
            [one.baseline, one.learner, one.zoo]
            + [one.fixed.get(axis, ALL) for axis in axes]
            + [one.runs, one.splits, one.ahead, *points]
        )
    return _csv(["baseline", "learner", settings.zoos, *axes, *numbers], table)


def _csv(header: Sequence[str], lines: Sequence[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue()


def _caption(runs: Sequence[RunResult], settings: SweepConfig) -> str:
    splits = len(settings.axes.get(settings.repeats, {})) or 1
    zoos = len(settings.axes.get(settings.zoos, {})) or 1
    planned = math.prod(len(labels) for labels in settings.axes.values())
    images = len(next(iter(runs[0].right.values())))
    lines = [
        f"{len(runs)} runs over {splits} split{'s' * (splits != 1)} and {zoos} "
        f"zoo{'s' * (zoos != 1)}; {images:,} report images in each run.",
        "Intervals are 95% hierarchical bootstrap intervals of the mean difference over splits: "
        "splits are resampled with all that varies in them, and so are report images, for all "
        "runs that share them at once.",
    ]
    if len(runs) < planned:
        lines[0] += (
            f" {planned - len(runs)} of {planned} runs are missing: means and intervals are of "
            "the others."
        )
    if zoos > 1:
        lines[1] += (
            " In the rows `all`, a split is resampled with its runs in all zoos, where all zoos "
            "have the same splits."
        )
    if splits == 1:
        lines.append("With one split the intervals say what other report images would change.")
    if zoos == 2:
        lines.append("Two zoos are taken as they are: the rows `all` do not speak of a third.")
    if zoos >= FEWEST_ZOOS:
        lines.append(
            "In the rows `all` zoos are resampled too, whole: these speak of other zoos like them."
        )
    own = dict.fromkeys(
        row["learner"] for run in runs for row in run.rows if row.get("out_of_fold_own") == "True"
    )
    if own:
        lines.append(
            f"“Out of fold” of {', '.join(own)} is on the folds by which the learner itself has "
            "chosen, so slightly flattering."
        )
    return "\n\n".join(lines) + "\n"


def _report_images(data: DataConfig) -> str:
    """What decides which images *report* has, and in which order."""
    takers = ["report"]
    if data.report.source in (data.fit.source, data.tune.source, data.select.source):
        takers = ["fit", "tune", "select", "report"]
    drawn_again = data.report.source == data.select.source
    return fingerprint(
        {
            "path": data.path,
            "columns": [data.image_column, data.label_column],
            "split_seed": data.split_seed,
            "select_seed": data.select_seed if drawn_again else None,
            "splits": [getattr(data, name).model_dump(mode="json") for name in takers],
        }
    )
