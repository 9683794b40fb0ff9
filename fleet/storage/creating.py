"""Where a store may be made, who may write it, and its base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.disk import check_within
from fleet.storage.encodings import ENCODINGS
from fleet.storage.hashes import check_storable, tensor_hash
from fleet.storage.manifest import MANIFEST_NAME
from fleet.storage.objects import OBJECTS_NAME, Packs
from fleet.storage.records import BASE, Encoded, Node
from inputs.errors import InputError
from inputs.files import locked_by
from merge.checkpoints.tensors import Checkpoint

LOCK_NAME = "store.lock"
# A base is written in packs of about this size: so much of it is in memory.
PACK_BYTES = 256 << 20

MANIFEST_PART = re.compile(rf"\.{re.escape(MANIFEST_NAME)}\..+\.part")


def check_new(folder: str | Path) -> None:
    """FleetError unless a store can be made there; what a killed run left does not count."""
    home = Path(folder).resolve()
    if home.exists() and not home.is_dir():
        raise FleetError(f"{folder}: is a file, wanted a new or empty folder")
    for entry in home.iterdir() if home.exists() else ():
        if entry.name == MANIFEST_NAME:
            raise FleetError(f"{folder}: is a store already; open it, or name a new folder")
        if entry.name not in {OBJECTS_NAME, LOCK_NAME} and not MANIFEST_PART.fullmatch(entry.name):
            raise FleetError(f"{folder}: holds {entry.name!r}, wanted a new or empty folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers out of the store in `folder`; FleetError with the one that is there."""
    lock = folder / LOCK_NAME
    check_within(folder, lock)
    with ExitStack() as held:
        try:
            held.enter_context(
                locked_by(lock, who=str(folder), remedy="read it: readers need no lock")
            )
        except InputError as error:
            raise FleetError(str(error)) from error
        yield


def write_base(
    packs: Packs, base: Mapping[str, Shaped[Tensor, ...]] | Checkpoint, where: str
) -> Node:
    """Write the base's tensors, a pack at a time; `packs` knows them then."""
    records: dict[str, Encoded] = {}
    waiting: dict[str, Tensor] = {}
    waiting_bytes = 0
    names = base.tensors if isinstance(base, Checkpoint) else base
    for key in names:
        value = base.read(key) if isinstance(base, Checkpoint) else base[key]
        check_storable(value, f"{where}: {key!r}")
        parts, settings = ENCODINGS["plain"].encode(value)
        hashes = {part: tensor_hash(tensor) for part, tensor in parts.items()}
        records[key] = Encoded("plain", hashes, settings)
        waiting.update((hashes[part], tensor) for part, tensor in parts.items())
        waiting_bytes += value.nbytes
        if waiting_bytes >= PACK_BYTES:
            packs.learn(packs.put(waiting))
            waiting, waiting_bytes = {}, 0
    node = Node(BASE, None, records)
    packs.learn(packs.put(waiting))
    return node
