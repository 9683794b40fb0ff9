"""Which row of a task to use, and whether it matters: the best, those tied with it, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import norm

from soups.boards.columns import baselines_of
from soups.boards.joining import Task
from soups.significance import LEVEL, tied_with_best

# How often an experiment should find a gain that is there.
POWER = 0.8
# Names that a sentence lists before it counts the others.
LISTED = 4

Line = Mapping[Any, Any]


@dataclass(frozen=True)
class Standing:
    """The soup with the highest report accuracy, and those that its images cannot tell from it.

    Rows are places (run, learner). `tied` is None where nothing was kept to tell by.
    `sentences` say it to a person; the first says what to do.
    """

    best: tuple[str, str]
    tied: frozenset[tuple[str, str]] | None
    sentences: tuple[str, ...]

    def of(self, run: str, learner: str) -> str:
        """`best`, `tied` or nothing."""
        place = (run, learner)
        return "best" if place == self.best else "tied" if place in (self.tied or ()) else ""


def standing(task: Task) -> Standing | None:
    """How the soups of a task stand; None where there is no soup."""
    soups = task.table.loc[task.table["kind"] == "soup", :].to_dict(orient="records")
    if not soups:
        return None
    tied = _tied(task, soups)
    return Standing(
        best=_place(soups[0]),
        tied=None if tied is None else frozenset(_place(line) for line in tied),
        sentences=tuple(_sentences(task, soups, tied)),
    )


def _tied(task: Task, soups: Sequence[Line]) -> list[Line] | None:
    """The soups after the first that were measured on its images and are not told from it."""
    images = task.run(soups[0]["run"]).images
    right = {}
    for number, line in enumerate(soups):
        run = task.run(line["run"])
        if run.images == images and line["learner"] in run.right:
            right[str(number)] = run.right[line["learner"]]
    if "0" not in right:
        return _tied_in_table(task, soups)
    found = tied_with_best(right) - {"0"}
    return [line for number, line in enumerate(soups) if str(number) in found]


def _tied_in_table(task: Task, soups: Sequence[Line]) -> list[Line] | None:
    """What the table of a single run itself says of ties, if it does."""
    if len(task.runs) > 1 or "tied_with_best" not in task.table:
        return None
    return [line for line in soups[1:] if line["tied_with_best"] == "True"]


def _sentences(task: Task, soups: Sequence[Line], tied: Sequence[Line] | None) -> Iterator[str]:
    best = soups[0]
    several = len(task.runs) > 1
    name = _named(best, several)
    count = task.run(best["run"]).report_count
    baseline = next(iter(baselines_of(task.table)), "")
    is_baseline = baseline == best["learner"]
    ends = ("", "_low", "_high")
    difference, low, high = (best.get(f"vs_{baseline}{end}", math.nan) for end in ends)
    known = all(map(math.isfinite, (difference, low, high)))
    gain = f"{points(difference)} [{points(low)}, {points(high)}]" if known else ""
    accuracy = f"{100 * best['report_accuracy']:.2f}% on report"
    if is_baseline:
        yield f"Keep {name}: its {accuracy} is the highest accuracy of all soups."
    elif not known:
        yield f"{name} has the highest accuracy of the soups, {accuracy}."
    else:
        others = f", or one of the {len(tied)} tied with it" if tied else ""
        # Of many rows the best is ahead by luck: the corrected p says so, where there is one.
        sure = low > 0 and not best.get(f"vs_{baseline}_p_holm", math.nan) > 1 - LEVEL
        surely = "." if sure else ", which may be nothing: it matters little here."
        yield f"Use {name}{others}: {accuracy}, {gain} points over {baseline}{surely}"
    images = f"{count:,} report images" if count else "these report images"
    if tied:
        quickest = min([*tied, best], key=lambda line: line.get("seconds", math.inf))
        yield (
            f"{listed([_named(line, several) for line in tied])} "
            f"{'is' if len(tied) == 1 else 'are'} tied with {name}: {images} do not tell "
            f"{'the two' if len(tied) == 1 else 'them'} apart. The quickest is "
            f"{_named(quickest, several)}."
        )
    elif tied is not None and len(soups) > 1:
        yield f"{images[0].upper() + images[1:]} tell {name} from every other soup."
    if known and low <= 0 < difference and count:
        wanted = images_needed(count, difference, (high - low) / 2)
        yield (
            f"To tell a gain of this size from none, four times in five, would take about "
            f"{wanted:,} report images."
        )
    yield (
        "Intervals are 95% and speak of other images alone; what other seeds and ingredients would "
        "change, a sweep says."
    )


def images_needed(count: int, difference: float, half_width: float) -> int:
    """How many images a paired comparison needs to tell this difference from none with 80% power,
    to two digits, where `count` of them gave a 95% interval of this half width.

    The interval shrinks with √n: n = count · ((z_0.975 + z_0.8) / z_0.975 · half_width / d)².
    """
    z = norm.ppf((1 + LEVEL) / 2)
    wanted = float(count * ((z + norm.ppf(POWER)) / z * half_width / difference) ** 2)
    digits = 1 - math.floor(math.log10(wanted))
    return int(round(wanted, digits))


def _place(line: Line) -> tuple[str, str]:
    return line["run"], line["learner"]


def _named(line: Line, several: bool) -> str:
    return f"{line['learner']} of {line['run']}" if several else line["learner"]


def listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    if more > 1:
        return f"{', '.join(names[:LISTED])} and {more} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def points(fraction: float) -> str:
    """With a sign, which is a minus and no hyphen."""
    return f"{100 * fraction:+.2f}".replace("-", "−")
