import pytest
import torch

from kernels import reference, segmented_linear, segmented_low_rank
from kernels.errors import KernelError
from tests.kernels.grouped import assert_equal, operand, unchecked  # noqa: F401

SEGMENTS = [
    [(0, 9)],
    [(0, 2), (2, 2), (2, 7), (7, 9)],
    [(1, 3), (5, 6)],
    [(row, row + 1) for row in range(9)],
]


def factors(segments, ins=5, outs=7, *, strided=False):
    ranks = [(3 * place) % 5 for place in range(len(segments))]
    downs = [operand(rank, ins, strided=strided) for rank in ranks]
    return downs, [operand(outs, rank) for rank in ranks], [0.5 + place for place in ranks]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("strided", [False, True])
def test_low_rank_equals_the_weights_added_up(segments, strided):
    x, given = operand(9, 5, strided=strided), factors(segments, strided=strided)
    wanted = reference.segmented_low_rank(x, segments, *given)
    assert_equal(segmented_low_rank(x, segments, *given), wanted)
    before = operand(9, 7)
    out = before.clone()
    assert segmented_low_rank(x, segments, *given, out=out) is out
    assert_equal(out, before + wanted)


def test_low_rank_adds_into_columns_of_something_larger():
    x, given, wide = operand(9, 5), factors(SEGMENTS[1]), operand(9, 20)
    wanted = wide.clone()
    wanted[:, 4:11] += reference.segmented_low_rank(x, SEGMENTS[1], *given)
    segmented_low_rank(x, SEGMENTS[1], *given, out=wide[:, 4:11])
    assert_equal(wide, wanted)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("with_bias", [True, False, None])
def test_linear_of_mixed_widths(segments, with_bias):
    x = operand(9, 5)
    weights = [operand(1 + (3 * place) % 5, 5) for place in range(len(segments))]
    biases = {
        True: [operand(len(weight)) for weight in weights],
        False: [None, *(operand(len(weight)) for weight in weights[1:])],
        None: None,
    }[with_bias]
    found = segmented_linear(x, segments, weights, biases)
    assert_equal(found, reference.segmented_linear(x, segments, weights, biases))


def test_rows_of_no_segment_and_columns_beyond_a_width_are_zero():
    found = segmented_linear(operand(4, 2), [(1, 2), (2, 3)], [operand(1, 2), operand(3, 2)])
    assert (found == 0).tolist() == [[True] * 3, [False, True, True], [False] * 3, [True] * 3]


def test_linear_into_what_is_there():
    x, weight, before = operand(4, 2), operand(3, 2), operand(4, 5)
    out = before.clone()
    assert segmented_linear(x, [(1, 3)], [weight], out=out) is out
    before[1:3, :3] = x[1:3] @ weight.t()
    assert_equal(out, before)


def test_a_segment_is_the_same_whatever_is_beside_it():
    x, segments = operand(9, 40), SEGMENTS[1]
    downs, ups, scales = factors(segments, 40)
    whole = segmented_low_rank(x, segments, downs, ups, scales)
    alone = segmented_low_rank(x[2:7], [(0, 5)], downs[2:3], ups[2:3], scales[2:3])
    assert torch.equal(alone, whole[2:7])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [(0, 2)]}, "1 segments, 2 downs.* wanted one of each"),
        ({"segments": [(0, 3), (2, 4)]}, "in order, without overlaps"),
        ({"segments": [(0, 3), (3, 5)]}, "of 4 rows; wanted"),
        ({"x": torch.zeros(4, 2, 5)}, r"x \[4, 2, 5\]; wanted \[rows, in\]"),
        ({"x": torch.zeros(4, 6)}, r"segment 0: found down \[2, 5\].* wanted \[rank, 6\]"),
        ({"ups": [torch.zeros(7, 2), torch.zeros(7, 1)]}, r"segment 1: .* up \[7, 1\]"),
        ({"out": torch.zeros(3, 7)}, r"out \[3, 7\] with x \[4, 5\]"),
        ({"out": torch.zeros(4, 7).double()}, "wanted one dtype on one device"),
        ({"x": torch.zeros(4, 5, requires_grad=True)}, "has no gradient"),
        ({"segments": [], "downs": [], "ups": [], "scales": []}, "no segments and no out"),
    ],
)
def test_low_rank_operands_that_do_not_fit(change, message):
    given = {
        "x": torch.zeros(4, 5),
        "segments": [(0, 2), (2, 4)],
        "downs": [torch.zeros(2, 5), torch.zeros(3, 5)],
        "ups": [torch.zeros(7, 2), torch.zeros(7, 3)],
        "scales": [1.0, 1.0],
    }
    with pytest.raises(KernelError, match=f"segmented_low_rank: .*{message}"):
        segmented_low_rank(**given | change)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": [None]}, "2 segments, 2 weights, 1 biases; wanted one of each"),
        ({"weights": [torch.zeros(3, 6)] * 2}, r"segment 0: found weight \[3, 6\], bias none"),
        ({"biases": [None, torch.zeros(2)]}, r"segment 1: found weight \[3, 5\], bias \[2\]"),
        ({"weights": [torch.zeros(3, 5).half()] * 2}, "wanted one dtype"),
        ({"segments": [], "weights": []}, "no segments and no out"),
        ({"out": torch.zeros(4, 2)}, r"out \[4, 2\]; wanted \[4, 3\] or wider"),
    ],
)
def test_linear_operands_that_do_not_fit(change, message):
    given = {
        "x": torch.zeros(4, 5),
        "segments": [(0, 2), (2, 4)],
        "weights": [torch.zeros(3, 5), torch.zeros(3, 5)],
    }
    with pytest.raises(KernelError, match=f"segmented_linear: .*{message}"):
        segmented_linear(**given | change)
