"""Where a merge goes: a folder, or one file, that is complete or not there at all."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inputs.files import locked_by, write_whole
from merge.checkpoints.strict_json import parse_json
from merge.errors import MergeError

log = logging.getLogger(__name__)

STATE = "unfinished.json"
RECORD = "merge.json"


class Output:
    """A merge on its way to `path`; everything is made in a folder beside it and renamed.

    `path` is one safetensors file if it ends in `.safetensors`, else a folder. Shards that are
    finished are remembered with the `fingerprint` of what they were made from, so that a killed
    merge can be resumed.
    """

    def __init__(self, path: Path, work: Path, fingerprint: str) -> None:
        self.path = path
        self.work = work
        self.is_file = path.suffix == ".safetensors"
        self._fingerprint = fingerprint
        self._finished: dict[str, Any] = {}

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What was recorded of a shard that an earlier run finished; None if none did."""
        return self._finished.get(shard) if (self.work / shard).is_file() else None

    def finish(self, shard: str, record: dict[str, Any]) -> None:
        """Remember that a shard in the work folder is whole."""
        self._finished[shard] = record
        self._save()

    def commit(self, record: dict[str, Any], *, overwrite: bool) -> None:
        """Put the result in its place, with `record` beside the weights."""
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        if self.is_file:
            (shard,) = self.work.glob("*.safetensors")
            shard.replace(self.path)
            write_whole(self.path.with_suffix(".merge.json"), text)
            shutil.rmtree(self.work)
            return
        write_whole(self.work / RECORD, text)
        (self.work / STATE).unlink()
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.old")
        if overwrite and self.path.exists():
            self.path.rename(aside)
        self.work.rename(self.path)
        shutil.rmtree(aside, ignore_errors=True)

    def _save(self) -> None:
        state = {"fingerprint": self._fingerprint, "finished": self._finished}
        write_whole(self.work / STATE, json.dumps(state, indent=1, sort_keys=True))

    def begin(self, *, resume: bool) -> None:
        """Make the work folder, or go on in the one that a killed merge left."""
        state = self.work / STATE
        if resume and state.is_file():
            found = parse_json(state.read_bytes(), str(state))
            if not isinstance(found, dict) or found.get("fingerprint") != self._fingerprint:
                raise MergeError(
                    f"{self.path}: --resume: the unfinished merge in {self.work} was of another "
                    "config or of other input files; start over without --resume"
                )
            self._finished = found["finished"]
            log.info("%s: resumed with %d finished shards", self.path, len(self._finished))
            return
        if self.work.exists():
            log.info("%s: an unfinished merge is discarded (--resume goes on with it)", self.path)
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        self._save()


@contextmanager
def open_output(path: Path, *, fingerprint: str, resume: bool, overwrite: bool) -> Iterator[Output]:
    """The output at `path`, locked against other runs.

    Raises MergeError where something is there already (unless `overwrite`), InputError where
    another run writes there.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()
    work = path.with_name(f".{path.name}.unfinished")
    lock = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_by(lock, who=str(path), remedy="merge into another path"):
        output = Output(path, work, fingerprint)
        output.begin(resume=resume)
        yield output
        lock.unlink()


def check_output(path: Path, *, overwrite: bool) -> None:
    """MergeError where the output is there already and may not be replaced."""
    is_file = path.suffix == ".safetensors"
    if path.is_dir() and is_file:
        raise MergeError(f"{path}: is a folder; name a .safetensors file to write, or a folder")
    if path.is_file() and not is_file:
        raise MergeError(f"{path}: is a file; name a folder to write, or a .safetensors file")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise MergeError(f"{path}: is there already; name another path, or give --overwrite")
    if path.is_dir() and not (path / RECORD).is_file():
        raise MergeError(
            f"{path}: is a folder that no merge has made (it has no {RECORD}), and is not "
            "overwritten; name another path, or remove it yourself"
        )
