"""The files of a store that are needed no more, or in a small part; and their removal."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fleet.errors import FleetError
from fleet.storage.creating import MANIFEST_PART, PACK_BYTES
from fleet.storage.disk import remove_files
from fleet.storage.journal import Journal
from fleet.storage.objects import Packs

logger = logging.getLogger(__name__)

PACKS_PER_LINE = 100_000
# A pack of which less is needed is written anew.
NEEDED_SHARE = 0.5


def collect(journal: Journal) -> int:
    """Remove what is not needed, in a transaction; the bytes freed.

    Packs of which less than NEEDED_SHARE is needed are written anew without the rest.
    """
    packs = journal.packs
    # Leftovers first: on a full disk they make room for the line.
    freed = _remove_leftovers(journal)
    dead, sparse = unneeded_packs(packs, journal.state.hashes(), NEEDED_SHARE)
    for first in range(0, len(dead), PACKS_PER_LINE):
        freed += _replace(journal, dead[first : first + PACKS_PER_LINE], [])
    for replaced, kept in batches(packs, sparse, PACK_BYTES):
        freed += _replace(journal, replaced, kept)
    return freed


def unneeded_packs(
    packs: Packs, needed: Collection[str], least_share: float
) -> tuple[list[str], dict[str, list[str]]]:
    """The packs that hold nothing `needed`, and what is needed of those that hold little of it.

    A pack that should be written anew and is damaged is in neither, which is logged.
    """
    dead: list[str] = []
    sparse: dict[str, list[str]] = {}
    for pack, tensors in packs.contents.items():
        kept = [digest for digest in packs.held_by(pack) if digest in needed]
        if not kept:
            dead.append(pack)
        elif sum(tensors[digest] for digest in kept) < least_share * sum(tensors.values()):
            try:
                packs.place(kept[0])
            except FleetError as error:
                logger.warning("%s (gc leaves it as it is)", error)
            else:
                sparse[pack] = kept
    return dead, sparse


def batches(
    packs: Packs, sparse: Mapping[str, list[str]], most_bytes: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Packs to be replaced by one, and what it holds: of about `most_bytes`, or of one pack."""
    replaced: list[str] = []
    kept: list[str] = []
    kept_bytes = 0
    for pack, digests in sparse.items():
        size = sum(map(packs.nbytes, digests))
        if replaced and kept_bytes + size > most_bytes:
            yield replaced, kept
            replaced, kept, kept_bytes = [], [], 0
        replaced.append(pack)
        kept += digests
        kept_bytes += size
    if replaced:
        yield replaced, kept


def _remove_leftovers(journal: Journal) -> int:
    """Remove what killed writers left: packs without a line, and unfinished files."""
    known = {journal.packs.path(pack) for pack in journal.packs.contents}
    left = {path: size for path, size in journal.packs.files().items() if path not in known}
    for entry in journal.folder.iterdir():
        if MANIFEST_PART.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            left[entry] = entry.stat().st_size
    remove_files(left)
    return sum(left.values())


def _replace(journal: Journal, replaced: Sequence[str], kept: Iterable[str]) -> int:
    """Remove packs after what is `kept` of them was written anew; the bytes freed."""
    packs = journal.packs
    sizes = {path: path.stat().st_size for p in replaced if (path := packs.path(p)).is_file()}
    new = packs.copy(kept)
    # Before the files go: a tensor is not to be looked for in a pack that is gone.
    journal.commit({"op": "gc", "removed": list(replaced), "packs": new}, new)
    remove_files(sizes)
    return sum(sizes.values()) - sum(packs.path(pack).stat().st_size for pack in new)
