"""Where a merge goes: a folder, or one file, that is complete or not there at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inputs.files import locked_by, write_whole
from merge.checkpoints.strict_json import parse_json
from merge.errors import MISTAKES, MergeError

log = logging.getLogger(__name__)

STATE = "unfinished.json"
RECORD = "merge.json"
UNREADABLE = (".pt", ".pth", ".bin", ".ckpt", ".th")


class Output:
    """A merge on its way to `path`; everything is made in a folder beside it and renamed.

    `path` is one safetensors file if it ends in `.safetensors`, else a folder. Shards that are
    finished are remembered with the `fingerprint` of what they were made from, so that a killed
    merge can be resumed.
    """

    def __init__(self, path: Path, work: Path, fingerprint: str) -> None:
        self.path = path
        self.work = work
        self.is_file = is_file(path)
        self._fingerprint = fingerprint
        self._finished: dict[str, Any] = {}

    def begin(self, *, resume: bool) -> None:
        """Make the work folder, or go on in the one that a killed merge left."""
        state = self.work / STATE
        if resume and state.is_file():
            found = parse_json(state.read_bytes(), str(state))
            if not isinstance(found, dict) or found.get("fingerprint") != self._fingerprint:
                raise MergeError(
                    f"{self.path}: --resume: the unfinished merge in {self.work} was of another "
                    "config, shard size or input; start over without --resume"
                )
            self._finished = found["finished"]
            log.info("%s: resumed with %d finished shards", self.path, len(self._finished))
            return
        if self.work.exists():
            log.info("%s: an unfinished merge is discarded (--resume goes on with it)", self.path)
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        self._save()

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What was recorded of a shard that an earlier run finished; None if none did."""
        found, file = self._finished.get(shard), self.work / shard
        if found is None or not file.is_file() or file.stat().st_size != found["size"]:
            return None
        return found["record"]

    def finish(self, shard: str, record: dict[str, Any]) -> None:
        """Remember that a shard in the work folder is whole."""
        size = (self.work / shard).stat().st_size
        self._finished[shard] = {"size": size, "record": record}
        self._save()

    def commit(self, record: dict[str, Any]) -> None:
        """Put the result in its place, with `record` beside the weights.

        A folder that is there goes aside first, and away when the new one is in its place.
        """
        if self.is_file:
            write_whole(record_of(self.path), _text(record))
            (shard,) = self.work.glob("*.safetensors")
            shard.replace(self.path)
            shutil.rmtree(self.work)
            return
        files = sorted(file.name for file in self.work.iterdir() if file.name != STATE)
        write_whole(self.work / RECORD, _text(record | {"files": [*files, RECORD]}))
        if self.path.exists():
            self.path.rename(aside(self.path))
        self.work.rename(self.path)
        (self.path / STATE).unlink()
        if aside(self.path).exists():
            shutil.rmtree(aside(self.path))

    def _save(self) -> None:
        write_whole(
            self.work / STATE,
            _text({"fingerprint": self._fingerprint, "finished": self._finished}),
        )


@contextmanager
def open_output(path: Path, *, fingerprint: str, resume: bool, overwrite: bool) -> Iterator[Output]:
    """The output at `path`, locked against other runs.

    What failed for good is removed; what was interrupted, or ran out of room, stays to be resumed.
    Raises MergeError where something is there already (unless `overwrite`), InputError where
    another run writes there.
    """
    path = path.resolve()
    _check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work, lock = (path.with_name(f".{path.name}.{what}") for what in ("unfinished", "lock"))
    with locked_by(lock, who=str(path), remedy="merge into another path", keep=False):
        _restore(path)
        check_output(path, overwrite=overwrite)
        output = Output(path, work, fingerprint)
        output.begin(resume=resume)
        try:
            yield output
        except MISTAKES:
            shutil.rmtree(work)
            raise
        except OSError as error:
            raise MergeError(
                f"{error.filename or path}: {error.strerror or error}; finished shards are kept "
                f"in {work}: make room and go on with --resume, or remove that folder"
            ) from error


def check_output(path: Path, *, overwrite: bool) -> None:
    """MergeError where the output is there already and may not be replaced.

    With `overwrite` only what an earlier merge made is replaced: a folder with nothing else in it,
    or a file with its record beside it.
    """
    _check_place(path)
    present = _present(path)
    if not present:
        return
    if not overwrite:
        raise MergeError(f"{path}: is there already; name another path, or give --overwrite")
    strangers = sorted(set(present) - set(_made_by_a_merge(path)))
    if strangers:
        more = f" and {len(strangers) - 4} more" if len(strangers) > 4 else ""
        raise MergeError(
            f"{path}: holds what no merge has made ({', '.join(strangers[:4])}{more}), which "
            "--overwrite does not remove; name another path, or remove it yourself"
        )


def _check_place(path: Path) -> None:
    """MergeError for a name that cannot be an output."""
    if path.is_dir() and is_file(path):
        raise MergeError(f"{path}: is a folder; name a .safetensors file to write, or a folder")
    if (path.exists() or path.suffix in UNREADABLE) and not (is_file(path) or path.is_dir()):
        raise MergeError(f"{path}: names a file; name a folder, or a .safetensors file to write")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise MergeError(f"{path}: {parent} is a file; name a path that is not below it")
            break


def is_file(path: Path) -> bool:
    """Whether the output is one file, by its name."""
    return path.suffix == ".safetensors"


def record_of(path: Path) -> Path:
    """Where the record of an output that is one file is written."""
    return path.with_suffix(f".{RECORD}")


def aside(path: Path) -> Path:
    """Where a folder waits while the one that replaces it is put in its place."""
    return path.with_name(f".{path.name}.replaced")


def _restore(path: Path) -> None:
    """Clear up after a merge that was killed while it replaced a folder."""
    old = aside(path)
    if old.exists() and path.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(path)


def _present(path: Path) -> list[str]:
    if is_file(path):
        return [file.name for file in (path, record_of(path)) if file.exists()]
    return [file.name for file in path.iterdir()] if path.is_dir() else []


def _made_by_a_merge(path: Path) -> list[str]:
    """The files at `path` that the record of a merge there names."""
    record = record_of(path) if is_file(path) else path / RECORD
    if not record.is_file():
        return []
    found = parse_json(record.read_bytes(), str(record))
    if not isinstance(found, dict) or "ingredients" not in found:
        return []
    return [path.name, record.name] if is_file(path) else [*found.get("files", []), STATE]


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
