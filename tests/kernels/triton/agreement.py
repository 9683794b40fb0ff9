"""How the tests of the kernels compare: in the interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def operand(*shape: int, strided: bool = False) -> Tensor:
    """Random fp32 numbers; `strided`: not adjacent in memory."""
    if strided:
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    return torch.randn(shape)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-5 of the largest number."""
    assert found.shape == wanted.shape
    scale = max(wanted.abs().max().item(), 1e-3) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-5 * scale)


def assert_agree(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *operands: Tensor | None
) -> None:
    """The results and gradients of float32 operands, against the reference in float64."""
    narrow = [leaf(t, torch.float32) for t in operands]
    wide = [leaf(t, torch.float64) for t in operands]
    found, wanted = function(*narrow), reference(*wide)
    assert found.dtype == torch.float32
    assert_close(found, wanted)
    loss = torch.randn_like(wanted)
    gradients = torch.autograd.grad(found, floating(narrow), loss.float())
    wanted_gradients = torch.autograd.grad(wanted, floating(wide), loss)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, wanted_gradient)


def leaf(operand: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The same numbers, with a gradient of their own and as strided as they were."""
    if operand is None or not operand.is_floating_point():
        return operand
    return operand.detach().to(dtype).requires_grad_()


def floating(operands: list[Tensor | None]) -> list[Tensor]:
    return [t for t in operands if t is not None and t.is_floating_point()]
