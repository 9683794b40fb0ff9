"""The hashes of checkpoints that were merged before, so that a file is hashed once."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from inputs.files import write_whole
from merge.checkpoints import Checkpoint, scan

log = logging.getLogger(__name__)

KEPT = 10_000


class KnownHashes:
    """SHA-256 of a checkpoint's tensors by its files' paths, inodes, sizes and times.

    Kept in `hashes.json` in the user's cache folder (XDG_CACHE_HOME). A file that cannot be read
    or written there costs time, and nothing else: that is logged.
    """

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(cache) / "model-soups-toolkit" / "hashes.json"
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        try:
            found = json.loads(self.path.read_bytes())
            self._known = {str(key): str(value) for key, value in found.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s: cannot be read (%s); hashing again", self.path, error)

    def get(self, checkpoint: Checkpoint) -> str | None:
        """The hash, if these very files were hashed before and have not changed since."""
        plain = type(checkpoint) is Checkpoint  # what is computed on reading may change otherwise
        return self._known.get(_key(checkpoint)) if plain else None

    def put(self, checkpoint: Checkpoint, sha256: str) -> None:
        """Remember a hash."""
        if type(checkpoint) is Checkpoint:
            self._new[_key(checkpoint)] = sha256

    def of(self, checkpoint: Checkpoint) -> str:
        """The hash, known or made now."""
        sha256 = self.get(checkpoint)
        if sha256 is None:
            sha256 = scan(checkpoint).sha256
            self.put(checkpoint, sha256)
        return sha256

    def save(self) -> None:
        """Write what is new; the oldest of very many are forgotten."""
        if not self._new:
            return
        known = [*(self._known | self._new).items()][-KEPT:]
        try:
            write_whole(self.path, json.dumps(dict(known), indent=0) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.path, error)


def _key(checkpoint: Checkpoint) -> str:
    """Which files, and which of their contents: prefixes and averages show in the notes."""
    files = []
    for file in checkpoint.files:
        stat = file.stat()
        times = [stat.st_mtime_ns, stat.st_ctime_ns]
        files.append([str(file.resolve()), stat.st_dev, stat.st_ino, stat.st_size, *times])
    return json.dumps([files, checkpoint.notes])
