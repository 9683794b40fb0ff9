"""Mixing on the CPU: matrix products over chunks of weights, whatever the rows are stored in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.mixing import tile, tiles
from kernels.segments import Segment
from kernels.storage import Rows

# Bytes of the scratch that a chunk of rows is unpacked into: it stays in the cache. Rows that need
# no unpacking are copied too where many models read them: adjacent in memory they do not push each
# other out of it, as they do at strides of a power of two (1.3x there, and no loss elsewhere).
CHUNK_BYTES = 1 << 21

# Weights that are multiplied with a gradient at a time: longer sums in fp32 lose digits.
DOT_WEIGHTS = 1 << 14

# The library's product has whole tiles of this many models, and another order of sums where they do
# not fill. With zeros up to a multiple a candidate's weights are the same bits whatever else is in
# the call, and for any number of threads (measured; in fp32). One alone has an order of its own.
MODELS_TOGETHER = 4


def mix(
    anchor: Float[Tensor, " weights"],
    deltas: Float[Tensor, "rows weights"] | Rows,
    coefficients: Float[Tensor, "models rows groups"],
    segments: Sequence[Segment],
    *,
    out: Float[Tensor, "models weights"],
) -> Float[Tensor, "models weights"]:
    """`out[m] = anchor + Σ_k coefficients[m, k, group] · deltas[k]` over `runs` of segments."""
    compute = _compute_dtype(anchor)
    coefficients = coefficients.to(compute)
    _keep_the_rest(anchor, segments, out)
    for start, stop, group in segments:
        of_group = coefficients[:, :, group]
        for begin, end, values, scales in _mix_chunks(deltas, start, stop, compute, len(of_group)):
            factors = of_group if scales is None else of_group * scales
            part = anchor[begin:end].to(compute)
            _add_product(part, factors, values, out[:, begin:end])
    return out


def delta_dot(
    deltas: Float[Tensor, "rows weights"] | Rows,
    gradient: Float[Tensor, "models weights"],
    segments: Sequence[Segment],
    groups: int,
) -> Float[Tensor, "models rows groups"]:
    """`Σ_w gradient[m, w] · deltas[k, w]` over the weights of each group, chunk by chunk."""
    compute = _compute_dtype(gradient)
    models = len(gradient)
    dots = gradient.new_zeros(models, len(deltas), groups, dtype=torch.float64)
    for start, stop, group in segments:
        for begin, end, values, scales in _chunks(
            deltas, start, stop, compute, as_stored=DOT_WEIGHTS
        ):
            part = gradient[:, begin:end].to(compute)
            product = (values @ part[0])[None] if models == 1 else part @ values.t()
            dots[:, :, group] += product if scales is None else product * scales
    return dots.to(compute)


def row_norms(
    deltas: Float[Tensor, "rows weights"] | Rows, segments: Sequence[Segment], groups: int
) -> Float[Tensor, "rows groups"]:
    """The Euclidean length of each row in each group, chunk by chunk."""
    compute = torch.float32 if isinstance(deltas, Rows) else _compute_dtype(deltas)
    squares = torch.zeros(len(deltas), groups, dtype=torch.float64, device=deltas.device)
    for start, stop, group in segments:
        for _, _, values, scales in _chunks(deltas, start, stop, compute, as_stored=DOT_WEIGHTS):
            lengths = torch.linalg.vector_norm(values, dim=1)
            squares[:, group] += (lengths if scales is None else lengths * scales).double() ** 2
    return squares.sqrt_().to(compute)


class _Chunk(NamedTuple):
    """The rows over [begin, end): `values`, yet to be multiplied by `scales` where there are."""

    begin: int
    end: int
    values: Tensor
    scales: Tensor | None


def _mix_chunks(
    deltas: Tensor | Rows, start: int, stop: int, compute: torch.dtype, models: int
) -> Iterator[_Chunk]:
    """What to multiply at a time: for one model all that needs no unpacking, else a scratch full.

    Every thread has a scratch of its own size, so that they meet less often. From two models on,
    bits do not depend on where a chunk ends.
    """
    if models == 1:
        return _chunks(deltas, start, stop, compute, as_stored=stop - start)
    return _unpacked(deltas, start, stop, compute, CHUNK_BYTES * torch.get_num_threads())


def _chunks(
    deltas: Tensor | Rows, start: int, stop: int, compute: torch.dtype, as_stored: int
) -> Iterator[_Chunk]:
    """Rows that need no unpacking as they are, `as_stored` weights at a time; others unpacked."""
    tensor = deltas.codes if isinstance(deltas, Rows) else deltas
    if tensor.dtype != compute:
        yield from _unpacked(deltas, start, stop, compute, CHUNK_BYTES)
        return
    for begin in range(start, stop, as_stored):
        end = min(begin + as_stored, stop)
        yield _Chunk(begin, end, tensor[:, begin:end], None)


def _unpacked(
    deltas: Tensor | Rows, start: int, stop: int, compute: torch.dtype, scratch_bytes: int
) -> Iterator[_Chunk]:
    """The rows in a scratch that is theirs until the next chunk."""
    tensor = deltas.codes if isinstance(deltas, Rows) else deltas
    count = len(tensor)
    length = max(scratch_bytes // (max(count, 1) * compute.itemsize) // 64, 1) * 64
    scratch = tensor.new_empty(count * min(length, stop - start), dtype=compute)
    begin = start
    while begin < stop:
        end = min(begin + length, stop)
        if isinstance(deltas, Rows):
            end = deltas.chunk_end(begin, end)
        values = scratch[: count * (end - begin)].view(count, end - begin)
        scales = None
        if isinstance(deltas, Rows):
            scales = deltas.read_codes(begin, end, values)
        else:
            values.copy_(deltas[:, begin:end])
        yield _Chunk(begin, end, values, scales)
        begin = end


def _add_product(anchor: Tensor, factors: Tensor, values: Tensor, out: Tensor) -> None:
    """`out = anchor + factors · values`, rounded once to the type of `out`."""
    direct = out.dtype == anchor.dtype
    models = len(factors)
    if models == 1:
        total = torch.addmv(anchor, values.t(), factors[0], out=out[0] if direct else None)
    elif missing := -models % MODELS_TOGETHER:
        padded = torch.nn.functional.pad(factors, (0, 0, 0, missing))
        total, direct = torch.addmm(anchor, padded, values)[:models], False
    else:
        total = torch.addmm(anchor, factors, values, out=out if direct else None)
    if not direct:
        out.copy_(total)


def _keep_the_rest(anchor: Tensor, segments: Sequence[Segment], out: Tensor) -> None:
    """Weights outside of all segments are the anchor's."""
    end = 0
    for start, stop, _ in (*segments, Segment(len(anchor), len(anchor), 0)):
        if start > end and out.data_ptr() != anchor.data_ptr():
            out[:, end:start] = anchor[end:start]
        end = stop


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mixed_linear(
    x: Float[Tensor, "#models rows in"],
    anchor: Float[Tensor, "out in"],
    deltas: Float[Tensor, "ingredients out in"] | Rows,
    coefficients: Float[Tensor, "models ingredients"],
    bias: Float[Tensor, "#models out"] | None = None,
) -> Float[Tensor, "models rows out"]:
    """`y[m] = x[m] · (anchor + Σ_k coefficients[m, k] · deltas[k])ᵀ + bias[m]`, tile by tile."""
    coefficients = coefficients.to(_compute_dtype(anchor))
    models, inputs = len(coefficients), len(x)
    rows, width, ingredients = x.shape[1], x.shape[2], len(deltas)
    through_rows = ingredients * rows * (inputs * width + models)
    through_weights = models * width * (ingredients + rows)
    tile_product = _through_rows if through_rows < through_weights else _through_weights
    y = x.new_empty(models, rows, len(anchor))
    for start, stop in tiles(anchor, models):
        part = tile(deltas, width, start, stop)
        tile_product(x, anchor[start:stop], part, coefficients, y[:, :, start:stop])
    return y if bias is None else y.add_(bias[:, None])


