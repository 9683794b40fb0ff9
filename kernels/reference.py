"""Each operation in plain torch: the meaning that faster ones are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.segmented import Run
from kernels.segments import Segment
from kernels.storage import Rows


def mix(
    anchor: Float[Tensor, " weights"],
    deltas: Float[Tensor, "ingredients weights"] | Rows,
    coefficients: Float[Tensor, "models ingredients *groups"],
    segments: Sequence[Segment] | None = None,
    *,
    out: Float[Tensor, "models weights"] | None = None,
) -> Float[Tensor, "models weights"]:
    """`out[m] = anchor + Σ_k coefficients[m, k, group] · deltas[k]`, segment by segment."""
    values, segments = _values_and_segments(deltas, coefficients, segments)
    compute = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    by_group = (coefficients if coefficients.dim() == 3 else coefficients[:, :, None]).to(compute)
    models = []
    for of_model in by_group:
        pieces, end = [], 0
        for start, stop, group in segments:
            pieces.append(anchor[end:start].to(compute))
            change = of_model[:, group] @ values[:, start:stop].to(compute)
            pieces.append(anchor[start:stop] + change)
            end = stop
        models.append(torch.cat([*pieces, anchor[end:].to(compute)]))
    mixed = torch.stack(models) if models else anchor.new_empty(0, len(anchor))
    return mixed.to(anchor.dtype) if out is None else out.copy_(mixed)


def delta_dot(
    deltas: Float[Tensor, "ingredients weights"] | Rows,
    gradient: Float[Tensor, "models weights"],
    segments: Sequence[Segment] | None = None,
    groups: int = 1,
) -> Float[Tensor, "models ingredients groups"]:
    """`Σ_w gradient[m, w] · deltas[k, w]` over the weights of each group."""
    like = gradient.new_empty(len(gradient), len(deltas), groups)
    values, segments = _values_and_segments(deltas, like, segments)
    compute = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    products = gradient.to(compute)[:, None] * values.to(compute)
    dots = [
        sum(
            (products[:, :, s.start : s.stop].sum(2) for s in segments if s.group == group),
            start=torch.zeros_like(like[:, :, 0], dtype=compute),
        )
        for group in range(groups)
    ]
    return torch.stack(dots, dim=2)


def row_norms(
    deltas: Float[Tensor, "ingredients weights"] | Rows, segments: Sequence[Segment], groups: int
) -> Float[Tensor, "ingredients groups"]:
    """The Euclidean length of each row in each group; 0 where a group has no weights."""
    values = deltas.unpack() if isinstance(deltas, Rows) else deltas
    squares = values.new_zeros(len(values), groups)
    for start, stop, group in segments:
        squares[:, group] += torch.linalg.vector_norm(values[:, start:stop], dim=1) ** 2
    return squares.sqrt()


def mixed_linear(
    x: Float[Tensor, "#models rows in"],
    anchor: Float[Tensor, "out in"],
    deltas: Float[Tensor, "ingredients out in"] | Rows,
    coefficients: Float[Tensor, "models ingredients"],
    bias: Float[Tensor, "#models out"] | None = None,
) -> Float[Tensor, "models rows out"]:
    """`y[m] = x[m] · (anchor + Σ_k coefficients[m, k] · deltas[k])ᵀ + bias[m]`."""
    flat = deltas if isinstance(deltas, Rows) else deltas.flatten(1)
    weights = mix(anchor.flatten(), flat, coefficients).unflatten(1, anchor.shape)
    return grouped_linear(x, weights, bias)


def _values_and_segments(
    deltas: Tensor | Rows, coefficients: Tensor, segments: Sequence[Segment] | None
) -> tuple[Tensor, Sequence[Segment]]:
    """The rows as numbers; by default the segments of the rows, or all weights as one."""
    values = deltas.unpack() if isinstance(deltas, Rows) else deltas
    if segments is None and isinstance(deltas, Rows) and coefficients.shape[2:].numel() > 1:
        segments = deltas.segments
    if segments is None:
        return values, [Segment(0, values.shape[1], 0)]
    return values, sorted(segment for segment in segments if segment.start < segment.stop)


def per_model(function: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """`function` on each model's slice of the operands, stacked; a size of 1 is every model's."""
    models = max(len(operand) for operand in operands if operand is not None)
    slices = (
        [operand] * models if operand is None else operand.expand(models, *operand.shape[1:])
        for operand in operands
    )
    return torch.stack([function(*of_model) for of_model in zip(*slices, strict=True)])


def grouped_linear(
    x: Float[Tensor, "#models *rows in"],
    weight: Float[Tensor, "#models out in"],
    bias: Float[Tensor, "#models out"] | None = None,
) -> Float[Tensor, "_ *rows out"]:
    """`y[m] = x[m] · weight[m]ᵀ + bias[m]`."""
    return per_model(F.linear, x, weight, bias)


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
    """`y[m] = conv2d(x[m], weight[m], bias[m])`."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return per_model(convolve, x, weight, bias)


