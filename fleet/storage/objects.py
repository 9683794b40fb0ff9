"""Packs: safetensors files that are named by their own hash, with tensors named by theirs."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.disk import check_within, sync_folder
from fleet.storage.references import is_hash, piece_of, tensor_of
from merge.checkpoints.files import InputFile
from merge.checkpoints.safetensors_file import DTYPE_NAMES, read_safetensors
from merge.checkpoints.tensors import TensorInfo, dtype_name, tensor_bytes
from merge.checkpoints.writer import CheckpointWriter
from merge.errors import MergeError

OBJECTS_NAME = "objects"
SUFFIX = ".safetensors"
NAMES_SHOWN = 8
# Packs whose headers are kept: some kilobytes each.
HEADERS_KEPT = 4096
CHUNK_BYTES = 4 << 20

_LEFTOVER = re.compile(r"new-\d+-[0-9a-f]{8}\.safetensors|\..+\.part")

# Pack → hash of each tensor in it → its bytes.
Contents = dict[str, dict[str, int]]
Identity = tuple[int, int, int, int]
Result = TypeVar("Result")

_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPE_NAMES}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `nbytes` bytes from `offset` of the file `path`, row-major."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def tensor_hash(tensor: Shaped[Tensor, ...]) -> str:
    """SHA-256 of dtype, shape and the values' bytes, in hex."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(tensor_bytes(plain(tensor)))
    return digest.hexdigest()


def check_storable(tensor: Shaped[Tensor, ...], where: str) -> None:
    """FleetError unless a pack can hold it: dense, of a dtype that safetensors has."""
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        raise FleetError(
            f"{where}: is {dtype_name(tensor.dtype)}, {tensor.layout}; a store holds dense tensors "
            f"of {', '.join(dtype_name(dtype) for dtype in DTYPE_NAMES)}: cast it"
        )


def check_named(digest: str, tensor: Shaped[Tensor, ...]) -> None:
    """FleetError unless a pack can hold the tensor, and it is what its hash says."""
    check_storable(tensor, f"tensor {digest}")
    found = tensor_hash(tensor)
    if found != digest:
        raise FleetError(f"a tensor given as {digest} is {found}; name each by its hash")


