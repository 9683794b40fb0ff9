"""Coefficients: what every learner returns, and all that is needed to cook its soup again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inputs.files import write_whole
from merge.checkpoints import Checkpoint, Scan, scan
from merge.checkpoints.strict_json import parse_json
from merge.errors import MergeError
from merge.mixing import SUM_TOLERANCE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Coefficients", "Ingredient", "mean_coefficients"]

VERSION = 1
NORM_BUFFER_RULES = ("uniform", "convex", "recalibrate")


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint's name in the zoo and the SHA-256 of its tensors, as `scan` gives it."""

    name: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Coefficients:
    """A soup as numbers over its original ingredients.

    `W = Σ_k A[k, g]·w_k + (1 − Σ_k A[k, g])·base` for every tensor of group g. `groups` maps a
    group's name to its tensors; `matrix` is A [ingredients, groups] in float64 (a read-only
    copy); without a base each column sums to 1 within 1e-6. `carried` names the tensors that are
    taken unmixed, with the reason: from the base where it has them, else from the first
    ingredient. `temperature` multiplies the logits; it is folded into a head only when asked.
    Raises MergeError, with all that is wrong at once.
    """

    ingredients: tuple[Ingredient, ...]
    groups: dict[str, tuple[str, ...]]
    matrix: Float64[np.ndarray, "ingredients groups"]
    base: Ingredient | None = None
    carried: dict[str, str] = field(default_factory=dict)
    norm_buffers: str = "uniform"
    temperature: float = 1.0
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        matrix.flags.writeable = False
        object.__setattr__(self, "ingredients", tuple(self.ingredients))
        object.__setattr__(self, "groups", {g: tuple(names) for g, names in self.groups.items()})
        object.__setattr__(self, "matrix", matrix)
        problems = list(_problems(self))
        if problems:
            raise MergeError(f"coefficients {self.method!r}: " + "; ".join(problems))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coefficients) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the mixed tensors, in the order of the groups."""
        return tuple(self._group_index)

    @cached_property
    def _group_index(self) -> dict[str, int]:
        return {name: g for g, names in enumerate(self.groups.values()) for name in names}

    @property
    def sha256(self) -> str:
        """The hash of these coefficients: of the text that `save` writes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def column(self, tensor_name: str) -> Float64[np.ndarray, " ingredients"]:
        """The coefficient of each ingredient in the tensor; MergeError where it is not mixed."""
        if tensor_name not in self._group_index:
            reason = self.carried.get(tensor_name)
            found = "unknown" if reason is None else f"carried unmixed ({reason})"
            raise MergeError(f"coefficients {self.method!r}: tensor {tensor_name!r} is {found}")
        return self.matrix[:, self._group_index[tensor_name]]

    def weights(self, tensor_name: str) -> Float64[np.ndarray, " sources"]:
        """The weight of each source: of the ingredients, then of the base where there is one."""
        column = self.column(tensor_name)
        if self.base is None:
            return column
        return np.append(column, 1 - math.fsum(column))

    def to_json(self) -> str:
        """The text of the file: the same coefficients give the same text."""
        stored = {
            "format": "soup coefficients",
            "version": VERSION,
            "ingredients": [vars(ingredient) for ingredient in self.ingredients],
            "groups": [{"name": g, "tensors": list(names)} for g, names in self.groups.items()],
            "matrix": self.matrix.tolist(),
            "base": None if self.base is None else vars(self.base),
            "carried": self.carried,
            "norm_buffers": self.norm_buffers,
            "temperature": self.temperature,
            "method": self.method,
            "settings": self.settings,
        }
        try:
            return json.dumps(stored, indent=1, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise MergeError(
                f"coefficients {self.method!r}: settings cannot be stored as JSON ({error}); "
                "wanted finite numbers, texts, lists and mappings"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file, beside its place and renamed."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Coefficients:
        """The coefficients at `path`; MergeError, with all that is wrong, where there are none."""
        found = parse_json(Path(path).read_bytes(), str(path))
        if not isinstance(found, dict) or found.get("format") != "soup coefficients":
            raise MergeError(f"{path}: not a coefficients file; give one that a learner has saved")
        if found.get("version") != VERSION:
            raise MergeError(
                f"{path}: version is {found.get('version')!r}, wanted {VERSION}; use the release "
                "of this toolkit that wrote the file"
            )
        try:
            stored = _Stored.model_validate(found)
            ragged = [
                f"matrix row {k} has {len(row)} numbers, wanted one for each of "
                f"{len(stored.groups)} groups"
                for k, row in enumerate(stored.matrix)
                if len(row) != len(stored.groups)
            ]
            names = [group.name for group in stored.groups]
            repeated = [f"group {g!r} is there twice" for g in sorted(_repeated(names))]
            if ragged or repeated:
                raise MergeError("; ".join(ragged + repeated))
            base = stored.base
            return cls(
                ingredients=tuple(Ingredient(i.name, i.sha256) for i in stored.ingredients),
                groups={group.name: tuple(group.tensors) for group in stored.groups},
                matrix=np.array(stored.matrix, dtype=np.float64),
                base=None if base is None else Ingredient(base.name, base.sha256),
                carried=stored.carried,
                norm_buffers=stored.norm_buffers,
                temperature=stored.temperature,
                method=stored.method,
                settings=stored.settings,
            )
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {_short(e['input'])})"
                for e in error.errors()[:10]
            )
            raise MergeError(f"{path}: {problems}") from error
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from error

    def check_ingredients(
        self,
        checkpoints: Sequence[Checkpoint],
        scans: Sequence[Scan] | None = None,
        *,
        base: Checkpoint | None = None,
    ) -> None:
        """Check that these checkpoints are the ones the coefficients were learned over.

        `scans` are those of the ingredients, then of the base where there is one; without them
        all data is read. Raises MergeError that names each one that differs, and both hashes.
        """
        self.check_count(checkpoints, base)
        given = [*checkpoints, base] if base is not None and self.base is not None else checkpoints
        wanted = [*self.ingredients, self.base] if self.base is not None else self.ingredients
        scans = [scan(c) for c in given if c is not None] if scans is None else scans
        if len(scans) < len(wanted):
            raise MergeError(
                f"coefficients {self.method!r}: {len(scans)} scans were given, wanted one for each "
                f"of {len(wanted)} checkpoints (the base comes last)"
            )
        problems = [
            f"{checkpoint.path}: SHA-256 is {found.sha256}, ingredient {ingredient.name!r} was "
            f"{ingredient.sha256}"
            for checkpoint, found, ingredient in zip(given, scans, wanted, strict=False)
            if checkpoint is not None and ingredient is not None
            if found.sha256 != ingredient.sha256
        ]
        if problems:
            raise MergeError(
                f"coefficients {self.method!r} belong to other weights: "
                + "; ".join(problems)
                + "; give the checkpoints that they were learned over, in the same order, or "
                "learn again"
            )

    def check_count(self, checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> None:
        """MergeError unless there is a checkpoint for each ingredient, and one for the base."""
        if len(checkpoints) != len(self.ingredients):
            raise MergeError(
                f"coefficients {self.method!r}: {len(checkpoints)} checkpoints were given, wanted "
                f"{len(self.ingredients)}: {_listed([i.name for i in self.ingredients])}"
            )
        if self.base is not None and base is None:
            raise MergeError(
                f"coefficients {self.method!r}: no base was given, wanted {self.base.name!r} "
                f"({self.base.sha256}); pass it as `base`"
            )

    def compare(self, other: Coefficients) -> pd.DataFrame:
        """Per group: how far two matrices over the same ingredients are apart.

        Columns: max_difference and mean_difference (absolute), cosine, sum and sum_other (of the
        column), first and first_other (the ingredient with the largest coefficient).
        """
        import pandas as pd  # half a second, and only this needs it

        _check_alike([self, other])
        names = [ingredient.name for ingredient in self.ingredients]
        a, b = self.matrix, other.matrix
        norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
        cosine = np.divide((a * b).sum(0), norms, out=np.full(len(norms), np.nan), where=norms > 0)
        return pd.DataFrame(
            {
                "max_difference": np.abs(a - b).max(axis=0),
                "mean_difference": np.abs(a - b).mean(axis=0),
                "cosine": cosine,
                "sum": a.sum(axis=0),
                "sum_other": b.sum(axis=0),
                "first": [names[k] for k in a.argmax(axis=0)],
                "first_other": [names[k] for k in b.argmax(axis=0)],
            },
            index=pd.Index(list(self.groups), name="group"),
        )


def mean_coefficients(many: Sequence[Coefficients]) -> Coefficients:
    """The mean of several matrices over the same ingredients and groups, each entry rounded once.

    By linearity it is the mean of their soups. Temperatures are averaged too; `settings` keeps
    the hashes of what was averaged. Raises MergeError where they are not alike.
    """
    _check_alike(many)
    first = many[0]
    matrix = np.array(
        [
            [_mean([c.matrix[k, g] for c in many]) for g in range(len(first.groups))]
            for k in range(len(first.ingredients))
        ]
    ).reshape(first.matrix.shape)
    return Coefficients(
        ingredients=first.ingredients,
        groups=first.groups,
        matrix=matrix,
        base=first.base,
        carried=first.carried,
        norm_buffers=first.norm_buffers,
        temperature=_mean([c.temperature for c in many]),
        method=first.method if len({c.method for c in many}) == 1 else "mean",
        settings={"mean_of": [c.sha256 for c in many]},
    )


# --- checks -------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StoredIngredient(_Strict):
    name: str
    sha256: str


class _StoredGroup(_Strict):
    name: str
    tensors: list[str]


class _Stored(_Strict):
    format: str
    version: int
    ingredients: list[_StoredIngredient]
    groups: list[_StoredGroup]
    matrix: list[list[Annotated[float, Field(allow_inf_nan=False)]]]
    base: _StoredIngredient | None
    carried: dict[str, str]
    norm_buffers: Literal["uniform", "convex", "recalibrate"]
    temperature: float
    method: str
    settings: dict[str, Any]


def _problems(found: Coefficients) -> Iterator[str]:
    sources = [*found.ingredients, *([found.base] if found.base else [])]
    if not found.ingredients:
        yield "there are no ingredients"
    if repeated := _repeated([ingredient.name for ingredient in found.ingredients]):
        yield f"ingredient {_listed(repeated)} is there twice"
    for source in sources:
        if len(source.sha256) != 64 or not set(source.sha256) <= set("0123456789abcdef"):
            yield f"sha256 of {source.name!r} is {source.sha256!r}, wanted 64 hexadecimal digits"
    names = [name for group in found.groups.values() for name in group]
    if repeated := _repeated(names):
        yield f"tensor {_listed(repeated)} is in two groups, wanted one"
    if both := sorted(set(names) & found.carried.keys()):
        yield f"tensor {_listed(both)} is both mixed and carried"
    if empty := [group for group, members in found.groups.items() if not members]:
        yield f"group {_listed(empty)} has no tensors"
    if found.norm_buffers not in NORM_BUFFER_RULES:
        wanted = ", ".join(NORM_BUFFER_RULES)
        yield f"norm_buffers is {found.norm_buffers!r}, wanted one of {wanted}"
    if not (math.isfinite(found.temperature) and found.temperature > 0):
        yield f"temperature is {found.temperature}, wanted a positive number"
    wanted_shape = (len(found.ingredients), len(found.groups))
    if found.matrix.shape != wanted_shape:
        yield (
            f"the matrix is {list(found.matrix.shape)}, wanted [ingredients, groups] = "
            f"{list(wanted_shape)}"
        )
    elif not np.isfinite(found.matrix).all():
        k, g = (int(i) for i in np.argwhere(~np.isfinite(found.matrix))[0])
        yield (
            f"the matrix has {np.count_nonzero(~np.isfinite(found.matrix))} non-finite values, the "
            f"first for ingredient {found.ingredients[k].name!r} in group {list(found.groups)[g]!r}"
        )
    elif found.base is None:
        for group, column in zip(found.groups, found.matrix.T, strict=True):
            total = math.fsum(column)
            if abs(total - 1) > SUM_TOLERANCE:
                yield (
                    f"group {group!r} sums to {total!r}, wanted 1 within {SUM_TOLERANCE}; divide "
                    "it by its sum, or name the base that takes the remainder"
                )
                return  # hundreds of groups would say the same


def _check_alike(many: Sequence[Coefficients]) -> None:
    if not many:
        raise MergeError("mean of coefficients: none were given, wanted at least one")
    for name in (f.name for f in fields(Coefficients)):
        if name in ("matrix", "temperature", "method", "settings"):
            continue
        first = getattr(many[0], name)
        for k, other in enumerate(many[1:], start=1):
            value = getattr(other, name)
            # The order of the groups is the order of the columns; that of `carried` means nothing.
            same = (
                list(first.items()) == list(value.items()) if name == "groups" else first == value
            )
            if not same:
                raise MergeError(
                    f"coefficients 0 ({many[0].method!r}) and {k} ({other.method!r}) differ in "
                    f"{name}: {_short(first)} and {_short(value)}; wanted the same {name}"
                )


def _mean(numbers: Sequence[float]) -> float:
    return float(sum(map(Fraction, map(float, numbers))) / len(numbers))


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
