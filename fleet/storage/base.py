"""The base of a store, read like any other checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merge.checkpoints.files import InputFile
from merge.checkpoints.tensors import Checkpoint, Stored

if TYPE_CHECKING:
    from fleet.variants import Store


def stored_base(store: Store) -> Checkpoint:
    """The base as a checkpoint, each time opened anew; FleetError for a damaged file."""
    files: dict[Path, InputFile] = {}
    stored: dict[str, Stored] = {}
    for key, encoded in store.base.tensors.items():
        place = store.packs.place(encoded.parts["value"])
        if place.path not in files:
            files[place.path] = InputFile(place.path)
        stored[key] = Stored(files[place.path], place.offset, place.shape, place.dtype)
    return Checkpoint(f"{store.folder} (its base)", stored, [])
