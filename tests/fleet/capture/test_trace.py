import pytest
import torch
import torch.nn.functional as F

from fleet.capture.trace import CaptureError, trace


def targets(module) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_the_graph_computes_what_the_function_computes():
    constant = torch.arange(3.0)

    def function(x, weight):
        first, second = (x @ weight + constant).chunk(2)
        return [F.gelu(first), second.max(1).values, x]

    module = trace(function, [torch.randn(4, 5), torch.randn(5, 3)])
    x, weight = torch.randn(4, 5), torch.randn(5, 3)
    for found, wanted in zip(module(x, weight), function(x, weight), strict=True):
        assert torch.equal(found, wanted)


def test_writing_in_place_becomes_a_graph_without_it():
    def function(x):
        y = x * 2
        y[:, 0].zero_()
        view = y[0]
        view += 1
        return [y, torch.relu_(y - 3)]

    x = torch.randn(3, 4)
    module = trace(function, [x])
    assert not any(name.split(".")[1].endswith("_") for name in targets(module))
    for found, wanted in zip(module(x), function(x), strict=True):
        assert torch.equal(found, wanted)


def test_one_tensor_that_is_handed_in_twice():
    x = torch.randn(3)
    module = trace(lambda a, b: [a - 2 * b], [x, x])
    assert torch.equal(module(torch.ones(3), torch.zeros(3))[0], torch.ones(3))


def test_what_looks_at_shapes_alone_is_a_constant():
    module = trace(lambda x: [x + torch.ones_like(x) + x.new_zeros(3)], [torch.randn(3)])
    assert targets(module).count("aten.full.default") == 2
    assert torch.equal(module(torch.zeros(3))[0], torch.ones(3))


def test_numbers_from_constants_may_be_looked_at():
    sizes = torch.tensor([2, 3])
    module = trace(lambda x: [x.reshape(*sizes.tolist())], [torch.randn(6)])
    assert module(torch.zeros(6))[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [x if x.sum() > 0 else -x], "branches on data"),
        (lambda x: [x * x.max().item()], "takes a number out of a tensor"),
        (lambda x: [x + torch.rand(3)], "draws random numbers"),
        (lambda x: [F.dropout(x)], "draws random numbers"),
        (lambda x: [x.add_(1)], "writes into its arguments"),
        (lambda x: [x @ torch.zeros(5, 5)], "tracing failed: .*"),
    ],
)
def test_what_cannot_be_replayed(function, reason):
    with pytest.raises(CaptureError, match=reason):
        trace(function, [torch.randn(3)])


def test_attention_without_dropout_is_not_random():
    q = torch.randn(1, 2, 3, 4)
    module = trace(lambda q: [F.scaled_dot_product_attention(q, q, q)], [q])
    wanted = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(module(q)[0], wanted, rtol=1e-6, atol=0)
