import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import grouped_conv2d, reference
from kernels.cpu import convolution, strategies
from kernels.errors import KernelError
from tests.kernels.grouped import (
    SHARED,
    assert_agree,
    assert_rounds_no_worse,
    operand,
    unchecked,  # noqa: F401
)

DIFFERENTIABLE = [name for name in convolution.STRATEGIES if not name.endswith("packed")]
WINDOWS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (3, 1), "padding": (0, 2)},
    {"padding": "valid", "stride": 2},
    {"padding": "same"},
    {"groups": 2, "padding": 1},
    {"groups": 4},
    {"dilation": 2, "padding": 2},
    {"dilation": (1, 2), "padding": "same", "groups": 2},
]


def with_settings(function, **settings):
    return lambda x, weight, bias: function(x, weight, bias, **settings)


def kernel(models, settings, size=(3, 2), outs=8, shared=False):
    return operand(models, outs, 4 // settings.get("groups", 1), *size, shared=shared)


@pytest.mark.parametrize("settings", WINDOWS, ids=str)
@pytest.mark.parametrize("shared", SHARED)
def test_equals_the_loop_whatever_is_shared(shared, settings):
    x = operand(3, 2, 4, 7, 6, shared=shared[0])
    weight = kernel(3, settings, shared=shared[1])
    for bias in (None, operand(3, 8, shared=shared[2])):
        functions = (grouped_conv2d, reference.grouped_conv2d)
        assert_agree(*(with_settings(f, **settings) for f in functions), x, weight, bias)


CASES = [
    ((1, 4, 1, 1), (1, 1), {}),
    ((1, 4, 1, 1), (3, 3), {"padding": (1, 1)}),
    ((3, 4, 8, 8), (2, 2), {"stride": (2, 2)}),
    ((2, 4, 7, 5), (1, 1), {"stride": (2, 1)}),
    ((2, 4, 7, 5), (3, 5), {"stride": (1, 2), "padding": (1, 2)}),
    ((2, 4, 7, 7), (7, 7), {"padding": (3, 3), "groups": 4}),
    ((2, 4, 9, 9), (3, 3), {"padding": (1, 1), "groups": 2, "dilation": (2, 1)}),
]


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize(
    ("strategy", "image", "size", "settings"),
    [
        (strategy, *case)
        for strategy in DIFFERENTIABLE
        for case in CASES
        if strategy != "columns" or not case[2].keys() & {"groups", "dilation"}
    ],
)
def test_each_strategy(strategy, models, image, size, settings):
    x, weight, bias = operand(models, *image), kernel(models, settings, size), operand(models, 8)
    forced = with_settings(convolution.grouped_conv2d, force=strategy, **settings)
    wanted = with_settings(reference.grouped_conv2d, **settings)
    assert_agree(forced, wanted, x, weight, bias)
    assert_agree(forced, wanted, x, weight, bias[:1])
    assert_agree(forced, wanted, x, weight, None)


@pytest.mark.parametrize("strategy", DIFFERENTIABLE)
@pytest.mark.parametrize("order", [(0, 1, 3, 4, 2), (1, 3, 4, 0, 2)])
def test_channels_last_inputs(strategy, order):
    inverse = [order.index(axis) for axis in range(5)]
    x = operand(2, 3, 4, 7, 6).permute(order).contiguous().permute(inverse)
    settings = {"stride": (2, 1), "padding": (1, 1)}
    forced = with_settings(convolution.grouped_conv2d, force=strategy, **settings)
    wanted = with_settings(reference.grouped_conv2d, **settings)
    assert_agree(forced, wanted, x, kernel(2, {}), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["channels_packed", "loop_packed"])
@pytest.mark.parametrize("groups", [1, 4])
def test_packed_weights(strategy, dtype, groups):
    settings = {"padding": (1, 1), "stride": (2, 2), "groups": groups}
    x, weight, bias = operand(3, 2, 4, 7, 6), kernel(3, settings), operand(3, 8)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    found = convolution.grouped_conv2d(x, weight, bias, force=strategy, **settings)
    wanted = reference.grouped_conv2d(x, weight, bias, **settings)
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_weights_are_packed_in_a_captured_graph_and_nowhere_else(monkeypatch):
    times = {"channels_packed": 1.0, "loop": 2.0}
    row = strategies.Measured(1, (3, 2, 4, 8, 1, 42, 9), times)
    monkeypatch.setattr(strategies, "table", lambda: {"conv2d": [row]})
    strategies._choose.cache_clear()
    x, weight = operand(3, 2, 4, 7, 6).float(), kernel(3, {}).float()

    def reordered(*operands):
        nodes = make_fx(lambda x, weight: grouped_conv2d(x, weight))(*operands).graph.nodes
        return [node for node in nodes if "reorder_convolution_weight" in str(node.target)]

    with torch.no_grad():
        (packed,) = reordered(x, weight)
        assert not reordered(x.double(), weight.double())
    assert not reordered(x, weight)
    above = {packed}
    for node in reversed(packed.graph.nodes):
        if any(node in user.all_input_nodes for user in above):
            above.add(node)
    assert [node.name for node in above if node.op == "placeholder"] == ["weight_1"]
    strategies._choose.cache_clear()


def test_bf16_rounds_no_worse_than_the_loop():
    x, weight, bias = operand(3, 2, 16, 8, 8), operand(3, 8, 16, 3, 3), operand(3, 8)
    functions = [with_settings(f, padding=1) for f in (grouped_conv2d, reference.grouped_conv2d)]
    assert_rounds_no_worse(*functions, x, weight, bias)
    assert_rounds_no_worse(*functions, x[:1], weight, bias)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "weight", "bias", "settings", "message"),
    [
        ((2, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {}, "a leading model axis"),
        ((3, 1, 4, 5, 5), (3, 8, 3, 3, 3), None, {}, r"weight \[3, 8, 3, 3, 3\]; wanted x"),
        ((3, 1, 4, 5, 5), (3, 7, 2, 3, 3), None, {"groups": 2}, "a multiple of groups = 2"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"groups": 0}, "groups = 0"),
        ((3, 4, 5, 5), (3, 8, 4, 3, 3), None, {}, "wanted x"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), (3, 4), {}, r"bias \[3, 4\]"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"padding": "full"}, "padding 'full'"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"padding": "same", "stride": 2}, "stride"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"stride": (1,)}, r"stride \(1,\); .* a pair"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"padding": (1,)}, r"padding \(1,\)"),
        ((3, 1, 4, 5, 5), (3, 8, 4, 3, 3), None, {"dilation": (1, 1, 1)}, r"dilation \(1, 1, 1\)"),
    ],
)
def test_operands_that_do_not_fit(x, weight, bias, settings, message):
    operands = [None if shape is None else torch.zeros(shape) for shape in (x, weight, bias)]
    with pytest.raises(KernelError, match=f"grouped_conv2d: found .*{message}"):
        grouped_conv2d(*operands, **settings)
