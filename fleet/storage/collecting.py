"""Which packs of a store are needed no more, or in a small part."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping

from fleet.errors import FleetError
from fleet.storage.objects import Packs

logger = logging.getLogger(__name__)


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
