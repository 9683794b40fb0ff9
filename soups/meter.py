"""Seconds and peak memory of one piece of work."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from inputs.budget import give_back_freed, peak_resident_bytes, resident_bytes


def memory_in_use(device: torch.device) -> int:
    """Bytes now: on the GPU where the model is there, else of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


class Meter:
    """`with Meter(device) as meter:` gives `meter.seconds` and `meter.peak_bytes`.

    The peak is that of the piece where the system can forget the earlier one (CUDA, Linux), and
    that of the whole process elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (forget := Path("/proc/self/clear_refs")).exists():
            give_back_freed()
            forget.write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak_bytes = peak_resident_bytes()
