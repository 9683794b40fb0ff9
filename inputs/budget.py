"""Bytes as people write them, and the bytes that this process holds; imports no torch."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

__all__ = ["format_bytes", "give_back_freed", "peak_resident_bytes", "resident_bytes"]

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def format_bytes(n: int) -> str:
    """`n` bytes in binary units with three digits: 4294967296 → "4.00 GiB"."""
    if abs(n) < 1024:
        return f"{n} B"
    size, unit = n / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if abs(size) < 1023.5:  # from here on it would be shown as 1024 of this unit
            break
        size, unit = size / 1024, larger
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def give_back_freed() -> None:
    """Hand freed memory to the system, where the allocator keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """The memory that this process holds now, without what it has freed; where the system does not
    say, its peak so far."""
    give_back_freed()
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    if _STATUS.exists():
        # Not ru_maxrss: that begins with what the process which started this one held.
        (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(line) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
