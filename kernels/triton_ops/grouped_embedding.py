"""Embedding tables of several models, gathered in one launch."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .launch import kernel, launched_on, model_stride, models_of


@kernel
@no_type_check
def gather_kernel(
    ids,
    weight,
    y,
    rows,
    entries,
    width,
    ids_model,
    weight_model,
    weight_entry,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    model = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(ids + model * ids_model + row, mask=row < rows, other=0).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    # An id that is not in the table reads nothing and shows as NaN.
    known = inside & ((entry >= 0) & (entry < entries))[:, None]
    values = tl.load(
        weight + model * weight_model + entry[:, None] * weight_entry + column[None, :],
        mask=known,
        other=float("nan"),
    )
    tl.store(y + (model * rows + row[:, None]) * width + column[None, :], values, mask=inside)


@torch.library.custom_op(
    "grouped::embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor weight, int padding) -> Tensor",
)
def launch(ids: Tensor, weight: Tensor, padding: int) -> Tensor:
    """`[1|M, rows]`, `[M, entries, width]`; `padding` (−1: none) is the entry without gradient."""
    models, entries, width = weight.shape
    rows = ids.shape[1]
    y = weight.new_empty(models, rows, width)
    if y.numel() == 0:
        return y
    ids = ids.contiguous()
    weight = weight if weight.stride(2) == 1 else weight.contiguous()
    block = min(triton.next_power_of_2(width), 1024)
    high = max(2048 // block, 1)
    with launched_on(weight):
        gather_kernel[(triton.cdiv(rows, high), triton.cdiv(width, block), models)](
            *(ids, weight, y, rows, entries, width),
            *(model_stride(ids), weight.stride(0), weight.stride(1)),
            ROWS=high,
            BLOCK=block,
        )
    return y


@launch.register_fake
def shape(ids: Tensor, weight: Tensor, padding: int) -> Tensor:
    return weight.new_empty(len(weight), ids.shape[1], weight.shape[2])


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, weight, ctx.padding = inputs
    ctx.save_for_backward(ids)
    ctx.entries = weight.shape[1]


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Torch's gradient of one table in which the models' lie one after the other."""
    (ids,) = ctx.saved_tensors
    models, _, width = gradient.shape
    firsts = torch.arange(models, device=ids.device)[:, None] * ctx.entries
    if ctx.padding >= 0:
        gradient = gradient.masked_fill((ids == ctx.padding)[:, :, None], 0)
    to_weight = torch.ops.aten.embedding_dense_backward(
        gradient.reshape(-1, width), (ids + firsts).flatten(), models * ctx.entries, -1, False
    )
    return None, to_weight.unflatten(0, (models, ctx.entries)), None


launch.register_autograd(backward, setup_context=save)


def grouped_embedding(
    ids: Int[Tensor, "_ *rows"],  # noqa: UP037
    weight: Float[Tensor, "_ entries width"],
    padding_idx: int | None = None,
) -> Float[Tensor, "_ *rows width"]:
    """`y[m] = weight[m][ids[m]]`; the gradient of row `padding_idx` is 0.

    An id outside of the table gives NaN.
    """
    models = models_of(ids, weight)
    if len(weight) == 1:
        return F.embedding(ids, weight[0], padding_idx)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[1]
    y = launch(ids.reshape(len(ids), -1), weight, padding)
    return y.reshape(models, *ids.shape[1:], weight.shape[2])
