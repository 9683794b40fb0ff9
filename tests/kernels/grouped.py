"""What the tests of the grouped operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from jaxtyping import config
from torch import Tensor

SHARED = list(product([False, True], repeat=3))


def operand(models: int, *shape: int, shared: bool = False, strided: bool = False) -> Tensor:
    """Random float64 numbers with a model axis; `strided`: not adjacent in memory."""
    sizes = (1 if shared else models, *shape)
    if strided:
        return torch.randn(*sizes[:-1], 2 * sizes[-1] + 1, dtype=torch.float64)[..., 1::2]
    return torch.randn(sizes, dtype=torch.float64)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-10 of the largest number."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * scale_of(wanted))


def scale_of(tensor: Tensor) -> float:
    return max(tensor.abs().max().item(), 1e-30) if tensor.numel() else 1.0


def assert_agree(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *operands: Tensor | None
) -> None:
    """The same results, and the same gradients of a random loss in all operands."""
    results = []
    for compute in (function, reference):
        mine = [t if t is None else t.detach().requires_grad_() for t in operands]
        result = compute(*mine)
        seeded = torch.Generator().manual_seed(3)
        loss = torch.randn(result.shape, dtype=result.dtype, generator=seeded)
        given = [t for t in mine if t is not None]
        results.append([result, *torch.autograd.grad((result * loss).sum(), given)])
    for found, wanted in zip(*results, strict=True):
        assert_equal(found, wanted)


def assert_rounds_no_worse(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *operands: Tensor | None
) -> None:
    """In bf16, the error against float32 is at most 1.5 times that of the loop in bf16."""
    halves = [t if t is None else t.bfloat16() for t in operands]
    exact = reference(*(t if t is None else t.float() for t in halves))
    found, loop = function(*halves), reference(*halves)
    assert found.dtype == torch.bfloat16
    error, allowed = (torch.dist(t.float(), exact).item() for t in (found, loop))
    assert error <= 1.5 * allowed + 1e-6 * exact.norm().item()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without shape annotations, which would refuse bad operands before the operation does."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)
