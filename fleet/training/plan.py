"""How many models train at once within a memory budget, and in what pieces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.averages import Average
from fleet.training.optimizers import ModelOptimizer
from fleet.training.step import Kernel
from inputs.budget import format_bytes

# Of one model's step: below that, threads are in each other's way.
MUCH = 4_000_000
# Halves: while a step is recorded, some values live longer than when it is replayed; measured.
RECORDED = 3
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Manner:
    """How models of one kind are computed, and what that takes in bytes.

    `width` models at once, and so many groups of them `side_by_side` where there is `much` to do,
    each batch in `micro_batches` equal parts. `step_bytes` is what a step of one model takes beside
    what it keeps, its images among it; `fixed_bytes` what the kind takes once.
    """

    width: int
    side_by_side: int
    much: bool
    micro_batches: int
    checkpointing: bool
    step_bytes: int
    fixed_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.width * self.side_by_side * self.step_bytes + self.fixed_bytes


def kept_bytes(recipe: Recipe, state: Mapping[str, Tensor], trained: Iterable[str]) -> int:
    """What a model keeps while it trains: weights, the optimizer's state, averages, the best."""
    weights = sum(map(_nbytes, state.values()))
    parameters = {name: state[name] for name in trained}
    best = weights if recipe.keep == "best" else 0
    ascent = sum(map(_nbytes, parameters.values())) if recipe.sam_rho else 0
    return (
        weights
        + ModelOptimizer.state_bytes(recipe, parameters)
        + Average.state_bytes(recipe, state)
        + best
        + ascent
    )


def manner_of(
    kernel: Kernel,
    stacked: Mapping[str, Tensor],
    pixels: Tensor,
    targets: Tensor,
    *,
    kept: int,
    models: int,
    threads: int,
    budget: int | None,
    name: str,
) -> Manner:
    """The fastest way that fits: fewer models at once, then activation checkpointing, then smaller
    parts of a batch.

    `kernel` is made to checkpoint where that is needed. The last of these changes the rounding of
    gradients, the others change no bits. FleetError where not even one model fits.
    """
    fixed = sum(map(_nbytes, stacked.values()))
    rows, least = pixels.shape[1], math.inf
    batched = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in _train(kernel))
    for checkpointing in (False, True):
        kernel.checkpointing = checkpointing
        for parts in MICRO_BATCHES if checkpointing and not batched else (1,):
            if rows % parts:
                continue
            mine = slice(0, rows // parts)
            _, size = kernel.probe(pixels[:, mine], targets[:, mine], stacked)
            images = _nbytes(pixels) // len(pixels) + _nbytes(targets) // len(targets)
            accumulated = fixed if parts > 1 else 0
            step = size.step_bytes * RECORDED // 2 + 2 * images + accumulated
            much = size.multiplications > MUCH
            side_by_side = min(threads, models) if much else 1
            width = _balanced(size.width, models, side_by_side)
            if budget is not None:
                room = (budget - fixed) // (kept + step)
                side_by_side = max(1, min(side_by_side, room))
                width = min(width, room // side_by_side)
            if width >= 1:
                return Manner(width, side_by_side, much, parts, checkpointing, step, fixed)
            least = min(least, fixed + kept + step)
    why = " (with BatchNorm a batch is not cut into smaller parts)" if batched else ""
    assert budget is not None
    raise FleetError(
        f"{name}: memory_budget is {format_bytes(budget)}, one model with batches of {rows} takes "
        f"{format_bytes(int(least))}{why}; raise memory_budget or lower batch_size"
    )


def _balanced(width: int, models: int, threads: int) -> int:
    """At most `width`, so that every thread has as many groups to compute; 1 stays 1, and others
    do not become 1, which rounds in another way."""
    if width == 1 or models == 1:
        return 1
    groups = -(-models // width)
    groups = -(-groups // threads) * threads
    return max(2, -(-models // groups))


def _train(kernel: Kernel) -> Iterable[nn.Module]:
    return (module for module, training in kernel.modes if training)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
