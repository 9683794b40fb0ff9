"""Seconds and memory of merging ViT-B/32 checkpoints: this engine beside mergekit-pytorch.

    pip install -e ".[bench]"
    python benchmarks/merge_throughput.py            # eight models and a base, 350 MB each
    python benchmarks/merge_throughput.py --quick    # ViT-Ti, a minute

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from recording import ROOT, append_rows

PEER = Path(sys.executable).with_name("mergekit-pytorch")
THREADS = {"OMP_NUM_THREADS": str(os.cpu_count())}
MEMORY_LIMIT_BYTES = 1_200_000_000


@dataclass(frozen=True)
class Case:
    """A method, its settings, and how much faster than the peer it is claimed to be."""

    method: str
    at_least: float
    models: int = 8
    parameters: tuple[tuple[str, Any], ...] = (("weight", 0.3),)
    base: bool = True

    @property
    def name(self) -> str:
        return f"{self.method} K={self.models}"

    def config(self, folder: Path) -> dict[str, Any]:
        models = [{"model": str(folder / f"{k:02d}.safetensors")} for k in range(self.models)]
        config = {
            "merge_method": self.method,
            "models": models,
            "parameters": dict(self.parameters),
            "dtype": "float32",
        }
        return config | ({"base_model": str(folder / "base.safetensors")} if self.base else {})


SPARSE = (("weight", 0.3), ("density", 0.2))
CASES = (
    Case("linear", 3, base=False),
    Case("task_arithmetic", 3),
    Case("slerp", 2.3, models=1, parameters=(("t", 0.3),)),
    Case("model_stock", 5, parameters=()),
    Case("dare_linear", 8, parameters=SPARSE),
    Case("dare_ties", 8, parameters=SPARSE),
    Case("ties", 8, parameters=SPARSE),
    Case("breadcrumbs", 8, parameters=SPARSE),
    Case("breadcrumbs_ties", 8, parameters=SPARSE),
    Case("della", 8, parameters=(("weight", 0.3), ("density", 0.5), ("epsilon", 0.1))),
    Case("della_linear", 8, parameters=(("weight", 0.3), ("density", 0.5), ("epsilon", 0.1))),
)
MEMORY_CASES = tuple(
    Case(case.method, 0, models=32, parameters=case.parameters, base=case.base)
    for case in CASES
    if case.models == 8
)


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the checkpoints are kept (12 GB); else temporary.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; medians count.")] = 3,
    peer_repeats: Annotated[int, typer.Option(min=1, help="Repeats of the peer.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="A method to run; may be given again.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Also with 32 models, ours alone.")] = True,
    quick: Annotated[bool, typer.Option(help="A small model.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    make: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure merges in fresh processes: wall-clock seconds from start to end, and peak memory."""
    if make:
        assert folder is not None
        make_checkpoints(folder, make, quick)
        return
    if not PEER.exists():
        raise SystemExit(f"{PEER}: not installed; pip install -e '.[bench]'")
    cases = [case for case in CASES if not only or case.method in only]
    memory_cases = [case for case in MEMORY_CASES if memory and (not only or case.method in only)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        most = max([case.models for case in [*cases, *memory_cases]], default=8)
        command = [sys.executable, __file__, "--folder", str(folder), "--make", str(most)]
        subprocess.run([*command, *(["--quick"] if quick else [])], check=True)
        os.environ["XDG_CACHE_HOME"] = temporary
        start = median(measure(folder, [sys.executable, "-c", "import torch"])[0] for _ in range(3))
        rows = []
        for case in cases:
            rows.append(compare(case, folder, repeats, peer_repeats, start))
        for case in memory_cases:
            rows.append(compare(case, folder, 1, 0, start))
        rows.append({"case": "start-up", "seconds": start} | help_seconds(folder))
    report(rows, {} if quick else {case.name: case for case in cases})
    if record and not quick:
        append_rows(Path(__file__).stem, rows, repeats, f"{os.cpu_count()} cores; fp32 ViT-B/32")


def compare(
    case: Case, folder: Path, repeats: int, peer_repeats: int, start: float
) -> dict[str, Any]:
    """One row: our process and the peer's, interleaved, beside reading and writing alone."""
    print(case.name, file=sys.stderr, flush=True)
    config = folder / "config.yaml"
    config.write_text(json.dumps(case.config(folder)))  # JSON is YAML
    inputs = [entry["model"] for entry in case.config(folder)["models"]]
    inputs += [str(folder / "base.safetensors")] if case.base else []
    mine = [sys.executable, "-m", "merge", str(config), "OUT", "--quiet"]
    first, _ = measure(folder, mine)
    ours, theirs, floors = [], [], []
    for repeat in range(max(repeats, peer_repeats)):
        floors.append(copy_seconds(inputs, folder))
        if repeat < repeats:
            ours.append(measure(folder, mine))
        if repeat < peer_repeats:
            theirs.append(measure(folder, [str(PEER), str(config), "OUT", "--quiet"]))
    seconds = median(one[0] for one in ours)
    row = {
        "case": case.name,
        "seconds": seconds,
        "first_seconds": first,
        "peak_bytes": median(one[1] for one in ours),
        "copy_seconds": median(floors),
        "seconds_over_copy": (seconds - start) / median(floors),
    }
    if theirs:
        peer = median(one[0] for one in theirs)
        peak = median(one[1] for one in theirs)
        row |= {"peer_seconds": peer, "peer_peak_bytes": peak, "times_faster": peer / seconds}
    return row


def measure(folder: Path, command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a fresh process; OUT is where it writes."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(out) if word == "OUT" else word for word in command]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | THREADS)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    shutil.rmtree(out, ignore_errors=True)
    return seconds, usage.ru_maxrss * 1024


def copy_seconds(inputs: Sequence[str], folder: Path) -> float:
    """The least that a merge can take: read all inputs, write one file of the same size."""
    buffer = bytearray(8 << 20)
    target = folder / "copy.bin"
    began = time.perf_counter()
    with target.open("wb", buffering=0) as output:
        for number, path in enumerate(inputs):
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    if number == 0:
                        output.write(memoryview(buffer)[:count])
        os.fsync(output.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def help_seconds(folder: Path) -> dict[str, float]:
    """How long `--help` takes."""
    command = [sys.executable, "-m", "merge", "--help"]
    with open(os.devnull, "w") as silence:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, stdout=silence, check=True)
            times.append(time.perf_counter() - began)
    return {"help_seconds": median(times)}


def report(rows: list[dict[str, Any]], cases: dict[str, Case]) -> None:
    """Print the table, and whether the claims hold."""
    import pandas as pd

    shown = pd.DataFrame(rows)
    for column in [c for c in shown if c.endswith("_bytes")]:
        shown[column.replace("_bytes", "_MB")] = (shown.pop(column) / 1e6).round(0)
    print(shown.to_markdown(index=False, floatfmt=".3g"), end="\n\n")
    for row in rows:
        if "times_faster" in row and cases:
            claim = cases[row["case"]].at_least
            verdict = "holds" if row["times_faster"] >= claim else "DOES NOT HOLD"
            print(f"{row['case']}: {row['times_faster']:.1f}x faster; at least {claim}x {verdict}")
        if row["case"] == "linear K=8" and cases:
            verdict = "holds" if row["seconds_over_copy"] <= 2 else "DOES NOT HOLD"
            ratio = f"{row['seconds_over_copy']:.2f}"
            print(f"linear, start-up apart, over a copy: {ratio}; at most 2 {verdict}")
    peaks = [row["peak_bytes"] for row in rows if "peak_bytes" in row]
    if peaks:
        verdict = "holds" if max(peaks) <= MEMORY_LIMIT_BYTES else "DOES NOT HOLD"
        print(f"most memory: {max(peaks) / 1e9:.2f} GB; at most 1.2 GB {verdict}")


def make_checkpoints(folder: Path, count: int, quick: bool) -> None:
    """A base and models that are the base plus noise, as fp32 safetensors; kept if there."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("vit_tiny_patch16_224" if quick else "vit_base_patch32_224")
    torch.manual_seed(0)
    # The peer's della fails on tensors with an axis of length 1 after the first, as cls_token has.
    shapes = {name: p.squeeze().shape for name, p in model.state_dict().items()}
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    for name, seed in [("base", 0), *((f"{k:02d}", k + 1) for k in range(count))]:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            noise = torch.Generator().manual_seed(seed)
            save_file(
                {
                    n: t + (0.01 if seed else 0.0) * torch.randn(t.shape, generator=noise)
                    for n, t in base.items()
                },
                path,
            )
        with path.open("rb", buffering=0) as file:  # into the page cache
            while file.read(8 << 20):
                pass


if __name__ == "__main__":
    typer.run(main)
