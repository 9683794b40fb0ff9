"""The plain mixing operations against sums in float64, weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import Rows, Segment, fine_segments, reference

SEGMENTS = [Segment(1, 8, 0), Segment(8, 8, 1), Segment(0, 1, 2), Segment(11, 101, 0)]
GROUP_OF = {w: s.group for s in SEGMENTS for w in range(s.start, s.stop)}


@pytest.fixture(params=[0, 1, 3, 17])
def deltas(request):
    # A slice of a larger tensor: rows are not adjacent in memory.
    return torch.randn(request.param, 130, dtype=torch.float64)[:, 7:108]


def mixed_by_hand(anchor, deltas, coefficients):
    wanted = anchor.numpy()[None].repeat(len(coefficients), axis=0)
    for weight, group in GROUP_OF.items():
        for model, of_model in enumerate(coefficients[:, :, group].numpy()):
            wanted[model, weight] += float(np.dot(of_model, deltas[:, weight].numpy()))
    return torch.from_numpy(wanted)


@pytest.mark.parametrize("models", [0, 1, 5])
def test_mix(deltas, models):
    anchor = torch.randn(101, dtype=torch.float64)
    coefficients = torch.randn(models, len(deltas), 3, dtype=torch.float64)
    wanted = mixed_by_hand(anchor, deltas, coefficients)
    mixed = reference.mix(anchor, deltas, coefficients, SEGMENTS)
    torch.testing.assert_close(mixed, wanted, rtol=1e-13, atol=1e-13)
    out = torch.empty(models, 101)
    narrow = reference.mix(anchor.float(), deltas.float(), coefficients, SEGMENTS, out=out)
    assert narrow is out
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_one_coefficient_for_all_weights(deltas):
    anchor, coefficients = torch.randn(101), torch.randn(4, len(deltas))
    wanted = anchor + coefficients @ deltas.float()
    torch.testing.assert_close(reference.mix(anchor, deltas.float(), coefficients), wanted)


def test_an_empty_segment_inside_of_another_changes_nothing():
    anchor, deltas, coefficients = torch.randn(9), torch.randn(3, 9), torch.randn(2, 3, 2)
    whole = [Segment(1, 8, 0)]
    wanted = reference.mix(anchor, deltas, coefficients, whole)
    found = reference.mix(anchor, deltas, coefficients, [*whole, Segment(5, 5, 1)])
    assert torch.equal(found, wanted)


def test_mix_and_delta_dot_are_each_others_gradients(deltas):
    anchor = torch.randn(101, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(2, len(deltas), 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 101, dtype=torch.float64)
    mixed = reference.mix(anchor, deltas, coefficients, SEGMENTS)
    found = torch.autograd.grad(mixed, (anchor, coefficients), upstream)
    wanted = torch.zeros(2, len(deltas), 3, dtype=torch.float64)
    for weight, group in GROUP_OF.items():
        wanted[:, :, group] += upstream[:, weight, None] * deltas[:, weight]
    torch.testing.assert_close(found[0], upstream.sum(0))
    torch.testing.assert_close(found[1], wanted)
    dots = reference.delta_dot(deltas, upstream, SEGMENTS, 3)
    torch.testing.assert_close(dots, wanted, rtol=1e-12, atol=1e-12)


def test_row_norms_by_group(deltas):
    norms = reference.row_norms(deltas, SEGMENTS, 4)
    of_group_0 = torch.cat([deltas[:, 1:8], deltas[:, 11:]], dim=1)
    torch.testing.assert_close(norms[:, 0], of_group_0.norm(dim=1))
    torch.testing.assert_close(norms[:, 2], deltas[:, 0].abs())
    assert norms[:, [1, 3]].count_nonzero() == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4", "sign"])
def test_stored_rows_are_their_unpacked_values(precision):
    segments = fine_segments([Segment(0, 30, 1), Segment(30, 101, 0)], 16)
    rows = Rows.of(torch.randn(3, 101), precision, segments)
    anchor, coefficients = torch.randn(101), torch.randn(2, 3, 2)
    unpacked, gradient = rows.unpack(), torch.randn(2, 101)
    mixed = reference.mix(anchor, rows, coefficients)
    torch.testing.assert_close(mixed, reference.mix(anchor, unpacked, coefficients, segments))
    dots = reference.delta_dot(rows, gradient, groups=2)
    torch.testing.assert_close(dots, reference.delta_dot(unpacked, gradient, segments, 2))
    norms = reference.row_norms(rows, segments, 2)
    torch.testing.assert_close(norms, reference.row_norms(unpacked, segments, 2))


@pytest.mark.parametrize("shared", [True, False])
def test_mixed_linear(shared):
    double = {"dtype": torch.float64}
    anchor, deltas = torch.randn(5, 7, **double), torch.randn(3, 5, 7, **double)
    coefficients, bias = torch.randn(4, 3, **double), torch.randn(4, 5, **double)
    x = torch.randn(1 if shared else 4, 2, 7, **double)
    found = reference.mixed_linear(x, anchor, deltas, coefficients, bias)
    for model in range(4):
        weight = anchor + sum(c * d for c, d in zip(coefficients[model], deltas, strict=True))
        wanted = x[0 if shared else model] @ weight.t() + bias[model]
        torch.testing.assert_close(found[model], wanted, rtol=1e-12, atol=1e-12)
