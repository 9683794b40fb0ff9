"""What the model's operations are where a weight has a value for each tenant.

The rows of a batch are the first axis of what the model computes, or that axis is a multiple of
them, with as many entries for each row. A rule takes the arguments of torch's function, with a
`PerTenant` where the model gave a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.owned import Layout, LowRank, PerTenant
from kernels import segmented_linear, segmented_low_rank
from kernels.multi_head import multi_head_attention

Weight = Tensor | PerTenant
# Smaller values are laid out row by row, larger ones taken segment by segment.
BY_ROW_NUMBERS = 1 << 14


@dataclass(frozen=True)
class Rule:
    """How an operation is computed, and the length of its operand's axis of rows."""

    compute: Callable[..., Any]
    length: Callable[..., int | None]


def linear(layout: Layout, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """The shared product for all rows at once; what is of low rank is added, segment by segment."""
    if not isinstance(weight, PerTenant):
        return _plus(layout, layout.products.linear(x, weight), bias, -1)
    flat = x.reshape(-1, x.shape[-1])
    names = weight.names + (bias.names if isinstance(bias, PerTenant) else ())
    if weight.widths_differ:
        y = _heads(layout, flat, weight, bias)
    else:
        plain = None if isinstance(bias, PerTenant) else bias
        y = _added(layout, flat, weight, _roots(layout, flat, weight, plain))
        y = _plus(layout, y, bias, -1) if isinstance(bias, PerTenant) else y
    result = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    layout.last_product = result, names
    return result


def matmul(layout: Layout, x: Tensor, weight: PerTenant) -> Tensor:
    """`x @ weight`, where weight is a matrix."""
    return linear(layout, x, _transposed(layout, weight))


def addmm(
    layout: Layout,
    bias: Weight,
    x: Tensor,
    weight: Weight,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """`bias + x @ weight`."""
    if beta != 1 or alpha != 1:
        raise FleetError(f"with beta {beta} and alpha {alpha}")
    transposed = _transposed(layout, weight) if isinstance(weight, PerTenant) else weight.t()
    return linear(layout, x, transposed, bias)


def embedding(
    layout: Layout,
    ids: Tensor,
    weight: PerTenant,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of tables."""
    if max_norm is not None:
        raise FleetError(f"with max_norm {max_norm}")
    runs = weight.roots()
    entries = len(ids) // layout.rows
    y = ids.new_empty(*ids.shape, weight.base.shape[1], dtype=weight.base.dtype)
    for start, stop, table in _in_rows(layout, runs, entries):
        y[start:stop] = F.embedding(ids[start:stop], table())
    for (start, stop), term in _terms(layout, weight, entries):
        narrow = F.embedding(ids[start:stop], term.up.to(y.dtype))
        y[start:stop].add_(narrow @ term.down.to(y.dtype), alpha=term.scale)
    return y


def convolution(
    function: Callable[..., Tensor],
    layout: Layout,
    x: Tensor,
    weight: Weight,
    bias: Weight | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A convolution for each run of rows with one kernel."""
    plain = None if isinstance(bias, PerTenant) else bias
    if isinstance(weight, PerTenant):
        parts = [
            function(x[start:stop], kernel(), plain, *args, **kwargs)
            for start, stop, kernel in _in_rows(layout, weight.values(), len(x) // layout.rows)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        y = function(x, weight, plain, *args, **kwargs)
    return _plus(layout, y, bias, 1) if isinstance(bias, PerTenant) else y


def layer_norm(
    layout: Layout,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Weight | None = None,
    bias: Weight | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalised once for all rows, then scaled and shifted by row."""
    y = F.layer_norm(x, tuple(normalized_shape), None, None, eps)
    return _plus(layout, _times(layout, y, weight, -1), bias, -1)


def rms_norm(
    layout: Layout,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Weight | None = None,
    eps: float | None = None,
) -> Tensor:
    """As `layer_norm`."""
    return _times(layout, F.rms_norm(x, tuple(normalized_shape), None, eps), weight, -1)


def group_norm(
    layout: Layout,
    x: Tensor,
    num_groups: int,
    weight: Weight | None = None,
    bias: Weight | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `layer_norm`, scale and shift by channel."""
    y = F.group_norm(x, num_groups, None, None, eps)
    return _plus(layout, _times(layout, y, weight, 1), bias, 1)


def batch_norm(
    layout: Layout,
    x: Tensor,
    running_mean: Weight | None,
    running_var: Weight | None,
    weight: Weight | None = None,
    bias: Weight | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By the running statistics: one scale and shift for each row and channel."""
    if training or running_mean is None or running_var is None:
        raise FleetError("with the statistics of the batch, which tenants would share")
    mean, variance = _by_segment(running_mean), _by_segment(running_var)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * _by_segment(weight)
    shift = -mean * scale
    shift = shift if bias is None else shift + _by_segment(bias)
    scale, shift = (_rows_of_segments(layout, t) for t in (scale, shift))
    rows = x.unflatten(0, (layout.rows, -1))
    y = torch.addcmul(_beside(shift, rows.dim(), 2), rows, _beside(scale, rows.dim(), 2))
    return y.flatten(0, 1).to(x.dtype)


def attention(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: PerTenant,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Attention with a bias of each tenant's own."""
    mask = attn_mask.by_row
    mask = mask.reshape(len(mask), *(1,) * (query.dim() - mask.dim()), *mask.shape[1:])
    if mask.dim() > query.dim():
        if mask.shape[1] != 1:
            raise FleetError(f"with a mask {list(attn_mask.base.shape)}")
        mask = mask.squeeze(1)
    mask = mask.repeat_interleave(len(query) // layout.rows, 0)
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


def multi_head(layout: Layout, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`, whose rows are its second axis."""

    def project(x: Tensor, weight: Any, bias: Any) -> Tensor:
        if not any(isinstance(given, PerTenant) for given in (weight, bias)):
            return F.linear(x, weight, bias)
        return linear(layout, x.transpose(0, 1), weight, bias).transpose(0, 1)

    found = multi_head_attention(project, F.scaled_dot_product_attention, *args, **kwargs)
    return found.output, found.weights


def expand(layout: Layout, value: PerTenant, *sizes: Any) -> Tensor:
    """One value for each row, from a first axis of 1."""
    shape = _sizes(sizes)
    by_row = _lengthened(layout, value, len(shape), shape[0])
    return by_row.expand(-1, *shape[1:])


def expand_as(layout: Layout, value: PerTenant, other: Tensor) -> Tensor:
    """As `expand`."""
    return expand(layout, value, *other.shape)


def repeat(layout: Layout, value: PerTenant, *sizes: Any) -> Tensor:
    """As `expand`, other axes repeated."""
    times = _sizes(sizes)
    return _lengthened(layout, value, len(times), times[0]).repeat(1, *times[1:])


def elementwise(function: Callable[..., Tensor], layout: Layout, *args: Any, **kw: Any) -> Tensor:
    """Each row with its own tenant's value, that broadcasts as the base's would."""
    if kw.get("out") is not None:
        raise FleetError("with out")
    first = _largest(args)
    assert first is not None
    dims, length = first.dim(), len(first)
    for value in (arg for arg in args if isinstance(arg, PerTenant)):
        if value.base.dim() > dims or (value.base.dim() == dims and len(value.base) != 1):
            raise FleetError(f"of {list(value.base.shape)} and {list(first.shape)}")
    large = any(isinstance(a, PerTenant) and a.base.numel() > BY_ROW_NUMBERS for a in args)
    in_place = function.__name__.endswith("_") and not function.__name__.startswith("__")
    in_place = in_place or function.__name__.startswith("__i")
    if large:
        return _by_segments(function, layout, args, kw, first, in_place)

    def rowwise(arg: Any) -> Any:
        if isinstance(arg, PerTenant):
            by_row = arg.by_row
            inner = by_row.shape[2:] if arg.base.dim() == dims else by_row.shape[1:]
            missing = dims - 1 - len(inner)
            return by_row.reshape(len(by_row), *(1,) * (1 + missing), *inner)
        if isinstance(arg, Tensor) and arg.dim() == dims:
            return arg.unflatten(0, (layout.rows, -1)) if len(arg) == length else arg.unsqueeze(0)
        return arg

    y = function(*map(rowwise, args), **kw)
    return first if in_place else y.flatten(0, 1)


def _by_segments(
    function: Callable[..., Tensor],
    layout: Layout,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    first: Tensor,
    in_place: bool,
) -> Tensor:
    entries = len(first) // layout.rows
    parts = []
    for place, (start, stop) in enumerate(layout.edges):

        def of_segment(arg: Any, start: int = start, stop: int = stop, place: int = place) -> Any:
            if isinstance(arg, PerTenant):
                return arg.dense(place)
            along = isinstance(arg, Tensor) and arg.dim() == first.dim() and len(arg) == len(first)
            return arg[start * entries : stop * entries] if along else arg

        parts.append(function(*map(of_segment, args), **kwargs))
    return first if in_place else torch.cat(parts)


# --- products ---


def _roots(layout: Layout, x: Tensor, weight: PerTenant, bias: Tensor | None) -> Tensor:
    """The products with what several tenants share, and with weights that are one tenant's."""
    runs = list(_in_rows(layout, weight.roots(), len(x) // layout.rows))
    if len(runs) == 1:
        return layout.products.linear(x, runs[0][2](), bias)
    y = x.new_empty(len(x), len(weight.base))
    for start, stop, root in runs:
        # One after the other: a decoded weight is as large as the base's.
        segmented_linear(x, [(start, stop)], [root()], [bias], out=y)
    return y


def _added(layout: Layout, x: Tensor, weight: PerTenant, y: Tensor) -> Tensor:
    """`y`, and what is of low rank."""
    found = _terms(layout, weight, len(x) // layout.rows)
    if found:
        segments, terms = zip(*found, strict=True)
        downs = [term.down.to(x.dtype) for term in terms]
        ups = [term.up.to(x.dtype) for term in terms]
        segmented_low_rank(x, segments, downs, ups, [term.scale for term in terms], out=y)
    return y


def _heads(layout: Layout, x: Tensor, weight: PerTenant, bias: Weight | None) -> Tensor:
    """Products of different widths, as wide as the widest."""
    entries = len(x) // layout.rows
    segments = [(start * entries, stop * entries) for start, stop in layout.edges]
    places = range(len(segments))
    weights = [weight.dense(place) for place in places]
    biases = [bias.dense(place) if isinstance(bias, PerTenant) else bias for place in places]
    return segmented_linear(x, segments, weights, biases)


def _terms(
    layout: Layout, weight: PerTenant, entries: int
) -> list[tuple[tuple[int, int], LowRank]]:
    """The segments that have something of low rank."""
    return [
        ((start * entries, stop * entries), own.term)
        for (start, stop), own in zip(layout.edges, weight.owns, strict=True)
        if own is not None and own.term is not None
    ]


def _transposed(layout: Layout, weight: PerTenant) -> PerTenant:
    """The transposed matrix, of low rank where it was."""
    if weight.base.dim() != 2:
        raise FleetError(f"with a weight {list(weight.base.shape)}; wanted a matrix")
    owns = []
    for own in weight.owns:
        if own is None:
            owns.append(None)
            continue
        base, value, decode, term = weight.base, own.value, own.decode, own.term
        turned = None if term is None else LowRank(term.up.t(), term.down.t(), term.scale)
        turn = partial(_turned, own, base) if decode is not None else None
        mine = None if value is None or decode is not None else value.t()
        owns.append(type(own)(mine, turned, turn))
    return PerTenant(weight.names, weight.base.t(), owns, layout)


def _turned(own: Any, base: Tensor, _: Tensor) -> Tensor:
    return own.root(base).t()


def _in_rows(
    layout: Layout, runs: Sequence[tuple[int, int, Callable[[], Tensor]]], entries: int
) -> list[tuple[int, int, Callable[[], Tensor]]]:
    """Runs of segments as runs of rows, each with so many entries."""
    return [
        (layout.edges[first][0] * entries, layout.edges[last - 1][1] * entries, value)
        for first, last, value in runs
    ]


# --- values by row ---


def _plus(layout: Layout, y: Tensor, bias: Weight | None, axis: int) -> Tensor:
    """`y`, which is nobody else's, with a bias along an axis."""
    return y if bias is None else _changed(layout, y, bias, axis, Tensor.add_)


def _times(layout: Layout, y: Tensor, weight: Weight | None, axis: int) -> Tensor:
    return y if weight is None else _changed(layout, y, weight, axis, Tensor.mul_)


def _changed(
    layout: Layout, y: Tensor, value: Weight, axis: int, change: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    if not isinstance(value, PerTenant):
        change(y, value if axis == -1 else _beside(value[None], y.dim(), axis))
        return y
    rows = y.unflatten(0, (layout.rows, -1))
    inner = value.by_row.shape[1:]
    place = rows.dim() - len(inner) if axis == -1 else axis + 1
    change(rows, _beside(value.by_row, rows.dim(), place))
    return y


def _beside(values: Tensor, dims: int, axis: int) -> Tensor:
    """[rows, *shape] with shape from `axis` on, ready to broadcast over `dims` axes."""
    inner = values.shape[1:]
    return values.reshape(
        len(values), *(1,) * (axis - 1), *inner, *(1,) * (dims - axis - len(inner))
    )


def _by_segment(value: Weight) -> Tensor:
    """[segments, *shape], or [1, *shape] where all share it."""
    return value.stacked if isinstance(value, PerTenant) else value[None]


def _rows_of_segments(layout: Layout, values: Tensor) -> Tensor:
    return values if len(values) == 1 else values.index_select(0, layout.segment_of_row)


def _lengthened(layout: Layout, value: PerTenant, dims: int, length: int) -> Tensor:
    """[length, …] with `dims` axes: each row's value, for each of its entries."""
    shape = value.base.shape
    if value.base.dim() > dims or (value.base.dim() == dims and shape[0] != 1):
        raise FleetError(f"of {list(shape)} to {dims} axes")
    inner = shape[1:] if value.base.dim() == dims else shape
    missing = dims - 1 - len(inner)
    by_row = value.by_row.reshape(layout.rows, *(1,) * missing, *inner)
    return by_row.repeat_interleave(length // layout.rows, 0) if length > layout.rows else by_row


# --- which axis counts the rows ---


def _sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(sizes[0]) if sizes and not isinstance(sizes[0], int) else tuple(sizes)


def _largest(args: Sequence[Any]) -> Tensor | None:
    """The operand with the most axes, of those the longest."""
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
    return max(tensors, key=lambda tensor: (tensor.dim(), len(tensor)), default=None)


def _of_input(x: Any, *args: Any, **kwargs: Any) -> int | None:
    return len(x) if isinstance(x, Tensor) and x.dim() else None


def _of_second(bias: Any, x: Any, *args: Any, **kwargs: Any) -> int | None:
    return _of_input(x)


def _of_sizes(value: Any, *sizes: Any, **kwargs: Any) -> int | None:
    return _sizes(sizes)[0] if len(sizes) and isinstance(value, PerTenant) else None


def _of_other(value: Any, other: Any, **kwargs: Any) -> int | None:
    return _of_input(other)


def _of_operands(*args: Any, **kwargs: Any) -> int | None:
    found = _largest(args)
    return None if found is None else len(found)


def _of_second_axis(x: Any, *args: Any, **kwargs: Any) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.dim() == 3 else None


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(linear, _of_input),
    torch.matmul: Rule(matmul, _of_input),
    Tensor.matmul: Rule(matmul, _of_input),
    Tensor.__matmul__: Rule(matmul, _of_input),
    torch.mm: Rule(matmul, _of_input),
    torch.addmm: Rule(addmm, _of_second),
    F.embedding: Rule(embedding, _of_input),
    torch.conv1d: Rule(partial(convolution, torch.conv1d), _of_input),
    torch.conv2d: Rule(partial(convolution, torch.conv2d), _of_input),
    torch.conv3d: Rule(partial(convolution, torch.conv3d), _of_input),
    F.layer_norm: Rule(layer_norm, _of_input),
    F.rms_norm: Rule(rms_norm, _of_input),
    F.group_norm: Rule(group_norm, _of_input),
    F.batch_norm: Rule(batch_norm, _of_input),
    F.scaled_dot_product_attention: Rule(attention, _of_input),
    F.multi_head_attention_forward: Rule(multi_head, _of_second_axis),
    Tensor.expand: Rule(expand, _of_sizes),
    Tensor.expand_as: Rule(expand_as, _of_other),
    Tensor.repeat: Rule(repeat, _of_sizes),
}
ELEMENTWISE = {
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub"),
    *("add_", "sub_", "mul_", "div_", "pow", "maximum", "minimum", "where", "lerp", "addcmul"),
    *(f"__{kind}{op}__" for kind in ("", "r", "i") for op in ("add", "sub", "mul", "truediv")),
}


def rule_for(function: Callable[..., Any]) -> Rule | None:
    """The rule of a function of torch; None where there is none."""
    try:
        found = RULES.get(function)
    except TypeError:  # not hashable
        return None
    if found is None and getattr(function, "__name__", "") in ELEMENTWISE:
        return Rule(partial(elementwise, function), _of_operands)
    return found
