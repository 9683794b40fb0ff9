"""Mixing K rows into M models: beside a loop of axpys, a plain matrix product and einsum.

    python benchmarks/mix.py            # 1 M and 22 M parameters (12 GB), K = 72, M = 32
    python benchmarks/mix.py --quick    # 200 k parameters, seconds

benchmarks/README.md says what the columns mean. With a CUDA device 87 M parameters there too, and
`mixed_linear` beside mixing and then multiplying.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from recording import append_rows

if TYPE_CHECKING:
    from torch import Tensor

    from kernels import Rows, Segment
    from kernels.quantise import Precision

ROWS, MODELS = 72, 32
SIZES = {"mix 1M": 1_000_000, "mix 22M": 22_050_664}
QUICK = {"mix 200k": 200_003}
CUDA_WEIGHTS = 87_000_000
AT_LEAST = 8.0
SCALE_RUN = 2048
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4", "sign")


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; medians count.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every process.")] = (
        os.cpu_count() or 1
    ),
    only: Annotated[str, typer.Option(help="Run the cases with this in their name.")] = "",
    quick: Annotated[bool, typer.Option(help="A small model.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the mixing of many candidates, and what the machine can do at best."""
    if case:
        print(json.dumps(MEASURE[case.split()[0]](case, repeats, threads)))
        return
    names = [*(QUICK if quick else SIZES), "linear 1536x384"]
    if not quick and has_cuda():
        names += ["cuda-mix 87M", "cuda-linear 3072x768"]
    for name in (name for name in names if only in name):
        print(name, file=sys.stderr, flush=True)
        rows, device = run_fresh(name, repeats, threads)
        report(rows)
        if record and not quick:
            append_rows(Path(__file__).stem, rows, repeats, f"{threads} threads; {device}")


def has_cuda() -> bool:
    """Asked in a process of its own: this one holds no device memory, and no torch."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "True"


def run_fresh(case: str, repeats: int, threads: int) -> tuple[list[dict[str, Any]], str]:
    """What a new process measures, and where."""
    command = [sys.executable, __file__, "--case", case, "--repeats", str(repeats)]
    command += ["--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows, device = json.loads(done.stdout.splitlines()[-1])
    return rows, device


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and whether the claims hold."""
    import pandas as pd

    shown = pd.DataFrame(rows)
    for column in [c for c in shown if c.endswith("_bytes")]:
        shown[column.replace("_bytes", "_MB")] = (shown.pop(column) / 1e6).round(1)
    print(shown.to_markdown(index=False, floatfmt=".4g"), end="\n\n")
    for row in rows:
        for column, value in row.items():
            if column.endswith("_at_least"):
                measured = row[column.removesuffix("_at_least")]
                verdict = "holds" if measured >= value else "DOES NOT HOLD"
                what = column.removesuffix("_at_least").replace("_", " ")
                print(f"{row['case']}: {what} {measured:.2f}; at least {value:g} {verdict}")
    print()


# --- the fresh process: on the CPU ---------------------------------------------------------------


