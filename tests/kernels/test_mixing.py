"""The mixing operations: the sums in float64, gradients, bits, refusals."""

from __future__ import annotations

from itertools import pairwise

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import (
    KernelError,
    Rows,
    Segment,
    delta_dot,
    fine_segments,
    mix,
    mixed_linear,
    ops,
    reference,
    row_norms,
)
from kernels.cpu import mixing as cpu_mixing
from kernels.mixing import tiles

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4", "sign")
GROUPS = [
    Segment(0, 1, 2),
    Segment(1, 8, 0),
    Segment(8, 8, 1),
    Segment(8, 90, 0),
    Segment(90, 101, 1),
]
GAPS = [Segment(50, 60, 0), Segment(60, 77, 0), Segment(3, 4, 2), Segment(80, 101, 1)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def row_values(count=5, weights=101, dtype=torch.float32, device="cpu"):
    """Rows that are not adjacent in memory."""
    torch.manual_seed(count)
    return torch.randn(count, weights + 30, dtype=dtype, device=device)[:, 7 : weights + 7]


def close(found, wanted, rtol=1e-5):
    """Within `rtol` of the largest number that is wanted."""
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=rtol * scale + 1e-30)


@pytest.mark.parametrize("segments", [GROUPS, GAPS], ids=["whole", "gaps"])
@pytest.mark.parametrize("models", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_mix_of_tensors(segments, models, count):
    deltas, anchor = row_values(count), torch.randn(101)
    coefficients = torch.randn(models, 3, count).transpose(1, 2)
    wanted = reference.mix(anchor.double(), deltas.double(), coefficients.double(), segments)
    close(mix(anchor, deltas, coefficients, segments), wanted)
    exact = mix(anchor.double(), deltas.double(), coefficients.double(), segments)
    close(exact, wanted, rtol=1e-13)
    inside = {w for s in segments for w in range(s.start, s.stop)}
    outside = [w for w in range(101) if w not in inside]
    assert torch.equal(exact[:, outside], anchor.double()[outside].expand(models, -1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("longest", [3, 16, 1000])
@pytest.mark.parametrize("models", [1, 3, 8])
def test_mix_and_dots_of_stored_rows(precision, longest, models, monkeypatch):
    monkeypatch.setattr(cpu_mixing, "CHUNK_BYTES", 5 * 4 * 64)  # several chunks in a segment
    rows = Rows.of(row_values(), precision, fine_segments(GROUPS, longest))
    anchor, coefficients = torch.randn(101), torch.randn(models, 5, 3)
    exact = rows.unpack().double()
    wanted = reference.mix(anchor.double(), exact, coefficients.double(), GROUPS)
    close(mix(anchor, rows, coefficients), wanted)
    close(mix(anchor, rows, coefficients, GROUPS), wanted)
    wide = mix(anchor.double(), rows, coefficients.double())
    close(wide, wanted, rtol=1e-6)
    for segments in (GROUPS, GAPS):  # those of the call, not of the scales
        wanted = reference.mix(anchor.double(), exact, coefficients.double(), segments)
        close(mix(anchor, rows, coefficients, segments), wanted)
        gradient = torch.randn(models, 101)
        dots = delta_dot(rows, gradient, segments, 3)
        close(dots, reference.delta_dot(exact, gradient.double(), segments, 3))
        close(row_norms(rows, segments, 3), reference.row_norms(exact, segments, 3))
    one = coefficients[:, :, 0]
    close(mix(anchor, rows, one), reference.mix(anchor.double(), exact, one.double()))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_segments_over_any_scales(data):
    weights = data.draw(st.integers(1, 60), label="weights")
    cuts = st.lists(st.integers(0, weights), max_size=6).map(sorted)
    bounds = [0, *data.draw(cuts, label="scales"), weights]
    scales = [Segment(a, b, 0) for a, b in pairwise(bounds)]
    edges = data.draw(cuts, label="groups")
    segments = [
        Segment(a, b, i % 3) for i, (a, b) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    precision = data.draw(st.sampled_from(PRECISIONS), label="precision")
    models = data.draw(st.integers(1, 5), label="models")
    rows = Rows.of(torch.randn(2, weights), precision, scales)
    anchor, coefficients = torch.randn(weights), torch.randn(models, 2, 3)
    wanted = reference.mix(anchor.double(), rows.unpack().double(), coefficients.double(), segments)
    close(mix(anchor, rows, coefficients, segments), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_summed_in_fp32(dtype):
    deltas, anchor = row_values(17).to(dtype), torch.randn(101).to(dtype)
    for models in (1, 4, 5):
        coefficients = torch.randn(models, 17)
        mixed = mix(anchor, deltas, coefficients)
        wanted = reference.mix(anchor.double(), deltas.double(), coefficients.double())
        assert mixed.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        assert ((mixed.double() - wanted).abs() <= wanted.abs() * rounding + 2e-5).all()


@pytest.mark.parametrize("models", [1, 4])
def test_dots_of_long_rows_keep_their_digits(models):
    torch.manual_seed(0)
    deltas, gradient = torch.rand(2, 1 << 20), torch.rand(models, 1 << 20)
    wanted = delta_dot(deltas.double(), gradient.double())
    torch.testing.assert_close(delta_dot(deltas, gradient).double(), wanted, rtol=1e-6, atol=0)


# --- gradients -----------------------------------------------------------------------------------


FEW = [Segment(0, 1, 2), Segment(3, 12, 0), Segment(12, 17, 1)]


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("stored", [True, False])
def test_gradients_of_mix(models, stored):
    deltas = row_values(2, 17, torch.float64)
    if stored:
        deltas = Rows.of(deltas, "int8", fine_segments([Segment(0, 17, 0)], 5))
    anchor = torch.randn(17, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(models, 2, 3, dtype=torch.float64, requires_grad=True)

    def mixed(anchor, coefficients):
        return mix(anchor, deltas, coefficients, FEW)

    assert torch.autograd.gradcheck(mixed, (anchor, coefficients))
    assert torch.autograd.gradgradcheck(lambda c: mixed(anchor.detach(), c).square(), coefficients)


@pytest.mark.parametrize("models", [1, 3])
def test_gradients_of_delta_dot(models):
    deltas = row_values(2, 17, torch.float64)
    gradient = torch.randn(models, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: delta_dot(deltas, g, FEW, 3), gradient)
    assert torch.autograd.gradgradcheck(lambda g: delta_dot(deltas, g, FEW, 3).square(), gradient)


def test_gradients_come_in_the_types_of_their_operands():
    deltas = row_values(4).bfloat16()
    anchor = torch.randn(101, dtype=torch.bfloat16, requires_grad=True)
    coefficients = torch.randn(2, 4, requires_grad=True)
    upstream = torch.randn(2, 101).bfloat16()
    mix(anchor, deltas, coefficients).backward(upstream)
    assert (anchor.grad.dtype, coefficients.grad.dtype) == (torch.bfloat16, torch.float32)
    close(coefficients.grad, upstream.double() @ deltas.double().t())


# --- bits ----------------------------------------------------------------------------------------


def test_one_model_has_the_bits_of_a_matrix_vector_product():
    deltas, anchor, coefficients = row_values(7, 20_011), torch.randn(20_011), torch.randn(1, 7, 2)
    segments = [Segment(0, 33, 1), Segment(33, 9_000, 0), Segment(9_000, 20_011, 1)]
    wanted = torch.cat(
        [
            torch.addmv(anchor[a:b], deltas[:, a:b].t(), coefficients[0, :, g])
            for a, b, g in segments
        ]
    )
    assert torch.equal(mix(anchor, deltas, coefficients, segments)[0], wanted)
    out = mix(anchor, deltas, coefficients, segments, out=anchor[None])
    assert out.data_ptr() == anchor.data_ptr()
    assert torch.equal(anchor, wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4", "sign"])
@pytest.mark.parametrize(("count", "weights"), [(3, 101), (72, 101), (72, 9001)])
def test_bits_do_not_depend_on_the_other_models(precision, count, weights):
    segments = fine_segments([Segment(0, 40, 1), Segment(40, weights, 0)], 64)
    rows = Rows.of(row_values(count, weights), precision, segments)
    anchor, coefficients = torch.randn(weights), torch.randn(33, count, 2)
    everyone = mix(anchor, rows, coefficients)
    for start, models in [(0, 2), (1, 3), (4, 4), (3, 5), (11, 8), (0, 9), (16, 17)]:
        some = slice(start, start + models)
        assert torch.equal(mix(anchor, rows, coefficients[some]), everyone[some])


@pytest.mark.parametrize("models", [1, 5, 9])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bits_do_not_depend_on_the_number_of_threads(models, precision, monkeypatch):
    monkeypatch.setattr(cpu_mixing, "CHUNK_BYTES", 1 << 19)
    segments = fine_segments([Segment(0, 9001, 0)], 130)
    rows = Rows.of(row_values(72, 9001), precision, segments)
    anchor, coefficients = torch.randn(9001), torch.randn(models, 72)
    gradient = torch.randn(1, 9001)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((mix(anchor, rows, coefficients), delta_dot(rows, gradient)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


# --- mixed_linear --------------------------------------------------------------------------------


def linear_case(models, inputs, rows, count, shape=(37, 11), dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(inputs, shape[1], rows, dtype=dtype).transpose(1, 2)
    anchor, deltas = torch.randn(shape, dtype=dtype), torch.randn(count, *shape, dtype=dtype)
    coefficients = torch.randn(models, count, dtype=dtype)
    return x, anchor, deltas, coefficients, torch.randn(models, shape[0], dtype=dtype)


@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize(("models", "inputs"), [(1, 1), (5, 1), (5, 5)])
def test_mixed_linear(models, inputs, rows, count, monkeypatch):
    monkeypatch.setattr("kernels.mixing.TILE_BYTES", 1 << 11)  # several tiles
    case = linear_case(models, inputs, rows, count)
    close(mixed_linear(*case), reference.mixed_linear(*case), rtol=1e-12)
    narrow = [operand.float() for operand in case]
    close(mixed_linear(*narrow), reference.mixed_linear(*case))
    close(mixed_linear(*case[:4]), reference.mixed_linear(*case[:4]), rtol=1e-12)
    shared_bias = (*case[:4], case[4][:1])
    close(mixed_linear(*shared_bias), reference.mixed_linear(*shared_bias), rtol=1e-12)


@pytest.mark.parametrize("through", ["_through_rows", "_through_weights"])
@pytest.mark.parametrize("inputs", [1, 5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_ways_of_mixed_linear(through, inputs, precision):
    x, anchor, deltas, coefficients, _ = linear_case(5, inputs, 3, 4, dtype=torch.float32)
    rows = Rows.of(deltas.flatten(1), precision, fine_segments([Segment(0, 407, 0)], 50))
    out = torch.empty(5, 3, 37)
    getattr(cpu_mixing, through)(x, anchor, rows, coefficients, out)
    exact = rows.unpack().double().view_as(deltas)
    operands = (x.double(), anchor.double(), exact, coefficients.double())
    close(out, reference.mixed_linear(*operands))
    close(mixed_linear(x, anchor, rows, coefficients), reference.mixed_linear(*operands))


@pytest.mark.parametrize(("models", "inputs", "rows"), [(1, 1, 2), (3, 1, 1), (3, 3, 2)])
def test_gradients_of_mixed_linear(models, inputs, rows, monkeypatch):
    monkeypatch.setattr("kernels.mixing.TILE_BYTES", 1)
    x, anchor, deltas, coefficients, bias = linear_case(models, inputs, rows, 2, (11, 3))
    operands = [o.requires_grad_() for o in (x, anchor, coefficients, bias)]

    def layer(x, anchor, coefficients, bias):
        return mixed_linear(x, anchor, deltas, coefficients, bias)

    assert torch.autograd.gradcheck(layer, operands)
    close(
        torch.autograd.grad(layer(x, anchor, coefficients, bias[:1]).sum(), bias)[0].sum(0),
        torch.full((11,), float(models * rows)),
    )


def test_gradients_of_mixed_linear_with_stored_rows():
    x, anchor, deltas, coefficients, _ = linear_case(3, 3, 2, 4, dtype=torch.float32)
    rows = Rows.of(deltas.flatten(1), "int4")
    x.requires_grad_()
    coefficients.requires_grad_()
    upstream = torch.randn(3, 2, 37)
    exact = rows.unpack().view_as(deltas)
    found = torch.autograd.grad(
        mixed_linear(x, anchor, rows, coefficients), (x, coefficients), upstream
    )
    wanted = torch.autograd.grad(
        reference.mixed_linear(x, anchor, exact, coefficients), (x, coefficients), upstream
    )
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


def test_one_tile_on_cuda():
    with FakeTensorMode():
        anchor = torch.empty(5000, 1000, device="cuda")
    assert tiles(anchor, 8) == [(0, 5000)]
    assert tiles(anchor[:0], 8) == []
    assert len(tiles(torch.empty(5000, 1000, device="meta"), 8)) > 1


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """Where shapes are checked, jaxtyping would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ANCHOR, DELTAS = torch.zeros(10), torch.zeros(3, 10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ANCHOR[:9], DELTAS, torch.zeros(2, 3)), r"anchor has shape \[9\], the deltas have 10"),
        ((ANCHOR, DELTAS, torch.zeros(2, 4)), r"\[2, 4\], wanted \[models, 3\] or"),
        ((ANCHOR, DELTAS, torch.zeros(3)), r"\[3\], wanted \[models, 3\]"),
        (
            (ANCHOR, DELTAS[0], torch.zeros(2, 10)),
            r"deltas \[10\] .*wanted \[ingredients, weights\]",
        ),
        ((ANCHOR, DELTAS, torch.zeros(2, 3, 2)), "found 2 groups and no segments"),
        ((ANCHOR, DELTAS, torch.zeros(2, 3).long()), r"torch.int64 on cpu, wanted floating"),
        ((ANCHOR, DELTAS.int(), torch.zeros(2, 3)), "deltas has type torch.int32"),
        ((ANCHOR, DELTAS.double(), torch.zeros(2, 3)), "the deltas are torch.float64, anchor is"),
        ((ANCHOR, DELTAS.to("meta"), torch.zeros(2, 3)), "on cpu, the deltas are on meta"),
        ((ANCHOR, Rows.empty(3, 9, "sign"), torch.zeros(2, 3)), "the deltas have 9"),
        ((ANCHOR, Rows.empty(4, 10, "sign"), torch.zeros(2, 3)), r"wanted \[models, 4\]"),
        (
            (ANCHOR, Rows.empty(3, 10, "int8"), torch.zeros(2, 3, 2), [Segment(0, 10, 2)]),
            "2 \\(the",
        ),
        ((ANCHOR, DELTAS, torch.zeros(2, 3), [Segment(0, 11, 0)]), r"Segment\(0, 11, 0\), wanted"),
        ((ANCHOR, DELTAS, torch.zeros(2, 3), [Segment(-1, 4, 0)]), r"Segment\(-1, 4, 0\)"),
        ((ANCHOR, DELTAS, torch.zeros(2, 3), [Segment(5, 4, 0)]), r"Segment\(5, 4, 0\)"),
        (
            (ANCHOR, DELTAS, torch.zeros(2, 3), [Segment(4, 6, 0), Segment(0, 5, 0)]),
            r"Segment\(4, 6, 0\) over Segment\(start=0, stop=5",
        ),
        (
            (ANCHOR, DELTAS.clone().requires_grad_(), torch.zeros(2, 3)),
            r"require a gradient.*detach",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(KernelError, match=message):
        mix(*arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_coefficient_that_is_not_finite_is_named(bad):
    coefficients = torch.zeros(2, 3)
    coefficients[1, 2] = bad
    with pytest.raises(KernelError, match=rf"mix: coefficient \[1, 2\] is {bad}"):
        mix(ANCHOR, DELTAS, coefficients)
    with pytest.raises(KernelError, match=rf"mixed_linear: coefficient \[1, 2\] is {bad}"):
        mixed_linear(torch.zeros(1, 1, 2), ANCHOR.view(5, 2), DELTAS.view(3, 5, 2), coefficients)


@pytest.mark.usefixtures("unchecked")
def test_out_that_does_not_fit_is_refused():
    coefficients = torch.zeros(2, 3)
    with pytest.raises(KernelError, match=r"out is \[1, 10\].*wanted \[2, 10\]"):
        mix(ANCHOR, DELTAS, coefficients, out=torch.zeros(1, 10))
    with pytest.raises(KernelError, match=r"out is .*float64.*float32 on cpu, like the anchor"):
        mix(ANCHOR, DELTAS, coefficients, out=torch.zeros(2, 10).double())
    memory = torch.zeros(25)
    with pytest.raises(KernelError, match="out overlaps the anchor with 2 models"):
        mix(memory[15:], DELTAS, coefficients, out=memory[:20].view(2, 10))
    mix(memory[:5], DELTAS[:, :5], coefficients, out=memory[5:15].view(2, 5))
    strided = row_values(3, 10)
    for k in range(3):
        with pytest.raises(KernelError, match="out overlaps the deltas, wanted memory of its own"):
            mix(ANCHOR, strided, coefficients[:1], out=strided[k : k + 1])
    stored = Rows.of(DELTAS, "fp32")
    with pytest.raises(KernelError, match="out overlaps the deltas"):
        mix(ANCHOR, stored, coefficients, out=stored.codes[1:])
    factors = torch.zeros(10, 10)
    with pytest.raises(KernelError, match="out overlaps the coefficients"):
        mix(ANCHOR, torch.zeros(10, 10), factors, out=factors)
    with pytest.raises(KernelError, match="out= and an operand that requires a gradient"):
        mix(ANCHOR, DELTAS, coefficients.requires_grad_(), out=torch.zeros(2, 10))


@pytest.mark.usefixtures("unchecked")
def test_other_operations_refuse_what_does_not_fit():
    with pytest.raises(KernelError, match=r"gradient has shape \[2, 9\], wanted \[models, 10\]"):
        delta_dot(DELTAS, torch.zeros(2, 9))
    with pytest.raises(KernelError, match=r"group < 1 \(the groups\)"):
        row_norms(DELTAS, [Segment(0, 10, 1)], 1)
    with pytest.raises(
        KernelError, match=r"row_norms: found deltas \[3, 10\] of torch.int32, want"
    ):
        row_norms(DELTAS.int(), [Segment(0, 10, 0)], 1)
    with pytest.raises(
        KernelError, match=r"delta_dot: found deltas \[10\] .*\[ingredients, weights"
    ):
        delta_dot(DELTAS[0], torch.zeros(2, 10))
    x, anchor, deltas = torch.zeros(2, 1, 2), ANCHOR.view(5, 2), DELTAS.view(3, 5, 2)
    coefficients = torch.zeros(2, 3)
    with pytest.raises(KernelError, match=r"wanted \[out, in\], \[rows, out, in\]"):
        mixed_linear(x, anchor, deltas.transpose(1, 2), coefficients)
    with pytest.raises(KernelError, match=r"found anchor \[5, 2\], rows of 9 weights"):
        mixed_linear(x, anchor, Rows.empty(3, 9, "int8"), coefficients)
    with pytest.raises(KernelError, match=r"x has shape \[3, 1, 2\], wanted \[1 or 2, rows, 2\]"):
        mixed_linear(torch.zeros(3, 1, 2), anchor, deltas, coefficients)
    with pytest.raises(KernelError, match=r"bias has shape \[5\], wanted \[1 or 2, 5\]"):
        mixed_linear(x, anchor, deltas, coefficients, torch.zeros(5))
    with pytest.raises(KernelError, match=r"x is torch.float64.*anchor is torch.float32"):
        mixed_linear(x.double(), anchor, deltas, coefficients)


# --- choosing ------------------------------------------------------------------------------------


def test_without_triton_plain_torch_is_chosen_and_said_once(monkeypatch, caplog):
    found = ops.find_spec
    monkeypatch.setattr(ops, "find_spec", lambda name: None if name == "triton" else found(name))
    ops._triton.cache_clear()
    ops._has_triton.cache_clear()
    try:
        assert [ops._triton(op) for op in ("mix", "delta_dot", "mixed_linear")] == [None] * 3
    finally:
        ops._triton.cache_clear()
        ops._has_triton.cache_clear()
    assert [r.message for r in caplog.records] == [
        "triton is not installed: operations on CUDA devices run in plain torch"
    ]


# --- on a GPU ------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("models", [1, 2, 5, 32])
@pytest.mark.parametrize("weights", [1, 101, 100_003])
def test_cuda_mixes_as_the_reference(precision, models, weights):
    segments = fine_segments([Segment(0, weights // 3, 1), Segment(weights // 3, weights, 0)], 1000)
    rows = Rows.of(row_values(17, weights), precision, segments)
    anchor, coefficients = torch.randn(weights), torch.randn(models, 17, 2)
    gradient = torch.randn(models, weights)
    exact = rows.unpack().double()
    on_gpu, coefficients = rows.to("cuda"), coefficients.cuda().requires_grad_()
    mixed = mix(anchor.cuda(), on_gpu, coefficients)
    wanted = reference.mix(anchor.double(), exact, coefficients.detach().cpu().double(), segments)
    close(mixed.cpu(), wanted)
    dots = reference.delta_dot(exact, gradient.double(), segments, 2)
    close(delta_dot(on_gpu, gradient.cuda(), None, 2).cpu(), dots)
    mixed.backward(gradient.cuda())
    close(coefficients.grad.cpu(), dots)
    close(row_norms(on_gpu, segments, 2).cpu(), reference.row_norms(exact, segments, 2))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("models", [1, 5, 32])
def test_cuda_mixes_tensors_of_every_type(dtype, models):
    deltas, anchor = row_values(17, 5003, dtype, "cuda"), torch.randn(5003).to("cuda", dtype)
    coefficients = torch.randn(models, 17, device="cuda")
    wanted = reference.mix(anchor.double(), deltas.double(), coefficients.double())
    close(mix(anchor, deltas, coefficients), wanted, rtol=max(torch.finfo(dtype).eps, 1e-5))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("models", "inputs", "rows"), [(1, 1, 1), (5, 1, 7), (5, 5, 7), (32, 32, 50)]
)
def test_cuda_multiplies_mixed_weights(precision, dtype, models, inputs, rows):
    operands = linear_case(models, inputs, rows, 9, (200, 104), torch.float32)
    x, anchor, deltas, coefficients, bias = (o.to("cuda", dtype) for o in operands)
    stored = Rows.of(deltas.float().flatten(1), precision, [Segment(0, 20_800, 0)])
    exact = stored.unpack().double().view(9, 200, 104)
    found = mixed_linear(x, anchor, stored, coefficients, bias)
    wanted = reference.mixed_linear(
        x.double(), anchor.double(), exact, coefficients.double(), bias.double()
    )
    close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2)
