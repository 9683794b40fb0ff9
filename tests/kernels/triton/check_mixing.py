import pytest
import torch
import triton.language as tl

from kernels import Segment, reference
from kernels.segments import fine_segments
from kernels.storage import Rows
from kernels.triton_ops import delta_dot as dot_module
from kernels.triton_ops import mix as mix_module
from kernels.triton_ops import mixed_linear as linear_module
from kernels.triton_ops.delta_dot import delta_dot
from kernels.triton_ops.mix import mix
from kernels.triton_ops.mixed_linear import mixed_linear
from kernels.triton_ops.rows import segments_or_all, stored
from tests.kernels.triton.agreement import assert_close, operand

# Out of order, apart from each other, odd, with one that is empty and weights of no group.
SEGMENTS = (Segment(0, 1, 2), Segment(150, 301, 1), Segment(1, 90, 0), Segment(120, 120, 1))
WEIGHTS = 331
PRECISIONS = ("fp32", "fp16", "int8", "int4", "sign")
MODELS = (1, 3)


def rows_of(precision, count=5):
    values = operand(count, WEIGHTS)
    if precision == "strided":
        return operand(count, WEIGHTS + 9)[:, 4:-5]
    return Rows.of(values, precision, fine_segments([Segment(0, WEIGHTS, 0)], 130))


def values_of(rows):
    return (rows.unpack() if isinstance(rows, Rows) else rows).double()


def exact_values_of(rows):
    """Without the rounding of scale times code to fp32."""
    lengths = torch.tensor([segment.stop - segment.start for segment in rows.segments])
    return rows.codes.double() * rows.scales.double().repeat_interleave(lengths, dim=1)


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("precision", ["strided", *PRECISIONS])
def test_mix_equals_the_loop(precision, models):
    rows, anchor, coefficients = rows_of(precision), operand(WEIGHTS), operand(models, 5, 3)
    wanted = reference.mix(anchor.double(), values_of(rows), coefficients.double(), SEGMENTS)
    assert_close(mix(anchor, rows, coefficients, SEGMENTS), wanted)
    out = torch.empty(models, WEIGHTS)
    mix_module.launch(anchor, stored(rows), coefficients, SEGMENTS, out, tl.float32)
    assert_close(out, wanted)


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("precision", ["strided", *PRECISIONS])
def test_delta_dot_equals_the_loop(precision, models):
    rows, gradient = rows_of(precision), operand(models, WEIGHTS)
    wanted = reference.delta_dot(values_of(rows), gradient.double(), SEGMENTS, 3)
    assert_close(delta_dot(rows, gradient, SEGMENTS, 3), wanted)
    found = dot_module.launch(stored(rows), gradient, SEGMENTS, 3, tl.float32)
    assert_close(found, wanted)


