"""Tables over the runs of a sweep: every row of every run, and learners against each other.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import itertools
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
from soups.hierarchy import PairedRun, draws, hierarchical_interval
from soups.plots.sweeps import ALL, comparisons
from soups.readings import count_readings, earlier_readings
from soups.record import fingerprint
from soups.rows import REPORT, load_predictions
from soups.statistics import Interval
from soups.sweeps.caption import caption
from soups.variance import Spread, spread

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
SPREADS = ("zoos", "splits", "learner_seeds", "images")


@dataclass(frozen=True)
class RunResult:
    """A finished run: axis → label, its leaderboard's rows, and who was right on *report*.

    Runs with the same `images` have the same report images in the same order. `readings` says how
    often rows were scored on them in the run's folder.
    """

    labels: Mapping[str, str]
    rows: tuple[Mapping[str, str], ...]
    right: Mapping[str, Bool[np.ndarray, " rows"]]
    images: str
    readings: int = 0


@dataclass(frozen=True)
class Comparison:
    """Report accuracy of `learner` minus that of `baseline`, as fractions.

    It is the mean over the runs of `zoo` (or of all) with the labels `fixed`; of `splits` splits
    the learner was `ahead` in so many (of learner seeds, where there is one split). `spread` says
    how far runs are apart, and by what.
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
    spread: Spread


def read_run(folder: Path, labels: Mapping[str, str], config: LearnConfig) -> RunResult:
    """What a run has left in its folder."""
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = tuple(csv.DictReader(file))
    predictions = load_predictions(folder / "predictions.npz")
    right = {learner: sets[REPORT] for learner, sets in predictions.items()}
    readings = count_readings(earlier_readings(folder / "run.json"))
    return RunResult(labels, rows, right, report_images(config.data), readings.times)


def write_tables(folder: Path, runs: Sequence[RunResult], settings: SweepConfig) -> str:
    """Write `runs.csv`, `comparisons.csv`, `comparisons.md` and their picture; the main table."""
    write_whole(folder / "runs.csv", _runs_csv(runs))
    found = [*compare(runs, settings)]
    write_whole(folder / "comparisons.csv", _comparisons_csv(found, settings))
    text = comparison_tables(found, settings)
    parts = [mean_table(runs, settings), text, *spread_tables(found, settings)]
    write_whole(folder / "comparisons.md", "\n".join([*parts, caption(runs, settings)]))
    # Models fine-tuned on few images are so far below that soups could not be told apart.
    soups = {row["learner"] for run in runs for row in run.rows if row["kind"] == "soup"}
    drawn = {one.baseline for one in found if one.learner in soups}
    for baseline in settings.compare:
        path = folder / "pictures" / f"comparisons_{baseline}.png"
        for file in picture_files(path):
            file.unlink(missing_ok=True)
        if baseline in drawn:
            save_figure(comparisons(folder, baseline), path)
    return text


def other_axes(settings: SweepConfig) -> list[str]:
    """The axes that are neither draws nor zoos."""
    draws = (settings.repeats, settings.seeds, settings.zoos)
    return [axis for axis in settings.axes if axis not in draws]


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
            seed=run.labels.get(settings.seeds, ALL),
        )
        for run in runs
        if learner in run.right and baseline in run.right
    ]
    if not paired:
        return
    splits: dict[tuple[str, str], list[float]] = {}
    for run, draw in zip(paired, draws(paired), strict=True):
        splits.setdefault((run.zoo, draw), []).append(float(run.difference.mean()))
    mean, interval = hierarchical_interval(paired, seed=0)
    yield Comparison(
        baseline=baseline,
        learner=learner,
        zoo=zoo,
        fixed=fixed,
        runs=len(paired),
        splits=len(splits),
        ahead=sum(float(np.mean(values)) > 0 for values in splits.values()),
        mean=mean,
        interval=interval,
        spread=spread(paired),
    )


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


def spread_tables(found: Sequence[Comparison], settings: SweepConfig) -> list[str]:
    """Where the spread of each difference over all runs comes from, as Markdown, in points."""
    blocks = []
    for baseline in settings.compare:
        lines = [
            [one.zoo, one.learner, *("" if s is None else f"{100 * s:.2f}" for s in _spread(one))]
            for one in found
            if one.baseline == baseline and not one.fixed
        ]
        headers = ["zoo", "learner", *(name.replace("_", " ") for name in SPREADS)]
        title = f"## Spread of the difference to {baseline}, standard deviations in points"
        blocks.append(f"{title}\n\n{_pipe(lines, headers, texts=2)}\n")
    return blocks


def _spread(one: Comparison) -> list[float | None]:
    return [one.spread.zoos, one.spread.splits, one.spread.seeds, one.spread.images]


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
    numbers = ["runs", "splits", "splits_ahead", "mean_points", "low_points", "high_points"]
    numbers += [f"spread_{name}_points" for name in SPREADS]
    table = []
    for one in found:
        points = [100 * value for value in (one.mean, *one.interval)]
        points += ["" if value is None else 100 * value for value in _spread(one)]
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


def report_images(data: DataConfig) -> str:
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
