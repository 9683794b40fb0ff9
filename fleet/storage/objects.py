"""Packs: safetensors files that are named by their own hash, with tensors named by theirs."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.disk import check_within, sync_folder
from fleet.storage.hashes import check_named, plain, tensor_hash
from fleet.storage.pack_file import (
    Place,
    file_hash,
    opened,
    places_in,
    read_tensor,
    whole_places,
)
from fleet.storage.references import is_hash, piece_of, tensor_of
from merge.checkpoints.safetensors_file import DTYPE_NAMES
from merge.checkpoints.tensors import TensorInfo, dtype_name
from merge.checkpoints.writer import CheckpointWriter
from merge.errors import MergeError

OBJECTS_NAME = "objects"
SUFFIX = ".safetensors"
NAMES_SHOWN = 8
LOST_SHOWN = 3
# Packs whose headers are kept: some kilobytes each.
HEADERS_KEPT = 4096

_LEFTOVER = re.compile(r"new-\d+-[0-9a-f]{8}\.safetensors|\..+\.part")

# Pack → hash of each tensor in it → its bytes.
Contents = dict[str, dict[str, int]]
Identity = tuple[int, int, int, int]
Result = TypeVar("Result")

_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPE_NAMES}


class Packs:
    """The packs in the folder of a store; reads may come from several threads at once.

    `contents` says what each pack holds, as the manifest does; `needed_by` names the variants that
    cannot be read without some tensors, for errors; `catch_up` takes up what the manifest says
    since, if anything: what was moved meanwhile is then read where it is. A pack is checked against
    its hash when this process reads it first, and again when its size, time or inode changed; of
    one that was damaged, those tensors are read that are what their own hashes say.
    What is asked for is a tensor by its hash, or a piece of one (`fleet.storage.references`).
    """

    def __init__(
        self,
        folder: Path,
        needed_by: Callable[[Sequence[str]], Sequence[str]] = lambda digests: [],
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
        # Of damaged packs what is whole.
        self._damaged: dict[str, tuple[Identity, dict[str, Place]]] = {}
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
            self._forget_file(pack)

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
        so. One writer at a time. A tensor whose pack is damaged is written again, and with it what
        else of that pack is whole, so that nothing needs the file any more.
        Raises FleetError for a tensor that is not what its hash says; a full disk is an OSError,
        and leaves nothing.
        """
        fresh = {digest: t for digest, t in tensors.items() if not self._is_there(digest)}
        for digest, tensor in fresh.items():
            check_named(digest, tensor)
        infos = [TensorInfo(d, tuple(t.shape), t.dtype) for d, t in fresh.items()]
        damaged = {self._homes[d][0] for d in fresh if d in self._homes} & self._damaged.keys()
        for pack in damaged:
            _, places = self._damaged[pack]
            rest = [d for d in self.held_by(pack) if d in places and d not in fresh]
            infos += [TensorInfo(d, places[d].shape, places[d].dtype) for d in rest]
        return self._written(infos, lambda d: plain(fresh[d]) if d in fresh else self.read(d))

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

        Raises FleetError for a pack that is missing, and for tensors of one that was truncated or
        altered; it names the file, these tensors and the variants that need them.
        """
        wanted = list(dict.fromkeys(references))
        return self._caught_up(lambda: self._read_many(wanted))

    def verify(self, pack: str) -> list[str]:
        """What is wrong with a pack, all of it read again: nothing, if it is whole."""
        self._forget_file(pack)
        problems = []
        try:
            places = self._header(pack)
            if pack in self._damaged:
                return [self._damage(pack, places)]
            with self._reported(pack), opened(self.path(pack)) as file:
                for digest in self.held_by(pack):
                    found = tensor_hash(read_tensor(file, places[digest]))
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
        pack = self.pack_of(reference)
        places = self._header(pack)
        whole = places.get(tensor_of(reference))
        if whole is None:
            raise FleetError(self._damage(pack, places))
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
            with self._reported(pack), opened(self.path(pack)) as file:
                for _, reference, place in sorted(places, key=lambda one: one[:2]):
                    found[reference] = read_tensor(file, place)
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
            with opened(new) as file:
                pack = file_hash(file)
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
        return home[0] not in self._damaged

    def _header(self, pack: str) -> dict[str, Place]:
        """The places of a pack's tensors, from its file as it is now; of the whole ones only."""
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
            damaged_as, places = self._damaged.get(pack, (None, {}))
            if damaged_as == identity:
                return places
        with self._reported(pack), opened(path) as file:
            whole = checked or file_hash(file) == pack
            places = places_in(file, contents) if whole else whole_places(file, contents)
        with self._lock:
            if not whole:
                self._damaged[pack] = identity, places
                return places
            self._damaged.pop(pack, None)
            self._checked[pack] = identity
            self._headers[pack] = places
            while len(self._headers) > HEADERS_KEPT:
                self._headers.popitem(last=False)
        return places

    def _forget_file(self, pack: str) -> None:
        """Have a pack's file read anew."""
        with self._lock:
            self._headers.pop(pack, None)
            self._checked.pop(pack, None)
            self._damaged.pop(pack, None)

    def _damage(self, pack: str, places: Mapping[str, Place]) -> str:
        """What was lost of a pack of which those at `places` are whole."""
        held = self.held_by(pack)
        lost = [digest for digest in held if digest not in places]
        what = "was truncated or altered"
        if lost:
            shown = ", ".join(lost[:LOST_SHOWN]) + (", …" if len(lost) > LOST_SHOWN else "")
            what += f", and with it {len(lost)} of the {len(held)} tensors read from it ({shown})"
        needing = [] if self._needed_by(lost) else self._needed_by(held)
        if needing:
            return (
                f"{self.path(pack)}: {what}; nothing that is needed is lost: put the file back "
                f"from a copy, or add {needing[0]!r} again, which moves what is whole"
            )
        return self._message(pack, what, lost)

    def _message(self, pack: str, what: str, lost: Sequence[str] | None = None) -> str:
        names = self._needed_by(self.held_by(pack) if lost is None else lost)
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


def _note(found: dict[Path, int], entry: os.DirEntry[str]) -> None:
    if entry.is_file(follow_symlinks=False):
        found[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