@pytest.mark.parametrize("precision", ["strided", "int8"])
def test_float64_stays(precision):
    rows, anchor, coefficients = rows_of(precision), operand(WEIGHTS), operand(2, 5, 3)
    anchor, coefficients = anchor.double(), coefficients.double()
    values = exact_values_of(rows) if precision == "int8" else rows.double()
    wanted = reference.mix(anchor, values, coefficients, SEGMENTS)
    found = mix(anchor, rows, coefficients, SEGMENTS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    dots = delta_dot(rows, wanted, SEGMENTS, 3)
    wanted_dots = reference.delta_dot(values, wanted, SEGMENTS, 3)
    torch.testing.assert_close(dots, wanted_dots, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operand_type", [tl.float32, tl.float16])
def test_a_coefficient_is_split_without_loss(operand_type):
    """Three terms of a narrow type: here fp16, which the interpreter computes rightly."""
    rows, anchor, coefficients = rows_of("int8"), operand(WEIGHTS), 1000 * operand(4, 5)
    out = torch.empty(4, WEIGHTS)
    whole = segments_or_all(None, WEIGHTS)
    mix_module.launch(anchor, stored(rows), coefficients[:, :, None], whole, out, operand_type)
    wanted = reference.mix(anchor.double(), values_of(rows), coefficients.double())
    largest = wanted.abs().max().item()
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=5e-7 * largest)


def test_many_rows_and_models():
    rows, anchor, coefficients = operand(37, 70), operand(70), operand(67, 37)
    wanted = reference.mix(anchor.double(), rows.double(), coefficients.double())
    assert_close(mix(anchor, rows, coefficients), wanted)
    wanted_dots = reference.delta_dot(rows.double(), wanted)
    assert_close(delta_dot(rows, wanted.float()), wanted_dots)


def test_no_rows_no_models_and_no_segments():
    anchor = operand(20)
    assert torch.equal(mix(anchor, operand(0, 20), operand(2, 0)), anchor.expand(2, -1))
    assert mix(anchor, operand(3, 20), operand(0, 3)).shape == (0, 20)
    assert torch.equal(mix(anchor, operand(3, 20), operand(2, 3, 1), []), anchor.expand(2, -1))
    assert torch.equal(delta_dot(operand(3, 20), operand(2, 20), [], 2), torch.zeros(2, 3, 2))
    assert delta_dot(operand(0, 20), operand(2, 20)).shape == (2, 0, 1)


def test_mixing_into_the_anchor_gives_the_same_bits():
    anchor, rows, coefficients = operand(WEIGHTS), rows_of("int4"), operand(1, 5, 3)
    apart = mix(anchor, rows, coefficients, SEGMENTS)
    assert torch.equal(mix(anchor, rows, coefficients, SEGMENTS, out=anchor[None]), apart)


def test_what_is_not_finite_stays_in_its_group():
    rows, gradient = operand(3, 40), operand(2, 40)
    rows[:, 30], gradient[:, 35] = torch.inf, torch.nan
    segments = [Segment(0, 30, 0), Segment(30, 40, 1)]
    for models in (1, 2):
        dots = delta_dot(rows, gradient[:models], segments, 2)
        assert dots[:, :, 0].isfinite().all()
        assert not dots[:, :, 1].isfinite().any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_mixed_linear_equals_mixing_first(precision, shared):
    deltas = operand(5, 11, 24)
    rows = deltas if precision is None else Rows.of(deltas.flatten(1), precision)
    values = deltas.double() if precision is None else values_of(rows).unflatten(1, (11, 24))
    x, anchor = operand(1 if shared else 3, 2, 24), operand(11, 24)
    coefficients, bias = operand(3, 5), operand(3, 11)
    wanted = reference.mixed_linear(
        x.double(), anchor.double(), values, coefficients.double(), bias.double()
    )
    assert_close(mixed_linear(x, anchor, rows, coefficients, bias), wanted)
    assert_close(mixed_linear(x, anchor, rows, coefficients), wanted - bias[:, None].double())


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_the_deltas(parts):
    x, deltas, coefficients = operand(3, 2, 24), operand(5, 11 * 24), operand(3, 5)
    found = linear_module.launch(x, 11, stored(deltas), coefficients, parts)
    weights = (coefficients @ deltas).unflatten(1, (11, 24))
    assert found.shape == (parts, 6, 11)
    assert_close(found.sum(0).unflatten(0, (3, 2)), x @ weights.mT)


@pytest.mark.parametrize("width", [23, 24])
def test_what_cannot_be_mixed_on_the_way_is_mixed_first(width, monkeypatch):
    monkeypatch.setattr(linear_module, "launch", None)
    segments = [Segment(0, 40, 0), Segment(40, 11 * width, 0)]
    rows = Rows.of(operand(5, 11 * width), "int4", segments if width == 24 else None)
    x, anchor, coefficients = operand(3, 2, width), operand(11, width), operand(3, 5)
    values = values_of(rows).unflatten(1, (11, width))
    wanted = reference.mixed_linear(x.double(), anchor.double(), values, coefficients.double())
    assert_close(mixed_linear(x, anchor, rows, coefficients), wanted)
