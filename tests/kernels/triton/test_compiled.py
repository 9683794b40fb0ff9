"""Every kernel compiles for sm_90, in every form in which it is launched; no GPU is needed.

A recorder takes the place of each kernel and compiles what would have been launched.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from kernels.storage import Rows

pytestmark = pytest.mark.slow

OPERATIONS = (
    "delta_dot",
    "grouped_attention",
    "grouped_batch_norm",
    "grouped_conv2d",
    "grouped_embedding",
    "grouped_layer_norm",
    "grouped_linear",
    "mix",
    "mixed_linear",
    "segmented_low_rank",
)
SM_90 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
OPTIONS = {"num_warps": 4, "num_stages": 3}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
TYPES = [torch.float32, torch.bfloat16]


class Recorder:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *operands: Any, **named: Any) -> None:
        kernel, configs = self.kernel, [triton.Config({}, **OPTIONS)]
        if isinstance(kernel, Autotuner):
            kernel, configs = kernel.fn, kernel.configs
        given = dict(zip(kernel.arg_names, operands, strict=False)) | named
        for config in configs:
            options = {name: given.get(name, getattr(config, name)) for name in OPTIONS}
            self.compiled.append(compile_for(kernel, given | config.kwargs, options))


def compile_for(kernel: Any, given: dict[str, Any], options: dict[str, int]) -> Any:
    """What Triton's launcher would compile: 1 and None are constants, 16 | n is known."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if value is None or name.isupper() or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=SM_90, options=options)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where Triton keeps what it has compiled, so that no form is compiled twice."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def recorders(monkeypatch, compiled):
    """One in the place of every kernel that is launched, by operation and name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled))
    found = {}
    for operation in OPERATIONS:
        module = importlib.import_module(f"kernels.triton_ops.{operation}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            found[operation, name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, found[operation, name])
    return found


def run(operation: str, *operands: Any, **settings: Any) -> None:
    module = importlib.import_module(f"kernels.triton_ops.{operation}")
    with torch.no_grad():
        getattr(module, operation)(*operands, **settings)


def assert_fits(recorder: Recorder) -> None:
    assert recorder.compiled
    for compiled in recorder.compiled:
        assert compiled.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "kernel"), [(3, "few_rows_kernel"), (16, "tiled_kernel")])
def test_grouped_linear(recorders, dtype, rows, kernel):
    x, weight = torch.empty(2, rows, 192, dtype=dtype), torch.empty(2, 192, 192, dtype=dtype)
    run("grouped_linear", x, weight, weight[:, 0])
    assert_fits(recorders["grouped_linear", kernel])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("groups", "kernel"), [(1, "implicit_kernel"), (32, "depthwise_kernel")])
def test_grouped_conv2d(recorders, dtype, groups, kernel):
    x = torch.empty(2, 1, 32, 14, 14, dtype=dtype)
    weight = torch.empty(2, 64, 32 // groups, 3, 3, dtype=dtype)
    run("grouped_conv2d", x, weight, weight[:, :, 0, 0, 0], padding=1, groups=groups)
    assert_fits(recorders["grouped_conv2d", kernel])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_and_embedding(recorders, dtype):
    x, factors = torch.empty(2, 5, 48, 7, dtype=dtype), torch.empty(2, 48)
    run("grouped_layer_norm", x.mT, (48,), factors, factors)
    run("grouped_batch_norm", x, factors, factors, factors, factors)
    run("grouped_embedding", torch.zeros(1, 6, dtype=torch.int64), x[:, 0])
    assert_fits(recorders["grouped_layer_norm", "row_kernel"])
    assert_fits(recorders["grouped_batch_norm", "scale_kernel"])
    assert_fits(recorders["grouped_embedding", "gather_kernel"])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "added", "causal"])
def test_grouped_attention(recorders, dtype, mask):
    tokens = torch.empty(2, 1, 3, 50, 64, dtype=dtype)
    added = torch.empty(1, 50, 50, dtype=dtype)
    given = {"bool": added > 0, "added": added}.get(mask)
    run("grouped_attention", *[tokens] * 3, given, is_causal=mask == "causal")
    assert_fits(recorders["grouped_attention", "head_kernel"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4", "sign"])
@pytest.mark.parametrize(
    ("models", "weights"), [(1, 4096), (2, 4096), (32, 4096), (32, 4099), (65, 4096)]
)
def test_mixing(recorders, precision, models, weights):
    rows = Rows.of(torch.randn(72, weights), precision)
    anchor, coefficients = torch.empty(weights), torch.empty(models, 72)
    run("mix", anchor, rows, coefficients)
    run("delta_dot", rows, torch.empty(models, weights))
    exact = models == 1 or precision in ("fp32", "fp16")
    assert_fits(recorders["mix", "exact_kernel" if exact else "matrix_kernel"])
    assert_fits(recorders["delta_dot", "single_kernel" if models == 1 else "matrix_kernel"])
    assert_fits(recorders["delta_dot", "sum_kernel"])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "sign"])
@pytest.mark.parametrize("shared", [False, True])
def test_mixed_linear(recorders, dtype, precision, shared):
    rows = Rows.of(torch.randn(3, 64 * 128), precision)
    x = torch.empty(1 if shared else 4, 2, 128, dtype=dtype)
    run("mixed_linear", x, torch.empty(64, 128, dtype=dtype), rows, torch.empty(4, 3))
    assert_fits(recorders["mixed_linear", "parts_kernel"])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_segments(recorders, dtype, rows):
    x, segments = torch.empty(2 * rows, 192, dtype=dtype), [(0, rows), (rows, 2 * rows)]
    downs = [torch.empty(rank, 192, dtype=dtype) for rank in (8, 64)]
    ups = [torch.empty(192, rank, dtype=dtype) for rank in (8, 64)]
    run("segmented_low_rank", x, segments, downs, ups, [1.0, 2.0])
    module = importlib.import_module("kernels.triton_ops.segmented_low_rank")
    module.launch(x, x[:, :64], segments, downs, [1.0, 1.0], [None, x[0, :64]])
    assert_fits(recorders["segmented_low_rank", "segment_kernel"])
