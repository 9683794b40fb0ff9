"""Positioned reads of a file: never mmap, because mapped pages count as the process's memory."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from typing_extensions import Buffer

from merge.errors import MergeError

# The cap of the safetensors library on its header; torch's pickles hold the same kind of list.
HEADER_BYTES_LIMIT = 100_000_000


class InputFile:
    """A regular file that is read at explicit offsets, by any number of threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):
            raise MergeError(f"{path}: is not a regular file; give a checkpoint file or a folder")
        self._raw = io.FileIO(path)
        self.size = os.fstat(self._raw.fileno()).st_size

    def __str__(self) -> str:
        return str(self.path)

    def read_into(self, buffer: Buffer, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset`; MergeError where the file ends too early."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            # One call returns at most 2 GiB on Linux, and may always return less.
            count = os.preadv(self._raw.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise MergeError(
                    f"{self}: ends at byte {offset + done}, {len(view) - done} bytes are missing "
                    f"(it had {self.size} bytes when it was opened); the file changed while it "
                    "was read: write it again and start over"
                )
            done += count

    def read_bytes(self, offset: int, count: int) -> bytearray:
        """`count` bytes from `offset`; the caller has checked that they lie inside the file."""
        data = bytearray(count)
        self.read_into(data, offset)
        return data

    def buffered(self, limit: int) -> io.BufferedReader:
        """A stream of the first `limit` bytes."""
        return io.BufferedReader(_Prefix(self, min(limit, self.size)))

    def prefetch(self, offset: int, count: int) -> None:
        """Ask the kernel to read a range into the page cache; returns at once."""
        if hasattr(os, "posix_fadvise"):  # macOS has none, and reads ahead by itself
            os.posix_fadvise(self._raw.fileno(), offset, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._raw.close()


class _Prefix(io.RawIOBase):
    """The first bytes of an InputFile as a stream."""

    def __init__(self, file: InputFile, limit: int) -> None:
        self._file, self._limit, self._position = file, limit, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._limit}[whence]
        if origin + offset < 0:
            raise ValueError(f"a seek to byte {origin + offset}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")[: max(self._limit - self._position, 0)]
        self._file.read_into(view, self._position)
        self._position += len(view)
        return len(view)
