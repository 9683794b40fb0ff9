"""Checkpoints with their units moved, read like any other, and the alignment of several."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from merge.align.groups import PermutationGroups, derive_groups
from merge.align.matching import check_state, cost_names, match_weights
from merge.align.permutations import Permutations, apply_permutations, identity, move
from merge.align.tracing import Example
from merge.checkpoints import Checkpoint
from merge.errors import MergeError

# Rows that are shorter are not worth a read of their own: the whole tensor is read.
ROW_BYTES = 4096

logger = logging.getLogger(__name__)


class AlignedCheckpoint(Checkpoint):
    """A checkpoint whose tensors come with their units moved; the files stay as they are.

    Everything but `read` and `notes` is the checkpoint's own; closing it closes that one.
    Raises MergeError where a tensor that moves has not the model's shape.
    """

    def __init__(self, checkpoint: Checkpoint, permutations: Permutations) -> None:
        super().__init__(
            checkpoint.path, checkpoint.stored, [*checkpoint.notes, _note(permutations)]
        )
        self.tensors = checkpoint.tensors
        self.files = checkpoint.files
        self.shared = checkpoint.shared
        self.permutations = permutations
        self._checkpoint = checkpoint
        self._indices = {}
        for name, info in self.tensors.items():
            permutations.groups.check_shape(name, info.shape, where=f"{checkpoint.path}: ")
            indices = permutations.indices(name)
            if any(index is not None for index in indices):
                self._indices[name] = indices

    def read(
        self,
        name: str,
        *,
        out: Shaped[Tensor, ...] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Shaped[Tensor, ...]:
        """The tensor `name` with its units moved, or its flat elements [start, stop).

        As `Checkpoint.read`. A slice reads the rows that it needs, each by itself, where they are
        long enough; else the whole tensor.
        """
        source = self._checkpoint
        if name not in self._indices:
            return source.read(name, out=out, start=start, stop=stop)
        info = self.tensors[name]
        end = info.numel if stop is None else stop
        # The source refuses a wrong range, and a wrong `out`, in its own words.
        if not 0 <= start <= end <= info.numel:
            return source.read(name, out=out, start=start, stop=stop)
        if out is not None and (out.numel() != end - start or not out.is_contiguous()):
            return source.read(name, out=out, start=start, stop=stop)
        values = self._moved(name, start, end)
        if out is None:
            return values.view(info.shape) if start == 0 and stop is None else values
        out.detach().view(-1).copy_(values)
        return out

    def close(self) -> None:
        """Close the checkpoint that is read."""
        self._checkpoint.close()

    def _moved(self, name: str, start: int, end: int) -> Shaped[Tensor, " numel"]:
        """The flat elements [start, end) of the moved tensor, a fresh one."""
        info, indices = self.tensors[name], self._indices[name]
        row = info.numel // info.shape[0]
        if end - start == info.numel or row * info.dtype.itemsize < ROW_BYTES:
            return move(self._checkpoint.read(name), indices).flatten()[start:end].clone()
        first, last = start // row, -(-end // row)
        rows = range(first, last) if indices[0] is None else indices[0][first:last].tolist()
        block = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
        for place, k in enumerate(rows):
            self._checkpoint.read(name, out=block[place], start=k * row, stop=(k + 1) * row)
        block = move(block, [None, *indices[1:]])
        return block.flatten()[start - first * row : end - first * row]


def aligned_checkpoint(checkpoint: Checkpoint, permutations: Permutations) -> AlignedCheckpoint:
    """The checkpoint with its units moved as it is read."""
    return AlignedCheckpoint(checkpoint, permutations)


def align_checkpoints(
    model: nn.Module,
    example: Example,
    checkpoints: Sequence[Checkpoint],
    *,
    reference: int | Literal["mean"] = 0,
    iterations: int = 100,
    seed: int = 0,
    check: bool = True,
) -> list[Checkpoint]:
    """Checkpoints of one model, each with its units moved to those of the reference.

    `reference` is the place of the checkpoint that stays; two of them are held in memory. With
    `mean` each in turn is matched to the mean of the others, in random order, until none moves
    (MergeMany of arXiv 2209.04836), after a start at the first; then all are held in memory.
    Tensor names are those of the model's state dict. `check` first runs `check_groups`, on a copy
    of the model in float64. Raises MergeError where a parameter is
    missing or has another shape, or the model cannot be traced.
    """
    if not checkpoints:
        raise MergeError("found no checkpoints to align; wanted at least one")
    first = 0 if reference == "mean" else reference
    if not -len(checkpoints) <= first < len(checkpoints):
        raise MergeError(
            f"reference {reference} is not one of the {len(checkpoints)} checkpoints, wanted "
            f"0 to {len(checkpoints) - 1} or 'mean'"
        )
    first %= len(checkpoints)
    groups = derive_groups(model, example, check=check)
    logger.info("alignment:\n%s", groups)
    if reference == "mean":
        found = _match_to_mean(groups, checkpoints, iterations, seed)
    else:
        target = _read(groups, checkpoints[first])
        found = [
            identity(groups)
            if k == first
            else match_weights(groups, target, _read(groups, one), iterations=iterations, seed=seed)
            for k, one in enumerate(checkpoints)
        ]
    return [
        aligned_checkpoint(one, permutations) if permutations.moved else one
        for one, permutations in zip(checkpoints, found, strict=True)
    ]


def _match_to_mean(
    groups: PermutationGroups, checkpoints: Sequence[Checkpoint], iterations: int, seed: int
) -> list[Permutations]:
    states = [_read(groups, checkpoint) for checkpoint in checkpoints]
    found = [identity(groups)]
    found += [
        match_weights(groups, states[0], state, iterations=iterations, seed=seed)
        for state in states[1:]
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations if len(states) > 2 else 0):
        moved = False
        for k in torch.randperm(len(states), generator=generator).tolist():
            others = [apply_permutations(found[j], states[j]) for j in range(len(states)) if j != k]
            better = match_weights(
                groups, _mean(others), states[k], start=found[k], iterations=iterations, seed=seed
            )
            moved |= better != found[k]
            found[k] = better
        if not moved:
            break
    return found


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def _read(groups: PermutationGroups, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that are compared, as fp32 (fp64 stays); a tied one by any of its names."""
    state = {}
    for name in cost_names(groups):
        names = [name, *(tied for tied, one in groups.tied.items() if one == name)]
        for stored in [n for n in names if n in checkpoint.tensors][:1]:
            tensor = checkpoint.read(stored)
            state[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    check_state(groups, state, where=checkpoint.path)
    return state


def _note(permutations: Permutations) -> str:
    groups = permutations.groups.groups
    return f"aligned: {permutations.moved} units moved in {len(groups)} permutation groups"
