"""What the mixing operations take and refuse, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.errors import KernelError
from kernels.segments import Segment, runs
from kernels.storage import Rows

# Bytes of the mixed weights of all models that are in memory at a time while they are multiplied.
TILE_BYTES = 1 << 21


class Chosen(NamedTuple):
    """The implementations that suit the operands' device."""

    mix: Callable[..., Tensor]
    delta_dot: Callable[..., Tensor]
    mixed_linear: Callable[..., Tensor]


def weights_of(deltas: Tensor | Rows) -> int:
    """The number of weights in a row."""
    return deltas.weights if isinstance(deltas, Rows) else deltas.shape[1]


def group_runs(
    op: str, deltas: Tensor | Rows, groups: int, segments: Sequence[Segment] | None
) -> Sequence[Segment]:
    """The runs of weights of one group; by default those of the rows, or all weights."""
    weights = weights_of(deltas)
    if segments is not None:
        return runs(segments, weights, groups)
    if groups == 1:
        return [Segment(0, weights, 0)] if weights else []
    if isinstance(deltas, Rows) and all(run.group < groups for run in deltas.groups):
        return deltas.groups
    raise KernelError(
        f"{op}: found {groups} groups and no segments for them; say which weights belong to which "
        "group with segments=[Segment(start, stop, group), …]"
    )


def check_mix(
    anchor: Tensor, deltas: Tensor | Rows, coefficients: Tensor, out: Tensor | None
) -> None:
    """Refuse what does not fit together, with the operand's name."""
    check_pair("mix", "anchor", anchor, deltas)
    check_rows("mix", deltas)
    if anchor.shape != (weights_of(deltas),):
        raise KernelError(
            f"mix: anchor has shape {list(anchor.shape)}, the deltas have {weights_of(deltas)} "
            "weights; wanted one flat anchor of as many"
        )
    check_coefficients("mix", coefficients, len(deltas), anchor.device)
    if out is None:
        return
    wanted = (len(coefficients), len(anchor))
    if out.shape != wanted or out.dtype != anchor.dtype or out.device != anchor.device:
        raise KernelError(
            f"mix: out is {list(out.shape)} {out.dtype} on {out.device}, wanted {list(wanted)} "
            f"{anchor.dtype} on {anchor.device}, like the anchor"
        )
    values = [deltas.codes, deltas.scales] if isinstance(deltas, Rows) else [deltas]
    for name, operands in (("deltas", values), ("coefficients", [coefficients])):
        if any(operand is not None and _overlap(operand, out) for operand in operands):
            raise KernelError(f"mix: out overlaps the {name}, wanted memory of its own")
    if len(coefficients) > 1 and _overlap(anchor, out):
        raise KernelError(
            f"mix: out overlaps the anchor with {len(coefficients)} models, wanted memory of its "
            "own; only one model may be mixed into the anchor"
        )
    if torch.is_grad_enabled() and (anchor.requires_grad or coefficients.requires_grad):
        raise KernelError(
            "mix: found out= and an operand that requires a gradient, wanted one of the two; "
            "leave out= away, or mix under torch.no_grad()"
        )


def check_delta_dot(deltas: Tensor | Rows, gradient: Tensor) -> None:
    """Refuse what does not fit together, with the operand's name."""
    check_pair("delta_dot", "gradient", gradient, deltas)
    check_rows("delta_dot", deltas)
    if gradient.dim() != 2 or gradient.shape[1] != weights_of(deltas):
        raise KernelError(
            f"delta_dot: gradient has shape {list(gradient.shape)}, wanted "
            f"[models, {weights_of(deltas)}] for rows of {weights_of(deltas)} weights"
        )


def check_rows(op: str, deltas: Tensor | Rows) -> None:
    """Refuse a tensor that is not a floating [ingredients, weights]."""
    if isinstance(deltas, Tensor) and not (deltas.dim() == 2 and deltas.is_floating_point()):
        raise KernelError(
            f"{op}: found deltas {list(deltas.shape)} of {deltas.dtype}, wanted "
            "[ingredients, weights] in floating point"
        )


