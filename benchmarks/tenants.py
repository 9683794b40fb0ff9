"""Ten thousand tenants of one BERT-mini, answered in mixed batches; a thousand ViTs in one store.

    python benchmarks/tenants.py --folder DIR        # keeps the store and the whole models (28 GB)
    python benchmarks/tenants.py --only store        # the ViTs alone
    python benchmarks/tenants.py --quick             # few tenants, to see that it works

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from adapted import adapted_variant
from medians import interval
from processes import Process
from recording import append_rows
from tenant_sides import (
    LAYERS,
    SCALE,
    SIDES,
    WIDTH,
    Job,
    adapted_modules,
    bert_mini,
    parts_of,
    tenant_name,
    whole_file,
)
from torch import Tensor
from tqdm import tqdm
from variant_zoo import store_case

from fleet.storage.records import BASE
from fleet.variants import Store, Variant

SCRIPT = Path(__file__).with_name("tenant_sides.py")
Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A column of a row, and what is claimed of it."""

    column: str
    least: float | None = None
    most: float | None = None

    def judge(self, case: str, row: Row) -> None:
        if self.column in row:
            value = row[self.column]
            holds = (self.least is None or value >= self.least) and (
                self.most is None or value <= self.most
            )
            wanted = f"at least {self.least}" if self.most is None else f"at most {self.most}"
            verdict = "holds" if holds else "DOES NOT HOLD"
            print(f"{case}: {self.column} {value:.3g}; {wanted} {verdict}")


CLAIMS = (
    Claim("times_whole", least=20),
    Claim("times_loop", least=1.5),
    Claim("times_peft", least=3),
    Claim("times_resident", least=0.8),
    Claim("hidden", least=0.8),
    Claim("size_over_plain", most=0.05),
    Claim("points_lost", most=0.5),
)


def main(
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where files are made, and stay.")] = None,
    tenants: Annotated[int, typer.Option(min=1)] = 10_000,
    whole: Annotated[int, typer.Option(min=1, help="Files of whole models.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Requests in a batch.")] = 32,
    variants: Annotated[int, typer.Option(min=2, help="ViTs in the other store.")] = 1000,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns; medians count.")] = 5,
    seconds: Annotated[float, typer.Option(help="About how long a turn is.")] = 5.0,
    sides: Annotated[str, typer.Option(help="Peers, separated by commas.")] = ",".join(SIDES),
    quick: Annotated[bool, typer.Option(help="Few and short.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of each side; 0: one per core.")] = 0,
) -> None:
    """Measure the cases, each side in a process of its own that takes turns with the others."""
    threads = threads or os.cpu_count() or 1
    job = Job(
        side="",
        folder="",
        tenants=tenants,
        whole=whole,
        batch=batch,
        tokens=32,
        exponent=1.0,
        share=0.1,
        peft_seconds=300.0,
        threads=threads,
    )
    if quick:
        turns, seconds, variants = min(turns, 2), min(seconds, 0.5), min(variants, 12)
        job = replace(job, tenants=min(tenants, 200), whole=min(whole, 20), peft_seconds=5.0)
    with ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home.mkdir(parents=True, exist_ok=True)
        job = replace(job, folder=str(home))
        cases: dict[str, Callable[[], Row]] = {
            f"serve {job.tenants} bert-mini": lambda: serve(job, sides.split(","), turns, seconds),
            f"store {variants} vit": lambda: store_case(home / "vits", variants),
        }
        for case, measure in cases.items():
            if only in case:
                print(case, file=sys.stderr, flush=True)
                row = measure()
                for claim in CLAIMS:
                    claim.judge(case, row)
                for column, value in row.items():
                    print(f"{column:>32} {value:.4g}")
                if record and not quick:
                    settings = f"{threads} threads, fp32, batch {batch}"
                    append_rows(Path(__file__).stem, [{"case": case} | row], turns, settings)


# --- files ---------------------------------------------------------------------------------------


def make_store(job: Job) -> None:
    """The base and the tenants' adapters and heads, unless they are there."""
    base = bert_mini()
    modules = adapted_modules(base)
    there = job.store.exists()
    store = Store(job.store) if there else Store.create(job.store, base.state_dict())
    missing = [n for n in range(job.tenants) if tenant_name(n) not in store.variants]
    bar = tqdm(missing, "storing", disable=not missing)
    store.add_many(made(job, number, modules) for number in bar)


def made(job: Job, number: int, modules: Sequence[str]) -> tuple[Variant, dict[str, Tensor]]:
    """A tenant's record, and its tensors by hash."""
    factors = parts_of(job, number, modules)
    head = {f"classifier.{part}": value for part, value in factors.pop("classifier").items()}
    return adapted_variant(tenant_name(number), BASE, factors, head, job.classes[number], SCALE)


