"""Look at models before they are merged: how far they went, how alike, and where they disagree.

One pass over the checkpoints, in slices, so that memory does not grow with their size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm

from inputs.files import write_whole
from merge.checkpoints import Checkpoint, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from merge.gram import RUN, gram_matrix
from merge.mixing import CHUNK
from merge.planning.layers import Layers
from merge.stream import stored_name, tied_names

if TYPE_CHECKING:
    from pandas import DataFrame

# What is held for one element of one model: its value, its delta, two signs, and their stacks.
COPIES = 6
NAMES_SHOWN = 6
DIGITS = 3


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint holds; norms are of its floating-point tensors, tied ones counted once.

    `delta_norm` is of the compared tensors; `dtypes` counts tensors.
    """

    name: str
    tensors: int
    parameters: int
    norm: float
    delta_norm: float | None
    nonfinite: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """What was found in models of one architecture; `plot_inspection` draws its tables.

    Deltas are to the `anchor`: the base, else the mean of the models. `gram` holds the inner
    products of the deltas in each layer, `opposed` for each pair of models the elements where
    their deltas have opposite signs, `conflicts` the elements where any two have; of `elements`
    that were compared. Without a base the deltas sum to zero, so that signs say nothing: both are
    None. `frozen` are the tensors that are equal in all models and in the base.
    """

    models: tuple[ModelFacts, ...]
    base: ModelFacts | None
    anchor: Literal["base", "mean"]
    layers: tuple[str, ...]
    elements: Int64[np.ndarray, " layers"]
    gram: Float64[np.ndarray, "layers models models"]
    conflicts: Int64[np.ndarray, " layers"] | None
    opposed: Int64[np.ndarray, "layers models models"] | None
    frozen: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    def cosines(self, layer: int | None = None) -> Float64[np.ndarray, "models models"]:
        """Cosine similarity of the deltas, in a layer or in all; NaN where one is zero."""
        gram = self.gram.sum(axis=0) if layer is None else self.gram[layer]
        norms = np.sqrt(np.diagonal(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(gram / np.outer(norms, norms), -1, 1)

    def opposition(self, layer: int | None = None) -> Float64[np.ndarray, "models models"] | None:
        """The share of elements where the deltas of two models have opposite signs."""
        if self.opposed is None:
            return None
        if layer is None:
            return _share(self.opposed.sum(axis=0), self.elements.sum())
        return _share(self.opposed[layer], self.elements[layer])

    def conflict(self) -> Float64[np.ndarray, " layers"] | None:
        """The share of elements where not all deltas that are not zero have one sign."""
        return None if self.conflicts is None else _share(self.conflicts, self.elements)

    def distances(self) -> Float64[np.ndarray, " layers"]:
        """How far the models went in each layer: the root mean square of the deltas' elements."""
        return np.sqrt(_share(np.einsum("lkk->l", self.gram) / len(self.models), self.elements))

    def tables(self) -> dict[str, DataFrame]:
        """Frames: `models`, `layers`, `cosine`, `pairs` (of models, by layer), `tensors`."""
        from merge.inspection.tables import frames

        return frames(self)

    def to_markdown(self) -> str:
        """The tables and remarks as Markdown, which reads well in a terminal too."""
        from merge.inspection.tables import markdown

        return markdown(self)

    def save(self, folder: str | Path) -> None:
        """Write each table to a CSV file of its name, and all as inspection.md, into `folder`."""
        folder = Path(folder)
        for name, frame in self.tables().items():
            write_whole(folder / f"{name}.csv", frame.to_csv(index=False))
        write_whole(folder / "inspection.md", self.to_markdown() + "\n")


def inspect_models(
    checkpoints: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    names: Sequence[str] | None = None,
    only: Collection[str] | None = None,
    memory_budget: int,
    progress: bool = True,
) -> Inspection:
    """Compare models, and their base where there is one, in one pass within `memory_budget` bytes.

    Values are compared in fp32 (fp64 where one is), sums run on in float64. Elements that are not
    finite in one of them count as zero in all; tensors that are missing somewhere, have another
    shape or are no floating-point numbers are left out of the comparison, with the reason.
    `names` are what the models are called (default: what tells their paths apart), `only` the
    tensors that are looked at (default: all).
    Raises MergeError where the budget is too small or there are no models.
    """
    if not checkpoints:
        raise MergeError("there is nothing to inspect; name at least one checkpoint")
    labels = list(names) if names is not None else short_names([c.path for c in checkpoints])
    if len(labels) != len(checkpoints):
        raise MergeError(f"{len(labels)} names for {len(checkpoints)} models; wanted one for each")
    survey = _Survey(checkpoints, base, only, memory_budget)
    with (
        tqdm(
            total=survey.nbytes,
            desc="inspecting",
            unit="B",
            unit_scale=True,
            disable=not progress,
            leave=False,
        ) as bar,
        _one_thread(),
    ):
        for name in survey.wanted:
            bar.update(survey.add(name))
    return survey.report(labels)


def mean_of_pairs(matrix: Float64[np.ndarray, "models models"]) -> float:
    """The mean over pairs of different models, of those that are numbers; NaN if none is."""
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    pairs = pairs[np.isfinite(pairs)]
    return float(pairs.mean()) if len(pairs) else float("nan")


def short_names(paths: Sequence[str]) -> list[str]:
    """The parts of paths that tell them apart; numbered where they are the same."""
    parts = [PurePath(path.removesuffix(".safetensors")).parts or (path,) for path in paths]
    if len(paths) == 1:
        return [parts[0][-1]]
    shortest = min(map(len, parts))
    first = next((k for k in range(shortest) if len({p[k] for p in parts}) > 1), shortest - 1)
    last = next((k for k in range(1, shortest) if len({p[-k] for p in parts}) > 1), 1)
    short = [str(PurePath(*p[first : len(p) - last + 1])) for p in parts]
    counts = Counter(short)
    return [f"{name} ({k})" if counts[name] > 1 else name for k, name in enumerate(short, 1)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Slices are small: sharing them out costs more than it gives, far more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share(counts: np.ndarray, of: np.ndarray | np.int64) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return counts / of


# --- the pass -----------------------------------------------------------------------------------


class _Survey:
    """The work of `inspect_models`, one tensor after the other."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        base: Checkpoint | None,
        only: Collection[str] | None,
        memory_budget: int,
    ) -> None:
        self.models = list(checkpoints)
        self.base = base
        self.sources = [base, *self.models] if base is not None else self.models
        self.tied = tied_names(self.sources)
        every = {name for source in self.sources for name in source.tensors}
        self.wanted = sorted(every if only is None else every.intersection(only))
        self.groups = _Groups(self.wanted)
        bytes_per_element = 4 * COPIES * len(self.sources)
        self.step = min(CHUNK, memory_budget // bytes_per_element)
        if self.step < RUN:
            raise MergeError(
                f"memory_budget is {memory_budget} bytes, wanted at least "
                f"{RUN * bytes_per_element} to compare {len(self.sources)} checkpoints; raise "
                "memory_budget, or inspect fewer models"
            )
        count, layers = len(self.models), len(self.groups.labels)
        self.norms = np.zeros(len(self.sources))  # squares
        self.nonfinite = np.zeros(len(self.sources), np.int64)
        self.elements = np.zeros(layers, np.int64)
        self.gram = np.zeros((layers, count, count))
        self.conflicts = np.zeros(layers, np.int64)
        self.opposed = np.zeros((layers, count, count), np.int64)
        self.frozen: list[str] = []
        self.left_out: dict[str, str] = {}
        self._seen: set[tuple[object, ...]] = set()

    @property
    def nbytes(self) -> int:
        """All that is looked at, in all checkpoints."""
        held = (source.tensors.get(name) for source in self.sources for name in self.wanted)
        return sum(info.nbytes for info in held if info is not None)

    def add(self, name: str) -> int:
        """Look at the tensor in every checkpoint that has it; the bytes that this covers."""
        held = [stored_name(source, name, self.tied) for source in self.sources]
        own = [k for k, source in enumerate(self.sources) if name in source.tensors]
        covered = sum(self.sources[k].tensors[name].nbytes for k in own)
        place = tuple(s.stored[n] if n else None for s, n in zip(self.sources, held, strict=True))
        if place in self._seen:  # the same as under a name before
            return covered
        self._seen.add(place)
        reason = self._reason(held)
        if reason is not None:
            self.left_out[name] = reason
            for k in own:
                self._add_norm(k, name)
            return covered
        infos = [s.tensors[n] for s, n in zip(self.sources, held, strict=True) if n is not None]
        layer = self.groups.place(name)
        equal = True
        fresh = [self._fresh(k, info.name) for k, info in enumerate(infos)]
        for rows in self._slices(list(range(len(infos))), infos):
            bad = self._count_nonfinite(range(len(infos)), rows, fresh)
            self._add_squares(range(len(infos)), rows, fresh)
            equal &= not self._compare(layer, rows) and not bad
        self.elements[layer] += infos[0].numel
        if equal and infos[0].numel and len(self.sources) > 1:
            self.frozen.append(name)
        return covered

    def _reason(self, held: Sequence[str | None]) -> str | None:
        """Why a tensor cannot be compared."""
        lacks = [s.path for s, n in zip(self.sources, held, strict=True) if n is None]
        if lacks:
            return f"missing in {_listed(lacks)}"
        infos = [s.tensors[n] for s, n in zip(self.sources, held, strict=True) if n is not None]
        if not all(info.dtype.is_floating_point for info in infos):
            kinds = sorted({dtype_name(info.dtype) for info in infos})
            return f"{', '.join(kinds)}, not floating point"
        shapes = sorted({info.shape for info in infos})
        if len(shapes) > 1:
            return f"shapes differ: {', '.join(str(list(shape)) for shape in shapes)}"
        return None

    def _add_norm(self, source: int, name: str) -> None:
        """Count the tensor of one checkpoint alone."""
        info = self.sources[source].tensors[name]
        if not info.dtype.is_floating_point or not self._fresh(source, name):
            return
        for rows in self._slices([source], [info]):
            self._count_nonfinite([source], rows, [True])
            self._add_squares([source], rows, [True])

    def _fresh(self, source: int, name: str) -> bool:
        """Whether this checkpoint's tensor was not yet counted, under this or another name."""
        key = (source, self.sources[source].stored[name])
        fresh = key not in self._seen
        self._seen.add(key)
        return fresh

    def _slices(
        self, sources: Sequence[int], infos: Sequence[TensorInfo]
    ) -> Iterator[Float[Tensor, "sources elements"]]:
        """The same flat elements of each source, in order, cast to the dtype of the computation."""
        wide = any(info.dtype == torch.float64 for info in infos)
        dtype = torch.float64 if wide else torch.float32
        step = self.step // 2 if wide else self.step
        checkpoints = [self.sources[k] for k in sources]
        whole: dict[int, Tensor] = {}
        for k, (checkpoint, info) in enumerate(zip(checkpoints, infos, strict=True)):
            checkpoint.prefetch([info.name])
            if checkpoint.stored[info.name].stride is not None:
                # Cut out of a larger tensor, or transposed: a slice costs as much as all of it.
                whole[k] = checkpoint.read(info.name).reshape(-1)
        for start in range(0, infos[0].numel, step):
            stop = min(start + step, infos[0].numel)
            rows = torch.empty(len(infos), stop - start, dtype=dtype)
            for k, (checkpoint, info) in enumerate(zip(checkpoints, infos, strict=True)):
                if k in whole:
                    rows[k].copy_(whole[k][start:stop])
                else:
                    checkpoint.read(info.name, out=rows[k], start=start, stop=stop)
            yield rows

    def _count_nonfinite(
        self,
        sources: Sequence[int],
        rows: Float[Tensor, "sources elements"],
        fresh: Sequence[bool],
    ) -> bool:
        """Count what is not finite, and make those elements zero in all rows."""
        if torch.isfinite(torch.stack(torch.aminmax(rows))).all():
            return False
        finite = torch.isfinite(rows)
        counts = (~finite).sum(1).numpy()
        for source, count, first in zip(sources, counts, fresh, strict=True):
            self.nonfinite[source] += count if first else 0
        rows.masked_fill_(~finite.all(0), 0)
        return True

    def _add_squares(
        self,
        sources: Sequence[int],
        rows: Float[Tensor, "sources elements"],
        fresh: Sequence[bool],
    ) -> None:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().numpy()
        for source, square, first in zip(sources, norms, fresh, strict=True):
            self.norms[source] += square if first else 0

    def _compare(self, layer: int, rows: Float[Tensor, "sources elements"]) -> bool:
        """Add the deltas' inner products and signs; whether any delta is not zero."""
        if self.base is not None:
            deltas = rows[1:] - rows[0]
        else:
            # Equal tensors have a mean that is exactly theirs when it is taken from one of them.
            deltas = rows - rows[0]
            deltas -= deltas.mean(0)
        low, high = deltas.amin(0), deltas.amax(0)
        if not (low.any() or high.any()):
            return False
        self.gram[layer] += gram_matrix("tensors", None, list(deltas)).numpy()
        if self.base is not None:
            self.conflicts[layer] += int(((low < 0) & (high > 0)).sum())
            signs = deltas.sign_()
            agreed = gram_matrix("tensors", None, list(signs))
            both = gram_matrix("tensors", None, list(signs.abs_()))
            self.opposed[layer] += ((both - agreed) / 2).long().numpy()
        return True

    def report(self, labels: Sequence[str]) -> Inspection:
        compared = [k for k, count in enumerate(self.elements) if count]
        squares = np.einsum("lkk->k", self.gram)
        offset = len(self.sources) - len(self.models)
        signed = self.base is not None
        alone = len(self.sources) == 1
        return Inspection(
            models=tuple(
                self._facts(k + offset, label, None if alone else float(np.sqrt(squares[k])))
                for k, label in enumerate(labels)
            ),
            base=self._facts(0, self.base.path, None) if self.base is not None else None,
            anchor="base" if signed else "mean",
            layers=tuple(self.groups.labels[k] for k in compared),
            elements=self.elements[compared],
            gram=self.gram[compared],
            conflicts=self.conflicts[compared] if signed else None,
            opposed=self.opposed[compared] if signed else None,
            frozen=tuple(self.frozen),
            tied=tuple(sorted({group for s in self.sources for group in s.shared})),
            left_out=self.left_out,
        )

    def _facts(self, k: int, label: str, delta_norm: float | None) -> ModelFacts:
        source = self.sources[k]
        places = {source.stored[name]: info for name, info in source.tensors.items()}
        dtypes = Counter(dtype_name(i.dtype) for i in source.tensors.values())
        return ModelFacts(
            name=label,
            tensors=len(source.tensors),
            parameters=sum(info.numel for info in places.values()),
            norm=float(np.sqrt(self.norms[k])),
            delta_norm=delta_norm,
            nonfinite=int(self.nonfinite[k]),
            dtypes=dict(sorted(dtypes.items())),
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


class _Groups:
    """Which row of the tables a tensor belongs to: a layer of a tower, or before or after them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.layers = Layers.of(names)
        self.first: dict[str, int] = {}  # tower → the row of its first layer
        self.labels = ["before" if self.layers.sequences else "all"]
        for stem, numbers in self.layers.sequences.items():
            self.first[stem] = len(self.labels)
            prefix = f"{stem}." if stem else ""
            self.labels += [prefix + ".".join(map(str, number)) for number in numbers]
        self.labels += ["after"] if self.first else []

    def place(self, name: str) -> int:
        """The row of this tensor."""
        position = self.layers.position(name)
        if not self.first or position == "before":
            return 0
        if position == "after":
            return len(self.labels) - 1
        # One tower's name may begin with another's.
        tower = max((stem for stem in self.first if name.startswith(stem)), key=len)
        return self.first[tower] + position
