"""Which entries of a zoo's folder are checkpoints, by their names alone."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".th"}
# What a zoo that was made here says of itself, and what it keeps of a training under way.
RECORD_FILE = "zoo.json"
SNAPSHOT_FILE = "training.safetensors"


def holds_checkpoint(entry: Path) -> bool:
    """Whether this looks like a checkpoint: a file by its name, a folder by the files in it.

    A folder with an index alone counts, so that shards that are missing are noticed. What a zoo
    keeps of a training that is under way is none.
    """
    if entry.name.startswith("."):
        return False
    if entry.name == SNAPSHOT_FILE and entry.with_name(RECORD_FILE).exists():
        return False
    if entry.is_dir():
        return any(
            file.suffix in SUFFIXES or file.name.endswith(".index.json") for file in entry.iterdir()
        )
    return entry.suffix in SUFFIXES
