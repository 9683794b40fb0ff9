"""Whether a network that is far from the others is one of them with its units in another order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from scipy.optimize import linear_sum_assignment

from inputs.randomness import generator
from merge.checkpoints import Checkpoint, TensorInfo

# A unit's weights can be compared where its inputs are the image's channels, or one channel: their
# order is not the network's own.
MOST_INPUTS = 4
FEWEST_UNITS = 8
# Of the way from chance to what members of one family have.
NEARLY_ALL = 0.7
# Where chance alone matches units so well, nothing can be said.
LEAST_ROOM = 0.1

Rows = Float64[np.ndarray, "units weights"]


def looks_permuted(
    stranger: Checkpoint, members: Sequence[Checkpoint], tensors: Sequence[str]
) -> bool:
    """Whether the stranger's units are those of the first member, in another order.

    In layers whose inputs have a known order, its units are matched with the member's by their
    cosines. They are the same units if that is about as close as another member's, and closer than
    chance: than when the weights within each unit are shuffled.
    """
    reference, other = members[0], members[1]
    infos = reference.tensors
    gained, room = 0.0, 0.0
    for name in tensors:
        if _is_known(infos[name]):
            known, own, kin = (_rows(c, name) for c in (reference, stranger, other))
            chance = _match(known, _shuffled(own, name))
            units = len(known)
            gained += units * (_match(known, own) - chance)
            room += units * (_match(known, kin) - chance)
    units = sum(infos[name].shape[0] for name in tensors if _is_known(infos[name]))
    return bool(units) and room >= LEAST_ROOM * units and gained >= NEARLY_ALL * room


def _is_known(info: TensorInfo) -> bool:
    shape = info.shape
    return len(shape) > 2 and shape[1] <= MOST_INPUTS and shape[0] >= FEWEST_UNITS


def _rows(checkpoint: Checkpoint, name: str) -> Rows:
    """The weights of each unit, of length one."""
    rows = checkpoint.read(name).double().flatten(1).numpy()
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _shuffled(rows: Rows, name: str) -> Rows:
    stream = generator(0, f"doctor/{name}")
    orders = [torch.randperm(rows.shape[1], generator=stream).numpy() for _ in rows]
    return np.stack([row[order] for row, order in zip(rows, orders, strict=True)])


def _match(a: Rows, b: Rows) -> float:
    """The mean cosine of units that are matched as well as they can be."""
    cosines = a @ b.T
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())
