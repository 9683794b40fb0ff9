"""Do the operands of a grouped operation fit together? Shapes, dtypes and devices, not values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.errors import KernelError

Operands = dict[str, Tensor | None]
MIXED = {torch.float32, torch.bfloat16}, {torch.float32, torch.float16}


def check_models(op: str, operands: Operands, mixed_precision: bool = False) -> None:
    """Leading axes of one size or 1, one device, one floating dtype.

    `mixed_precision` also allows parameters in float32 with activations in 16 bit.
    """
    given = [operand for operand in operands.values() if operand is not None]
    first = given[0]
    models = {len(operand) if operand.dim() else 0 for operand in given} - {1}
    if len(models) > 1 or 0 in models:
        fail(op, operands, "a leading model axis of one size, or 1 where it is shared")
    if any(operand.device != first.device for operand in given):
        fail(op, operands, "all on one device", "device")
    dtypes = {operand.dtype for operand in given if operand.is_floating_point()}
    agree = len(dtypes) < 2 or (mixed_precision and dtypes in MIXED)
    if not agree and not torch.is_autocast_enabled(first.device.type):
        fail(op, operands, "one dtype; cast them", "dtype")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """KernelError unless x [.., *rows, in], weight [.., out, in] and bias [.., out]."""
    operands: Operands = {"x": x, "weight": weight, "bias": bias}
    if not (
        weight.dim() == 3
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[2]
        and (bias is None or bias.shape[1:] == weight.shape[1:2])
    ):
        fail(
            "grouped_linear",
            operands,
            "x [models, *rows, in], weight [models, out, in], bias [models, out]",
        )
    check_models("grouped_linear", operands)


def check_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """KernelError unless image, kernel, bias and number of groups fit."""
    operands: Operands = {"x": x, "weight": weight, "bias": bias}
    if not (
        x.dim() == weight.dim() == 5
        and groups > 0
        and x.shape[2] == weight.shape[2] * groups
        and weight.shape[1] % groups == 0
        and (bias is None or bias.shape[1:] == weight.shape[1:2])
    ):
        fail(
            "grouped_conv2d",
            operands,
            "x [models, rows, channels, height, width], weight [models, out, channels / groups, "
            f"kernel height, kernel width] with out a multiple of groups = {groups}, "
            "bias [models, out]",
        )
    check_models("grouped_conv2d", operands)


def check_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A setting of both axes as a pair; KernelError for another number of them."""
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise KernelError(f"grouped_conv2d: found {name} {value}; wanted a number or a pair")
    return value[0], value[1]


def check_padding(
    padding: int | Sequence[int] | str, stride: tuple[int, int]
) -> tuple[int, int] | str:
    """The padding as a pair, "same" or "valid"; KernelError for another word."""
    if not isinstance(padding, str):
        return check_pair("padding", padding)
    if padding not in ("same", "valid"):
        raise KernelError(f"grouped_conv2d: found padding {padding!r}; wanted 'same' or 'valid'")
    if padding == "same" and stride != (1, 1):
        raise KernelError(f"grouped_conv2d: found padding 'same' with stride {stride}; wanted 1")
    return padding


