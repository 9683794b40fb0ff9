import pytest

from kernels import reference
from kernels.triton_ops import grouped_conv2d as module
from kernels.triton_ops.grouped_conv2d import grouped_conv2d
from tests.kernels.triton.agreement import assert_agree, operand

WINDOWS = [
    {},
    {"stride": (2, 1), "padding": (1, 2)},
    {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "stride": 3},
    {"groups": 2, "padding": 1},
    {"groups": 4, "padding": 1},
]


def agree(settings, *operands):
    assert_agree(
        *(
            lambda x, weight, bias=None, function=function: function(x, weight, bias, **settings)
            for function in (grouped_conv2d, reference.grouped_conv2d)
        ),
        *operands,
    )


@pytest.mark.parametrize("settings", WINDOWS, ids=str)
@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,)])
def test_equals_the_loop(settings, shared):
    models = [1 if place in shared else 2 for place in range(3)]
    channels = 4 // settings.get("groups", 1)
    x, weight = operand(models[0], 1, 4, 5, 6), operand(models[1], 8, channels, 3, 2)
    agree(settings, x, weight, operand(models[2], 8))


def test_one_pixel_and_an_odd_block_of_outputs():
    agree({}, operand(3, 1, 5, 1, 1), operand(3, 67, 5, 1, 1))


@pytest.mark.parametrize("groups", [1, 3])
def test_channels_last(groups):
    x = operand(2, 2, 4, 5, 3).permute(0, 1, 4, 2, 3)
    agree({"groups": groups, "padding": 1}, x, operand(2, 6, 3 // groups, 3, 3))


def test_large_ones_go_to_the_loop(monkeypatch):
    monkeypatch.setattr(module, "MOST_PRODUCTS", 0)
    monkeypatch.setattr(module, "launch", None)
    agree({"padding": 1}, operand(2, 2, 3, 4, 5), operand(2, 4, 3, 3, 3), operand(1, 4))