def measure_mix(case: str, repeats: int, threads: int) -> tuple[list[dict[str, float]], str]:
    """Seconds of mixing in memory that is there already, beside the machine's limits."""
    import torch

    from kernels import Segment, fine_segments, mix

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = (SIZES | QUICK)[case]
    require_memory((ROWS + 2 * MODELS + 4) * 4 * weights)
    anchor, coefficients = torch.randn(weights), torch.randn(MODELS, ROWS)
    deltas = torch.empty(ROWS, weights)
    for k, row in enumerate(deltas):
        row.normal_(std=0.01, generator=torch.Generator().manual_seed(k))
    out = torch.zeros(MODELS, weights)
    factors = coefficients.tolist()

    def axpys() -> None:
        for model, of_model in zip(out, factors, strict=True):
            model.copy_(anchor)
            for row, factor in zip(deltas, of_model, strict=True):
                model.add_(row, alpha=factor)

    def product() -> None:
        torch.addmm(anchor, coefficients, deltas, out=out)

    def einsum() -> None:
        torch.einsum("mk,kp->mp", coefficients, deltas).add_(anchor)

    def ours(rows: torch.Tensor | Rows) -> None:
        mix(anchor, rows, coefficients, out=out)

    limits = machine_limits()
    peers = {"axpys": axpys, "addmm": product, "einsum": einsum}
    few = max(1, repeats // 3) if weights > 5e6 else repeats
    found = interleaved(peers | limits, few, {"fp32": lambda: ours(deltas)} | limits, repeats)
    peaks = {"axpys": 0, "addmm": peak_excess(product), "einsum": peak_excess(einsum)}
    peaks["fp32"] = peak_excess(lambda: ours(deltas))
    stored_bytes = dict.fromkeys(peaks, deltas.nbytes)
    times_fp32 = {name: found["fp32"] / found[name] for name in peaks}
    segments = fine_segments([Segment(0, weights, 0)], SCALE_RUN)
    for precision in PRECISIONS:
        rows = like_rows(deltas[0], precision, segments)
        pair = {"fp32": lambda: ours(deltas), precision: lambda rows=rows: ours(rows)}
        beside = interleaved({}, 0, pair, repeats)
        found[precision], times_fp32[precision] = (
            beside[precision],
            beside["fp32"] / beside[precision],
        )
        peaks[precision] = peak_excess(pair[precision])
        stored_bytes[precision] = rows.nbytes
        del rows, pair
    copy_rate = COPIED_BYTES / found.pop("copy")
    flop_rate = 2 * SQUARE**3 / found.pop("sgemm")
    flop = 2 * ROWS * MODELS * weights
    table = []
    for name, seconds in found.items():
        moved = stored_bytes[name] + anchor.nbytes + out.nbytes
        table.append(
            {
                "case": f"{case} {name}",
                "seconds": seconds,
                "times_axpys": times_fp32[name] / times_fp32["axpys"],
                "times_fp32": times_fp32[name],
                "gb_per_second": moved / seconds / 1e9,
                "copy_gb_per_second": copy_rate / 1e9,
                "gflop_per_second": flop / seconds / 1e9,
                "sgemm_gflop_per_second": flop_rate / 1e9,
                "limit_times_axpys": found["axpys"] / max(flop / flop_rate, moved / copy_rate),
                "excess_bytes": peaks[name],
                "rows_bytes": stored_bytes[name],
            }
        )
        if name == "fp32" and case in SIZES:
            table[-1]["times_axpys_at_least"] = AT_LEAST
    return table, "cpu"


def measure_linear(case: str, repeats: int, threads: int) -> tuple[list[dict[str, float]], str]:
    """A layer that is mixed while it is multiplied, beside mixing all of it before."""
    import torch

    from kernels import mix, mixed_linear

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    features, width = (int(size) for size in case.split()[1].split("x"))
    anchor, deltas = torch.randn(features, width), torch.randn(ROWS, features, width)
    coefficients = torch.randn(MODELS, ROWS)
    table = []
    for inputs in (1, MODELS):
        for rows in (1, 16, 128):
            x = torch.randn(inputs, rows, width)

            def apart(x: torch.Tensor = x) -> None:
                weights = mix(anchor.flatten(), deltas.flatten(1), coefficients)
                torch.matmul(x, weights.view(MODELS, features, width).mT)

            def together(x: torch.Tensor = x) -> None:
                mixed_linear(x, anchor, deltas, coefficients)

            found = interleaved({"apart": apart, "together": together}, repeats)
            table.append(
                {
                    "case": f"{case} {'shared' if inputs == 1 else 'own'} x, {rows} rows",
                    "seconds": found["together"],
                    "apart_seconds": found["apart"],
                    "times_apart": found["apart"] / found["together"],
                    "excess_bytes": peak_excess(together),
                    "apart_excess_bytes": peak_excess(apart),
                }
            )
    return table, "cpu"


def like_rows(row: Tensor, precision: Precision, segments: list[Segment]) -> Rows:
    """As many rows as are mixed, all of them `row`: rounding one of them is enough."""
    from kernels import Rows

    rows = Rows.empty(ROWS, len(row), precision, segments, row.device)
    rows.write(0, row)
    rows.codes[1:] = rows.codes[0]
    if rows.scales is not None:
        rows.scales[1:] = rows.scales[0]
    return rows


SQUARE = 1024
COPIED_BYTES = 2 << 28


def machine_limits() -> dict[str, Callable[[], object]]:
    """A copy of memory (bytes read and bytes written count) and a large matrix product."""
    import torch

    source, target = torch.zeros(COPIED_BYTES // 8), torch.zeros(COPIED_BYTES // 8)
    left, right = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    square = torch.empty(SQUARE, SQUARE)
    return {
        "copy": lambda: target.copy_(source),
        "sgemm": lambda: torch.mm(left, right, out=square),
    }


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    more: Mapping[str, Callable[[], object]] | None = None,
    more_repeats: int = 0,
) -> dict[str, float]:
    """The median seconds of each, one after another in every repeat; `more` go on for longer."""
    more = more or {}
    seconds: dict[str, list[float]] = {name: [] for name in {**cases, **more}}
    for work in more.values():
        work()
    for repeat in range(max(repeats, more_repeats)):
        for name, work in {**cases, **more}.items():
            if repeat < (more_repeats if name in more else repeats):
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
    return {name: median(measured) for name, measured in seconds.items()}


def peak_excess(work: Callable[[], object]) -> int:
    """How far the peak of the process rises above what it holds (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = status_bytes("VmRSS")
    work()
    return max(status_bytes("VmHWM") - held, 0)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def require_memory(needed: int) -> None:
    """Stop before a case that would be killed for memory."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    needed += 2 << 30
    if available < needed:
        raise SystemExit(
            f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
            "close something, or leave the case out with --only"
        )


# --- the fresh process: on a CUDA device ---------------------------------------------------------


def measure_cuda_mix(case: str, repeats: int, threads: int) -> tuple[list[dict[str, float]], str]:
    """bf16 rows in the time that their bytes need; int8 and int4 beside them."""
    import torch

    from kernels import Segment, fine_segments, mix

    weights = CUDA_WEIGHTS
    anchor = torch.randn(weights, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(MODELS, weights, device="cuda", dtype=torch.bfloat16)
    coefficients = torch.randn(MODELS, ROWS, device="cuda")
    segments = fine_segments([Segment(0, weights, 0)], SCALE_RUN)
    source = torch.zeros(1 << 30, device="cuda")
    target = torch.zeros(1 << 30, device="cuda")
    stored, work = {}, {"copy": lambda: target.copy_(source)}
    row = torch.randn(weights, device="cuda") * 0.01
    for precision in PRECISIONS:
        rows = stored[precision] = like_rows(row, precision, segments)
        work[precision] = lambda rows=rows: mix(anchor, rows, coefficients, out=out)
    factors = coefficients.tolist()
    bf16 = stored["bf16"].codes

    def axpys() -> None:
        for model, of_model in zip(out, factors, strict=True):
            model.copy_(anchor)
            for row, factor in zip(bf16, of_model, strict=True):
                model.add_(row, alpha=factor)

    work |= {"addmm": lambda: torch.addmm(anchor, coefficients.bfloat16(), bf16, out=out)}
    found = on_device(work | {"axpys": axpys}, repeats)
    rate = 2 * source.nbytes / found.pop("copy")
    table = []
    for name, seconds in found.items():
        rows = stored.get(name, stored["bf16"])
        limit = (rows.nbytes + anchor.nbytes + out.nbytes) / rate
        row = {
            "case": f"{case} {name}",
            "seconds": seconds,
            "limit_seconds": limit,
            "limit_over_seconds": limit / seconds,
            "copy_gb_per_second": rate / 1e9,
            "times_axpys": found["axpys"] / seconds,
            "times_bf16": found["bf16"] / seconds,
        }
        row |= {
            "bf16": {"limit_over_seconds_at_least": 1 / 1.5},
            "int8": {"times_bf16_at_least": 1.7},
            "int4": {"times_bf16_at_least": 3.0},
        }.get(name, {})
        table.append(row)
    return table, torch.cuda.get_device_name()


def measure_cuda_linear(
    case: str, repeats: int, threads: int
) -> tuple[list[dict[str, float]], str]:
    """`mixed_linear` beside mixing into memory and a batched product, up to 400 rows in all."""
    import torch

    from kernels import Rows, Segment, fine_segments, mix, mixed_linear

    features, width = (int(size) for size in case.split()[1].split("x"))
    torch.manual_seed(0)
    anchor = torch.randn(features, width, device="cuda").bfloat16()
    values = torch.randn(ROWS, features * width, device="cuda") * 0.01
    coefficients = torch.randn(MODELS, ROWS, device="cuda")
    segments = fine_segments([Segment(0, features * width, 0)], SCALE_RUN)
    table = []
    for precision in PRECISIONS:
        stored = Rows.of(values, precision, segments)
        for inputs, rows in ((1, 1), (1, 64), (1, 400), (MODELS, 1), (MODELS, 4), (MODELS, 12)):
            x = torch.randn(inputs, rows, width, device="cuda").bfloat16()

            def apart(x: torch.Tensor = x, stored: Rows = stored) -> None:
                weights = mix(anchor.flatten(), stored, coefficients)
                torch.bmm(x.expand(MODELS, -1, -1), weights.view(MODELS, features, width).mT)

            def together(x: torch.Tensor = x, stored: Rows = stored) -> None:
                mixed_linear(x, anchor, stored, coefficients)

            found = on_device({"apart": apart, "together": together}, repeats)
            of_whom = "shared" if inputs == 1 else "own"
            table.append(
                {
                    "case": f"{case} {precision} {of_whom} x, {rows} rows",
                    "seconds": found["together"],
                    "apart_seconds": found["apart"],
                    "times_apart": found["apart"] / found["together"],
                    "times_apart_at_least": 1.3,
                }
            )
    return table, torch.cuda.get_device_name()


def on_device(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each on the device, interleaved; each is run for a few milliseconds."""
    import torch

    def timed(work: Callable[[], object], times: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / times / 1e3

    times = {}
    for name, work in cases.items():
        work()
        times[name] = max(1, math.ceil(0.02 / timed(work, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, work in cases.items():
            seconds[name].append(timed(work, times[name]))
    return {name: median(measured) for name, measured in seconds.items()}


MEASURE = {
    "mix": measure_mix,
    "linear": measure_linear,
    "cuda-mix": measure_cuda_mix,
    "cuda-linear": measure_cuda_linear,
}


if __name__ == "__main__":
    typer.run(main)
