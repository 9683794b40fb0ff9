import pytest
import torch

from kernels import reference
from kernels.triton_ops import grouped_layer_norm as layer_module
from kernels.triton_ops.grouped_batch_norm import grouped_batch_norm
from kernels.triton_ops.grouped_layer_norm import grouped_layer_norm
from tests.kernels.triton.agreement import assert_agree, assert_close, operand

LAYER_NORMS = (grouped_layer_norm, reference.grouped_layer_norm)
BATCH_NORMS = (grouped_batch_norm, reference.grouped_batch_norm)


def over(shape):
    return [
        lambda x, weight=None, bias=None, function=function: function(x, shape, weight, bias)
        for function in LAYER_NORMS
    ]


@pytest.mark.parametrize("models", [(1, 3, 3), (3, 1, 3), (3, 3, 1), (3, 3, 3), (1, 1, 1)])
def test_layer_norm_equals_the_loop(models):
    x = operand(models[0], 2, 5, 7, strided=True)
    for shape in ((7,), (5, 7)):
        assert_agree(*over(shape), x, operand(models[1], *shape), operand(models[2], *shape))
    assert_agree(*over((7,)), x, operand(models[1], 7))
    assert_agree(*over((7,)), x)


def test_long_rows_go_to_torch(monkeypatch):
    monkeypatch.setattr(layer_module, "LONGEST_ROW", 4)
    monkeypatch.setattr(layer_module, "launch", None)
    assert_agree(*over((7,)), operand(1, 2, 7), operand(3, 7), operand(1, 7))


def test_layer_norm_far_from_zero():
    """Where the difference of two squares would have no digits left."""
    x = operand(2, 3, 64) + 1000
    wanted = reference.grouped_layer_norm(x.double(), (64,))
    assert (grouped_layer_norm(x, (64,)) - wanted).abs().max() < 2e-4


def evaluating(models):
    mean, variance = operand(models, 4), operand(models, 4).abs() + 0.1
    return [
        lambda x, weight=None, bias=None, function=function: function(
            x, mean.to(x.dtype), variance.to(x.dtype), weight, bias
        )
        for function in BATCH_NORMS
    ]


@pytest.mark.parametrize("models", [(1, 3, 3, 3), (3, 1, 3, 1), (3, 3, 1, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("image", [(), (5,), (5, 3)])
def test_batch_norm_equals_the_loop(models, image):
    x, *factors = operand(models[0], 2, 4, *image), operand(models[2], 4), operand(models[3], 4)
    assert_agree(*evaluating(models[1]), x, *factors)
    assert_agree(*evaluating(models[1]), x)


def test_channels_last_stays_so():
    x = operand(2, 3, 5, 6, 4).permute(0, 1, 4, 2, 3)
    assert grouped_batch_norm(x, operand(2, 4), operand(2, 4).abs()).stride() == x.stride()
    assert_agree(*evaluating(2), x, operand(2, 4), operand(2, 4))
    assert_agree(*evaluating(2), x[:, :, :, 1:, :2], operand(2, 4), operand(2, 4))


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_training_moves_the_running_statistics(models, strided):
    x, weight = operand(models, 2, 4, 5), operand(3, 4)
    moved = []
    for function in BATCH_NORMS:
        torch.manual_seed(1)
        running = [operand(3, 4, strided=strided), operand(3, 4, strided=strided).abs()]
        y = function(x, *running, weight, training=True, momentum=0.3)
        moved.append([y, *running])
    for found, wanted in zip(*moved, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_without_running_statistics_those_of_the_batch(training):
    assert_agree(
        *(
            lambda x, weight, function=function: function(x, None, None, weight, training=training)
            for function in BATCH_NORMS
        ),
        operand(3, 2, 4, 5),
        operand(3, 4),
    )