def check_pair(op: str, name: str, operand: Tensor, deltas: Tensor | Rows) -> None:
    """Refuse another device, a type that is not floating, and fp64 rows for less than fp64."""
    values = deltas.codes if isinstance(deltas, Rows) else deltas
    if operand.device != values.device:
        raise KernelError(
            f"{op}: {name} is on {operand.device}, the deltas are on {values.device}; "
            "move them to one device"
        )
    for who, dtype in ((name, operand.dtype), ("deltas", values.dtype)):
        if not dtype.is_floating_point and not (who == "deltas" and isinstance(deltas, Rows)):
            raise KernelError(f"{op}: {who} has type {dtype}, wanted floating point")
    if values.dtype == torch.float64 != operand.dtype:
        raise KernelError(
            f"{op}: the deltas are torch.float64, {name} is {operand.dtype}; wanted both in "
            "torch.float64, or narrower deltas"
        )
    if torch.is_grad_enabled() and values.requires_grad:
        raise KernelError(
            f"{op}: found deltas that require a gradient, wanted constants; detach() them"
        )


def check_coefficients(op: str, coefficients: Tensor, rows: int, device: torch.device) -> None:
    """Refuse another number of rows, another device, and what is not finite."""
    if coefficients.dim() not in (2, 3) or coefficients.shape[1] != rows:
        raise KernelError(
            f"{op}: coefficients have shape {list(coefficients.shape)}, wanted [models, {rows}] or "
            f"[models, {rows}, groups] for {rows} rows"
        )
    if coefficients.device != device or not coefficients.is_floating_point():
        raise KernelError(
            f"{op}: coefficients are {coefficients.dtype} on {coefficients.device}, wanted "
            f"floating point on {device}"
        )
    if _capturing(coefficients):  # a CUDA graph is being recorded: values cannot be looked at
        return
    finite = coefficients.detach().isfinite()
    if not finite.all():
        at = (~finite).nonzero()[0].tolist()
        raise KernelError(
            f"{op}: coefficient {at} is {coefficients[tuple(at)].item()}, wanted finite numbers"
        )


def check_mixed_linear(
    x: Tensor, anchor: Tensor, deltas: Tensor | Rows, coefficients: Tensor, bias: Tensor | None
) -> None:
    """Refuse what does not fit together, with the operand's name."""
    check_pair("mixed_linear", "anchor", anchor, deltas)
    check_coefficients("mixed_linear", coefficients, len(deltas), anchor.device)
    models, shape = len(coefficients), tuple(anchor.shape)
    if isinstance(deltas, Rows):
        fits = deltas.weights == anchor.numel()
        found = f"rows of {deltas.weights} weights"
    else:
        fits, found = deltas.shape[1:] == shape, f"deltas {list(deltas.shape)}"
    if len(shape) != 2 or coefficients.dim() != 2 or not fits:
        raise KernelError(
            f"mixed_linear: found anchor {list(shape)}, {found} and coefficients "
            f"{list(coefficients.shape)}, wanted [out, in], [rows, out, in] and [models, rows]"
        )
    if x.dim() != 3 or x.shape[0] not in (1, models) or x.shape[2] != shape[1]:
        raise KernelError(
            f"mixed_linear: x has shape {list(x.shape)}, wanted [1 or {models}, rows, {shape[1]}]"
        )
    if bias is not None and (
        bias.dim() != 2 or bias.shape[0] not in (1, models) or bias.shape[1] != shape[0]
    ):
        raise KernelError(
            f"mixed_linear: bias has shape {list(bias.shape)}, wanted [1 or {models}, {shape[0]}]"
        )
    for name, operand in (("x", x), ("bias", bias)):
        if operand is not None and (operand.dtype, operand.device) != (anchor.dtype, anchor.device):
            raise KernelError(
                f"mixed_linear: {name} is {operand.dtype} on {operand.device}, the anchor is "
                f"{anchor.dtype} on {anchor.device}; wanted one type and device"
            )


