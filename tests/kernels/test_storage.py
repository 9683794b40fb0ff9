"""Rows in every precision: layout in bytes, error bounds for all inputs, views."""

from __future__ import annotations

import re
from itertools import pairwise

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import KernelError, Rows, Segment, fine_segments

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4", "sign")
QUANTISED = ("int8", "int4", "sign")
LARGEST = {"int8": 127, "int4": 7}


@st.composite
def rows_and_segments(draw):
    """A few short rows of any finite numbers up to 2^100, zeros and subnormals among them."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    weights = sum(lengths)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = [Segment(start, stop, i % 2) for i, (start, stop) in enumerate(pairwise(bounds))]
    number = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
        [0.0, -0.0, 1e-45, -3e-39, 1.0]
    )
    values = draw(st.lists(number, min_size=2 * weights, max_size=2 * weights))
    return torch.tensor(values, dtype=torch.float32).view(2, weights), segments


def segment_scales(rows: Rows) -> torch.Tensor:
    """The scale of each weight, looked up one by one."""
    return (
        torch.stack(
            [
                rows.scales[
                    :, next(i for i, s in enumerate(rows.segments) if s.start <= w < s.stop)
                ]
                for w in range(rows.weights)
            ],
            dim=1,
        )
        if rows.weights
        else torch.zeros(len(rows), 0)
    )


@settings(max_examples=60, deadline=None)
@given(rows_and_segments(), st.sampled_from(["int8", "int4"]))
def test_codes_are_the_nearest_inside_of_the_clip(case, precision):
    values, segments = case
    rows = Rows.of(values, precision, segments)
    scales = segment_scales(rows).double()
    clip = LARGEST[precision] * scales
    inside = values.double().clamp(-clip, clip)
    error = (rows.unpack().double() - inside).abs()
    assert (error <= scales * (0.5 + 1e-4)).all()
    assert (rows.unpack().abs().double() <= clip * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(rows_and_segments())
def test_eight_bits_clip_nothing(case):
    values, segments = case
    rows = Rows.of(values, "int8", segments)
    assert (values.abs().double() <= 127.001 * segment_scales(rows).double()).all()


@settings(max_examples=60, deadline=None)
@given(rows_and_segments())
def test_signs_have_the_mean_magnitude(case):
    values, segments = case
    rows = Rows.of(values, "sign", segments)
    for i, (start, stop, _) in enumerate(segments):
        if stop > start:
            wanted = values[:, start:stop].double().abs().mean(1)
            torch.testing.assert_close(rows.scales[:, i].double(), wanted, rtol=1e-6, atol=1e-44)
    unpacked = rows.unpack()
    torch.testing.assert_close(unpacked.abs(), segment_scales(rows), rtol=0, atol=0)
    assert (((unpacked >= 0) == (values >= 0)) | (unpacked == 0)).all()


@settings(max_examples=60, deadline=None)
@given(rows_and_segments(), st.sampled_from(PRECISIONS[:2] + QUANTISED[:2]))
def test_what_was_unpacked_is_stored_as_it_is(case, precision):
    values, segments = case
    once = Rows.of(values, precision, segments).unpack()
    again = Rows.of(once, precision, segments).unpack()
    if precision == "int4":  # another clipping may be as good
        bound = segment_scales(Rows.of(once, precision, segments))
        assert ((again - once).abs() <= bound * (0.5 + 1e-4)).all()
    else:
        torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-37)


@settings(max_examples=40, deadline=None)
@given(rows_and_segments())
def test_no_other_four_bit_clipping_of_the_grid_is_better(case):
    values, segments = case
    rows = Rows.of(values, "int4", segments)
    for i, (start, stop, _) in enumerate(segments):
        part = values[:, start:stop].double()
        for row, mine in zip(part, rows.unpack(start=start, stop=stop).double(), strict=True):
            largest = row.abs().max() if len(row) else torch.zeros(())
            if largest < 1e-30:
                continue
            error = (mine - row).square().sum()
            for ratio in (1.0, 2**-0.5, 0.5, 0.25):
                scale = largest * ratio / 7
                other = (row / scale).round().clamp(-7, 7) * scale
                assert error <= (other - row).square().sum() * (1 + 1e-4) + largest**2 * 1e-9, i


def test_relative_errors_of_normal_rows():
    torch.manual_seed(0)
    values = torch.randn(3, 4096)
    errors = {
        precision: float((Rows.of(values, precision).unpack() - values).norm() / values.norm())
        for precision in PRECISIONS
    }
    assert errors["fp32"] == 0
    assert errors["fp16"] < 3e-4
    assert errors["bf16"] < 2.5e-3
    assert errors["int8"] < 1.1e-2
    assert errors["int4"] < 0.13  # 15 levels at their best clipping lose 0.11 of a normal row
    assert errors["sign"] == pytest.approx((1 - 2 / torch.pi) ** 0.5, rel=0.02)


def test_finer_segments_follow_rows_of_uneven_size():
    torch.manual_seed(0)
    values = torch.randn(2, 1000) * torch.logspace(-4, 0, 1000)
    coarse = [Segment(0, 1000, 0)]
    small = slice(0, 100)
    lost, kept = (
        (Rows.of(values, "int4", segments).unpack() - values)[:, small].norm()
        / values[:, small].norm()
        for segments in (coarse, fine_segments(coarse, 50))
    )
    assert lost > 0.99
    assert kept < 0.15


def test_layout_of_four_bits():
    values = torch.tensor([[7.0, -7.0, 1.0, 0.0, 3.0]])
    rows = Rows.of(values, "int4", [Segment(0, 5, 0)])
    assert rows.scales.tolist() == [[1.0]]
    # The first of two in the low half, each code + 8.
    assert [byte & 0xFF for byte in rows.codes[0, :2].tolist()] == [15 | 1 << 4, 9 | 8 << 4]
    assert rows.codes[0, 2].item() & 15 == 11


def test_layout_of_signs():
    values = torch.tensor([[1.0, -1, -1, 1, -1, -1, -1, -1, -1, 1]])
    rows = Rows.of(values, "sign")
    assert rows.codes.dtype == torch.uint8
    assert rows.codes[0, 0] == 0b1001
    assert rows.codes[0, 1] & 3 == 0b10


@pytest.mark.parametrize(
    ("precision", "per_row"),
    [("fp32", 404), ("bf16", 202), ("fp16", 202), ("int8", 113), ("int4", 63), ("sign", 25)],
)
def test_bytes(precision, per_row):
    segments = [Segment(0, 1, 0), Segment(1, 101, 1), Segment(101, 101, 0)]
    rows = Rows.empty(7, 101, precision, segments)
    assert rows.nbytes == 7 * per_row
    assert len(rows) == 7
    assert rows.unpack().count_nonzero() == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_and_slices_are_views(precision):
    torch.manual_seed(0)
    segments = fine_segments([Segment(0, 11, 1), Segment(11, 101, 0)], 17)
    values = torch.randn(5, 101)
    rows = Rows.of(values, precision, segments)
    whole = rows.unpack()
    assert torch.equal(rows[1:4].unpack(), whole[1:4])
    assert torch.equal(rows.unpack(2), whole[2])
    assert torch.equal(rows.unpack(-1), whole[-1])
    assert torch.equal(rows.unpack(slice(1, 3), 13, 77), whole[1:3, 13:77])
    assert torch.equal(rows.unpack(start=7, stop=7), whole[:, 7:7])
    part = rows.part(8, 77)
    assert torch.equal(part.unpack(), whole[:, 8:77])
    assert part.segments[0] == Segment(0, 3, 1)
    assert torch.equal(part.part(16, 40)[2:].unpack(), whole[2:, 24:48])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_part_is_written_without_touching_its_neighbours(precision):
    torch.manual_seed(0)
    segments = [Segment(0, 8, 0), Segment(8, 21, 0), Segment(21, 40, 0)]
    rows = Rows.of(torch.randn(2, 40), precision, segments)
    before = rows.unpack()
    values = torch.randn(13)
    rows.part(8, 21).write(1, values)
    wanted = before.clone()
    wanted[1, 8:21] = Rows.of(values[None], precision).unpack(0)
    assert torch.equal(rows.unpack(), wanted)


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (8, 32), (16, 40)])
def test_a_part_that_shares_a_scale_is_not_written(precision, start, stop):
    torch.manual_seed(0)
    segments = [Segment(0, 13, 0), Segment(13, 32, 0), Segment(32, 40, 0)]
    rows = Rows.of(torch.randn(2, 40), precision, segments)
    before = rows.unpack()
    for part in (rows.part(start, stop), rows[1:].part(start, stop).part(0, stop - start)):
        with pytest.raises(KernelError, match=r"row 0: found a part that cuts .*fine_segments"):
            part.write(0, torch.ones(stop - start))
    assert torch.equal(rows.unpack(), before)
    rows.part(16, 40).part(16, 24).write(0, before[1, 32:])
    assert torch.equal(rows.unpack()[:, :32], before[:, :32])
    rows.part(40, 40).write(0, before[0, 40:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_other_types_and_strides(precision):
    torch.manual_seed(0)
    values = torch.randn(37, 6)[:, ::2].t()
    rows = Rows.of(values, precision, fine_segments([Segment(0, 37, 0)], 5))
    same = Rows.of(values.contiguous().double(), precision, fine_segments([Segment(0, 37, 0)], 5))
    assert torch.equal(rows.unpack(), same.unpack())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_no_rows_or_no_weights(precision, shape):
    values = torch.ones(shape)
    rows = Rows.of(values, precision)
    torch.testing.assert_close(rows.unpack(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_row_of_zeros_stays_zero(precision):
    rows = Rows.of(torch.zeros(2, 33), precision, fine_segments([Segment(0, 33, 0)], 8))
    assert rows.unpack().count_nonzero() == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_negated_row_is_the_negative(precision):
    torch.manual_seed(0)
    values = torch.randn(2, 999)
    assert torch.equal(Rows.of(-values, precision).unpack(), -Rows.of(values, precision).unpack())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_their_place(precision, bad):
    rows = Rows.empty(3, 50, precision)
    values = torch.ones(50)
    values[17] = bad
    with pytest.raises(KernelError, match=rf"row 2: found {bad} at weight 17"):
        rows.write(2, values)
    assert rows.unpack(2).count_nonzero() == 0


def test_what_fp16_cannot_hold_is_refused():
    with pytest.raises(KernelError, match="70000, the largest that fp16 holds is 65504"):
        Rows.of(torch.full((1, 3), -7e4), "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16", *QUANTISED])
def test_what_the_storage_or_its_scale_cannot_hold_is_refused(precision):
    with pytest.raises(KernelError, match=f"1e\\+39, the largest that {precision} holds is 3\\."):
        Rows.of(torch.tensor([[1.0, -1e39]], dtype=torch.float64), precision)
    largest = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).max
    values = torch.tensor([[largest, -largest, 1.0]])
    assert Rows.of(values, precision).unpack().isfinite().all()
    if precision != "fp32":
        with pytest.raises(KernelError, match=f"3.4028e\\+38, .* {precision}"):
            Rows.of(torch.tensor([[3.4028e38]]), precision)


@pytest.mark.parametrize(
    ("segments", "found"),
    [
        ([Segment(0, 5, 0)], "end at 5, wanted 10"),
        (
            [Segment(0, 5, 0), Segment(6, 10, 0)],
            "Segment(start=6, stop=10, group=0) after weight 5",
        ),
        (
            [Segment(0, 5, 0), Segment(4, 10, 0)],
            "Segment(start=4, stop=10, group=0) after weight 5",
        ),
        ([Segment(0, 11, 0)], "end at 11, wanted 10"),
        ([Segment(0, 10, -1)], "0 <= group"),
    ],
)
def test_segments_must_cover_the_weights(segments, found):
    with pytest.raises(KernelError, match=re.escape(found)):
        Rows.empty(2, 10, "int8", segments)


@pytest.fixture
def unchecked():
    """Where shapes are checked, jaxtyping would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_bad_requests():
    with pytest.raises(KernelError, match=r"'int3'.*wanted one of fp32"):
        Rows.empty(2, 10, "int3")
    with pytest.raises(KernelError, match=r"found \[3, 10\).*multiple of 2"):
        Rows.empty(2, 10, "int4").part(3, 10)
    with pytest.raises(KernelError, match=r"inside of \[0, 10\)"):
        Rows.empty(2, 10, "int8").part(3, 11)
    with pytest.raises(KernelError, match=r"found values of shape \[9\], wanted \[10\]"):
        Rows.empty(2, 10, "int8").write(0, torch.ones(9))
    with pytest.raises(KernelError, match="wanted at least 1"):
        fine_segments([Segment(0, 3, 0)], 0)


def test_fine_segments_keep_the_groups():
    fine = fine_segments([Segment(0, 5, 1), Segment(5, 5, 0), Segment(5, 7, 0)], 2)
    assert fine == [(0, 2, 1), (2, 4, 1), (4, 5, 1), (5, 7, 0)]
