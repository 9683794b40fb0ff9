import pytest
import torch

from kernels import reference
from kernels.triton_ops.segmented_linear import segmented_linear
from kernels.triton_ops.segmented_low_rank import segmented_low_rank
from tests.kernels.triton.agreement import assert_close, operand

SEGMENTS = [
    [(0, 83)],
    [(0, 1), (1, 1), (1, 70), (70, 83)],
    [(3, 40), (50, 51)],
    [(row, row + 1) for row in range(9)],
]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("strided", [False, True])
def test_low_rank(segments, strided):
    x = operand(83, 37, strided=strided)
    ranks = [(7 * place) % 67 for place in range(len(segments))]
    downs = [operand(rank, 37, strided=strided) for rank in ranks]
    ups = [operand(rank, 19).mT if strided else operand(19, rank) for rank in ranks]
    scales = [0.5 + place for place in ranks]
    wanted = reference.segmented_low_rank(x, segments, downs, ups, scales)
    assert_close(segmented_low_rank(x, segments, downs, ups, scales), wanted)
    wide = operand(83, 40)
    before = wide.clone()
    segmented_low_rank(x, segments, downs, ups, scales, out=wide[:, 3:22])
    before[:, 3:22] += wanted
    assert_close(wide, before)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("with_bias", ["all", "some", "none"])
def test_linear(segments, with_bias):
    x = operand(83, 37)
    weights = [operand(1 + (50 * place) % 79, 37) for place in range(len(segments))]
    biases = {
        "all": [operand(len(weight)) for weight in weights],
        "some": [None, *(operand(len(weight)) for weight in weights[1:])],
        "none": None,
    }[with_bias]
    found = segmented_linear(x, segments, weights, biases)
    assert_close(found, reference.segmented_linear(x, segments, weights, biases))


def test_a_segment_is_the_same_whatever_is_beside_it():
    x, down, up = operand(40, 50), operand(8, 50), operand(30, 8)
    alone = segmented_low_rank(x[10:25], [(0, 15)], [down], [up], [2.0])
    beside = [operand(20, 50), down, operand(1, 50)], [operand(30, 20), up, operand(30, 1)]
    segments = [(0, 10), (10, 25), (25, 40)]
    whole = segmented_low_rank(x, segments, *beside, [1.0, 2.0, 3.0])
    assert torch.equal(alone, whole[10:25])