class Packs:
    """The packs in the folder of a store; reads may come from several threads at once.

    `contents` says what each pack holds, as the manifest does; `needed_by` names the variants that
    cannot be read without a pack, for errors; `catch_up` takes up what the manifest says since, if
    anything: what was moved meanwhile is then read where it is. A pack is checked against its hash
    when this process reads it first, and again when its size, time or inode changed.
    What is asked for is a tensor by its hash, or a piece of one (`fleet.storage.references`).
    """

    def __init__(
        self,
        folder: Path,
        needed_by: Callable[[str], Sequence[str]] = lambda pack: [],
        catch_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._root = folder
        self._folder = folder / OBJECTS_NAME
        self._needed_by = needed_by
        self._catch_up = catch_up
        self.contents: Contents = {}
        # Hash of each tensor → the pack that it is read from, and its bytes.
        self._homes: dict[str, tuple[str, int]] = {}
        self._checked: dict[str, Identity] = {}
        self._headers: OrderedDict[str, dict[str, Place]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, reference: object) -> bool:
        return isinstance(reference, str) and tensor_of(reference) in self._homes

    def learn(self, contents: Contents) -> None:
        """Take up what further packs hold; the latest pack of a tensor is the one it is read
        from."""
        for pack, tensors in contents.items():
            self.contents[pack] = tensors
            self._homes.update({digest: (pack, nbytes) for digest, nbytes in tensors.items()})

    def forget(self, packs: Iterable[str]) -> None:
        """Drop packs that were removed."""
        for pack in packs:
            for digest in self.contents.pop(pack, {}):
                if self._homes.get(digest, ("", 0))[0] == pack:
                    del self._homes[digest]
            with self._lock:
                self._headers.pop(pack, None)
                self._checked.pop(pack, None)

    def pack_of(self, reference: str) -> str:
        """The pack that holds a tensor; FleetError if none does."""
        return self._home(reference)[0]

    def held_by(self, pack: str) -> list[str]:
        """The tensors that are read from this pack."""
        return [d for d in self.contents.get(pack, {}) if self._homes.get(d, ("", 0))[0] == pack]

    def nbytes(self, reference: str) -> int:
        """Bytes of a tensor, as the manifest has them; nothing is read."""
        piece = piece_of(reference)
        return self._home(reference)[1] if piece is None else piece.nbytes

    def check_held(self, reference: str) -> None:
        """FleetError where a tensor is not there, or too small for the piece; nothing is read."""
        piece, (pack, nbytes) = piece_of(reference), self._home(reference)
        if piece is not None and piece.offset + piece.nbytes > nbytes:
            what = f"holds {nbytes} bytes of {tensor_of(reference)}, and no {reference}"
            raise FleetError(self._message(pack, what))

    def path(self, pack: str) -> Path:
        """Where the file of a pack is."""
        return self._folder / pack[:2] / f"{pack}{SUFFIX}"

    def put(self, tensors: Mapping[str, Shaped[Tensor, ...]]) -> Contents:
        """Write one pack with those tensors (by hash) that no pack holds, and say what it holds.

        It is on the disk under its name when this returns, and nobody's until the manifest says
        so. One writer at a time. A tensor whose pack is damaged is written again.
        Raises FleetError for a tensor that is not what its hash says; a full disk is an OSError,
        and leaves nothing.
        """
        fresh = {digest: t for digest, t in tensors.items() if not self._is_there(digest)}
        for digest, tensor in fresh.items():
            check_named(digest, tensor)
        infos = [TensorInfo(d, tuple(t.shape), t.dtype) for d, t in fresh.items()]
        return self._written(infos, lambda digest: plain(fresh[digest]))

    def copy(self, digests: Iterable[str]) -> Contents:
        """Write one pack with tensors that others hold, one in memory at a time; else as `put`."""
        places = {digest: self.place(digest) for digest in digests}
        infos = [TensorInfo(d, place.shape, place.dtype) for d, place in places.items()]
        return self._written(infos, self.read)

    def place(self, reference: str) -> Place:
        """Where a tensor lies, in a pack that was checked; FleetError as `read_many`."""
        return self._caught_up(lambda: self._place(reference))

    def is_still(self, reference: str, place: Place) -> bool:
        """Whether a tensor lies where it was found: its pack is the same, and the file untouched.

        Costs a look at the file, and not its header.
        """
        home = self._homes.get(tensor_of(reference))
        if home is None or self.path(home[0]) != place.path:
            return False
        found = check_within(self._root, place.path)
        return found is not None and self._checked.get(home[0]) == _identity(found)

    def read(self, reference: str) -> Shaped[Tensor, ...]:
        """One tensor; FleetError as `read_many`."""
        return self.read_many([reference])[reference]

    def read_many(self, references: Iterable[str]) -> dict[str, Shaped[Tensor, ...]]:
        """The tensors that are referred to, each read once, in the order of the packs' files.

        Raises FleetError for a pack that is missing, truncated or altered; it names the file and
        the variants that need it.
        """
        wanted = list(dict.fromkeys(references))
        return self._caught_up(lambda: self._read_many(wanted))

    def verify(self, pack: str) -> list[str]:
        """What is wrong with a pack, all of it read again: nothing, if it is whole."""
        with self._lock:
            self._headers.pop(pack, None)
            self._checked.pop(pack, None)
        problems = []
        try:
            places = self._header(pack)
            with self._reported(pack), _opened(self.path(pack)) as file:
                for digest in self.held_by(pack):
                    found = tensor_hash(_read(file, places[digest]))
                    if found != digest:
                        problems.append(self._message(pack, f"its tensor {digest} is {found}"))
        except FleetError as error:
            problems.append(str(error))
        return problems

    def files(self) -> dict[Path, int]:
        """The files that packs and killed writers of packs left in the folder, and their bytes.

        What has other names is not the store's, and not among them; links are not followed.
        """
        found: dict[Path, int] = {}
        check_within(self._root, self._folder / "new")
        if not self._folder.is_dir():
            return found
        for entry in os.scandir(self._folder):
            if entry.is_dir(follow_symlinks=False) and re.fullmatch("[0-9a-f]{2}", entry.name):
                for inner in os.scandir(entry.path):
                    pack = inner.name.removesuffix(SUFFIX)
                    named = inner.name.endswith(SUFFIX) and is_hash(pack)
                    if named and pack.startswith(entry.name):
                        _note(found, inner)
            elif _LEFTOVER.fullmatch(entry.name):
                _note(found, entry)
        return found

    def _home(self, reference: str) -> tuple[str, int]:
        home = self._homes.get(tensor_of(reference))
        if home is None:
            raise FleetError(
                f"{self._root}: no pack holds the tensor {tensor_of(reference)}; it was removed "
                "meanwhile, or never written: refresh, or add what needs it again"
            )
        return home

    def _caught_up(self, action: Callable[[], Result]) -> Result:
        """What `action` gives; where it fails, and the manifest says more, what it gives then."""
        while True:
            try:
                return action()
            except FleetError:
                if not self._catch_up():
                    raise

    def _place(self, reference: str) -> Place:
        whole = self._header(self.pack_of(reference))[tensor_of(reference)]
        self.check_held(reference)
        piece = piece_of(reference)
        if piece is None:
            return whole
        dtype = _DTYPES[piece.dtype]
        return Place(whole.path, whole.offset + piece.offset, piece.nbytes, dtype, piece.shape)

    def _read_many(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        packs: dict[str, list[tuple[int, str, Place]]] = {}
        for reference in wanted:
            place = self._place(reference)
            packs.setdefault(self.pack_of(reference), []).append((place.offset, reference, place))
        found: dict[str, Tensor] = {}
        for pack, places in packs.items():
            with self._reported(pack), _opened(self.path(pack)) as file:
                for _, reference, place in sorted(places, key=lambda one: one[:2]):
                    found[reference] = _read(file, place)
        return found

    def _written(
        self, infos: Sequence[TensorInfo], value: Callable[[str], Shaped[Tensor, ...]]
    ) -> Contents:
        """One pack, whole and on the disk; nothing for nothing."""
        if not infos:
            return {}
        check_within(self._root, self._folder / "new")
        new = self._folder / f"new-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        try:
            with CheckpointWriter(new, infos) as writer:
                for info in infos:
                    writer.write(info.name, value(info.name))
            pack = _file_hash(new)
            path = self.path(pack)
            check_within(self._root, path)
            changed = [path.parent]
            if not path.parent.exists():
                path.parent.mkdir()
                changed += [self._folder, self._root]
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        try:
            for folder in changed:
                sync_folder(folder)
        except BaseException:
            if pack not in self.contents:
                path.unlink()
            raise
        return {pack: {info.name: info.nbytes for info in infos}}

    def _is_there(self, digest: str) -> bool:
        """Whether a whole pack holds the tensor."""
        home = self._homes.get(digest)
        if home is None:
            return False
        try:
            self._header(home[0])
        except FleetError:
            return False
        return True

    def _header(self, pack: str) -> dict[str, Place]:
        """The places of a pack's tensors, from its file as it is now."""
        path, contents = self.path(pack), self.contents.get(pack, {})
        found = check_within(self._root, path)
        if found is None:
            raise FleetError(self._message(pack, "is missing"))
        identity = _identity(found)
        with self._lock:
            checked = self._checked.get(pack) == identity
            if checked and pack in self._headers:
                self._headers.move_to_end(pack)
                return self._headers[pack]
        with self._reported(pack), _opened(path) as file:
            if not checked and (digest := _hash_of(file)) != pack:
                raise FleetError(
                    self._message(pack, f"was truncated or altered: its SHA-256 is {digest}")
                )
            places = {
                name: Place(
                    path,
                    stored.offset,
                    stored.span * stored.dtype.itemsize,
                    stored.dtype,
                    stored.shape,
                )
                for name, stored in read_safetensors(file).items()
            }
        for digest, nbytes in contents.items():
            place = places.get(digest)
            if place is None or place.nbytes != nbytes:
                what = "does not hold" if place is None else f"has {place.nbytes} bytes of"
                raise FleetError(
                    self._message(pack, f"{what} the tensor {digest} ({nbytes} bytes expected)")
                )
        with self._lock:
            self._checked[pack] = identity
            self._headers[pack] = places
            while len(self._headers) > HEADERS_KEPT:
                self._headers.popitem(last=False)
        return places

    def _message(self, pack: str, what: str) -> str:
        names = self._needed_by(pack)
        shown = ", ".join(map(repr, names[:NAMES_SHOWN]))
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        remedy = "no variant needs it: run gc"
        if names:
            remedy = (
                f"without it these cannot be read: {shown}{more}; put the file back from a copy, "
                "or add them again"
            )
        return f"{self.path(pack)}: {what}; {remedy}"

    @contextmanager
    def _reported(self, pack: str) -> Iterator[None]:
        """Say of what cannot be read whose it is."""
        try:
            yield
        except MergeError as error:
            what = str(error).removeprefix(f"{self.path(pack)}: ")
            raise FleetError(self._message(pack, what)) from error
        except OSError as error:
            what = f"cannot be read ({error.strerror or error})"
            raise FleetError(self._message(pack, what)) from error


def _identity(found: os.stat_result) -> Identity:
    return (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


@contextmanager
def _opened(path: Path) -> Iterator[InputFile]:
    file = InputFile(path)
    try:
        yield file
    finally:
        file.close()


def _read(file: InputFile, place: Place) -> Tensor:
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if place.nbytes:
        file.read_into(tensor_bytes(tensor), place.offset)
    return tensor


def plain(tensor: Tensor) -> Tensor:
    """The values in CPU memory, row by row."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A single value passes as contiguous with any stride, which torch does not view as bytes.
    return values.clone(memory_format=torch.contiguous_format) if values.numel() == 1 else values


def _file_hash(path: Path) -> str:
    with _opened(path) as file:
        return _hash_of(file)


def _hash_of(file: InputFile) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, file.size)))
    for offset in range(0, file.size, CHUNK_BYTES):
        chunk = buffer[: file.size - offset]
        file.read_into(chunk, offset)
        digest.update(chunk)
    return digest.hexdigest()


def _note(found: dict[Path, int], entry: os.DirEntry[str]) -> None:
    if entry.is_file(follow_symlinks=False):
        found[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