def grouped_layer_norm(
    x: Float[Tensor, "#models ..."],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "#models ..."] | None = None,
    bias: Float[Tensor, "#models ..."] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "_ ..."]:
    """`y[m] = (x[m] − mean) / √(var + eps) · weight[m] + bias[m]`, over the last axes."""

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, tuple(normalized_shape), weight, bias, eps)

    return per_model(normalise, x, weight, bias)


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
    """`y[m] = (x[m] − mean[m]) / √(var[m] + eps) · weight[m] + bias[m]`, per channel."""

    def normalise(x: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        by_batch = training or mean is None
        return F.batch_norm(x, mean, variance, None, None, by_batch, momentum, eps)

    def scale(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scaled = x if weight is None else x * weight.reshape(shape)
        scaled = scaled if bias is None else scaled + bias.reshape(shape)
        return scaled.to(x.dtype)

    return per_model(scale, per_model(normalise, x, running_mean, running_var), weight, bias)


def grouped_attention(
    query: Float[Tensor, "#models ... queries width"],
    key: Float[Tensor, "#models ... keys width"],
    value: Float[Tensor, "#models ... keys value_width"],
    mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "_ ... queries value_width"]:
    """`y[m] = softmax(query[m] · key[m]ᵀ · scale + mask[m]) · value[m]`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return per_model(attend, query, key, value, mask)


def grouped_embedding(
    ids: Int[Tensor, "#models *rows"],
    weight: Float[Tensor, "#models entries width"],
    padding_idx: int | None = None,
) -> Float[Tensor, "_ *rows width"]:
    """`y[m] = weight[m][ids[m]]`; the gradient of row `padding_idx` is 0."""

    def embed(ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight, padding_idx)

    return per_model(embed, ids, weight)


def segmented_low_rank(
    x: Float[Tensor, "rows in"],
    segments: Sequence[Run],
    downs: Sequence[Float[Tensor, "_ in"]],
    ups: Sequence[Float[Tensor, "out _"]],
    scales: Sequence[float],
    *,
    out: Float[Tensor, "rows out"] | None = None,
) -> Float[Tensor, "rows out"]:
    """`out[segment s] += scales[s] · x · (ups[s] · downs[s])ᵀ`."""
    y = x.new_zeros(len(x), len(ups[0])) if out is None else out
    for (start, stop), down, up, scale in zip(segments, downs, ups, scales, strict=True):
        y[start:stop] += F.linear(x[start:stop], scale * (up @ down))
    return y


def segmented_linear(
    x: Float[Tensor, "rows in"],
    segments: Sequence[Run],
    weights: Sequence[Float[Tensor, "_ in"]],
    biases: Sequence[Float[Tensor, " _"] | None] | None = None,
    *,
    out: Float[Tensor, "rows _"] | None = None,
) -> Float[Tensor, "rows _"]:
    """`out[segment s] = x · weights[s]ᵀ + biases[s]`, and 0 beyond a segment's width."""
    widest = max((len(weight) for weight in weights), default=0)
    y = x.new_zeros(len(x), widest) if out is None else out
    given = biases or [None] * len(weights)
    for (start, stop), weight, bias in zip(segments, weights, given, strict=True):
        y[start:stop, : len(weight)] = F.linear(x[start:stop], weight, bias)
    return y
