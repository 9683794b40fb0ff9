"""Report name → its settings and where its function lives; imports no torch.

A new report is a settings class here, with its name as `type`, a row in REPORTS, and a function
`(material, settings, path) -> files` that writes beside `path`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from inputs.config import Settings
from soups.registered import Registered

Margin = Annotated[float, Field(ge=0, le=100)]


def _quoted(name: Any) -> Any:
    if isinstance(name, int | float):
        raise ValueError(f"{name} is a number; put names such as '00' in quotes")
    return name


# A learner's row, an ingredient, or `base`.
PointName = Annotated[str, BeforeValidator(_quoted)]


class LeaveOneOut(Settings):
    """What taking one ingredient out of a learner's soup changes.

    `of` is the learner's row. In each group the ingredient's coefficient is given to the others in
    proportion to the size of theirs: a mean stays a mean, of one less.
    """

    type: Literal["leave_one_out"] = "leave_one_out"
    of: PointName = "uniform"


class Shapley(Settings):
    """Each ingredient's part in what the uniform soup of all gains over the empty soup.

    The mean over orders of joining of what an ingredient changes as it joins: exact where all
    subsets are no more than the soups of so many `permutations`, else over random ones in pairs,
    each with its reverse (2104.12199). `empty`: the base where it is known, or the constant
    prediction of the classes' shares of *select* (`chance`). An order ends early where the
    accuracy of its soup is within `truncate` of that of all (1904.02868); those who are left share
    what is left evenly, so that the values always sum to the gain. 0: no order does.
    """

    type: Literal["shapley"] = "shapley"
    permutations: Annotated[int, Field(ge=4, multiple_of=2)] = 64
    empty: Literal["base", "chance"] | None = None
    truncate: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Line(Settings):
    """Loss and accuracy along straight lines from one point of weight space to another.

    `points` positions from end to end, and on with the same step up to `margin` of the length
    beyond both.
    """

    type: Literal["line"] = "line"
    between: Annotated[list[tuple[PointName, PointName]], Field(min_length=1)]
    points: Annotated[int, Field(ge=2)] = 21
    margin: Margin = 0.25

    @field_validator("between")
    @classmethod
    def _two_ends(cls, between: list[tuple[str, str]]) -> list[tuple[str, str]]:
        same = [start for start, end in between if start == end]
        if same:
            raise ValueError(f"the line from {same[0]!r} ends where it starts; name another end")
        return between


class Plane(Settings):
    """Loss and accuracy on a grid over the plane through three points of weight space.

    The grid has `resolution` positions each way and reaches `margin` of the three points' extent
    beyond them.
    """

    type: Literal["plane"] = "plane"
    through: tuple[PointName, PointName, PointName]
    resolution: Annotated[int, Field(ge=2)] = 25
    margin: Margin = 0.25

    @field_validator("through")
    @classmethod
    def _three_points(cls, through: tuple[str, str, str]) -> tuple[str, str, str]:
        if len(set(through)) < 3:
            raise ValueError(f"found {', '.join(map(repr, through))}; name three different points")
        return through


ReportSettings = Annotated[LeaveOneOut | Shapley | Line | Plane, Field(discriminator="type")]


REPORTS: dict[str, Registered] = {
    "leave_one_out": Registered(LeaveOneOut, "soups.reports.leave_one_out:leave_one_out"),
    "shapley": Registered(Shapley, "soups.reports.shapley:shapley"),
    "line": Registered(Line, "soups.reports.landscape:line"),
    "plane": Registered(Plane, "soups.reports.landscape:plane"),
}
