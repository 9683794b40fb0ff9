import pytest
import torch

from kernels import reference
from kernels.triton_ops import grouped_attention as module
from kernels.triton_ops.grouped_attention import grouped_attention
from tests.kernels.triton.agreement import assert_agree, assert_close, operand

SHAPES = [
    ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    ((1, 2, 1, 8), (3, 2, 7, 8), (3, 2, 7, 8)),
    ((3, 2, 3, 5, 8), (1, 2, 3, 7, 8), (3, 2, 3, 7, 9)),
    ((3, 2, 3, 17, 4), (3, 1, 1, 5, 4), (1, 1, 3, 5, 4)),
    ((2, 2, 2, 3, 5, 8), (2, 1, 2, 3, 4, 8), (1, 2, 2, 3, 4, 8)),
]


def agree(*operands, **settings):
    """Without gradients, which the kernel has not, and with them."""
    functions = [
        lambda *given, function=function: function(*given, **settings)
        for function in (grouped_attention, reference.grouped_attention)
    ]
    with torch.no_grad():
        wide = [t.double() if t.is_floating_point() else t for t in operands]
        assert_close(functions[0](*operands), functions[1](*wide))
    assert_agree(*functions, *operands)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_equals_the_loop(shapes):
    agree(*(operand(*shape) for shape in shapes))
    agree(*(operand(*shape, strided=True) for shape in shapes), scale=0.3)


def test_causal():
    agree(*(operand(3, 2, 2, 5, 8) for _ in range(3)), is_causal=True)
    agree(operand(3, 2, 7, 8), operand(3, 2, 5, 8), operand(3, 2, 5, 8), is_causal=True)


@pytest.mark.parametrize(
    "mask", [(1, 5, 7), (3, 5, 7), (3, 1, 1, 7), (3, 2, 1, 5, 7), (1, 1, 3, 1, 7)], ids=str
)
def test_masks(mask):
    operands = [operand(3, 2, 3, 5, 8), operand(3, 2, 3, 7, 8), operand(3, 2, 3, 7, 8)]
    agree(*operands, operand(*mask))
    agree(*operands, operand(*mask) > -1)


def test_a_query_that_may_look_nowhere():
    mask = torch.ones(3, 5, 7, dtype=torch.bool)
    mask[1, 2] = False
    operands = operand(3, 2, 5, 8), operand(3, 2, 7, 8), operand(3, 2, 7, 8)
    with torch.no_grad():
        found = grouped_attention(*operands, mask)
        wanted = reference.grouped_attention(*(t.double() for t in operands), mask)
    assert_close(found, wanted)


def test_fewer_heads_of_keys():
    agree(operand(2, 2, 4, 5, 8), *(operand(2, 2, 2, 5, 8) for _ in range(2)), enable_gqa=True)


def test_more_tokens_are_folded(monkeypatch):
    monkeypatch.setattr(module, "launch", None)
    agree(*(operand(2, 2, 65, 4) for _ in range(3)))
