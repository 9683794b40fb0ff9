"""Report name → its settings and where its function lives; imports no torch.

A new report is a settings class here, with its name as `type`, a row in REPORTS, and a function
`(material, settings, path) -> files` that writes beside `path`, from *select* alone. One that needs
*report* has a second function, which is called when all learning is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, field_validator

from inputs.config import Settings
from soups.registered import Registered, imported

Margin = Annotated[float, Field(ge=0, le=100)]


def _quoted(name: Any) -> Any:
    if isinstance(name, int | float):
        raise ValueError(f"{name} is a number; put names such as '00' in quotes")
    return name


# A learner's row, an ingredient, or `base`.
PointName = Annotated[str, BeforeValidator(_quoted)]


class LeaveOneOut(Settings):
    """What taking one ingredient out of a learner's soup changes.

    In each group the ingredient's coefficient is given to the others in proportion to the size of
    theirs: a mean stays a mean, of one less.
    """

    type: Literal["leave_one_out"] = "leave_one_out"
    of: PointName = "uniform"
    """The learner's row."""


class Shapley(Settings):
    """Each ingredient's part in what the uniform soup of all gains over the empty soup.

    The mean over orders of joining of what an ingredient changes as it joins. The values always sum
    to the gain.
    """

    type: Literal["shapley"] = "shapley"
    permutations: Annotated[int, Field(ge=4, multiple_of=2)] = 64
    """Random orders of joining, half of them the reverse of the other half (2104.12199); where
    their soups would be no fewer than all subsets, these are taken, and the values are exact."""
    empty: Literal["base", "chance"] | None = None
    """The empty soup: the base, or the constant prediction of the classes' shares of *select*
    (`chance`); without it the base where it is known."""
    truncate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """An order ends where the accuracy of its soup is within this (a fraction) of that of all
    (1904.02868); those who are left share what is left evenly. 0: none ends early."""


class Line(Settings):
    """Loss and accuracy along straight lines from one point of weight space to another."""

    type: Literal["line"] = "line"
    between: Annotated[list[tuple[PointName, PointName]], Field(min_length=1)]
    """Pairs of points; a point is a learner's row, an ingredient, or `base`."""
    points: Annotated[int, Field(ge=2)] = 21
    """Positions on each line, both ends included."""
    margin: Margin = 0.25
    """How far beyond both ends the line goes on, as a part of its length."""

    @field_validator("between")
    @classmethod
    def _two_ends(cls, between: list[tuple[str, str]]) -> list[tuple[str, str]]:
        same = [start for start, end in between if start == end]
        if same:
            raise ValueError(f"the line from {same[0]!r} ends where it starts; name another end")
        return between


class Plane(Settings):
    """Loss and accuracy on a grid over the plane through three points of weight space."""

    type: Literal["plane"] = "plane"
    through: tuple[PointName, PointName, PointName]
    """Three points: a learner's row, an ingredient, or `base`."""
    resolution: Annotated[int, Field(ge=2)] = 25
    """Positions of the grid each way."""
    margin: Margin = 0.25
    """How far the grid reaches beyond the three points, as a part of their extent."""

    @field_validator("through")
    @classmethod
    def _three_points(cls, through: tuple[str, str, str]) -> tuple[str, str, str]:
        if len(set(through)) < 3:
            raise ValueError(f"found {', '.join(map(repr, through))}; name three different points")
        return through


class Subsets(Settings):
    """Accuracy on *report* against the number of ingredients, and against the best ones removed.

    The best single, uniform and greedy soups of the best 1, 2, … ingredients and of all but the
    best 1, 2, …, ordered and selected on *select* (the figures of 2203.05482 and 2407.03641), and
    the uniform soups along random orders.
    """

    type: Literal["subsets"] = "subsets"
    orders: NonNegativeInt = 8
    """Random orders in which the uniform soup grows."""
    accept: Literal["gt", "ge"] = "ge"
    """Greedy's: an ingredient is kept if accuracy does not fall (`ge`), or rises (`gt`)."""


class Deltas(Settings):
    """How alike the ingredients' deltas are: cosines and sign conflicts, in all and by layer.

    Deltas are to the base where it is known, else to the mean of the ingredients, which leaves
    signs without a meaning. Only tensors that learners mix count.
    """

    type: Literal["deltas"] = "deltas"


ReportSettings = Annotated[
    LeaveOneOut | Shapley | Line | Plane | Subsets | Deltas, Field(discriminator="type")
]


@dataclass(frozen=True)
class RegisteredReport(Registered):
    """What is made on *select*; and as `judge`, where there is one, what *report* says of it."""

    judge: str | None = None

    def judging(self) -> Callable | None:
        """`(material, record, images, path) -> files`: the record is what was found on *select*."""
        return None if self.judge is None else imported(self.judge)


REPORTS: dict[str, RegisteredReport] = {
    "leave_one_out": RegisteredReport(LeaveOneOut, "soups.reports.leave_one_out:leave_one_out"),
    "shapley": RegisteredReport(Shapley, "soups.reports.shapley:shapley"),
    "line": RegisteredReport(Line, "soups.reports.landscape:line"),
    "plane": RegisteredReport(Plane, "soups.reports.landscape:plane"),
    "subsets": RegisteredReport(
        Subsets, "soups.reports.subsets:choose_subsets", "soups.reports.subsets:judge_subsets"
    ),
    "deltas": RegisteredReport(Deltas, "soups.reports.deltas:deltas"),
}
