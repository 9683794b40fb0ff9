"""Every operation on CUDA against the reference, at the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.segments import Segment, fine_segments
from kernels.storage import Rows
from tests.kernels.triton.agreement import assert_agree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS = ["fp32", "bf16", "fp16", "int8", "int4", "sign"]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    torch.manual_seed(0)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def operand(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def assert_as_the_loop(name: str, *operands: Tensor | None, **settings) -> None:
    """float32 within 1e-5 of the largest number, bf16 within 1.5 of the loop's error."""

    def call(module: object) -> Callable[..., Tensor]:
        return lambda *given: getattr(module, name)(*given, **settings)

    assert_agree(call(ops), call(reference), *operands)
    halves = [t.bfloat16() if t is not None and t.is_floating_point() else t for t in operands]
    wide = [t.float() if t is not None and t.is_floating_point() else t for t in halves]
    exact = run(call(reference), wide)
    found, loop = run(call(ops), halves), run(call(reference), halves)
    for mine, theirs, wanted in zip(found, loop, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        allowed = 1.5 * torch.dist(theirs.float(), wanted) + 1e-5 * wanted.norm()
        assert torch.dist(mine.float(), wanted) <= allowed
    with torch.no_grad():
        evaluated = call(ops)(*halves)
    allowed = 1.5 * torch.dist(loop[0].float(), exact[0]) + 1e-5 * exact[0].norm()
    assert torch.dist(evaluated.float(), exact[0]) <= allowed


def run(function: Callable[..., Tensor], operands: list[Tensor | None]) -> list[Tensor]:
    """The result and the gradients of one loss."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in operands
    ]
    result = function(*leaves)
    torch.manual_seed(1)
    loss = torch.randn(result.shape, device=result.device)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [result.detach(), *torch.autograd.grad((result.float() * loss).sum(), wanted)]


@pytest.mark.parametrize("rows", [1, 3, 16, 50, 197, 800])
@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,)])
def test_grouped_linear(rows, shared):
    models = [1 if place in shared else 5 for place in range(3)]
    x, weight = operand(models[0], rows, 768), operand(models[1], 771, 768) / 28
    assert_as_the_loop("grouped_linear", x, weight, operand(models[2], 771))


@pytest.mark.parametrize(
    ("channels", "outs", "size", "kernel", "settings"),
    [
        (3, 64, 64, 7, {"stride": 2, "padding": 3}),
        (64, 64, 28, 3, {"padding": 1}),
        (256, 512, 14, 1, {"stride": 2}),
        (512, 512, 7, 3, {"padding": "same"}),
        (96, 96, 28, 7, {"padding": 3, "groups": 96}),
        (32, 64, 15, 3, {"padding": 1, "groups": 4}),
    ],
)
@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("shared", [(), (0,), (1,)])
def test_grouped_conv2d(channels, outs, size, kernel, settings, images, shared):
    models = [1 if place in shared else 3 for place in range(2)]
    taps = (channels // settings.get("groups", 1)) * kernel**2
    x = operand(models[0], images, channels, size, size)
    weight = operand(models[1], outs, taps // kernel**2, kernel, kernel) / taps**0.5
    assert_as_the_loop("grouped_conv2d", x, weight, operand(3, outs), **settings)


def test_channels_last_convolutions():
    x = operand(3, 2, 28, 28, 64).permute(0, 1, 4, 2, 3)
    assert_as_the_loop("grouped_conv2d", x, operand(3, 64, 64, 3, 3) / 24, padding=1)


@pytest.mark.parametrize("shape", [(768,), (13, 7)])
def test_grouped_layer_norm(shape):
    x, weight, bias = operand(5, 50, *shape), operand(5, *shape), operand(1, *shape)
    functions = [
        lambda x, weight, bias, module=module: module.grouped_layer_norm(x, shape, weight, bias)
        for module in (ops, reference)
    ]
    assert_agree(*functions, x, weight, bias)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_grouped_batch_norm(training, last):
    x = operand(3, 8, 56, 56, 64).permute(0, 1, 4, 2, 3) if last else operand(3, 8, 64, 56, 56)
    mean, variance = operand(3, 64), operand(3, 64).abs() + 0.1
    functions = [
        lambda x, weight, bias, module=module: module.grouped_batch_norm(
            x, mean.to(x.dtype), variance.to(x.dtype), weight, bias, training=training
        )
        for module in (ops, reference)
    ]
    assert_agree(*functions, x, operand(3, 64), operand(3, 64))


@pytest.mark.parametrize("tokens", [1, 50, 64, 197])
@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.1}], ids=str)
def test_grouped_attention(tokens, settings):
    shape = (4, 2, 12, tokens, 64)
    operands = operand(*shape), operand(*shape), operand(1, *shape[1:])
    assert_as_the_loop("grouped_attention", *operands, **settings)


def test_attention_of_views_with_a_mask():
    query, key, value = operand(3, 2, 50, 3, 12, 64).permute(3, 0, 1, 4, 2, 5)
    mask = operand(1, 2, 1, 1, 50) > -1
    assert_as_the_loop("grouped_attention", query, key, value, mask)


@pytest.mark.parametrize("models", [(1, 4), (4, 4), (4, 1)])
def test_grouped_embedding(models):
    ids = torch.randint(0, 3001, (models[0], 2, 50), device="cuda")
    assert_as_the_loop("grouped_embedding", ids, operand(models[1], 3001, 771), padding_idx=5)


SEGMENTS = [Segment(0, 100_000, 1), Segment(100_001, 700_003, 0), Segment(700_003, 900_000, 2)]
WEIGHTS = 1_000_003


def rows_of(precision: str, weights: int = WEIGHTS, count: int = 24) -> Rows:
    """Scales of short segments, as 4 and 1 bit want them."""
    segments = fine_segments([Segment(0, weights, 0)], 5000)
    rows = Rows.of(torch.randn(count, weights), precision, segments)  # pyright: ignore
    return rows.to("cuda")


def within(found: Tensor, wanted: Tensor, part: float) -> bool:
    return bool((found - wanted).abs().max() <= part * wanted.abs().max())


@pytest.mark.parametrize("weights", [WEIGHTS, 1_000_000])
@pytest.mark.parametrize("models", [1, 2, 32, 65])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mix_and_delta_dot(precision, models, weights):
    rows, anchor = rows_of(precision, weights), operand(weights)
    coefficients, values = operand(models, 24, 3), rows.unpack().double()
    wanted = reference.mix(anchor.double(), values, coefficients.double(), SEGMENTS)
    assert within(ops.mix(anchor, rows, coefficients, SEGMENTS), wanted, 1e-5)
    dots = ops.delta_dot(rows, wanted.float(), SEGMENTS, 3)
    for group in range(3):
        pieces = [s for s in SEGMENTS if s.group == group]
        exact = sum(wanted[:, s.start : s.stop] @ values[:, s.start : s.stop].mT for s in pieces)
        assert within(dots[:, :, group], exact, 1e-5)
    assert torch.equal(dots, ops.delta_dot(rows, wanted.float(), SEGMENTS, 3))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_is_the_same_whatever_is_mixed_beside_it(precision):
    rows, anchor, coefficients = rows_of(precision), operand(WEIGHTS), operand(33, 24, 3)
    alone = ops.mix(anchor, rows, coefficients[4:6], SEGMENTS)
    assert torch.equal(alone, ops.mix(anchor, rows, coefficients, SEGMENTS)[4:6])


def test_gradients_of_mix():
    rows = rows_of("bf16", 10_007)
    anchor, coefficients = operand(10_007).requires_grad_(), operand(5, 24).requires_grad_()
    loss = operand(5, 10_007)
    mixed = ops.mix(anchor, rows, coefficients)
    to_anchor, to_coefficients = torch.autograd.grad(mixed, [anchor, coefficients], loss)
    assert within(to_anchor, loss.sum(0), 1e-5)
    assert within(to_coefficients.double(), loss.double() @ rows.unpack().double().mT, 1e-5)


@pytest.mark.parametrize("rows_per_model", [1, 10, 50])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_linear(precision, shared, rows_per_model, dtype):
    deltas = Rows.of(torch.randn(24, 256 * 384) / 20, precision).to("cuda")
    x = operand(1 if shared else 8, rows_per_model, 384).to(dtype)
    anchor, bias = operand(256, 384).to(dtype) / 20, operand(8, 256).to(dtype)
    coefficients = operand(8, 24) / 24
    values = deltas.unpack().unflatten(1, (256, 384)).double()
    exact = reference.mixed_linear(
        x.double(), anchor.double(), values, coefficients.double(), bias.double()
    )
    found = ops.mixed_linear(x, anchor, deltas, coefficients, bias)
    assert within(found.double(), exact, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_segments_of_tenants(dtype):
    sizes, ranks = [1, 32, 0, 33, 128, 64], [8, 64, 3, 1, 17, 0]
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    segments = list(pairwise(edges))
    x = operand(sum(sizes), 768).to(dtype)
    downs = [operand(rank, 768).to(dtype) / 28 for rank in ranks]
    ups = [operand(771, rank).to(dtype) for rank in ranks]
    scales = [0.5 * place for place in range(6)]
    wide = [[t.double() for t in given] for given in (downs, ups)]
    exact = reference.segmented_low_rank(x.double(), segments, *wide, scales)
    heads = [operand(rank + 1, 768).to(dtype) / 28 for rank in ranks]
    biases = [None, *(operand(len(head)).to(dtype) for head in heads[1:])]
    exact_heads = reference.segmented_linear(
        x.double(),
        segments,
        [head.double() for head in heads],
        [None if bias is None else bias.double() for bias in biases],
    )
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for found, wanted in (
        (ops.segmented_low_rank(x, segments, downs, ups, scales), exact),
        (ops.segmented_linear(x, segments, heads, biases), exact_heads),
    ):
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= limit * wanted.abs().max()
