import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import reference
from kernels.triton_ops.grouped_linear import grouped_linear
from tests.kernels.triton.agreement import assert_agree, assert_close, operand


@pytest.mark.parametrize("rows", [(), (1,), (3,), (5,), (2, 9)])
@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,), (0, 2)])
def test_equals_the_loop(rows, shared):
    models = [1 if place in shared else 3 for place in range(3)]
    x, weight = operand(models[0], *rows, 37), operand(models[1], 19, 37)
    assert_agree(grouped_linear, reference.grouped_linear, x, weight, operand(models[2], 19))
    assert_agree(grouped_linear, reference.grouped_linear, x, weight)


@pytest.mark.parametrize("rows", [2, 7])
def test_operands_with_gaps_and_transposed_weights(rows):
    x, weight = operand(3, rows, 5, strided=True), operand(3, 5, 17).mT
    assert_agree(grouped_linear, reference.grouped_linear, x, weight, operand(3, 17, strided=True))


@pytest.mark.parametrize("rows", [0, 33])
def test_no_rows_and_many(rows):
    x, weight, bias = operand(2, rows, 3), operand(2, 4, 3), operand(1, 4)
    assert_close(grouped_linear(x, weight, bias), reference.grouped_linear(x, weight, bias))


@pytest.mark.parametrize("rows", [2, 6])
def test_a_model_is_the_same_whatever_runs_beside_it(rows):
    x, weight = operand(5, rows, 40), operand(5, 9, 40)
    of_two = grouped_linear(x[2:4], weight[2:4])
    assert torch.equal(of_two, grouped_linear(x, weight)[2:4])


def test_a_captured_graph_holds_the_kernel():
    x, weight = operand(2, 3, 4), operand(2, 5, 4)
    graph = make_fx(lambda x, weight: grouped_linear(x, weight))(x, weight)
    assert "grouped.linear" in graph.code
    x, weight = operand(2, 3, 4), operand(2, 5, 4)
    assert torch.equal(graph(x, weight), grouped_linear(x, weight))
