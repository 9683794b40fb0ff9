"""Memory and time of building a soup: MEHL-Soup+ beside Learned-Soup+, each in a fresh process.

    python benchmarks/soup_construction.py            # ViT-S/16, up to 72 ingredients
    python benchmarks/soup_construction.py --quick    # ViT-Ti/16, up to 8, a minute

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import timm
import torch
import typer
from recording import append_rows
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from inputs.data import ImageSet
from inputs.randomness import generator
from merge.checkpoints import Checkpoint, CheckpointWriter, TensorInfo, open_checkpoint
from merge.checkpoints.scan import Scan
from merge.coefficients import Ingredient
from merge.preflight import Preflight
from soups.ingredients import Zoo
from soups.learners.descent import soup_loss
from soups.learners.learned import learned
from soups.learners.mehl import mehl
from soups.learners.registry import Greedy, LearnedLayerwise, MehlLayerwise
from soups.learners.selection import greedy
from soups.norms import NormBuffers
from soups.session import IngredientScores, Session

BATCH = 8
IMAGES = 2 * BATCH
CLASSES = 1000
NOISE = 0.01

# The schedule of 2407.03641: five passes over *select* (for each block), on a set of this size.
PUBLISHED_PASSES = 5
PUBLISHED_IMAGES = 10_000


@dataclass(frozen=True)
class Size:
    """The model, and the numbers of ingredients of the cases."""

    model: str
    most: int
    half: int
    published: int
    large_block: int


FULL = Size("vit_small_patch16_224", most=72, half=36, published=24, large_block=18)
QUICK = Size("vit_tiny_patch16_224", most=8, half=4, published=4, large_block=8)


@dataclass(frozen=True)
class Case:
    """One row: what runs in a fresh process, and the sets of weights that its method holds.

    `passes` is how often the shortened run sees its few images (for each block).
    """

    name: str
    learner: str
    ingredients: int = 0
    block: int = 0
    passes: int = 1
    copies: int = 0

    @property
    def reads(self) -> int:
        """Ingredients read, each as often as the method needs it: MEHL's mean, then its blocks."""
        return 2 * self.ingredients if self.learner in ("mehl", "greedy") else self.ingredients

    @property
    def blocks(self) -> int:
        return -(-self.ingredients // self.block) if self.block else 1

    @property
    def published_steps(self) -> int:
        """Gradient steps of the published schedule at this benchmark's batch size."""
        return self.blocks * PUBLISHED_PASSES * -(-PUBLISHED_IMAGES // BATCH)


def cases_of(size: Size) -> list[Case]:
    """The rows, MEHL's reference row first after the baseline."""

    def mehl_case(ingredients: int, block: int) -> Case:
        name = f"mehl_layerwise K={ingredients} B={block}"
        return Case(name, "mehl", ingredients, block, copies=block + 1)

    return [
        Case("one model", "baseline", passes=3),
        mehl_case(size.most, 4),
        mehl_case(size.half, 4),
        mehl_case(size.most, size.large_block),
        Case(
            f"learned_layerwise published K={size.published}",
            "published",
            size.published,
            passes=2,
            copies=2 * size.published,
        ),
        Case(
            f"learned_layerwise lean K={size.most}",
            "lean",
            size.most,
            passes=2,
            copies=size.most,
        ),
        Case(f"greedy K={size.most}", "greedy", size.most, copies=2),
    ]


# --- the parent process --------------------------------------------------------------------------


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the ingredients are kept (6.4 GB); else temporary.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; medians count.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every process.")] = (
        os.cpu_count() or 1
    ),
    only: Annotated[str, typer.Option(help="Run the cases with this in their name.")] = "",
    quick: Annotated[bool, typer.Option(help="A small model and few ingredients.")] = False,
    return_freed: Annotated[
        bool, typer.Option(help="Have glibc return freed memory, so that peaks are live bytes.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what it takes to build a soup, against one model's own forward and backward."""
    size = QUICK if quick else FULL
    cases = cases_of(size)
    if case:
        torch.set_num_threads(threads)
        print(json.dumps(measure(size, case, folder or Path())))
        return
    if return_freed:
        # Setting the threshold, to its own default even, keeps glibc from raising it as it runs.
        os.environ["MALLOC_TRIM_THRESHOLD_"] = str(128 << 10)
    cases = [c for c in cases if only in c.name or c.learner == "baseline"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        write_zoo(folder, size, max(c.ingredients for c in cases))
        runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in cases}
        limits = []
        for repeat in range(repeats):
            limits.append(run_fresh("limits", size, folder, threads))
            for c in cases:
                print(f"{repeat + 1}/{repeats}  {c.name}", file=sys.stderr, flush=True)
                require_memory(c, limits[0]["weight_bytes"])
                runs[c.name].append(run_fresh(c.name, size, folder, threads))
    medians = {name: _medians(measured) for name, measured in runs.items()}
    rows = table(cases, medians, _medians(limits))
    report(rows, _medians(limits), size)
    if record and not quick:
        allocator = "freed memory returned" if return_freed else "default allocator"
        append_rows(Path(__file__).stem, rows, repeats, f"{threads} threads; {allocator}")


def run_fresh(
    case: str, size: Size, folder: Path, threads: int, script: str = __file__
) -> dict[str, Any]:
    """What a new process measures."""
    command = [sys.executable, script, "--case", case, "--folder", str(folder)]
    command += ["--threads", str(threads), *(["--quick"] if size is QUICK else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def require_memory(case: Case, weight_bytes: int) -> None:
    """Stop before a case that would be killed for memory."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    needed = (case.copies + 2) * weight_bytes + (2 << 30)
    if available < needed:
        raise SystemExit(
            f"{case.name}: needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB "
            "are available; close something, or leave the case out with --only"
        )


def table(
    cases: list[Case], medians: dict[str, dict[str, float]], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per case, with the limits of the machine and ratios to peers of the same run."""
    one_model = medians[cases[0].name]
    excess = {c.name: medians[c.name]["peak_bytes"] - one_model["peak_bytes"] for c in cases}
    mehl_excess = next((excess[c.name] for c in cases if c.learner == "mehl"), float("nan"))
    weight_bytes = limits["weight_bytes"]
    rows = []
    for c in cases:
        found = medians[c.name]
        held = c.block or c.ingredients
        # Every row is read for the weights and again for the gradient, the weights written once.
        moved = (2 * held + 1) * weight_bytes if c.ingredients else 0
        step_limit = limits["step_flop"] / limits["flop_rate"] + moved / limits["memory_rate"]
        read_limit = c.reads * weight_bytes / limits["read_rate"]
        step = found["step_seconds"]
        rows.append(
            {
                "case": c.name,
                "step_seconds": step,
                "step_limit_seconds": step_limit,
                "step_over_one_model": step / one_model["step_seconds"],
                "run_seconds": found["run_seconds"],
                "run_limit_seconds": read_limit + found["steps"] * step_limit,
                "run_steps": found["steps"],
                "run_without_steps_seconds": found["run_seconds"] - found["all_steps_seconds"],
                "published_run_seconds_computed": found["run_seconds"]
                - found["all_steps_seconds"]
                + c.published_steps * step,
                "published_run_steps": c.published_steps,
                "peak_bytes": found["peak_bytes"],
                "excess_bytes": excess[c.name],
                "excess_limit_bytes": c.copies * weight_bytes,
                "excess_over_mehl": excess[c.name] / mehl_excess,
            }
        )
    return rows


def report(rows: list[dict[str, Any]], limits: dict[str, float], size: Size) -> None:
    """Print the table, the machine's limits, and whether the claims hold."""
    shown = pd.DataFrame(rows)
    for column in [c for c in shown if c.endswith("_bytes")]:
        shown[column.replace("_bytes", "_MB")] = (shown.pop(column) / 1e6).round(0)
    memory = ["case", "peak_MB", "excess_MB", "excess_limit_MB", "excess_over_mehl"]
    step = ["case", "step_seconds", "step_limit_seconds", "step_over_one_model"]
    run = ["case", *(c for c in shown if "run_" in c)]
    for columns in (memory, step, run):
        print(shown[columns].to_markdown(index=False, floatfmt=".4g"), end="\n\n")
    print(
        f"limits: matmul {limits['flop_rate'] / 1e9:.0f} GFLOP/s; {limits['step_flop'] / 1e9:.0f} "
        f"GFLOP a step; memory {limits['memory_rate'] / 1e9:.1f} GB/s; reading the files "
        f"{limits['read_rate'] / 1e9:.2f} GB/s from the page cache (as in the runs), "
        f"{limits['cold_read_rate'] / 1e9:.2f} GB/s from the disk\n"
    )
    excess = {row["case"]: row["excess_bytes"] for row in rows}
    reference = excess.get(f"mehl_layerwise K={size.most} B=4")
    for case in rows:
        if case["case"].startswith("learned") and reference:
            ratio = case["excess_over_mehl"]
            verdict = "holds" if ratio >= 13 else "DOES NOT HOLD"
            print(f"excess of {case['case']} is {ratio:.1f}x that of mehl B=4; >= 13x {verdict}")
    half = excess.get(f"mehl_layerwise K={size.half} B=4")
    if reference and half:
        verdict = "holds" if abs(reference - half) <= 30e6 else "DOES NOT HOLD"
        print(
            f"mehl B=4, K={size.most} against K={size.half}: {(reference - half) / 1e6:+.1f} MB; "
            f"within 30 MB {verdict}"
        )


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(m[key] for m in measured) for key in measured[0]}


# --- the ingredients -----------------------------------------------------------------------------


def build(size: Size) -> nn.Module:
    """The base: the same weights in every process."""
    torch.manual_seed(0)
    return timm.create_model(size.model, num_classes=CLASSES).eval()


def ingredient_path(folder: Path, size: Size, index: int) -> Path:
    return folder / size.model / f"{index:02d}.safetensors"


def write_zoo(folder: Path, size: Size, count: int) -> None:
    """Write the ingredients that are missing: base + noise; ingredient i depends on i alone."""
    missing = [i for i in range(count) if not ingredient_path(folder, size, i).exists()]
    model = build(size)
    infos = [TensorInfo(n, tuple(p.shape), p.dtype) for n, p in model.named_parameters()]
    needed = len(missing) * sum(info.nbytes for info in infos) + (1 << 30)
    folder.mkdir(parents=True, exist_ok=True)
    if missing and shutil.disk_usage(folder).free < needed:
        raise SystemExit(
            f"{folder}: the ingredients need {needed / 1e9:.1f} GB of disk, "
            f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free; name another --folder"
        )
    for i in missing:
        stream = generator(0, f"ingredient/{i}")
        with CheckpointWriter(ingredient_path(folder, size, i), infos) as writer:
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=stream)
                writer.write(name, parameter.detach() + NOISE * noise)


def open_ingredients(folder: Path, size: Size, count: int) -> Zoo:
    """The first `count` ingredients as a zoo; the scan, which is no part of learning, is made up:
    no two tensors are the same."""
    paths = [ingredient_path(folder, size, i) for i in range(count)]
    checkpoints = tuple(open_checkpoint(path) for path in paths)
    names = tuple(path.stem for path in paths)
    tensors = tuple(checkpoints[0].tensors)
    hashes = [f"{i:064x}" for i in range(count)]
    scans = tuple(Scan(own, {name: f"{own} {name}" for name in tensors}, {}) for own in hashes)
    return Zoo(
        names=names,
        checkpoints=checkpoints,
        base=None,
        preflight=Preflight([], [], [], mixed=tensors, scans=scans),
        tied={},
        ingredients=tuple(map(Ingredient, names, hashes)),
        base_ingredient=None,
    )


# --- the fresh process ---------------------------------------------------------------------------


@dataclass
class TimedSession(Session):
    """A session that measures each gradient step: from a batch's handing out to the next one."""

    step_seconds: list[float] = field(default_factory=list)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().epoch(batch_size, generator):
            start = time.perf_counter()
            yield batch
            self.step_seconds.append(time.perf_counter() - start)


def measure(size: Size, name: str, folder: Path) -> dict[str, float]:
    """Run the case `name` here and now."""
    if name == "limits":
        return measure_limits(size, folder)
    case = next(c for c in cases_of(size) if c.name == name)
    return measure_case(size, case, folder, LEARN[case.learner])


def measure_case(
    size: Size, case: Case, folder: Path, learn: Callable[[Session, Case], None]
) -> dict[str, float]:
    """Run `learn` here and now; what it records in numbers is measured, too."""
    zoo = open_ingredients(folder, size, case.ingredients or 1)
    read_all(zoo.checkpoints)
    model, select = build(size), random_images()
    session = TimedSession(
        model=model,
        zoo=zoo,
        select=select,
        norms=NormBuffers(model, "uniform", zoo, select),
        seed=0,
        eval_batch_size=BATCH,
        memory_budget=4 << 30,
        progress=False,
        block_sizes={case.name: case.block},
        ingredients=IngredientScores((0.0,) * case.ingredients, 0.0),
    )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        session.begin(case.name, Path(work))
        start = time.perf_counter()
        learn(session, case)
        seconds = time.perf_counter() - start
    later = session.step_seconds[1:]  # the first one warms up
    return {
        "step_seconds": median(later) if later else float("nan"),
        "all_steps_seconds": sum(session.step_seconds),
        "steps": len(session.step_seconds),
        "run_seconds": seconds,
        "peak_bytes": peak_bytes(),
        **{name: value for name, value in session.record.items() if isinstance(value, int | float)},
    }


def random_images() -> ImageSet:
    """A *select* of noise: time and memory do not depend on what is in the images."""
    stream = generator(0, "images")
    pixels = torch.randint(256, (IMAGES, 3, 224, 224), dtype=torch.uint8, generator=stream)
    labels = torch.randint(CLASSES, (IMAGES,), generator=stream)
    classes = tuple(str(c) for c in range(CLASSES))
    return ImageSet("select", classes, labels, torch.arange(IMAGES), lambda rows: pixels[rows])


def read_all(checkpoints: tuple[Checkpoint, ...]) -> float:
    """Read every tensor into one small buffer; bytes per second. Files are in the cache then."""
    count, start = 0, time.perf_counter()
    largest = max(info.numel for info in checkpoints[0].tensors.values())
    buffer = torch.empty(largest)
    for checkpoint in checkpoints:
        for name, info in checkpoint.tensors.items():
            checkpoint.read(name, out=buffer[: info.numel])
            count += info.nbytes
    return count / (time.perf_counter() - start)


def peak_bytes() -> int:
    """VmHWM: unlike getrusage's ru_maxrss it does not count the process that started this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def run_baseline(session: Session, case: Case) -> None:
    """One model's own forward and backward; gradients are freed before the next forward."""
    for number in range(case.passes):
        for images, labels in session.epoch(BATCH, generator(0, str(number))):
            session.model.zero_grad(set_to_none=True)
            soup_loss(session.model(images), labels, 0.0).backward()


def run_mehl(session: Session, case: Case) -> None:
    settings = MehlLayerwise(batch_size=BATCH, block_size=case.block, inner_epochs=case.passes)
    mehl(session, settings)


def run_lean(session: Session, case: Case) -> None:
    learned(session, LearnedLayerwise(batch_size=BATCH, epochs=case.passes))


def run_greedy(session: Session, case: Case) -> None:
    greedy(session, Greedy())


def run_published(session: Session, case: Case) -> None:
    """Learned-Soup+ as its public code does it: autograd through the sum of all ingredients.

    The ingredients are leaves of the graph that require gradients, the soup's tensors are sums of
    scaled ingredients, and only the coefficients' gradients are cleared between steps.
    """
    model, settings = session.model, LearnedLayerwise()
    names = [name for name, _ in model.named_parameters()]
    ingredients = [
        {name: checkpoint.read(name).requires_grad_() for name in names}
        for checkpoint in session.zoo.checkpoints
    ]
    # The public code takes the model's own parameters away: sums stand in their place.
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    alpha = torch.zeros(len(names), len(ingredients), requires_grad=True)
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([alpha, beta], lr=settings.lr, weight_decay=0.0)
    for number in range(case.passes):
        for images, labels in session.epoch(BATCH, generator(0, str(number))):
            optimizer.zero_grad()
            shares = alpha.softmax(dim=1)
            soup = {
                name: sum(
                    [w[name] * share for w, share in zip(ingredients, row, strict=True)],
                    start=torch.zeros(()),
                )
                for name, row in zip(names, shares, strict=True)
            }
            logits = beta * functional_call(model, soup, (images,))
            soup_loss(logits, labels, 0.0).backward()
            optimizer.step()


LEARN: dict[str, Callable[[Session, Case], None]] = {
    "baseline": run_baseline,
    "mehl": run_mehl,
    "published": run_published,
    "lean": run_lean,
    "greedy": run_greedy,
}


def measure_limits(size: Size, folder: Path) -> dict[str, float]:
    """What this machine can do at best, with the threads of the cases."""
    model = build(size)
    images, labels = next(random_images().batches(BATCH))
    with FlopCounterMode(display=False) as counter:
        soup_loss(model(images), labels, 0.0).backward()
    some = open_ingredients(folder, size, min(8, size.published))
    for file in [file for checkpoint in some.checkpoints for file in checkpoint.files]:
        _drop_from_cache(file)
    cold = read_all(some.checkpoints)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    product = torch.empty(2048, 2048)
    long = torch.ones(1 << 27)
    return {
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "step_flop": counter.get_total_flops(),
        "flop_rate": 2 * 2048**3 / _fastest(lambda: torch.mm(left, right, out=product)),
        "memory_rate": long.nbytes / _fastest(lambda: torch.dot(long, long)),
        "read_rate": max(read_all(some.checkpoints) for _ in range(3)),
        "cold_read_rate": cold,
    }


def _drop_from_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fastest(work: Callable[[], object], times: int = 10) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    typer.run(main)
