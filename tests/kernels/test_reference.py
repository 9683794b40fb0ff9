import pytest
import torch

from kernels import Segment, delta_dot, mix, row_norms

SEGMENTS = [Segment(0, 1, 2), Segment(1, 8, 0), Segment(8, 8, 1), Segment(8, 101, 0)]


@pytest.fixture(params=[0, 1, 3, 17])
def deltas(request):
    # A slice of a larger tensor: rows are not adjacent in memory.
    return torch.randn(request.param, 130)[:, 7:108]


def test_mix_equals_the_float64_sum(deltas):
    anchor, coefficients = torch.randn(101), torch.randn(len(deltas), 3)
    mixed = mix(anchor, deltas, coefficients, SEGMENTS, out=torch.empty(101))
    wanted = anchor.double()
    for start, stop, group in SEGMENTS:
        weights = coefficients[:, group].double()
        wanted[start:stop] += (weights[:, None] * deltas[:, start:stop].double()).sum(0)
    torch.testing.assert_close(mixed.double(), wanted, rtol=1e-5, atol=1e-5)


def test_mixing_into_the_anchor_gives_the_same_bits(deltas):
    anchor, coefficients = torch.randn(101), torch.randn(len(deltas), 3)
    apart = mix(anchor, deltas, coefficients, SEGMENTS, out=torch.empty(101))
    assert torch.equal(mix(anchor, deltas, coefficients, SEGMENTS, out=anchor), apart)


def test_delta_dot_is_the_gradient_of_mix(deltas):
    gradient = torch.randn(101)
    wanted = (deltas.double() * gradient.double()).sum(1)
    torch.testing.assert_close(delta_dot(deltas, gradient).double(), wanted, rtol=1e-5, atol=1e-4)


def test_row_norms_by_group(deltas):
    norms = row_norms(deltas, SEGMENTS, 3)
    torch.testing.assert_close(norms[:, 0], deltas[:, 1:].norm(dim=1))
    torch.testing.assert_close(norms[:, 2], deltas[:, 0].abs())
    assert norms[:, 1].count_nonzero() == 0