def make_whole(job: Job) -> None:
    """Whole models with the adapters of some tenants merged into them, unless they are there."""
    from safetensors.torch import save_file

    base = {name: tensor.clone() for name, tensor in bert_mini().state_dict().items()}
    modules = adapted_modules(bert_mini())
    whole_file(job, 0).parent.mkdir(exist_ok=True)
    for number in tqdm(range(job.whole), "writing whole models", leave=False):
        file = whole_file(job, number)
        if file.exists():
            continue
        state = dict(base)
        for module in modules:
            parts = parts_of(job, number, [module])[module]
            name = f"{module}.weight"
            state[name] = base[name] + SCALE * parts["up"] @ parts["down"]
        head = torch.zeros(2, WIDTH)
        save_file(state | {"classifier.weight": head}, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)


# --- serving -------------------------------------------------------------------------------------


def serve(job: Job, sides: Sequence[str], turns: int, seconds: float) -> Row:
    """Requests per second of each side, medians of interleaved turns, and our side over each."""
    make_store(job)
    if "whole" in sides:
        make_whole(job)
    row: Row = {"parts_bytes": job.parts_bytes, "budget_bytes": job.budget}
    with ExitStack() as stack:
        running: dict[str, Process] = {}
        for side in sides:  # one after another: building fills both cores
            process = Process(SCRIPT, asdict(replace(job, side=side)))
            stack.callback(process.end)
            row[f"{_key(side)}_start_seconds"] = process.hear()["seconds"]
            running[side] = process
        first = {side: _turn(process, 1) for side, process in running.items()}
        if {"ours", "loop"} <= first.keys():
            _compare_answers(first["ours"], first["loop"])
        counts = {side: _batches(process, seconds) for side, process in running.items()}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        before = {side: _turn(process, counts[side]) for side, process in running.items()}
        last = dict(before)
        for _ in tqdm(range(turns), "turns", leave=False):
            for side, process in running.items():
                last[side] = _turn(process, counts[side])
                rates[side].append(counts[side] * job.batch / last[side]["seconds"])
        for side in sides:
            row[f"{_key(side)}_peak_bytes"] = last[side]["peak_bytes"]
            row[f"{_key(side)}_per_second"] = median(rates[side])
    for side in sides:
        if side != "ours" and "ours" in sides:
            ratios = [a / b for a, b in zip(rates["ours"], rates[side], strict=True)]
            low, high = interval(ratios)
            name = f"times_{_key(side)}"
            row |= {name: median(ratios), f"{name}_low": low, f"{name}_high": high}
    for side in ("ours", "no prefetch"):
        if side in sides:
            row |= _reading(side, before[side], last[side], turns * counts[side])
    if "peft" in sides:
        row["peft_adapters"] = last["peft"]["adapters"]
    if "whole" in sides:
        row["whole_misses"] = _share_missed(before["whole"], last["whole"])
    row["limit_per_second"] = job.batch / _limit_seconds(job)
    return row


def _key(side: str) -> str:
    return side.replace(" ", "_")


def _turn(process: Process, count: int) -> Row:
    process.tell(str(count))
    return process.hear()


def _batches(process: Process, seconds: float) -> int:
    """Batches in about so many seconds; the first ones warm up."""
    _turn(process, 3)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds / 2:
        _turn(process, 1)
        count += 1
    return max(1, 2 * count)


def _compare_answers(ours: Row, theirs: Row) -> None:
    """Ours beside the loop's, of the same requests: SystemExit if they differ."""
    worst = max(
        (torch.tensor(a) - torch.tensor(b)).abs().max().item() / max(map(abs, b))
        for a, b in zip(ours["answers"], theirs["answers"], strict=True)
    )
    if worst > 1e-4:
        raise SystemExit(f"our answers and the loop's differ by {worst:.1e} of the largest logit")
    print(f"answers: ours and the loop's differ by {worst:.1e} of the largest logit")


def _reading(side: str, before: Row, after: Row, batches: int) -> Row:
    """What was read for a batch, and how much of the time for it was hidden."""
    spent = {
        name: after[f"seconds_{name}"] - before[f"seconds_{name}"]
        for name in ("reading", "waiting", "computing")
    }
    smaller = min(spent["reading"], spent["computing"])
    found = {
        "hidden": 1 - spent["waiting"] / smaller if smaller else 1.0,
        "misses": _share_missed(before, after),
        "read_bytes_per_batch": (after["bytes_read"] - before["bytes_read"]) / batches,
        **{f"{name}_ms_per_batch": 1e3 * value / batches for name, value in spent.items()},
    }
    prefix = "" if side == "ours" else f"{_key(side)}_"
    return {f"{prefix}{name}": value for name, value in found.items()}


def _share_missed(before: Row, after: Row) -> float:
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    return misses / max(1, hits + misses)


def _limit_seconds(job: Job) -> float:
    """The products of one batch, all rows at once, at the measured rate of a large one."""
    rows = job.batch * job.tokens
    linear = LAYERS * rows * 12 * WIDTH**2 * 2
    attention = LAYERS * job.batch * 2 * job.tokens**2 * WIDTH * 2
    rank = sum(job.ranks) / job.tenants
    own = 2 * LAYERS * rows * 2 * WIDTH * rank * 2
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.set_num_threads(job.threads)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return (linear + attention + own) / (2 * 2048**3 / best)


if __name__ == "__main__":
    typer.run(main)
