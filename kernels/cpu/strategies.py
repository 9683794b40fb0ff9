"""Which of several ways to compute an operation, from a table of measured times.

Each row of the table is one shape, as numbers, with the time that each strategy took there. A call
takes the fastest available strategy of the nearest row, by the distance of the logarithms. The
table that comes with the package is `strategies.json`; `python -m kernels.measure` writes one for
this machine into the user's cache folder, and that one is used where it is there.
"""

from __future__ import annotations

import json
import logging
import math
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

logger = logging.getLogger(__name__)

TRAINED_MODELS = 8
FEATURES = {
    "linear": ("models", "rows", "in", "out"),
    "conv2d": ("models", "rows", "channels", "out", "groups", "pixels", "kernel"),
}


class Measured(NamedTuple):
    """The times in microseconds of each strategy for one shape."""

    threads: int
    shape: tuple[int, ...]
    times: dict[str, float]


def choose(op: str, x: Tensor, shape: tuple[int, ...], available: tuple[str, ...]) -> str:
    """The available strategy that was fastest at the measured shape nearest to this one.

    The first one on devices other than the CPU, of which the table knows nothing.
    """
    if x.device.type != "cpu":
        return available[0]
    return _choose(op, shape, available, min(torch.get_num_threads(), 2))


@lru_cache(maxsize=4096)
def _choose(op: str, shape: tuple[int, ...], available: tuple[str, ...], threads: int) -> str:
    rows = [row for row in table().get(op, ()) if set(available) & set(row.times)]
    if not rows:
        return available[0]

    def distance(row: Measured) -> tuple[bool, float]:
        pairs = zip(shape, row.shape, strict=True)
        return row.threads != threads, sum(math.log2(max(a, 1) / b) ** 2 for a, b in pairs)

    times = min(rows, key=distance).times
    return min((name for name in available if name in times), key=times.__getitem__)


def alike(models: int) -> int:
    """The number of models to choose by: any one while they are trained, where the bits of each are
    not to depend on how many there are."""
    return TRAINED_MODELS if torch.is_grad_enabled() else models


def packs(*operands: Tensor | None) -> bool:
    """Whether to reorder weights into oneDNN's own layout.

    Worth it only while a graph is captured, where what depends on weights alone is computed once;
    it has no gradient.
    """
    present = [operand for operand in operands if operand is not None]
    return (
        capturing()
        and not torch.is_grad_enabled()
        and all(operand.device.type == "cpu" for operand in present)
        and len({operand.dtype for operand in present}) == 1
        and _packed_dtype(present[0].dtype)
    )


def capturing() -> bool:
    """Whether operations are being recorded as a graph (make_fx, or another dispatch mode)."""
    return is_in_torch_dispatch_mode()


@cache
def _packed_dtype(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    halves = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or halves


def measured_path() -> Path:
    """Where this machine's own table is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "model-soups-toolkit" / "strategies.json"


@cache
def table() -> dict[str, list[Measured]]:
    """The measured rows by operation: this machine's own, else those of the package."""
    own = measured_path()
    if own.exists():
        try:
            return parse(own.read_text())
        except (OSError, ValueError) as error:
            logger.warning(
                "%s is ignored: %s; write it anew with python -m kernels.measure", own, error
            )
    return parse(Path(__file__).with_name("strategies.json").read_text())


def parse(text: str) -> dict[str, list[Measured]]:
    """A table from its JSON text; ValueError says what is wrong with it."""
    found = json.loads(text)
    if not isinstance(found, dict) or set(found) != set(FEATURES):
        raise ValueError(f"wanted an object with {', '.join(FEATURES)}")
    if not all(isinstance(rows, list) for rows in found.values()):
        raise ValueError("wanted a list of rows for each operation")
    return {op: [_row(op, row) for row in rows] for op, rows in found.items()}


def _row(op: str, row: object) -> Measured:
    match row:
        case {"threads": int(threads), "shape": list(shape), "times": dict(times)} if (
            len(shape) == len(FEATURES[op])
            and all(isinstance(size, int) and size > 0 for size in shape)
            and times
            and all(isinstance(time, int | float) and time > 0 for time in times.values())
        ):
            return Measured(threads, tuple(shape), times)
    raise ValueError(f"{op}: {row} is no row; wanted threads, shape {FEATURES[op]} and times")
