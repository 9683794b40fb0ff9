"""The linear combination of tensors: one function for cooking and for learning, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from merge.errors import MergeError

SUM_TOLERANCE = 1e-6

# Elements that the inner loop works on at a time: its operands stay in the cache, and torch runs
# operations of this size in the caller's thread. (On a busy machine its thread pool costs more
# than it gives: 4 s became 69 s; reading has a thread of its own.)
CHUNK = 1 << 15


def combine(
    sources: Callable[[int], Tensor] | Sequence[Tensor],
    weights: Float64[np.ndarray, " sources"],
    *,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, ...] | None = None,
    scratch: Float[Tensor, " scratch"] | None = None,
) -> Float[Tensor, ...]:
    """The mix `W = r − Σ_k a_k·(r − w_k)` of tensors of one shape, where r has the largest weight.

    The sum runs over the other sources with a non-zero weight, in order, in fp32 (fp64 where W is
    fp64), and is rounded once to `dtype` (default: that of `out`, else of `sources[0]`, else of
    the first that the function reads). A one-hot mix and a mix of equal tensors give that tensor
    back bit for bit; slices give the bits of the whole. Of equal weights the first is r's.

    `sources` may be a function that reads source k: it is called once for each one that is needed,
    in `mixing_order(weights)`, and its tensor need be valid only until the next call. `out` is
    contiguous and receives W; `scratch` has the dtype of the computation and
    `scratch_numel(numel)` elements. Weights sum to 1, else MergeError.
    """
    order = mixing_order(weights)
    read = sources if callable(sources) else sources.__getitem__
    reference = read(order[0])
    if dtype is None and out is not None:
        dtype = out.dtype
    elif dtype is None:
        dtype = reference.dtype if callable(sources) else sources[0].dtype
    compute = compute_dtype(dtype)
    if out is None:
        out = torch.empty(reference.shape, dtype=dtype, device=reference.device)
    if len(order) == 1 or reference.numel() == 0:
        return out.copy_(reference.to(compute))

    numel = reference.numel()
    if scratch is None:
        scratch = torch.empty(scratch_numel(numel), dtype=compute, device=reference.device)
    anchor, total, difference = scratch[:numel], scratch[numel : 2 * numel], scratch[2 * numel :]
    parts = [slice(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]
    source = reference.reshape(-1)
    for part in parts:
        anchor[part].copy_(source[part])
        total[part].zero_()
    for k in order[1:]:
        source, weight = read(k).reshape(-1), float(weights[k])
        for part in parts:
            chunk, subtrahend = difference[: part.stop - part.start], source[part]
            if source.dtype != compute:  # torch itself would cast into a fresh tensor
                subtrahend = chunk.copy_(subtrahend)
            # (r − w) rather than (w − r): equal zeros then keep their sign.
            torch.sub(anchor[part], subtrahend, out=chunk)
            total[part].add_(chunk, alpha=weight)
    flat = out.view(-1)
    for part in parts:
        flat[part].copy_(anchor[part].sub_(total[part]))
    return out


def mixing_order(weights: Float64[np.ndarray, " sources"]) -> list[int]:
    """The sources that `combine` reads, in order: the largest weight, then all others but zeros."""
    total = math.fsum(weights)
    if not abs(total - 1) <= SUM_TOLERANCE:
        raise MergeError(
            f"the weights of a mix sum to {total!r}, wanted 1 within {SUM_TOLERANCE}; divide them "
            "by their sum, or give the remainder to a base"
        )
    first = int(np.argmax(weights))
    return [first, *(int(k) for k in np.flatnonzero(weights) if k != first)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in where the result is stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scratch_numel(numel: int) -> int:
    """Elements of scratch that `combine` uses for tensors of `numel` elements."""
    return 2 * numel + min(numel, CHUNK)
