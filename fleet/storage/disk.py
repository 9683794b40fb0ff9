"""A store's folder: files in it, no links out of it, names that are on the disk; no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from fleet.errors import FleetError


def check_within(root: Path, path: Path) -> os.stat_result | None:
    """What is at `path` below `root`, None if nothing is.

    Raises FleetError where a link, or something that is neither file nor folder, is on the way:
    what a store reads, writes and removes lies in its own folder.
    """
    found = None
    here = root
    for part in path.relative_to(root).parts:
        here = here / part
        try:
            found = here.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(found.st_mode):
            raise FleetError(
                f"{here}: is a link to {os.readlink(here)!r}; a store holds its own files: put the "
                "file or folder itself there"
            )
        wanted = stat.S_ISREG if here == path else stat.S_ISDIR
        if not wanted(found.st_mode):
            kind = "file" if here == path else "folder"
            raise FleetError(f"{here}: is no plain {kind}, as a store has there; move it away")
    return found


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_files(files: Iterable[Path]) -> None:
    """Remove files, and have it on the disk."""
    files = list(files)
    for path in files:
        path.unlink()
    for folder in {path.parent for path in files}:
        sync_folder(folder)
