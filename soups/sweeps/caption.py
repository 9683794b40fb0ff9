"""What is said below the tables of a sweep, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from soups.config import SweepConfig
from soups.hierarchy import FEWEST_ZOOS

if TYPE_CHECKING:
    from soups.sweeps.tables import RunResult


def caption(runs: Sequence[RunResult], settings: SweepConfig) -> str:
    """The caption as Markdown: how many runs, what the intervals and spreads are of."""
    parts = [
        _counts(runs, settings),
        *_intervals(settings),
        _spreads(settings),
        *_readings(runs),
        *_flattered(runs),
    ]
    return "\n\n".join(parts) + "\n"


def _number(settings: SweepConfig, axis: str) -> int:
    """How many labels the axis has; 1 where there is none."""
    return len(settings.axes.get(axis, {})) or 1


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _counts(runs: Sequence[RunResult], settings: SweepConfig) -> str:
    splits, seeds, zoos = (
        _number(settings, axis) for axis in (settings.repeats, settings.seeds, settings.zoos)
    )
    over = [_several(splits, "split"), *([_several(seeds, "learner seed")] if seeds > 1 else [])]
    images = len(next(iter(runs[0].right.values())))
    text = (
        f"{len(runs)} runs over {', '.join(over)} and {_several(zoos, 'zoo')}; {images:,} report "
        "images in each run."
    )
    planned = math.prod(len(labels) for labels in settings.axes.values())
    if len(runs) < planned:
        text += (
            f" {planned - len(runs)} of {planned} runs are missing: means and intervals are of "
            "the others."
        )
    return text


def _intervals(settings: SweepConfig) -> list[str]:
    splits, seeds, zoos = (
        _number(settings, axis) for axis in (settings.repeats, settings.seeds, settings.zoos)
    )
    text = (
        "Intervals are 95% hierarchical bootstrap intervals of the mean difference over splits: "
        "splits are resampled with all that varies in them, and so are report images, for all "
        "runs that share them at once."
    )
    if zoos > 1:
        text += (
            " In the rows `all`, a split is resampled with its runs in all zoos, where all zoos "
            "have the same splits."
        )
    lines = [text]
    if splits == 1 and seeds > 1:
        lines.append(
            "With one split, learner seeds are resampled in its place: the intervals do not speak "
            "of other splits."
        )
    elif splits == 1:
        lines.append("With one split the intervals say what other report images would change.")
    if zoos == 2:
        lines.append("Two zoos are taken as they are: the rows `all` do not speak of a third.")
    if zoos >= FEWEST_ZOOS:
        lines.append(
            "In the rows `all` zoos are resampled too, whole: these speak of other zoos like them."
        )
    return lines


def _spreads(settings: SweepConfig) -> str:
    text = (
        "Spreads are how far single draws are apart, as standard deviations by the analysis of "
        "variance: from zoo to zoo, from split to split of a zoo, from one learner seed to another "
        "on a split; each without what the levels below it and the images add. `images`: one run's "
        "difference, from one draw of as many report images to another. 0: all is explained by the "
        "levels below; empty: there is one draw only."
    )
    if _number(settings, settings.seeds) == 1:
        text += (
            f" What else the axis `{settings.repeats}` sets, such as the seed, varies with the "
            f"splits; an axis `{settings.seeds}` would tell them apart."
        )
    return text


def _readings(runs: Sequence[RunResult]) -> list[str]:
    times = [run.readings for run in runs if run.readings]
    if not times:
        return []
    text = f"*report* was read {sum(times)} times by {_several(len(times), 'run')}"
    most = max(times)
    return [f"{text}, at most {most} times by one." if most > 1 else f"{text}, once by each."]


def _flattered(runs: Sequence[RunResult]) -> list[str]:
    own = dict.fromkeys(
        row["learner"] for run in runs for row in run.rows if row.get("out_of_fold_own") == "True"
    )
    if not own:
        return []
    return [
        f"“Out of fold” of {', '.join(own)} is on the folds by which the learner itself has "
        "chosen, so slightly flattering."
    ]