def check_layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    """KernelError unless x ends in `shape` and the parameters have it."""
    operands: Operands = {"x": x, "weight": weight, "bias": bias}
    if not (
        len(shape) > 0
        and x.dim() > len(shape)
        and x.shape[-len(shape) :] == shape
        and all(t is None or t.shape[1:] == shape for t in (weight, bias))
    ):
        fail(
            "grouped_layer_norm",
            operands,
            f"normalized_shape {list(shape)} at the end of x, and as the shape of one model's "
            "weight and bias",
        )
    check_models("grouped_layer_norm", operands, mixed_precision=True)


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    """KernelError unless statistics and parameters are [.., channels] and can be updated."""
    operands: Operands = {
        "x": x,
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    of_channels = [t for name, t in operands.items() if name != "x" and t is not None]
    if x.dim() < 3 or any(t.shape[1:] != x.shape[2:3] for t in of_channels):
        fail(
            "grouped_batch_norm",
            operands,
            "x [models, rows, channels, ...], statistics and parameters [models, channels]",
        )
    if (running_mean is None) != (running_var is None):
        fail("grouped_batch_norm", operands, "both running_mean and running_var, or neither")
    check_models("grouped_batch_norm", operands, mixed_precision=True)
    if not training and running_mean is not None:
        return
    if x.shape[1] * x.shape[3:].numel() == 1:
        fail("grouped_batch_norm", operands, "more than one value per channel")
    statistics = [len(t) for t in (running_mean, running_var) if t is not None]
    if any(models < len(x) for models in statistics):
        fail("grouped_batch_norm", operands, "running statistics of each model, to be updated")
    if len(set(statistics)) > 1:
        fail("grouped_batch_norm", operands, "as many running means as running variances")


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, gqa: bool
) -> None:
    """KernelError unless queries, keys, values and mask fit."""
    operands: Operands = {"query": query, "key": key, "value": value, "mask": mask}
    check_models("grouped_attention", operands)
    if not (
        query.dim() == key.dim() == value.dim() >= 3
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2]
        and (not gqa or query.dim() >= 4)
    ):
        fail(
            "grouped_attention",
            operands,
            "query [models, ..., queries, width], key [models, ..., keys, width], "
            "value [models, ..., keys, value width], the same axes in all (heads before queries "
            "where enable_gqa)",
        )
    heads = query.dim() - 3
    for axis in range(1, query.dim() - 2):
        sizes = {t.shape[axis] for t in (query, key, value)}
        if len(sizes - {1}) > 1 and not (gqa and axis == heads):
            fail("grouped_attention", operands, "the same number of rows and heads")
    if gqa and any(query.shape[heads] % t.shape[heads] for t in (key, value)):
        fail("grouped_attention", operands, "heads of the query that are a multiple of the others'")
    if mask is None:
        return
    if is_causal:
        fail("grouped_attention", operands, "a mask or is_causal, not both")
    wanted = (*query.shape[1:-2], query.shape[-2], key.shape[-2])
    found = mask.shape[1:]
    if not (
        2 <= len(found) <= len(wanted)
        and all(a in (1, b) for a, b in zip(reversed(found), reversed(wanted), strict=False))
    ):
        fail("grouped_attention", operands, f"a mask that broadcasts to [models, *{list(wanted)}]")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        fail("grouped_attention", operands, "a mask of booleans or of the query's dtype", "dtype")


def check_embedding(ids: Tensor, weight: Tensor, padding_idx: int | None) -> None:
    """KernelError unless ids are integers, tables [.., entries, width] and padding_idx inside."""
    operands: Operands = {"ids": ids, "weight": weight}
    if weight.dim() != 3 or ids.dim() < 1:
        fail("grouped_embedding", operands, "ids [models, *rows], weight [models, entries, width]")
    if ids.dtype not in (torch.int32, torch.int64):
        fail("grouped_embedding", operands, "ids of int64 or int32", "dtype")
    entries = weight.shape[1]
    if padding_idx is not None and not -entries <= padding_idx < entries:
        fail("grouped_embedding", operands, f"padding_idx {padding_idx} among {entries} entries")
    check_models("grouped_embedding", operands)


def fail(op: str, operands: Operands, wanted: str, what: str = "shape") -> None:
    """Raise the KernelError that names what was found."""
    given = {name: operand for name, operand in operands.items() if operand is not None}
    if what == "shape":
        found = ", ".join(f"{name} {list(operand.shape)}" for name, operand in given.items())
    else:
        found = ", ".join(f"{name} {getattr(operand, what)}" for name, operand in given.items())
    raise KernelError(f"{op}: found {found}; wanted {wanted}")
