"""What the kernels' launches share: tuning, models, types, and the device to launch on.

`kernels.ops` has checked the operands: a kernel reads where it is told to.

Kernels carry `no_type_check`: a type checker that wraps functions when they are imported would get
between Triton and a kernel's source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# What a kernel is called with, `[grid](…, num_warps=…)`, is not what its `def` says.
kernel: Any = triton.jit

HALVES = (torch.bfloat16, torch.float16)


def autotuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable:
    """Pick the fastest of `configs` once per key; they may not differ in the order of a sum.

    So the bits of a result do not depend on which one won. The interpreter takes the first.
    """
    return triton.autotune(list(configs[:1] if INTERPRETED else configs), key=list(key))


def models_of(*operands: Tensor | None) -> int:
    """The common size of the leading axes, which are 1 where all models share an operand."""
    return max(len(operand) for operand in operands if operand is not None)


def autocast(*operands: Tensor | None) -> list[Any]:
    """The operands in the type in which autocast multiplies, where it is on."""
    given = [operand for operand in operands if operand is not None]
    device = given[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(operands)
    dtype = torch.get_autocast_dtype(device)
    return [operand if operand is None else operand.to(dtype) for operand in operands]


def model_stride(operand: Tensor | None) -> int:
    """The step from one model to the next: 0 where they share the operand."""
    return 0 if operand is None or len(operand) == 1 else operand.stride(0)


def launched_on(operand: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the operand's."""
    return torch.cuda.device(operand.device) if operand.is_cuda else nullcontext()


def shared_sum(gradient: Tensor, models: int) -> Tensor:
    """The gradient of an operand that all models share (`models` = 1) is the sum of theirs."""
    return gradient if models == len(gradient) else gradient.sum(0, keepdim=True)
