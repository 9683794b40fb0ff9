"""Many models to be run together: candidate soups, mixed, or whole checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, nn

from merge.checkpoints import open_checkpoint
from merge.mixing import SUM_TOLERANCE
from merge.stream import stored_name
from soups.errors import SoupError
from soups.norms import RECALIBRATION_BATCH, Groups, NormBuffers
from soups.sources import Flat, Sources, parted_by

# What a pass over the data costs beside the models in it, in passes of one model.
PASS_COST = 1.0


@dataclass(frozen=True)
class Weights:
    """Tensors of several models by name: `stacked` ones [models, ...], and `shared` ones [...].

    `buffers` [models, weights] are the memory of those that lie side by side.
    """

    stacked: dict[str, Tensor]
    shared: dict[str, Tensor]
    buffers: tuple[Tensor, ...] = ()


class Models(ABC):
    """Models of one architecture whose weights are made when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def families(self) -> list[list[int]]:
        """The models in the order in which they are best run, those that share layers together."""

    @abstractmethod
    def bytes_of(self, members: Sequence[int]) -> tuple[int, int]:
        """Bytes of weights: of what these models share, and of what each has for itself."""

    @abstractmethod
    def weights(
        self, members: Sequence[int], *, at_once: int = 1, reuse: Sequence[Tensor] = ()
    ) -> Weights:
        """The weights of these models.

        `at_once` images, over all models, may be run for them. They take the place of those
        buffers in `reuse` that have their shape.
        """


