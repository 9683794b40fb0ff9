import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleet.capture.dependence import Dependence
from fleet.capture.fuse import fuse
from fleet.capture.trace import trace

MODEL, INPUT, NOTHING = Dependence.MODEL, Dependence.INPUT, Dependence.NOTHING
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


def fused(function, weights, x, kinds=None):
    """Names of the operations after fusing, with the largest relative error of the result."""
    with torch.no_grad():
        module = trace(lambda *t: [function(*t)], [*weights, x])
        fuse(module, kinds or [*[MODEL] * len(weights), INPUT])
        module.recompile()
        found, wanted = module(*weights, x)[0], function(*weights, x)
    assert found.shape == wanted.shape
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    names = [
        str(n.target).rpartition(":")[2] for n in module.graph.nodes if n.op == "call_function"
    ]
    return names, error


def norm_of(channels):
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.5
    return [mean, variance, torch.randn(channels), torch.randn(channels)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_is_folded_into_the_convolution(bias, affine):
    weights = [torch.randn(6, 3, 3, 3), *norm_of(6), torch.randn(6)]

    def function(weight, mean, variance, gain, shift, offset, x):
        y = F.conv2d(x, weight, offset if bias else None, stride=2, padding=1)
        y = F.batch_norm(y, mean, variance, *((gain, shift) if affine else (None, None)))
        return F.relu(y)

    names, error = fused(function, weights, torch.randn(2, 3, 9, 7))
    assert error < 1e-5
    assert not any("batch_norm" in name or "relu" in name for name in names)
    assert names.count("mkldnn._convolution_pointwise.default") == 1


def test_a_norm_for_each_model_is_not_folded_into_a_convolution_for_all():
    def function(weight, mean, variance, gain, shift, x):
        return F.batch_norm(F.conv2d(x, weight), mean, variance, gain, shift)

    weights = [torch.randn(6, 3, 3, 3), *norm_of(6)]
    x = torch.randn(2, 3, 9, 7)
    names, error = fused(function, weights, x, [NOTHING, *[MODEL] * 4, INPUT])
    assert "aten.native_batch_norm.default" in names
    assert error < 1e-6
    names, _ = fused(function, weights, x, [MODEL, *[NOTHING] * 4, INPUT])
    assert "aten.native_batch_norm.default" not in names


def test_a_convolution_that_is_needed_before_its_norm_is_not_folded():
    def function(weight, mean, variance, gain, shift, x):
        y = F.conv2d(x, weight)
        return F.batch_norm(y, mean, variance, gain, shift) + y.sum()

    names, error = fused(function, [torch.randn(6, 3, 3, 3), *norm_of(6)], torch.randn(2, 3, 9, 7))
    assert "aten.native_batch_norm.default" in names
    assert error < 1e-6


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.randn(2, 4, 5, 5)
    weight = torch.randn(8, 2, 3, 3)
    names, error = fused(lambda w, x: ACTIVATIONS[name](F.conv2d(x, w, groups=2)), [weight], x)
    assert [n for n in names if n.startswith("aten")] == []
    assert error < 1e-5
    wide, bias = torch.randn(256, 300) / 17, torch.randn(256)
    rows = torch.randn(2, 5, 300)
    names, error = fused(lambda w, b, x: ACTIVATIONS[name](F.linear(x, w, b)), [wide, bias], rows)
    assert "mkldnn._linear_pointwise.default" in names
    assert all("aten.reshape" in n or not n.startswith("aten") for n in names)
    assert error < 1e-5


def test_leaving_out_what_another_operation_needs():
    """The value before the activation, or before the sum, is used once more."""
    weight, x = torch.randn(4, 4, 1, 1), torch.randn(2, 4, 5, 5)

    def before_activation(weight, x):
        y = F.conv2d(x, weight)
        return F.relu(y) * y

    def before_sum(weight, x):
        y = F.conv2d(x, weight)
        return (y + x) * y

    for function in (before_activation, before_sum):
        _, error = fused(function, [weight], x)
        assert error < 1e-6


def test_a_residual_is_added_by_the_convolution():
    def block(first, second, x):
        return F.relu(F.conv2d(F.relu(F.conv2d(x, first, padding=1)), second, padding=1) + x)

    weights = [torch.randn(4, 4, 3, 3) for _ in range(2)]
    names, error = fused(block, weights, torch.randn(2, 4, 6, 6))
    assert error < 1e-5
    assert names.count("mkldnn._convolution_pointwise.binary") == 1
    assert not any(name.startswith("aten") for name in names)


@pytest.mark.parametrize("order", [0, 1])
def test_a_sum_of_two_convolutions(order):
    def block(first, second, x):
        a, b = F.conv2d(x, first), F.conv2d(x, second)
        return a + b if order else b + a

    weights = [torch.randn(4, 4, 1, 1) for _ in range(2)]
    _, error = fused(block, weights, torch.randn(2, 4, 6, 6))
    assert error < 1e-5


def test_a_sum_that_is_not_plain():
    weight, x = torch.randn(4, 4, 1, 1), torch.randn(2, 4, 5, 5)
    for function in (
        lambda w, x: torch.add(F.conv2d(x, w), x, alpha=2),
        lambda w, x: F.conv2d(x, w) + x[:, :1],
        lambda w, x: F.conv2d(x, w) + 3,
        lambda w, x: F.conv2d(x, w) * 2 + F.conv2d(x, w),
    ):
        _, error = fused(function, [weight], x)
        assert error < 1e-5


def test_views_after_a_convolution_see_its_values():
    weight, x = torch.randn(4, 3, 2, 2), torch.randn(2, 3, 8, 8)
    _, error = fused(lambda w, x: F.conv2d(x, w, stride=2).view(2, -1).softmax(1), [weight], x)
    assert error < 1e-5


def test_few_weights_and_float64_and_weights_of_the_input_are_left():
    x = torch.randn(3, 20)
    names, _ = fused(lambda w, x: F.linear(x, w), [torch.randn(5, 20)], x)
    assert "aten.mm.default" in names
    wide = torch.randn(300, 300, dtype=torch.float64)
    names, _ = fused(lambda w, x: F.linear(x, w), [wide], x[:, :1].double().expand(3, 300))
    assert "aten.mm.default" in names
    names, _ = fused(lambda w, x: F.linear(x, x), [wide], torch.randn(300, 300))
    assert "aten.mm.default" in names


def test_transposed_and_one_dimensional_convolutions_are_left():
    names, _ = fused(
        lambda w, x: F.conv_transpose2d(x, w), [torch.randn(4, 3, 2, 2)], torch.randn(2, 4, 5, 5)
    )
    assert names == ["aten.convolution.default"]
    names, _ = fused(lambda w, x: F.conv1d(x, w), [torch.randn(4, 3, 2)], torch.randn(2, 3, 5))
    assert names == ["aten.convolution.default"]


def test_a_small_network_is_nothing_but_packed_operations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Linear(8 * 36, 256)

        def forward(self, x):
            return self.head(F.silu(self.norm(self.conv(x))).flatten(1))

    net = Net().eval()
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    names = list(state)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=False))
        return torch.func.functional_call(net, given, (tensors[-1],))

    operations, error = fused(function, list(state.values()), torch.randn(2, 3, 8, 8))
    assert error < 1e-5
    assert [name for name in operations if name.startswith("aten")] == ["aten.reshape.default"]
