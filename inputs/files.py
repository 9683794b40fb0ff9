"""Write a file so that readers, and a killed run, see the old one or the new one; no torch."""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path


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
