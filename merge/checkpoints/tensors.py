"""A checkpoint: what tensors there are, from headers alone, and reads of one at a time."""

from __future__ import annotations

import difflib
import math
import reprlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from merge.checkpoints.files import InputFile
from merge.errors import MergeError

# Large enough for full disk speed, small enough to stay in the last-level cache.
STAGING_BYTES = 4 << 20

_staging = threading.local()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: from byte `offset` of `file`, row-major unless `stride` is given.

    `stride` is in elements, as torch's, and never negative.
    """

    file: InputFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Elements from the first to the last one in the file, gaps included."""
        if self.stride is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """As it stands in configs: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check_shape(shape: object, dtype: torch.dtype) -> tuple[int, ...]:
    """`shape` as a tuple; ValueError unless it is one that a tensor of `dtype` can have."""
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(
            f"its shape is {reprlib.repr(shape)}, wanted a list of non-negative integers"
        )
    if len(shape) > 64:
        raise ValueError(f"it has {len(shape)} dimensions, at most 64 are possible")
    # Zeros count as ones: torch multiplies the other sizes all the same to get strides.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"its shape {reprlib.repr(shape)} does not fit into 63 bits")
    return tuple(shape)


def tensor_bytes(tensor: Shaped[Tensor, ...]) -> memoryview:
    """The memory of a contiguous CPU tensor, for reads into it and writes from it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class Checkpoint:
    """The tensors of one checkpoint, read one at a time; a context manager.

    `path` is as the user named it, `tensors` is sorted by name (after unwrapping), `notes` says
    what was unwrapped, stripped, ignored or chosen, and `shared` holds the names that are one and
    the same tensor in a torch file (tied). `files` are read, an adapter's after the model's own.
    Reads are thread-safe and go through this object's own file descriptors: files that are
    replaced meanwhile are still read as they were.
    """

    def __init__(self, path: str, stored: Mapping[str, Stored], notes: Iterable[str]) -> None:
        self.path = path
        self.stored = {name: stored[name] for name in sorted(stored)}
        self.tensors = {
            name: TensorInfo(name, entry.shape, entry.dtype) for name, entry in self.stored.items()
        }
        self.notes = tuple(notes)
        self._inputs = tuple({entry.file: None for entry in self.stored.values()})
        self.files: tuple[Path, ...] = tuple(sorted(file.path for file in self._inputs))
        self.shared = _same_places(self.stored)

    @property
    def home(self) -> Path:
        """The folder of the weights, and of what lies beside them; with an adapter the base's."""
        return self.files[0].parent

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {len(self.tensors)} tensors)"

    def read(
        self,
        name: str,
        *,
        out: Shaped[Tensor, ...] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Shaped[Tensor, ...]:
        """The tensor `name`, or its flat elements [start, stop) in one dimension.

        Without `out` a fresh CPU tensor of the stored dtype and shape. `out` is contiguous, of any
        dtype, device and shape with the right number of elements; it is filled, cast through a
        small fixed buffer where it differs, and returned.
        Raises MergeError for an unknown name, a wrong range, and a file that shrank.
        """
        entry = self._entry(name)
        numel = self.tensors[name].numel
        end = numel if stop is None else stop
        if not 0 <= start <= end <= numel:
            raise MergeError(
                f"{self.path}: '{name}' has {numel} elements, [{start}, {end}) is outside of it"
            )
        if out is None:
            shape = entry.shape if start == 0 and stop is None else (end - start,)
            out = torch.empty(shape, dtype=entry.dtype)
        elif out.numel() != end - start or not out.is_contiguous():
            raise MergeError(
                f"{self.path}: '{name}' is read into a tensor of shape {list(out.shape)}; wanted a "
                f"contiguous one with {end - start} elements"
            )
        _fill(out.detach().reshape(-1), entry, start)
        return out

    def prefetch(self, names: Iterable[str] | None = None) -> None:
        """Have the kernel read `names` (default: all) into its page cache; returns at once."""
        for name in self.stored if names is None else names:
            entry = self._entry(name)
            if entry.span:
                entry.file.prefetch(entry.offset, entry.span * entry.dtype.itemsize)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self._inputs:
            file.close()

    def _entry(self, name: str) -> Stored:
        if name not in self.stored:
            near = difflib.get_close_matches(name, self.stored, n=1)
            hint = f"; the nearest name is '{near[0]}'" if near else ""
            raise MergeError(f"{self.path}: has no tensor '{name}'{hint}")
        return self.stored[name]


def _fill(flat: Shaped[Tensor, " numel"], entry: Stored, start: int) -> None:
    """Read the elements of `entry` from `start` into `flat`, as many as it has."""
    if flat.numel() == 0:
        return
    if entry.stride is not None:
        # The range that the view covers never exceeds its storage, which lies in the file.
        cover = torch.empty(entry.span, dtype=entry.dtype)
        entry.file.read_into(tensor_bytes(cover), entry.offset)
        values = cover.as_strided(entry.shape, entry.stride).reshape(-1)
        flat.copy_(values[start : start + flat.numel()])
        return
    itemsize = entry.dtype.itemsize
    offset = entry.offset + start * itemsize
    if flat.dtype == entry.dtype and flat.device.type == "cpu":
        entry.file.read_into(tensor_bytes(flat), offset)
        return
    if not hasattr(_staging, "buffer"):
        _staging.buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    staging = _staging.buffer.view(entry.dtype)
    for first in range(0, flat.numel(), staging.numel()):
        part = flat[first : first + staging.numel()]
        chunk = staging[: part.numel()]
        entry.file.read_into(tensor_bytes(chunk), offset + first * itemsize)
        part.copy_(chunk)


def _same_places(stored: Mapping[str, Stored]) -> tuple[tuple[str, ...], ...]:
    places: dict[Stored, list[str]] = {}
    for name, entry in stored.items():
        if 0 not in entry.shape:
            places.setdefault(entry, []).append(name)
    return tuple(tuple(names) for names in places.values() if len(names) > 1)
