import pytest
import torch

from kernels import grouped_linear, reference
from kernels.cpu import linear
from kernels.errors import KernelError
from tests.kernels.grouped import (
    SHARED,
    assert_agree,
    assert_equal,
    assert_rounds_no_worse,
    operand,
    unchecked,  # noqa: F401
)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3), (0,)])
def test_equals_the_loop_whatever_is_shared(shared, rows):
    x = operand(3, *rows, 5, shared=shared[0])
    weight, bias = operand(3, 7, 5, shared=shared[1]), operand(3, 7, shared=shared[2])
    assert_agree(grouped_linear, reference.grouped_linear, x, weight, bias)
    assert_agree(grouped_linear, reference.grouped_linear, x, weight, None)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 1, 1, 3), (2, 3, 5, 1), (13, 11, 1, 7)])
@pytest.mark.parametrize("strategy", [name for name in linear.STRATEGIES if name != "packed"])
@pytest.mark.parametrize("bias_models", [0, 1, 13])
def test_each_strategy(strategy, sizes, bias_models):
    models, rows, ins, outs = sizes
    bias = operand(min(bias_models, models), outs) if bias_models else None

    def forced(x, weight, bias):
        return linear.grouped_linear(x, weight, bias, force=strategy)

    x, weight = operand(models, rows, ins, strided=True), operand(models, outs, ins, strided=True)
    assert_agree(forced, reference.grouped_linear, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype):
    x, weight, bias = operand(3, 50, 65), operand(3, 33, 65), operand(3, 33)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    found = linear.grouped_linear(x, weight, bias, force="packed")
    wanted = reference.grouped_linear(x, weight, bias)
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_bf16_rounds_no_worse_than_the_loop():
    operands = operand(4, 9, 64), operand(4, 32, 64), operand(4, 32)
    assert_rounds_no_worse(grouped_linear, reference.grouped_linear, *operands)
    assert_rounds_no_worse(grouped_linear, reference.grouped_linear, operands[0][:1], *operands[1:])


def test_a_shared_input_is_one_product():
    x, weight = operand(1, 4, 6), operand(3, 2, 6)
    with torch.profiler.profile() as profile:
        found = grouped_linear(x, weight)
    assert [event.count for event in profile.key_averages() if event.key == "aten::mm"] == [1]
    assert_equal(found, torch.einsum("ri,moi->mro", x[0], weight))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 4, 5), (3, 7, 5), None, r"x \[2, 4, 5\], weight \[3, 7, 5\]; wanted a leading"),
        ((3, 4, 5), (3, 7, 6), None, r"x \[3, 4, 5\], weight \[3, 7, 6\]; wanted x \[models"),
        ((3, 4, 5), (7, 5), None, "wanted x"),
        ((3, 4, 5), (3, 7, 5), (3, 6), r"bias \[3, 6\]; wanted"),
        ((0, 4, 5), (3, 7, 5), None, "wanted a leading model axis"),
    ],
)
def test_operands_that_do_not_fit(x, weight, bias, message):
    operands = [None if shape is None else torch.zeros(shape) for shape in (x, weight, bias)]
    with pytest.raises(KernelError, match=f"grouped_linear: found .*{message}"):
        grouped_linear(*operands)


def test_mixed_dtypes_and_devices():
    x, weight = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    with pytest.raises(KernelError, match=r"x torch.float32, weight torch.float64; wanted one"):
        grouped_linear(x, weight.double())
    with pytest.raises(KernelError, match=r"x cpu, weight meta; wanted all on one device"):
        grouped_linear(x, weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x.bfloat16(), weight).dtype == torch.bfloat16