def _through_weights(
    x: Tensor, anchor: Tensor, deltas: Tensor | Rows, coefficients: Tensor, out: Tensor
) -> None:
    """Mix the tile of every model's weight, then multiply."""
    flat = anchor.reshape(-1)
    weights = flat.new_empty(len(coefficients), len(flat))
    segments = [Segment(0, len(flat), 0)]
    mix(flat, deltas, coefficients[:, :, None], segments, out=weights)
    out.copy_(x @ weights.unflatten(1, anchor.shape).transpose(1, 2))


def _through_rows(
    x: Tensor, anchor: Tensor, deltas: Tensor | Rows, coefficients: Tensor, out: Tensor
) -> None:
    """Multiply with the anchor and with every row, then mix the products: fewer for few inputs."""
    inputs, rows, width = x.shape
    features, count = len(anchor), len(deltas)
    compute = coefficients.dtype
    if isinstance(deltas, Rows):
        values = x.new_empty(count, deltas.weights, dtype=compute)
        deltas.read(0, deltas.weights, values)
    else:
        values = deltas.to(compute)
    x = x.to(compute)
    products = x.reshape(inputs * rows, width) @ values.view(count, features, width).mT
    by_input = products.view(count, inputs, rows * features).transpose(0, 1)
    mixed = coefficients @ by_input[0] if inputs == 1 else coefficients[:, None] @ by_input
    mixed = mixed.reshape(len(coefficients), rows, features)
    out.copy_(mixed.add_(x @ anchor.to(compute).t()))
