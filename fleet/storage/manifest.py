"""A store's manifest: one record a line, only appended to, each sealed by a sum; no torch.

A line is a JSON object that ends in `"sum"`: the first 16 hex digits of SHA-256 of the sum of the
line before it and of its own text without the sum. Lines are on the disk before `append` returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.errors import FleetError
from fleet.storage.disk import check_within, sync_folder
from inputs.files import write_whole
from merge.checkpoints.strict_json import parse_json
from merge.errors import MergeError

MANIFEST_NAME = "manifest.jsonl"
LINE_BYTES_LIMIT = 64 << 20

_SEAL = re.compile(rb',"sum":"([0-9a-f]{16})"\}\n')
_SEAL_BYTES = len(',"sum":"0123456789abcdef"}\n')
# A reader may meet a writer that cuts a torn line and writes its own: then it looks again.
_LOOKS = 4
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Line:
    """One record of the manifest, and the number of its line."""

    number: int
    content: dict[str, Any]


class Manifest:
    """The records of the store in `folder`, read on from where reading ended before.

    `count` is the number of lines that were read or appended.
    One thread at a time. A last line that a killed or running writer has not finished (no end of
    line, or zero bytes where a disk lost power) is not there for readers; the next writer cuts it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST_NAME
        self._folder = folder
        self._end = 0
        self.count = 0
        self._sum = ""
        self._file: tuple[int, int] | None = None

    @staticmethod
    def create(folder: Path, record: Mapping[str, Any]) -> None:
        """Write a manifest of one record: from then on the folder is a store."""
        line, _ = _sealed("", record, str(folder / MANIFEST_NAME))
        write_whole(folder / MANIFEST_NAME, line)
        sync_folder(folder)

    def read(self) -> list[Line]:
        """The records that were appended since the last call.

        Raises FleetError for a folder without manifest, a line that was altered, and a manifest
        that was replaced or cut.
        """
        for look in range(1, _LOOKS + 1):
            before = self._end, self.count, self._sum
            try:
                return self._read()
            except FleetError:
                self._end, self.count, self._sum = before
                if look == _LOOKS:
                    raise
                time.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def has_more(self) -> bool:
        """Whether something was appended since the last `read`."""
        found = check_within(self._folder, self.path)
        return found is not None and found.st_size > self._end

    def cut_torn_line(self) -> None:
        """Remove what a killed writer left after the last whole line; only under the lock, and
        after `read`."""
        descriptor = self._open(os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size > self._end:
                os.ftruncate(descriptor, self._end)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, record: Mapping[str, Any]) -> Line:
        """Write one line; only under the lock, and after `cut_torn_line`.

        A full disk is an OSError and leaves the manifest as it was.
        """
        count = self.count + 1
        line, seal = _sealed(self._sum, record, f"{self.path}: line {count}")
        end = self._end + len(line)
        descriptor = self._open(os.O_WRONLY)
        try:
            try:
                _write(descriptor, line, self._end)
            except BaseException:
                os.ftruncate(descriptor, self._end)
                raise
            os.fsync(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(descriptor)
        # Nothing is called in between: an interrupt comes before all of it, or after.
        self._end, self.count, self._sum = end, count, seal
        return Line(self.count, dict(record))

    def _open(self, flags: int) -> int:
        """The manifest's descriptor; FleetError unless it is the file that was read so far."""
        if check_within(self._folder, self.path) is None:
            raise FleetError(
                f"{self._folder}: is no store, it has no {MANIFEST_NAME}; name a store's folder, "
                "or make one: python -m fleet.store build"
            )
        descriptor = os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        found = os.fstat(descriptor)
        file = found.st_dev, found.st_ino
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise FleetError(f"{self.path}: is no plain file, as a store has there; move it away")
        if self._file not in {None, file} or found.st_size < self._end:
            os.close(descriptor)
            raise FleetError(
                f"{self.path}: was replaced or cut while the store was open ({found.st_size} "
                f"bytes, {self._end} were read); open the store again"
            )
        self._file = file
        return descriptor

    def _read(self) -> list[Line]:
        lines: list[Line] = []
        with open(self._open(os.O_RDONLY), "rb") as file:
            file.seek(self._end)
            while text := file.readline(LINE_BYTES_LIMIT + 1):
                where = f"{self.path}: line {self.count + 1}"
                if not text.endswith(b"\n"):
                    if len(text) > LINE_BYTES_LIMIT:
                        raise FleetError(
                            f"{where}: has more than {LINE_BYTES_LIMIT} bytes, more than a store "
                            f"writes; {_REMEDY}"
                        )
                    break
                seal = _seal_of(self._sum, text)
                if seal is None:
                    if b"\0" in text and not file.read(1):
                        break
                    raise FleetError(
                        f"{where}: was altered: its sum is not that of its text and of the lines "
                        f"before it; {_REMEDY}"
                    )
                self._sum = seal
                self.count += 1
                self._end += len(text)
                lines.append(Line(self.count, _parse(text, where)))
        return lines


_REMEDY = (
    "put back a copy of the manifest, or keep the lines before this one (in a copy of the store): "
    "they are whole"
)


def _sealed(previous: str, record: Mapping[str, Any], where: str) -> tuple[bytes, str]:
    """The line of a record, and its sum."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    seal = _sum(previous, text)
    line = text[:-1] + f',"sum":"{seal}"}}\n'.encode()
    if len(line) > LINE_BYTES_LIMIT:
        raise FleetError(
            f"{where}: would have {len(line)} bytes, at most {LINE_BYTES_LIMIT} are read; shorten "
            "what is written about it"
        )
    return line, seal


def _seal_of(previous: str, line: bytes) -> str | None:
    """The sum of a line, None if it is not the one that its text has."""
    found = _SEAL.fullmatch(line, max(len(line) - _SEAL_BYTES, 0))
    if found is None:
        return None
    seal = found[1].decode()
    return seal if seal == _sum(previous, line[:-_SEAL_BYTES] + b"}") else None


def _sum(previous: str, text: bytes) -> str:
    digest = hashlib.sha256(previous.encode())
    digest.update(text)
    return digest.hexdigest()[:16]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        content = parse_json(line[:-_SEAL_BYTES] + b"}", where)
    except MergeError as error:
        raise FleetError(f"{error}; {_REMEDY}") from error
    if not isinstance(content, dict):
        raise FleetError(f"{where}: is no JSON object; {_REMEDY}")
    return content


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
