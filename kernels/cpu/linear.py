"""Linear layers of several models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import each, expanded, plus
from .strategies import alike, choose, packs

FEW_ROWS = 64


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, force: str | None = None
) -> Tensor:
    """`y[m] = x[m] · weight[m]ᵀ + bias[m]`."""
    if len(weight) == 1:
        return _one_weight(x, weight, bias)
    if len(x) == 1:
        return _side_by_side(x, weight, bias)
    rows = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
    models, count, ins = rows.shape
    outs = weight.shape[1]
    # Columns lie otherwise than the gradients that will meet them: of many rows, elementwise
    # operations on the two are slow (GELU's backward: 7 times).
    columns = not torch.is_grad_enabled() or count <= FEW_ROWS
    available = ("batched",) + ("columns",) * columns + ("packed",) * packs(x, weight, bias)
    shape = (alike(models), count, ins, outs)
    y = STRATEGIES[force or choose("linear", x, shape, available)](rows, weight, bias)
    return y if x.dim() == 3 else y.reshape(models, *x.shape[1:-1], outs)


def _one_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The models are rows more."""
    if bias is not None and len(bias) == 1:
        return F.linear(x, weight.squeeze(0), bias.squeeze(0))
    return plus(F.linear(x, weight.squeeze(0)), bias, -1)


def _side_by_side(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One matrix product with the weights of all models beside each other."""
    models, outs, _ = weight.shape
    own = bias is not None and len(bias) == models
    beside = bias.flatten() if bias is not None and own else None
    y = F.linear(x.squeeze(0), weight.flatten(0, 1), beside)
    y = y.unflatten(-1, (models, outs)).movedim(-2, 0)
    return y if own else plus(y, bias, -1)


def _batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batched product of rows and weights."""
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(expanded(bias, len(x)).unsqueeze(1), x, weight.transpose(1, 2))


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batched product of weights and rows as columns: for few rows and large weights."""
    if bias is None:
        y = torch.bmm(weight, x.transpose(1, 2))
    else:
        y = torch.baddbmm(expanded(bias, len(x)).unsqueeze(2), weight, x.transpose(1, 2))
    return y.transpose(1, 2)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product per model, with weights in oneDNN's own layout."""
    mkldnn, (models, rows, _) = torch.ops.mkldnn, x.shape
    packed = [mkldnn._reorder_linear_weight(own, rows) for own in each(weight, models)]
    return torch.stack(
        [
            mkldnn._linear_pointwise(*operands, "none", [], "")
            for operands in zip(each(x, models), packed, each(bias, models), strict=True)
        ]
    )


STRATEGIES = {"batched": _batched, "columns": _columns, "packed": _packed}