class Mix(torch.autograd.Function):
    """∂mix/∂coefficients is `delta_dot`; ∂mix/∂anchor is 1 for every model."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, coefficients: Tensor, deltas: Any, segments: Any, chosen: Chosen
    ) -> Tensor:
        ctx.constants = deltas, segments, chosen
        ctx.groups, ctx.types = coefficients.shape[2], (anchor.dtype, coefficients.dtype)
        out = anchor.new_empty(len(coefficients), len(anchor))
        return chosen.mix(anchor, deltas, coefficients, segments, out=out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        deltas, segments, chosen = ctx.constants
        anchor_type, coefficients_type = ctx.types
        for_anchor = for_coefficients = None
        if ctx.needs_input_grad[0]:
            for_anchor = gradient.sum(0).to(anchor_type)
        if ctx.needs_input_grad[1]:
            dots = DeltaDot.apply(gradient, deltas, segments, ctx.groups, chosen)
            for_coefficients = dots.to(coefficients_type)
        return for_anchor, for_coefficients, None, None, None


class DeltaDot(torch.autograd.Function):
    """∂delta_dot/∂gradient is a mix of the rows."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, deltas: Any, segments: Any, groups: int, chosen: Chosen
    ) -> Tensor:
        ctx.constants = deltas, segments, chosen
        ctx.weights, ctx.dtype = gradient.shape[1], gradient.dtype
        return chosen.delta_dot(deltas, gradient, segments, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (upstream,) = gradients
        zeros = upstream.new_zeros(ctx.weights)
        mixed = Mix.apply(zeros, upstream, *ctx.constants)
        return mixed.to(ctx.dtype), None, None, None, None


class MixedLinear(torch.autograd.Function):
    """Backward mixes the weights again, tile by tile of output features."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        coefficients: Tensor,
        bias: Any,
        deltas: Any,
        chosen: Chosen,
    ) -> Tensor:
        ctx.save_for_backward(x, anchor, coefficients)
        ctx.constants = deltas, chosen
        ctx.bias_models = 0 if bias is None else len(bias)
        return chosen.mixed_linear(x, anchor, deltas, coefficients, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        x, anchor, coefficients = ctx.saved_tensors
        deltas, chosen = ctx.constants
        for_x, for_anchor, for_coefficients, for_bias, *_ = ctx.needs_input_grad
        x_gradient = torch.zeros_like(x) if for_x else None
        anchor_gradient = torch.zeros_like(anchor) if for_anchor else None
        dots = torch.zeros_like(coefficients) if for_coefficients else None
        bias_gradient = None
        if for_bias:
            bias_gradient = _sum_shared(gradient.sum(1), ctx.bias_models)
        for start, stop in tiles(anchor, len(coefficients)):
            rows = tile(deltas, anchor.shape[1], start, stop)
            of_tile = gradient[:, :, start:stop]
            whole = [Segment(0, (stop - start) * anchor.shape[1], 0)]
            if x_gradient is not None:
                flat = anchor[start:stop].reshape(-1)
                out = flat.new_empty(len(coefficients), len(flat))
                chosen.mix(flat, rows, coefficients[:, :, None], whole, out=out)
                x_gradient += _sum_shared(of_tile @ out.unflatten(1, (stop - start, -1)), len(x))
            if anchor_gradient is None and dots is None:
                continue
            weight_gradient = of_tile.transpose(1, 2) @ x
            if anchor_gradient is not None:
                anchor_gradient[start:stop] = weight_gradient.sum(0)
            if dots is not None:
                dots += chosen.delta_dot(rows, weight_gradient.flatten(1), whole, 1)[:, :, 0]
        return x_gradient, anchor_gradient, dots, bias_gradient, None, None


def tiles(anchor: Tensor, models: int) -> list[tuple[int, int]]:
    """Ranges of output features whose mixed weights fit the cache; packed rows start at bytes.

    On CUDA all in one: what takes time there is the number of launches.
    """
    features, width = anchor.shape
    length = max(TILE_BYTES // max(models * width * anchor.itemsize, 1) // 8, 1) * 8
    if anchor.is_cuda:
        length = max(features, 1)
    return [(start, min(start + length, features)) for start in range(0, features, length)]


def tile(deltas: Tensor | Rows, width: int, start: int, stop: int) -> Tensor | Rows:
    """The rows' weights of the output features [start, stop)."""
    if isinstance(deltas, Rows):
        return deltas.part(start * width, stop * width)
    return deltas[:, start:stop].flatten(1)


def _sum_shared(gradient: Tensor, models: int) -> Tensor:
    """The gradient of an operand that all models share is the sum of theirs."""
    return gradient.sum(0, keepdim=True) if models == 1 else gradient


def _overlap(one: Tensor, other: Tensor) -> bool:
    """From each one's first to its last number, with what lies between where it is strided."""
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.data_ptr() < _end(other)
        and other.data_ptr() < _end(one)
    )


def _end(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return tensor.data_ptr()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return tensor.data_ptr() + (last + 1) * tensor.itemsize


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