@dataclass
class Candidates(Models):
    """Coefficient matrices [candidates, ingredients, groups] as models.

    The base takes what a column leaves, and norm buffers follow the run's rule; with `own_buffers`
    they are mixed like weights but not estimated again, so that ingredients keep their own.
    Raises SoupError where the matrices do not fit the groups or the zoo, and names which.
    """

    matrices: Float64[np.ndarray, "candidates ingredients groups"]
    groups: Groups
    sources: Sources
    norms: NormBuffers
    own_buffers: bool = False
    _columns: np.ndarray = field(init=False)
    _column_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        check_candidates(self.matrices, self.groups, self.sources)
        followed = [self.norms.columns(self.groups, matrix) for matrix in self.matrices]
        named = self.groups | followed[0][0]
        whole = np.concatenate([self.matrices, np.stack([own for _, own in followed])], axis=2)
        self._column_of = {n: g for g, names in enumerate(named.values()) for n in names}
        self._columns = with_rest(whole, len(self.sources.checkpoints))

    def __len__(self) -> int:
        return len(self.matrices)

    def families(self) -> list[list[int]]:
        order = [name for name in self.norms.order if name in self._column_of]
        return families(self._columns, [self._column_of[name] for name in order])

    def bytes_of(self, members: Sequence[int]) -> tuple[int, int]:
        shared, own = 0, self.norms.nbytes
        for (alone, *_), names in self._parts(members).items():
            nbytes = sum(self.sources.parameters[name].nbytes for name in names)
            shared, own = (shared + nbytes, own) if alone else (shared, own + nbytes)
        return shared, own

    def weights(
        self, members: Sequence[int], *, at_once: int = 1, reuse: Sequence[Tensor] = ()
    ) -> Weights:
        free = list(reuse)
        stacked, shared, buffers = {}, {}, []
        for (alone, frozen, used, *_), names in self._parts(members).items():
            groups = list(dict.fromkeys(self._column_of[name] for name in names))
            columns = self._columns[members[:1] if alone else members][:, :, groups]
            if frozen:  # all sources are this one
                columns = np.zeros((1, len(self.sources.checkpoints), len(groups)))
                columns[:, used] = 1.0
            group_of = [groups.index(self._column_of[name]) for name in names]
            flat = Flat(names, self.sources.parameters)
            dtype = self.sources.parameters[names[0]].dtype
            out = _buffer(free, len(columns), flat.numel, dtype, self.sources.device)
            views = flat.views(self.sources.mix(names, columns, group_of, out=out))
            if alone and len(members) > 1:
                shared |= {name: tensor[0] for name, tensor in views.items()}
            else:
                stacked |= views
            buffers.append(out)
        for names in parted_by(self._column_of.__getitem__, self.norms.names):
            columns = self._columns[members][:, :, self._column_of[names[0]]]
            if len(members) > 1 and agree(columns):
                mixed = self.norms.mix(names, columns[:1])
                shared |= {name: tensor[0] for name, tensor in mixed.items()}
            else:
                stacked |= self.norms.mix(names, columns)
        found = Weights(stacked, shared, tuple(buffers))
        if self.own_buffers or self.norms.rule != "recalibrate":
            return found
        return self._recalibrated(found, max(1, at_once // RECALIBRATION_BATCH))

    def _parts(self, members: Sequence[int]) -> dict[tuple, list[str]]:
        """Tensors that are mixed alike: whether of all models at once, whether all sources are the
        same there, the sources, the dtypes."""
        of_column: dict[int, tuple[bool, tuple[int, ...]]] = {}
        parts: dict[tuple, list[str]] = {}
        for name, parameter in self.sources.parameters.items():
            g = self._column_of[name]
            if g not in of_column:
                columns = self._columns[members][:, :, g]
                used = tuple(np.flatnonzero(columns.any(axis=0)).tolist())
                of_column[g] = agree(columns), used
            alone, used = of_column[g]
            frozen = self.sources.same(name, used)
            dtypes = (self.sources.dtypes[name], parameter.dtype)
            key = (alone or frozen, frozen, used[:1] if frozen else used, *dtypes)
            parts.setdefault(key, []).append(name)
        return parts

    def _recalibrated(self, weights: Weights, together: int) -> Weights:
        """The same with running statistics estimated again; those that agree are shared."""
        stacked, shared = dict(weights.stacked), dict(weights.shared)
        if not stacked:  # all of them are one model
            stacked, shared = {name: tensor[None] for name, tensor in shared.items()}, {}
        found = self.norms.recalibrated(stacked, shared, together=together)
        for name, values in ({**stacked, **found} if not shared else found).items():
            stacked.pop(name, None)
            shared.pop(name, None)
            if agree(values):
                shared[name] = values[0]
            else:
                stacked[name] = values
        return Weights(stacked, shared)


class Files(Models):
    """Checkpoints of one model as models: their tensors as they are, nothing is mixed.

    Tensors that all of them have bit for bit are shared.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[Path], tied: Mapping[str, Sequence[str]]
    ) -> None:
        self.paths, self._tied = paths, tied
        self._names = [*model.state_dict()]
        own = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {name: tensor.detach() for name, tensor in own if name in self._names}

    def __len__(self) -> int:
        return len(self.paths)

    def families(self) -> list[list[int]]:
        return [list(range(len(self.paths)))]

    def bytes_of(self, members: Sequence[int]) -> tuple[int, int]:
        return 0, sum(tensor.nbytes for tensor in self._tensors.values())

    def weights(
        self, members: Sequence[int], *, at_once: int = 1, reuse: Sequence[Tensor] = ()
    ) -> Weights:
        free, stacked, shared, buffers = list(reuse), {}, {}, []
        with ExitStack() as stack:
            opened = [
                stack.enter_context(open_checkpoint(str(self.paths[m]), names=self._names))
                for m in members
            ]
            for names in parted_by(lambda name: self._tensors[name].dtype, self._tensors):
                flat = Flat(names, self._tensors)
                first = self._tensors[names[0]]
                values = _buffer(free, len(opened), flat.numel, first.dtype, first.device)
                buffers.append(values)
                for name, own in flat.views(values).items():
                    for value, checkpoint in zip(own, opened, strict=True):
                        stored = stored_name(checkpoint, name, self._tied) or name
                        checkpoint.read(stored, out=value)
                    if len(opened) > 1 and agree(own):
                        shared[name] = own[0]
                    else:
                        stacked[name] = own
        return Weights(stacked, shared, tuple(buffers))


def _buffer(
    free: list[Tensor], models: int, weights: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory [models, weights]: one that is free, which it then is no more, or a new one."""
    for place, tensor in enumerate(free):
        if tensor.shape == (models, weights) and tensor.dtype == dtype:
            return free.pop(place)
    return torch.empty(models, weights, dtype=dtype, device=device)


def check_candidates(matrices: Float64[np.ndarray, ...], groups: Groups, sources: Sources) -> None:
    """SoupError that says which candidate, ingredient or group is wrong."""
    names = [name for tensors in groups.values() for name in tensors]
    if sorted(names) != sorted(sources.parameters):
        wrong = sorted(set(names) ^ set(sources.parameters)) or [
            name for name in names if names.count(name) > 1
        ]
        raise SoupError(
            f"groups: {wrong[0]!r} is {_what_is_wrong(wrong[0], names, sources)}; wanted every "
            "mixed tensor of the model in exactly one group, as session.groups gives them"
        )
    wanted = (sources.ingredients, len(groups))
    if matrices.ndim != 3 or matrices.shape[1:] != wanted or not len(matrices):
        raise SoupError(
            f"candidates: found an array of shape {list(matrices.shape)}, wanted [candidates, "
            f"{wanted[0]} ingredients, {wanted[1]} groups] with at least one candidate"
        )
    if not np.isfinite(matrices).all():
        m, k, g = np.argwhere(~np.isfinite(matrices))[0].tolist()
        raise SoupError(
            f"candidates: candidate {m} has {matrices[m, k, g]} for ingredient {k} in group "
            f"{list(groups)[g]!r}; wanted finite numbers: look at what made them"
        )
    sums = matrices.sum(axis=1)
    if len(sources.checkpoints) == sources.ingredients and (abs(sums - 1) > SUM_TOLERANCE).any():
        m, g = np.argwhere(abs(sums - 1) > SUM_TOLERANCE)[0].tolist()
        raise SoupError(
            f"candidates: candidate {m} sums to {sums[m, g]:.9g} in group {list(groups)[g]!r}, and "
            "the base, which would take the rest, is not known; wanted columns that sum to 1, or "
            "name the base with zoo.base"
        )


def with_rest(
    matrices: Float64[np.ndarray, "candidates ingredients groups"], sources: int
) -> Float64[np.ndarray, "candidates sources groups"]:
    """The weight of each source: where there is a base, it comes last and takes what is left."""
    if matrices.shape[1] == sources:
        return matrices
    rest = 1 - matrices.sum(axis=1, keepdims=True)
    return np.concatenate([matrices, np.where(abs(rest) > SUM_TOLERANCE, rest, 0.0)], axis=1)


def _what_is_wrong(name: str, names: Sequence[str], sources: Sources) -> str:
    if name not in sources.parameters:
        return "no tensor that is mixed"
    return "in no group" if name not in names else "in two groups"


def agree(values: Shaped[Tensor, "models ..."] | Float64[np.ndarray, "models ..."]) -> bool:
    """Whether all models have the same values."""
    return bool((values == values[0]).all())


def _first_equal(columns: Float64[np.ndarray, "candidates sources"]) -> list[int]:
    """Of each candidate, the first one that has the same weights."""
    seen: dict[bytes, int] = {}
    return [seen.setdefault(column.tobytes(), m) for m, column in enumerate(columns)]


def families(
    columns: Float64[np.ndarray, "candidates sources groups"], tensors: Sequence[int]
) -> list[list[int]]:
    """Candidates that agree in the earliest tensors together, where that saves work.

    `tensors` is the group of each tensor in the model's order. What a family shares is run once:
    the cost of `m` models that agree in the first `s` of `t` tensors is taken as
    `PASS_COST + s/t + m·(1 − s/t)`. Families are split as long as the sum of their costs falls.
    """
    order = list(dict.fromkeys(tensors))
    before = np.cumsum([0, *(tensors.count(g) for g in order)]) / max(len(tensors), 1)
    keys = np.stack([_first_equal(columns[:, :, g]) for g in order], axis=1).tolist()

    def split(members: list[int], first: int) -> tuple[list[list[int]], float]:
        g = first
        while g < len(order) and len({keys[m][g] for m in members}) == 1:
            g += 1
        together = PASS_COST + before[g] + len(members) * (1 - before[g])
        if g == len(order):
            return [members], together
        runs: dict[int, list[int]] = {}
        for m in members:
            runs.setdefault(keys[m][g], []).append(m)
        parts = [split(run, g + 1) for run in runs.values()]
        if (apart := sum(cost for _, cost in parts)) < together:
            return [family for found, _ in parts for family in found], apart
        return [sorted(members, key=lambda m: keys[m])], together

    return split(list(range(len(columns))), 0)[0]
