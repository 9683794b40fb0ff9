"""Points of weight space by name: a learner's soup, an ingredient, the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from inputs.config import nearest
from merge.coefficients import Coefficients
from soups.config import LearnConfig
from soups.ingredients import find_ingredients, ingredient_names
from soups.norms import Groups
from soups.reports.registry import LeaveOneOut, Line, Plane, ReportSettings, Shapley
from soups.session import Session
from soups.zoo_folder import names_to_come

BASE = "base"


def point_columns(
    name: str, session: Session, soups: Mapping[str, Coefficients]
) -> Float64[np.ndarray, "ingredients tensors"]:
    """The coefficients of a point, a column for each tensor of `session.numels`.

    What a column leaves to one is the base's. A soup's temperature is no part of the point.
    """
    zoo = session.zoo
    columns = np.zeros((len(zoo.names), len(session.numels)))
    if name in soups:
        soup = soups[name]
        mixed = set(soup.tensors)
        for t, tensor in enumerate(session.numels):
            known = next(n for n in (tensor, *zoo.tied.get(tensor, ())) if n in mixed)
            columns[:, t] = soup.column(known)
    elif name != BASE:
        columns[zoo.names.index(name)] = 1.0
    return columns


def shared_groups(
    names: Sequence[str], columns: Float64[np.ndarray, "points ingredients tensors"]
) -> tuple[Groups, Float64[np.ndarray, "points ingredients groups"]]:
    """The fewest groups in which all the points can be written, and the points in them.

    Two tensors share a group if at each point they have the same coefficients: the common
    refinement of the points' own groups. A group is called like its first tensor.
    """
    if not names:
        return {}, columns
    # Adding zero makes −0 a 0.
    keys = [(columns[:, :, t] + 0.0).tobytes() for t in range(len(names))]
    members: dict[bytes, list[int]] = {}
    for t, key in enumerate(keys):
        members.setdefault(key, []).append(t)
    groups = {names[own[0]]: tuple(names[t] for t in own) for own in members.values()}
    return groups, columns[:, :, [own[0] for own in members.values()]]


def report_problems(config: LearnConfig, *, base_known: bool) -> list[str]:
    """What is wrong with the names in `reports`, before anything is made; needs no weights."""
    if not config.reports:
        return []
    ingredients = _every_name(config)
    return [
        f"reports.{row}.{problem}"
        for row, settings in config.reports.items()
        for problem in _problems(settings, [*config.learners], ingredients, base_known)
    ]


def named_points(settings: ReportSettings) -> dict[str, str]:
    """Where in the settings a point is named → the point."""
    if isinstance(settings, Line):
        return {
            f"between.{i}.{end}": name
            for i, ends in enumerate(settings.between)
            for end, name in enumerate(ends)
        }
    if isinstance(settings, Plane):
        return {f"through.{i}": name for i, name in enumerate(settings.through)}
    return {"of": settings.of} if isinstance(settings, LeaveOneOut) else {}


def _problems(
    settings: ReportSettings, rows: list[str], ingredients: list[str], base_known: bool
) -> Iterator[str]:
    if isinstance(settings, Shapley):
        if settings.empty == BASE and not base_known:
            yield "empty: the base is not known; name it with zoo.base, or set empty: chance"
        return
    if isinstance(settings, LeaveOneOut):
        if settings.of not in rows:
            yield f"of: no learner's row is called {settings.of!r}{nearest(settings.of, rows)}"
        return
    known = [*rows, *ingredients, *([BASE] if base_known else [])]
    for where, name in named_points(settings).items():
        if name == BASE and not base_known:
            yield f"{where}: the base is not known; name it with zoo.base, or another point"
        elif name not in known:
            yield (
                f"{where}: {name!r} is neither a learner's row nor an ingredient nor `base`"
                f"{nearest(name, known)}"
            )
        elif known.count(name) > 1:
            yield f"{where}: {name!r} is a learner's row and also a checkpoint; rename the row"


def _every_name(config: LearnConfig) -> list[str]:
    """The names that the ingredients have, or will have once the zoo is made."""
    if config.zoo.finetune is not None and config.zoo.ingredients is None:
        return names_to_come(config.zoo)
    return list(ingredient_names(find_ingredients(config.zoo)[0]))
