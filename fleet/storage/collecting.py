"""Packs: those not needed are removed, those needed in part written anew, small ones merged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from fleet.errors import FleetError
from fleet.storage.creating import MANIFEST_PART, PACK_BYTES
from fleet.storage.disk import remove_files
from fleet.storage.journal import Journal
from fleet.storage.objects import Packs

logger = logging.getLogger(__name__)

# Pack → what is needed of it.
Kept = dict[str, list[str]]

PACKS_PER_LINE = 100_000
# A pack of which less is needed is written anew.
NEEDED_SHARE = 0.5
# Packs of fewer bytes are merged into some of about MERGED_BYTES, once there are so many: each
# costs a file, and its first reader a hash. Fewer stay, so that not every gc writes them again.
SMALL_BYTES = 4 << 20
SMALL_PACKS = 16
MERGED_BYTES = 16 << 20


def collect(journal: Journal) -> int:
    """Remove what is not needed, in a transaction; the bytes freed.

    Packs of which less than NEEDED_SHARE is needed are written anew without the rest; many small
    ones become few. On the disk this takes one such pack more, for as long as it is written.
    """
    packs = journal.packs
    # Leftovers first: on a full disk they make room for the line.
    freed = _remove_leftovers(journal)
    dead, sparse, small = sorted_packs(packs, journal.state.hashes())
    for first in range(0, len(dead), PACKS_PER_LINE):
        freed += _replace(journal, dead[first : first + PACKS_PER_LINE], [])
    for replaced, kept in batches(packs, sparse, PACK_BYTES):
        freed += _replace(journal, replaced, kept)
    for replaced, kept in batches(packs, small, MERGED_BYTES):
        if len(replaced) > 1:
            freed += _replace(journal, replaced, kept)
    return freed


def sorted_packs(packs: Packs, needed: Collection[str]) -> tuple[list[str], Kept, Kept]:
    """The packs that hold nothing `needed`; what is needed of those that hold little of it; and of
    those that are small, if they are many.

    A pack that should be written anew and is damaged is in none, which is logged.
    """
    dead: list[str] = []
    sparse: Kept = {}
    small: Kept = {}
    for pack, tensors in packs.contents.items():
        kept = [digest for digest in packs.held_by(pack) if digest in needed]
        total_bytes = sum(tensors.values())
        if not kept:
            dead.append(pack)
        elif sum(tensors[digest] for digest in kept) < NEEDED_SHARE * total_bytes:
            sparse[pack] = kept
        elif total_bytes < SMALL_BYTES:
            small[pack] = kept
    return dead, _whole(packs, sparse), _whole(packs, small) if len(small) >= SMALL_PACKS else {}


def _whole(packs: Packs, kept: Kept) -> Kept:
    """Without the packs of which something that is kept is damaged."""
    whole: Kept = {}
    for pack, digests in kept.items():
        try:
            for digest in digests:
                packs.place(digest)
        except FleetError as error:
            logger.warning("%s (gc leaves it as it is)", error)
        else:
            whole[pack] = digests
    return whole


def batches(packs: Packs, sparse: Kept, most_bytes: int) -> Iterator[tuple[list[str], list[str]]]:
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
