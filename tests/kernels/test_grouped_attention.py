import pytest
import torch

from kernels import grouped_attention, reference
from kernels.errors import KernelError
from tests.kernels.grouped import (
    SHARED,
    assert_agree,
    assert_equal,
    assert_rounds_no_worse,
    operand,
    unchecked,  # noqa: F401
)

AXES = [(), (4,), (2, 4), (2, 3, 4)]


def with_settings(function, mask=None, **settings):
    return lambda query, key, value: function(query, key, value, mask, **settings)


def both(mask=None, **settings):
    functions = grouped_attention, reference.grouped_attention
    return [with_settings(function, mask, **settings) for function in functions]


def inputs(axes, shared=(False, False, False), tokens=5):
    query = operand(3, *axes, tokens, 6, shared=shared[0])
    return query, *(operand(3, *axes, 7, 6, shared=own) for own in shared[1:])


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("shared", SHARED)
def test_equals_the_loop_whatever_is_shared(axes, shared):
    assert_agree(*both(), *inputs(axes, shared))
    assert_agree(*both(scale=0.3), *inputs(axes, shared, tokens=1))
    assert_agree(*both(is_causal=True), *inputs(axes, shared))


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("mask_models", [1, 3])
@pytest.mark.parametrize("of_booleans", [False, True])
def test_masks(axes, mask_models, of_booleans):
    shapes = [(5, 7), (1, 7), *((1,) * len(axes) + (5, 7),), (*axes, 5, 7), (*axes, 1, 7)]
    for shape in shapes:
        mask = torch.randn(mask_models, *shape, dtype=torch.float64)
        if of_booleans:
            mask = mask > 0
            mask[..., 0] = True
        assert_agree(*both(mask), *inputs(axes))
        assert_agree(*both(mask), *inputs(axes, (True, True, True)))


def test_an_additive_mask_has_a_gradient():
    query, key, value = inputs((2, 4))

    def of_mask(function):
        return lambda mask: function(query, key, value, mask)

    functions = of_mask(grouped_attention), of_mask(reference.grouped_attention)
    assert_agree(*functions, operand(3, 2, 1, 5, 7))
    assert_agree(*functions, operand(1, 5, 7))


@pytest.mark.parametrize("heads", [(4, 2, 2), (6, 1, 3)])
def test_fewer_heads_for_keys_and_values(heads):
    query, key, value = (operand(3, 2, own, 5, 6) for own in heads)
    assert_agree(*both(enable_gqa=True), query, key, value)


def test_operands_that_are_not_contiguous():
    query, key, value = (operand(3, 2, 5, 4, 6).transpose(2, 3) for _ in range(3))
    assert_agree(*both(), query, key, value)


@pytest.mark.parametrize("masked", [False, True])
def test_one_call_of_the_fused_kernel(masked):
    packed = torch.randn(3, 2, 5, 3, 4, 8)
    query, key, value = packed.permute(3, 0, 1, 4, 2, 5).unbind(0)
    mask = torch.randn(3, 1, 1, 1, 5) if masked else None
    with torch.profiler.profile() as profile, torch.no_grad():
        grouped_attention(query, key, value, mask)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1


def test_dropout_keeps_the_mean():
    query, key = operand(2, 4, 5, 6), operand(2, 4, 7, 6)
    value = torch.ones(2, 4, 7, 6, dtype=torch.float64)
    dropped = grouped_attention(query, key, value, dropout_p=0.5)
    assert dropped.std() > 0.1
    assert_equal(grouped_attention(query, key, value), torch.ones_like(query))


def test_bf16_rounds_no_worse_than_the_loop():
    assert_rounds_no_worse(*both(), *inputs((2, 4)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("query", "key", "value", "mask", "settings", "message"),
    [
        ((3, 5, 6), (2, 7, 6), (3, 7, 6), None, {}, "a leading model axis"),
        ((3, 5, 6), (3, 7, 4), (3, 7, 6), None, {}, r"key \[3, 7, 4\]"),
        ((3, 5, 6), (3, 7, 6), (3, 8, 6), None, {}, "value width"),
        ((3, 5, 6), (3, 1, 7, 6), (3, 7, 6), None, {}, "the same axes"),
        ((3, 4, 5, 6), (3, 2, 7, 6), (3, 2, 7, 6), None, {}, "rows and heads"),
        ((3, 4, 5, 6), (3, 3, 7, 6), (3, 3, 7, 6), None, {"enable_gqa": True}, "multiple"),
        ((3, 5, 6), (3, 7, 6), (3, 7, 6), (2, 5, 7), {}, "a leading model axis"),
        ((3, 5, 6), (3, 7, 6), (3, 7, 6), (3, 7, 5), {}, r"a mask that broadcasts to"),
        ((3, 5, 6), (3, 7, 6), (3, 7, 6), (3, 7), {}, r"a mask that broadcasts to"),
        ((3, 5, 6), (3, 7, 6), (3, 7, 6), (3, 5, 7), {"is_causal": True}, "not both"),
    ],
)
def test_operands_that_do_not_fit(query, key, value, mask, settings, message):
    shapes = (query, key, value, mask)
    operands = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(KernelError, match=f"grouped_attention: found .*{message}"):
        grouped_attention(*operands, **settings)


def test_a_mask_of_integers():
    query = torch.zeros(2, 3, 4)
    with pytest.raises(KernelError, match=r"mask torch.int64; wanted a mask of booleans"):
        grouped_attention(query, query, query, torch.ones(2, 3, 3, dtype=torch.int64))
