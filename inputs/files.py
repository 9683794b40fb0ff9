"""Files that readers, and a killed run, see old or new and nothing between; locks; no torch."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from inputs.errors import InputError


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write beside the file's place, flush to the disk, rename; a text is written in UTF-8.

    The folder is made if need be. What fails leaves the old file and nothing else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path)
    beside = part_path(path)
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def part_path(path: Path) -> Path:
    """A name beside `path` that no other writer has, and that tells who writes it."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.part")


def remove_stale_parts(path: Path) -> None:
    """Remove what writers of `path` left that were killed on this machine."""
    ours = re.compile(re.escape(f".{path.name}.{_host()}.") + r"(\d+)\.[0-9a-f]{8}\.part")
    for entry in path.parent.iterdir():
        match = ours.fullmatch(entry.name)
        if match and not _is_running(int(match[1])):
            entry.unlink(missing_ok=True)


@contextmanager
def locked_by(lock: Path, *, who: str, remedy: str, keep: bool = True) -> Iterator[None]:
    """Keep other runs out while this one works on `who`, with a lock file (removed unless `keep`).

    The system drops the lock when the process ends, however it ends. Raises InputError with the
    other run's process id and the remedy.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(lock, who, remedy)
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if not keep:
                lock.unlink(missing_ok=True)


def _lock(lock: Path, who: str, remedy: str) -> TextIO:
    while True:
        # Opened for appending: the file must not be emptied before the lock is ours.
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                owner = file.read().strip() or "unknown"
            raise InputError(
                f"{who}: another run (process {owner}) works there; wait for it, end it, or "
                f"{remedy}"
            ) from error
        # Another run may have removed the file between opening and locking.
        if lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
