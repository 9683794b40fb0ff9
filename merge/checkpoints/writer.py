"""Writes safetensors tensor by tensor, beside the place and renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from jaxtyping import Shaped
from torch import Tensor

from inputs.files import part_path, remove_stale_parts, write_whole
from merge.checkpoints.files import HEADER_BYTES_LIMIT
from merge.checkpoints.safetensors_file import DTYPE_NAMES
from merge.checkpoints.tensors import TensorInfo, tensor_bytes
from merge.errors import MergeError


class CheckpointWriter:
    """A safetensors checkpoint that is written in any order; a context manager.

    `tensors` says beforehand what will be written. Inside the `with` block `write` puts each
    tensor in its place; at its end the file is renamed to `path`, which holds the old file or the
    new one and nothing between. On an exception nothing is left; what a killed writer left is
    removed by the next one. The same tensors give the same bytes. Files have their whole size
    from the start: a full disk is an OSError at once.

    With `max_shard_bytes`, `path` is a folder: `model-00001-of-0000N.safetensors` of at most that
    many bytes of tensors (a larger tensor gets a shard of its own) and
    `model.safetensors.index.json`. An index that is there is removed before the shards are
    renamed and the new one comes last: killed in between, the folder has no index, and opening it
    says so.

    Raises MergeError for tensors that safetensors cannot hold, and at the end for missing ones.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Iterable[TensorInfo],
        *,
        metadata: dict[str, str] | None = None,
        max_shard_bytes: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._sharded = max_shard_bytes is not None
        infos = self._check(list(tensors))
        # Wide types first, as the library does, so that every tensor is aligned for those who map.
        infos.sort(key=lambda info: (-info.dtype.itemsize, info.name))
        if max_shard_bytes is None:
            self._shards = [_Shard(self.path, infos, metadata or {})]
        else:
            shards = split_shards(infos, max_shard_bytes)
            self._shards = [
                _Shard(self.path / name, part, metadata or {}) for name, part in shards.items()
            ]
        self._shard_of = {name: shard for shard in self._shards for name in shard.infos}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._shard_of}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointWriter:
        if self._sharded:
            self.path.mkdir(parents=True, exist_ok=True)
        elif self.path.is_dir():
            raise MergeError(f"{self.path}: is a folder; name a file to write")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for shard in self._shards:
                shard.create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def write(self, name: str, tensor: Shaped[Tensor, ...], *, start: int | None = None) -> None:
        """Put a tensor in its place; with `start` a part of it, its flat elements from there on.

        The dtype must match, and the shape too unless it is a part. Threads may write at once.
        Raises MergeError for a tensor that was not announced, does not match or comes twice.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise MergeError(f"{self.path}: '{name}' is written, but was not announced")
        info = shard.infos[name]
        first = start or 0
        last = first + tensor.numel()
        fits = (
            tuple(tensor.shape) == info.shape if start is None else 0 <= first <= last <= info.numel
        )
        if tensor.dtype != info.dtype or not fits:
            raise MergeError(
                f"{self.path}: '{name}' is written as {tensor.dtype} {list(tensor.shape)} from "
                f"element {first}; announced was {info.dtype} {list(info.shape)}"
            )
        with self._lock:
            ranges = self._written[name]
            if any(first < end and begin < last for begin, end in ranges):
                raise MergeError(f"{self.path}: '{name}' is written twice")
            ranges.append((first, last))
        if last > first:
            shard.put(tensor.detach().cpu().contiguous(), name, first * info.dtype.itemsize)

    def _check(self, infos: list[TensorInfo]) -> list[TensorInfo]:
        names: set[str] = set()
        for info in infos:
            if info.name in names or info.name == "__metadata__":
                raise MergeError(f"{self.path}: the tensor name '{info.name}' is taken")
            if info.dtype not in DTYPE_NAMES:
                raise MergeError(
                    f"{self.path}: '{info.name}' is {info.dtype}, which safetensors cannot hold; "
                    "cast it or skip it"
                )
            names.add(info.name)
        return infos

    def _commit(self) -> None:
        missing = [
            name
            for name, ranges in self._written.items()
            if sum(end - begin for begin, end in ranges) < self._shard_of[name].infos[name].numel
            or not ranges
        ]
        if missing:
            raise MergeError(
                f"{self.path}: {len(missing)} tensors were announced and not written: "
                f"{', '.join(missing[:8])}; nothing was kept"
            )
        for shard in self._shards:
            shard.finish()
        if not self._sharded:
            self._shards[0].rename()
            return
        index = self.path / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        for shard in self._shards:
            shard.rename()
        write_index(index, {s.path.name: s.order for s in self._shards})
        _sync_folder(self.path)

    def _discard(self) -> None:
        for shard in self._shards:
            shard.discard()


@dataclass
class _Shard:
    """One safetensors file on its way: tensors in the order of their data."""

    path: Path
    order: list[TensorInfo]
    metadata: Mapping[str, str]
    infos: dict[str, TensorInfo] = field(init=False)
    _offsets: dict[str, int] = field(init=False)
    _header: bytes = field(init=False)
    _size: int = field(init=False)
    _part: Path = field(init=False)
    _descriptor: int | None = None

    def __post_init__(self) -> None:
        self.infos = {info.name: info for info in self.order}
        self._part = part_path(self.path)
        entries: dict[str, object] = {}
        begins: dict[str, int] = {}
        position = 0
        for info in self.order:
            begins[info.name], end = position, position + info.nbytes
            entries[info.name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, end],
            }
            position = end
        content = dict(sorted(entries.items()))
        if self.metadata:
            content = {"__metadata__": dict(sorted(self.metadata.items())), **content}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > HEADER_BYTES_LIMIT:
            raise MergeError(
                f"{self.path}: its header would have {len(text)} bytes, safetensors allows "
                f"{HEADER_BYTES_LIMIT}; write shards (max_shard_bytes)"
            )
        self._header = struct.pack("<Q", len(text)) + text
        self._offsets = {name: len(self._header) + begin for name, begin in begins.items()}
        self._size = len(self._header) + position

    def create(self) -> None:
        """Make the temporary file with its whole size and its header."""
        remove_stale_parts(self.path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._part, flags, 0o666)
        try:
            _reserve(self._descriptor, self._size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._write(memoryview(self._header), 0)

    def put(self, tensor: Shaped[Tensor, ...], name: str, skip_bytes: int) -> None:
        self._write(tensor_bytes(tensor), self._offsets[name] + skip_bytes)

    def _write(self, data: memoryview, offset: int) -> None:
        if self._descriptor is None:
            raise RuntimeError("CheckpointWriter.write is for use inside its `with` block")
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def finish(self) -> None:
        """Have everything on the disk, still under the temporary name."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            self._close()

    def rename(self) -> None:
        self._part.replace(self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        self._close()
        self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Give a file its size, with room on the disk where the system can reserve it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            # Some file systems cannot reserve; that the disk is full is said later, then.
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
        else:
            return
    os.ftruncate(descriptor, size_bytes)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split_shards(infos: Sequence[TensorInfo], max_bytes: int) -> dict[str, list[TensorInfo]]:
    """File name → the consecutive tensors in it, of at most `max_bytes` together or only one."""
    if max_bytes <= 0:
        raise MergeError(f"max_shard_bytes is {max_bytes}, wanted a positive number of bytes")
    parts: list[list[TensorInfo]] = [[]]
    used = 0
    for info in infos:
        if parts[-1] and used + info.nbytes > max_bytes:
            parts.append([])
            used = 0
        parts[-1].append(info)
        used += info.nbytes
    return {
        f"model-{number:05}-of-{len(parts):05}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def write_index(path: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
    """Write the index.json that says which shard holds which tensor."""
    content = {
        "metadata": {"total_size": sum(i.nbytes for part in shards.values() for i in part)},
        "weight_map": {info.name: file for file, part in shards.items() for info in part},
    }
    write_whole(path, json.dumps(content, indent=2, sort_keys=True))
