"""The public operations, and the only place that chooses how each is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kernels import checks, mixing
from kernels import segmented as of_segments
from kernels.cpu import attention, convolution, embedding, linear, norms, segmented
from kernels.cpu import mixing as cpu_mixing
from kernels.segments import Segment
from kernels.storage import Rows

logger = logging.getLogger(__name__)


def mix(
    anchor: Float[Tensor, " weights"],
    deltas: Float[Tensor, "ingredients weights"] | Rows,
    coefficients: Float[Tensor, "models ingredients *groups"],
    segments: Sequence[Segment] | None = None,
    *,
    out: Float[Tensor, "models weights"] | None = None,
) -> Float[Tensor, "models weights"]:
    """The weights of many models, each the anchor and its own mixture of the same rows.

    `out[m, w] = anchor[w] + Σ_k coefficients[m, k, group of w] · deltas[k, w]`

    Coefficients [models, ingredients] are one group. `segments` say which weights belong to which
    group (default: those of `Rows`); weights outside of all segments are the anchor's. Sums run in
    fp32, in fp64 where the anchor is fp64, and are rounded once to the anchor's type. From two
    models on, a model's bits do not depend on the others in the call; one alone may differ in the
    last bits. `out` may be the anchor's memory for one model.

    Differentiable in anchor and coefficients (not with `out`). Raises KernelError where operands
    do not fit together or a coefficient is not finite.
    """
    mixing.check_mix(anchor, deltas, coefficients, out)
    by_group = coefficients if coefficients.dim() == 3 else coefficients[:, :, None]
    segments = mixing.group_runs("mix", deltas, by_group.shape[2], segments)
    chosen = _mixing_for(anchor)
    if out is not None:
        return chosen.mix(anchor, deltas, by_group, segments, out=out)
    return mixing.Mix.apply(anchor, by_group, deltas, segments, chosen)


def delta_dot(
    deltas: Float[Tensor, "ingredients weights"] | Rows,
    gradient: Float[Tensor, "models weights"],
    segments: Sequence[Segment] | None = None,
    groups: int = 1,
) -> Float[Tensor, "models ingredients groups"]:
    """The gradient in the coefficients of `mix`, from the gradient in the mixed weights.

    `dots[m, k, g] = Σ_w gradient[m, w] · deltas[k, w]` over the weights of group g

    In fp32 (fp64 where the gradient is fp64). Differentiable in the gradient. Raises KernelError
    where operands do not fit together.
    """
    mixing.check_delta_dot(deltas, gradient)
    segments = mixing.group_runs("delta_dot", deltas, groups, segments)
    return mixing.DeltaDot.apply(gradient, deltas, segments, groups, _mixing_for(gradient))


def row_norms(
    deltas: Float[Tensor, "ingredients weights"] | Rows, segments: Sequence[Segment], groups: int
) -> Float[Tensor, "ingredients groups"]:
    """The Euclidean length of each row in each group; 0 where a group has no weights."""
    mixing.check_rows("row_norms", deltas)
    segments = mixing.group_runs("row_norms", deltas, groups, segments)
    return cpu_mixing.row_norms(deltas, segments, groups)


def mixed_linear(
    x: Float[Tensor, "#models rows in"],
    anchor: Float[Tensor, "out in"],
    deltas: Float[Tensor, "ingredients out in"] | Rows,
    coefficients: Float[Tensor, "models ingredients"],
    bias: Float[Tensor, "#models out"] | None = None,
) -> Float[Tensor, "models rows out"]:
    """A linear layer of many models that are mixed while they are multiplied.

    `y[m] = x[m] · (anchor + Σ_k coefficients[m, k] · deltas[k])ᵀ + bias[m]`

    For few rows: the weights of all models are never in memory at once. `Rows` hold out · in
    weights. Differentiable in x, anchor, coefficients and bias. Raises KernelError where operands
    do not fit together or a coefficient is not finite.
    """
    mixing.check_mixed_linear(x, anchor, deltas, coefficients, bias)
    return mixing.MixedLinear.apply(x, anchor, coefficients, bias, deltas, _mixing_for(anchor))


def grouped_linear(
    x: Float[Tensor, "#models *rows in"],
    weight: Float[Tensor, "#models out in"],
    bias: Float[Tensor, "#models out"] | None = None,
) -> Float[Tensor, "_ *rows out"]:
    """A linear layer of many models.

    `y[m] = x[m] · weight[m]ᵀ + bias[m]`

    In this and all grouped operations a leading axis of 1 means that all models share the operand,
    and the result has one of 1 where they share them all. Differentiable in all operands. Raises
    KernelError where operands do not fit together.
    """
    checks.check_linear(x, weight, bias)
    chosen = _triton_for("grouped_linear", x) or linear.grouped_linear
    return chosen(x, weight, bias)


def grouped_conv2d(
    x: Float[Tensor, "#models rows channels height width"],
    weight: Float[Tensor, "#models out channels_per_group kernel_height kernel_width"],
    bias: Float[Tensor, "#models out"] | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Float[Tensor, "_ rows out _ _"]:
    """A convolution of many models, with the settings of `torch.nn.functional.conv2d`.

    `y[m] = conv2d(x[m], weight[m], bias[m])`

    On the CPU the result may lie in memory with channels last. Differentiable in all operands.
    Raises KernelError where operands do not fit together.
    """
    checks.check_conv2d(x, weight, bias, groups)
    strides = checks.check_pair("stride", stride)
    settings = {
        "stride": strides,
        "padding": checks.check_padding(padding, strides),
        "dilation": checks.check_pair("dilation", dilation),
        "groups": groups,
    }
    chosen = _triton_for("grouped_conv2d", x) or convolution.grouped_conv2d
    return chosen(x, weight, bias, **settings)


def grouped_layer_norm(
    x: Float[Tensor, "#models ..."],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "#models ..."] | None = None,
    bias: Float[Tensor, "#models ..."] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "_ ..."]:
    """Layer normalisation over the last axes with the scale and shift of each model.

    `y[m] = (x[m] − mean) / √(var + eps) · weight[m] + bias[m]`

    `weight` and `bias` are [models, *normalized_shape]. Differentiable in all operands. Raises
    KernelError where operands do not fit together.
    """
    shape = tuple(normalized_shape)
    checks.check_layer_norm(x, shape, weight, bias)
    chosen = _triton_for("grouped_layer_norm", x) or norms.grouped_layer_norm
    return chosen(x, shape, weight, bias, eps)


def grouped_batch_norm(
    x: Float[Tensor, "#models rows channels ..."],
    running_mean: Float[Tensor, "#models channels"] | None,
    running_var: Float[Tensor, "#models channels"] | None,
    weight: Float[Tensor, "#models channels"] | None = None,
    bias: Float[Tensor, "#models channels"] | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "_ rows channels ..."]:
    """Batch normalisation of many models.

    `y[m] = (x[m] − mean[m]) / √(var[m] + eps) · weight[m] + bias[m]`, by channel

    Mean and variance are the running ones; in training, and where there are none, those of each
    model's own batch, and the running ones are moved towards them in place (the variance unbiased).
    Differentiable in x, weight and bias. Raises KernelError where operands do not fit together, and
    in training where there is one value per channel or models share running statistics.
    """
    checks.check_batch_norm(x, running_mean, running_var, weight, bias, training)
    settings = {"training": training, "momentum": momentum, "eps": eps}
    chosen = _triton_for("grouped_batch_norm", x) or norms.grouped_batch_norm
    return chosen(x, running_mean, running_var, weight, bias, **settings)


def grouped_attention(
    query: Float[Tensor, "#models ... queries width"],
    key: Float[Tensor, "#models ... keys width"],
    value: Float[Tensor, "#models ... keys value_width"],
    mask: Shaped[Tensor, "#models ..."] | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "_ ... queries value_width"]:
    """Scaled dot product attention of many models, as one call over a larger batch.

    `y[m] = softmax(query[m] · key[m]ᵀ · scale + mask[m]) · value[m]`

    A mask of booleans (True: attend) or of the query's dtype, [models, ...], broadcasts to one
    model's [..., queries, keys]. Differentiable in all operands. Raises KernelError where operands
    do not fit together.
    """
    checks.check_attention(query, key, value, mask, is_causal, enable_gqa)
    settings = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    chosen = _triton_for("grouped_attention", query) or attention.grouped_attention
    return chosen(query, key, value, mask, **settings)


def grouped_embedding(
    ids: Int[Tensor, "#models *rows"],
    weight: Float[Tensor, "#models entries width"],
    padding_idx: int | None = None,
) -> Float[Tensor, "_ *rows width"]:
    """Rows of many models' embedding tables.

    `y[m] = weight[m][ids[m]]`; row `padding_idx` gets no gradient

    Differentiable in weight. Raises KernelError where operands do not fit together, IndexError
    for an id outside of the table.
    """
    checks.check_embedding(ids, weight, padding_idx)
    chosen = _triton_for("grouped_embedding", ids) or embedding.grouped_embedding
    return chosen(ids, weight, padding_idx)


def segmented_low_rank(
    x: Float[Tensor, "rows in"],
    segments: Sequence[of_segments.Run],
    downs: Sequence[Float[Tensor, "_ in"]],
    ups: Sequence[Float[Tensor, "out _"]],
    scales: Sequence[float],
    *,
    out: Float[Tensor, "rows out"] | None = None,
) -> Float[Tensor, "rows out"]:
    """What adapters of low rank add, of another model and another rank for each segment of rows.

    `out[rows of s] += scales[s] · (x[rows of s] · downs[s]ᵀ) · ups[s]ᵀ`

    `segments` are (start, stop), in order and without overlaps; rows of none of them get nothing.
    Without `out`, to zeros; else in its memory. Ranks may be 0. No gradient. Raises KernelError
    where operands do not fit together.
    """
    of_segments.check_low_rank(x, segments, downs, ups, scales, out)
    chosen = _triton_for("segmented_low_rank", x) or segmented.segmented_low_rank
    return chosen(x, segments, downs, ups, scales, out=out)


def segmented_linear(
    x: Float[Tensor, "rows in"],
    segments: Sequence[of_segments.Run],
    weights: Sequence[Float[Tensor, "_ in"]],
    biases: Sequence[Float[Tensor, " _"] | None] | None = None,
    *,
    out: Float[Tensor, "rows _"] | None = None,
) -> Float[Tensor, "rows _"]:
    """Linear layers of another model and another width for each segment of rows.

    `out[rows of s, :widths[s]] = x[rows of s] · weights[s]ᵀ + biases[s]`

    As wide as the widest; 0 beyond a segment's own width and for rows of no segment. What is given
    as `out` stays as it is there. No gradient. Raises KernelError where operands do not fit
    together.
    """
    of_segments.check_linear(x, segments, weights, biases, out)
    chosen = _triton_for("segmented_linear", x) or segmented.segmented_linear
    return chosen(x, segments, weights, biases, out=out)


def _mixing_for(tensor: Tensor) -> mixing.Chosen:
    return mixing.Chosen(
        *(
            _triton_for(op, tensor) or getattr(cpu_mixing, op)
            for op in ("mix", "delta_dot", "mixed_linear")
        )
    )


def _triton_for(op: str, tensor: Tensor) -> Callable[..., Tensor] | None:
    """The Triton kernel for `op`, where `tensor` is on a CUDA device and there is one."""
    return _triton(op) if tensor.is_cuda else None


@cache
def _triton(op: str) -> Callable[..., Tensor] | None:
    if not _has_triton() or find_spec(f"kernels.triton_ops.{op}") is None:
        return None
    return getattr(import_module(f"kernels.triton_ops.{op}"), op)


@cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed: operations on CUDA devices run in plain torch")
    return found
