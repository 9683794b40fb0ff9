"""Attention of several models: torch's fused kernels over models folded into the batch, or, for
few tokens, one program per head with everything in registers.

Flash attention cuts long sequences into tiles; up to MOST_TOKENS there is one tile, and what takes
time is to bring operands of which some are shared, or strided, or masked, into the form that it
wants. `head_kernel` reads them where they lie. It has no backward: where a gradient is wanted, and
for dropout, float64 and more tokens, the models are folded into the batch.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import HALVES, autocast, kernel, launched_on, models_of

MOST_TOKENS = 64
WIDEST_HEAD = 128


@kernel
@no_type_check
def head_kernel(
    query,
    key,
    value,
    mask,
    y,
    images,
    heads,
    heads_per_key,
    queries,
    keys,
    width,
    value_width,
    scale,
    query_model,
    query_image,
    query_head,
    query_token,
    query_width,
    key_model,
    key_image,
    key_head,
    key_token,
    key_width,
    value_model,
    value_image,
    value_head,
    value_token,
    value_step,
    mask_model,
    mask_image,
    mask_head,
    mask_query,
    mask_key,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head, image, model = program % heads, program // heads % images, program // heads // images
    key_place = head // heads_per_key
    token = (tl.program_id(1) * QUERIES + tl.arange(0, QUERIES))[:, None]
    other = tl.arange(0, KEYS)
    query += model * query_model + image * query_image + head * query_head
    key += model * key_model + image * key_image + key_place * key_head
    value += model * value_model + image * value_image + key_place * value_head
    place = tl.arange(0, WIDTH)
    q = tl.load(
        query + token * query_token + place[None, :] * query_width,
        mask=(token < queries) & (place < width)[None, :],
        other=0.0,
    )
    k = tl.load(
        key + other[None, :] * key_token + place[:, None] * key_width,
        mask=(other < keys)[None, :] & (place < width)[:, None],
        other=0.0,
    )
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    allowed = (other < keys)[None, :] & (token < queries)
    if CAUSAL:
        allowed = allowed & (other[None, :] <= token)
    if MASK != "none":
        mask += model * mask_model + image * mask_image + head * mask_head
        mask += token * mask_query + other[None, :] * mask_key
        if MASK == "bool":
            allowed = allowed & (tl.load(mask, mask=allowed, other=0) != 0)
        else:
            scores += tl.load(mask, mask=allowed, other=0.0).to(tl.float32)
    scores = tl.where(allowed, scores, float("-inf"))
    # A query that may look nowhere gets 0, as torch's does.
    largest = tl.max(scores, axis=1)[:, None]
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    parts = tl.exp(scores - largest)
    whole = tl.sum(parts, axis=1)[:, None]
    parts = parts / tl.where(whole == 0.0, 1.0, whole)
    step = tl.arange(0, VALUE_WIDTH)
    v = tl.load(
        value + other[:, None] * value_token + step[None, :] * value_step,
        mask=(other < keys)[:, None] & (step < value_width)[None, :],
        other=0.0,
    )
    result = tl.dot(parts.to(v.dtype), v, input_precision=PRECISION)
    y += (program * queries + token) * value_width + step[None, :]
    tl.store(
        y, result.to(y.dtype.element_ty), mask=(token < queries) & (step < value_width)[None, :]
    )


@torch.library.custom_op(
    "grouped::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
    "int models) -> Tensor",
)
def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    models: int,
) -> Tensor:
    """`[1|M, images, heads, tokens, width]`; heads of key and value may be fewer; mask expanded."""
    _, images, heads, queries, width = query.shape
    keys, value_width = value.shape[-2:]
    y = query.new_empty(models, images, heads, queries, value_width)
    if y.numel() == 0:
        return y
    strides = [
        stride
        for operand in (query, key, value, mask)
        for stride in ((0,) * 5 if operand is None else expanded_strides(operand))
    ]
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "added"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    # 32 bit operands of more queries do not fit the registers.
    block = max(triton.next_power_of_2(queries), 16) if query.dtype in HALVES else 16
    mask = mask.view(torch.uint8) if kind == "bool" and mask is not None else mask
    with launched_on(query):
        head_kernel[(models * images * heads, triton.cdiv(queries, block))](
            *(query, key, value, mask, y, images, heads, heads // key.shape[2]),
            *(queries, keys, width, value_width, scale, *strides),
            MASK=kind,
            CAUSAL=is_causal,
            PRECISION="tf32" if tf32 else "ieee",
            QUERIES=block,
            KEYS=max(triton.next_power_of_2(keys), 16),
            WIDTH=max(triton.next_power_of_2(width), 16),
            VALUE_WIDTH=max(triton.next_power_of_2(value_width), 16),
            num_warps=4,
        )
    return y


def expanded_strides(operand: Tensor) -> tuple[int, ...]:
    """0 along axes of size 1, which every index reads."""
    return tuple(
        0 if size == 1 else step for size, step in zip(operand.shape, operand.stride(), strict=True)
    )


@launch.register_fake
def shape(query, key, value, mask, is_causal, scale, models):
    return query.new_empty(models, *query.shape[1:-1], value.shape[-1])


def grouped_attention(
    query: Float[Tensor, "_ ... queries width"],
    key: Float[Tensor, "_ ... keys width"],
    value: Float[Tensor, "_ ... keys value_width"],
    mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "_ ... queries value_width"]:
    """`y[m] = softmax(query[m] · key[m]ᵀ · scale + mask[m]) · value[m]`.

    A leading axis of 1 is every model's. `mask` is boolean (True: may look) or added.
    """
    models = models_of(query, key, value, mask)
    query, key, value = autocast(query, key, value)
    middle = common_axes(query, key, value, enable_gqa)
    query = query.expand(len(query), *middle, *query.shape[-2:])
    q, k, v = (with_heads(operand, middle) for operand in (query, key, value))
    m = None if mask is None else with_heads(mask, middle)
    if m is not None and m.is_floating_point():
        m = m.to(q.dtype)
    of_keys = max(k.shape[2], v.shape[2])
    k, v = (t.expand(-1, -1, of_keys, -1, -1) for t in (k, v))
    gradients = torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in (q, k, v, m)
    )
    if gradients or dropout_p > 0 or not small(q, k, v):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        y = folded(q, k, v, m, models, dropout_p=dropout_p, **options)
    else:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        y = launch(q, k, v, m, is_causal, scale, models)
    return y.reshape(models, *query.shape[1:-1], value.shape[-1])


def common_axes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The axes between models and tokens, which broadcast; there may be fewer heads of keys."""
    middles = [tuple(operand.shape[1:-2]) for operand in (query, key, value)]
    if not enable_gqa:
        return tuple(torch.broadcast_shapes(*middles))
    images = torch.broadcast_shapes(*(middle[:-1] for middle in middles))
    return (*images, query.shape[-3])


def small(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a head's operands fit the registers of one program."""
    tokens = max(query.shape[-2], key.shape[-2])
    width = max(query.shape[-1], value.shape[-1])
    return tokens <= MOST_TOKENS and width <= WIDEST_HEAD and query.dtype != torch.float64


def with_heads(operand: Tensor, middle: tuple[int, ...]) -> Tensor:
    """`[1|M, images, heads, …, …]`, a view unless several axes of images are to be one."""
    missing = max(len(middle), 2) + 3 - operand.dim()
    operand = operand.reshape(len(operand), *[1] * missing, *operand.shape[1:])
    images = middle[:-1]
    if len(images) < 2:
        return operand
    return operand.expand(-1, *images, -1, -1, -1).flatten(1, len(images))


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, models: int, **options):
    """Torch's attention with the models as more of the batch. Operands [1|M, images, heads, …]."""
    images, heads = query.shape[1:3]

    def fold(operand: Tensor) -> Tensor:
        spread = operand.expand(models, images, *operand.shape[2:]).flatten(0, 1)
        one_each = spread.shape[1] > 1 or options["enable_gqa"]
        return spread if one_each else spread.expand(-1, heads, -1, -1)

    if mask is not None:
        mask = mask[0] if mask.shape[:2] == (1, 1) else fold(mask)
    y = F.scaled_dot_product_attention(fold(query), fold(key), fold(value), mask, **options)
    return y.unflatten(0, (models, images))
