"""M models trained by one JointTrainer: beside plain PyTorch one after another and in concurrent
processes, and beside stock `torch.func.vmap` of grad.

    python benchmarks/joint_training.py                  # all cases, about half an hour
    python benchmarks/joint_training.py --only mlp       # those whose name contains "mlp"
    python benchmarks/joint_training.py --quick          # short turns, to see that it works

benchmarks/README.md says what the columns mean. With a CUDA device, the cases for one run too.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from medians import interval
from processes import Process
from recording import append_rows

SCRIPT = Path(__file__).with_name("training_sides.py")
IMAGES = 2048
SAMPLE_SECONDS = 0.05
MEMORY_REPEATS = 3
CONV_NETS = ("convnet", "resnet18")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Models of one net, who trains them (ours the last), and what is claimed.

    `at_least` and `at_most` name columns of the case's row, and bounds.
    """

    name: str
    net: str
    models: int
    batch: int
    shape: tuple[int, int, int]
    sides: tuple[str, ...]
    at_least: tuple[tuple[str, float], ...] = ()
    at_most: tuple[tuple[str, float], ...] = ()
    device: str = "cpu"


def _after_another(
    title: str,
    net: str,
    models: int,
    batch: int,
    shape: tuple[int, int, int],
    least: float,
    sides: tuple[str, ...] = ("loop", "stock", "joint"),
) -> Case:
    claims = (("times_loop", least),)
    return Case(f"{models} {title} batch {batch}", net, models, batch, shape, sides, claims)


def _processes(title: str, net: str, batch: int, shape: tuple[int, int, int]) -> Case:
    return Case(
        f"8 {title} batch {batch} against 8 processes",
        net,
        8,
        batch,
        shape,
        sides=("processes", "joint"),
        at_most=(
            ("memory_over_processes", 0.47),
            ("memory_over_processes_stepped", 0.47),
            ("time_over_processes", 0.6),
        ),
    )


def _cuda(
    title: str,
    net: str,
    models: int,
    batch: int,
    least: tuple[tuple[str, float], ...] = (),
    most: tuple[tuple[str, float], ...] = (),
) -> Case:
    return Case(
        f"cuda {models} {title} batch {batch}",
        net,
        models,
        batch,
        (3, 32, 32),
        ("loop", "processes", "joint"),
        least,
        most,
        device="cuda",
    )


CASES = (
    _after_another("mlp 784-64-10", "mlp", 16, 8, (1, 28, 28), 4.0),
    _after_another("digits vit", "vit", 16, 16, (1, 8, 8), 2.0),
    _after_another("small convnet", "convnet", 16, 16, (1, 28, 28), 1.2),
    # Without stock vmap: by far the slowest here, it would take longer than all other cases.
    _after_another("resnet18", "resnet18", 8, 32, (3, 32, 32), 0.97, ("loop", "joint")),
    _processes("mlp 784-64-10", "mlp", 8, (1, 28, 28)),
    _processes("digits vit", "vit", 16, (1, 8, 8)),
    _processes("small convnet", "convnet", 16, (1, 28, 28)),
    _processes("resnet18", "resnet18", 32, (3, 32, 32)),
    Case(
        "digits zoo",
        "zoo",
        17,
        32,
        (1, 8, 8),
        ("zoo plainly", "zoo jointly"),
        at_least=(("times_loop", 1.5),),
    ),
    _cuda(
        "resnet18",
        "resnet18",
        16,
        128,
        (("times_loop", 3.0), ("times_processes", 1.5)),
        (("memory_over_processes", 0.47),),
    ),
    _cuda("vit_small", "vit_small", 32, 128),
)


def main(
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns; medians count.")] = 9,
    seconds: Annotated[float, typer.Option(help="About how long the first side's turn is.")] = 3.0,
    quick: Annotated[bool, typer.Option(help="Few, short turns; no digits zoo.")] = False,
    peers_only: Annotated[bool, typer.Option(help="Leave our side out.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    threads: Annotated[int, typer.Option(help="Threads in all; 0: one for each core.")] = 0,
) -> None:
    """Measure cases, each side in processes of its own that take turns."""
    threads = threads or os.cpu_count() or 1
    if quick:
        turns, seconds = min(turns, 2), min(seconds, 0.3)
    rows = []
    for case in CASES:
        if only not in case.name or (case.device == "cuda" and not has_cuda()):
            continue
        if quick and case.net == "zoo" and not only:
            continue
        print(case.name, file=sys.stderr, flush=True)
        sides = [side for side in case.sides if not (peers_only and "joint" in side)]
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(case, Path(folder), threads)
            if case.net == "zoo":
                row = measure_zoo(bench, sides, turns)
            else:
                write_images(Path(folder), case.shape)
                row = measure(bench, sides, turns, seconds, 1 if quick else MEMORY_REPEATS)
        rows.append({"case": case.name} | row)
        judge(case, row)
        if record and not quick and not peers_only:  # at once: a run may be stopped
            append_rows(Path(__file__).stem, rows[-1:], turns, f"{threads} threads, fp32")
    show(rows)


# --- processes -----------------------------------------------------------------------------------


class Team:
    """The processes of one side: one, or as many as there are models."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes
        self.heard = [process.hear() for process in processes]

    def build(self) -> float:
        """Build and warm up; seconds until all are ready."""
        if "imported" in self.heard[0]:
            self.all("step")
        began = time.perf_counter()
        self.all("build")
        return time.perf_counter() - began

    def turn(self, rounds: int) -> float:
        """Seconds a round takes, from the first that begins to the last that ends."""
        self.all(str(rounds))
        began = min(heard["began"] for heard in self.heard)
        ended = max(heard["ended"] for heard in self.heard)
        return (ended - began) / self.heard[0]["rounds"]

    def all(self, text: str) -> None:
        for process in self.processes:
            process.tell(text)
        self.heard = [process.hear() for process in self.processes]

    def memory_bytes(self) -> int:
        """Sum of proportional set sizes; on a GPU what is in use on it."""
        on_device = max(heard["device_bytes"] for heard in self.heard)
        return on_device or sum(proportional_set_size(p.pid) for p in self.processes)


@dataclass(frozen=True)
class Bench:
    """A case, the folder of its images, and the threads that all sides have."""

    case: Case
    folder: Path
    threads: int

    @contextmanager
    def team(self, side: str, channels_last: bool = False) -> Iterator[Team]:
        """The processes of a side, when their imports are done; ended afterwards."""
        many = side == "processes"
        job = {
            "side": side,
            "net": self.case.net,
            "models": 1 if many else self.case.models,
            "batch": self.case.batch,
            "shape": self.case.shape,
            "images": str(self.folder),
            "count": IMAGES,
            "device": self.case.device,
            "threads": 1 if many else self.threads,
            "channels_last": channels_last,
        }
        processes: list[Process] = []
        try:
            for index in range(self.case.models if many else 1):
                processes.append(Process(SCRIPT, job | {"seed": index}))
            yield Team(processes)
        finally:
            for process in processes:
                process.end()

    def ask(self, side: str) -> dict[str, Any]:
        """What a process that does not train says."""
        with self.team(side) as team:
            team.build()
            return team.heard[0]

    def layout(self) -> bool:
        """Whether plain PyTorch is faster in channels_last."""
        return self.case.net in CONV_NETS and self.ask("layout")["channels_last"]


def proportional_set_size(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def write_images(folder: Path, shape: tuple[int, int, int]) -> None:
    """Random images in bytes, as normalised floats, and their labels: speed needs no others."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(256, size=(IMAGES, *shape), dtype=np.uint8)
    (folder / "pixels.u8").write_bytes(pixels.tobytes())
    floats = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    (folder / "pixels.f32").write_bytes(floats.tobytes())
    (folder / "labels.i64").write_bytes(draws.integers(10, size=IMAGES).tobytes())


# --- measurements --------------------------------------------------------------------------------


def measure(
    bench: Bench, sides: Sequence[str], turns: int, seconds: float, memory_repeats: int
) -> Row:
    """One row: medians in seconds a round, ratios of turns next to each other, memory."""
    layout = bench.layout()
    limits = bench.ask("limits")
    times, starts = take_turns(bench, sides, turns, seconds, layout)
    row: Row = {f"{side}_seconds": median(values) for side, values in times.items()}
    row |= {f"{side}_start_seconds": value for side, value in starts.items()}
    arithmetic = limits["flop"] / limits["flop_rate"]
    row["limit_seconds"] = arithmetic + limits["moved_bytes"] / limits["memory_rate"]
    row["channels_last"] = int(layout)
    row |= compare(times)
    if "processes" in sides:
        row |= {"state_bytes": limits["state_bytes"]}
        row |= measure_memory(bench, sides, seconds, layout, memory_repeats)
    return row


def take_turns(
    bench: Bench, sides: Sequence[str], turns: int, seconds: float, layout: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a round of every side and turn; seconds until each was ready."""
    with teams(bench, sides, layout) as ready:
        starts = {side: team.build() for side, team in ready.items()}
        rounds = choose_rounds(next(iter(ready.values())), seconds)
        for team in ready.values():
            team.turn(rounds)
        times: dict[str, list[float]] = {side: [] for side in ready}
        order = [*ready]
        for _ in range(turns):
            for side in order:
                times[side].append(ready[side].turn(rounds))
            order = order[1:] + order[:1]
    return times, starts


@contextmanager
def teams(bench: Bench, sides: Sequence[str], layout: bool) -> Iterator[dict[str, Team]]:
    """All sides at once: those whose turn it is not wait for a line and cost nothing."""
    if not sides:
        yield {}
        return
    with bench.team(sides[0], layout) as first, teams(bench, sides[1:], layout) as others:
        yield {sides[0]: first} | others


def choose_rounds(team: Team, seconds: float) -> int:
    """How many rounds take about so long; at least two."""
    rounds = 2
    while (took := team.turn(rounds) * rounds) < seconds / 2:
        rounds *= 2
    return max(2, round(rounds * seconds / took))


def compare(times: dict[str, list[float]]) -> Row:
    """How many times faster ours is than each peer, with the interval of that median."""
    row: Row = {}
    if "joint" not in times:
        return row
    for side, values in times.items():
        if side != "joint":
            ratios = [its / ours for its, ours in zip(values, times["joint"], strict=True)]
            low, high = interval(ratios)
            row |= {f"times_{side}": median(ratios)}
            row |= {f"times_{side}_low": low, f"times_{side}_high": high}
    if "times_processes" in row:
        row["time_over_processes"] = 1 / row["times_processes"]
    return row


def measure_memory(
    bench: Bench, sides: Sequence[str], seconds: float, layout: bool, repeats: int
) -> Row:
    """Peak of each side alone, what it takes when idle, and ours over that of the processes.

    Idle is after imports, and after a step of the smallest model, for which PyTorch imports more.
    Sides run one at a time: processes share pages of libraries with all that have them open.
    """
    shown = [side for side in sides if side in ("processes", "joint")]
    measured: dict[str, list[int]] = {}
    for _ in range(repeats):
        for side in shown:
            with bench.team(side, layout) as team:
                found = {"idle": team.memory_bytes()}
                team.all("step")
                found["stepped"] = team.memory_bytes()
                found["peak"] = peak_bytes(team, seconds)
            for stage, value in found.items():
                measured.setdefault(f"{side}_{stage}_bytes", []).append(value)
    row: Row = {name: median(values) for name, values in measured.items()}
    if len(shown) == 2:
        for name, without in (("", "idle"), ("_stepped", "stepped"), ("_with_idle", "")):
            ours, theirs = (
                row[f"{side}_peak_bytes"] - row.get(f"{side}_{without}_bytes", 0)
                for side in ("joint", "processes")
            )
            row[f"memory_over_processes{name}"] = ours / theirs
    return row


def peak_bytes(team: Team, seconds: float) -> int:
    """The most memory that is seen while a side builds, warms up and trains."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            seen.append(team.memory_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        team.build()
        team.turn(choose_rounds(team, seconds))
    finally:
        over.set()
        watching.join()
    return max(*seen, team.memory_bytes())


def measure_zoo(bench: Bench, sides: Sequence[str], turns: int) -> Row:
    """Whole zoos, files included, each made by a fresh process whose imports are done."""
    times: dict[str, list[float]] = {}
    names = {"zoo plainly": "loop", "zoo jointly": "joint"}
    for turn, side in itertools.product(range(turns), sides):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            own = Bench(bench.case, Path(folder), bench.threads)
            with own.team(side) as team:
                team.build()
                print(f"{turn + 1}/{turns}  {side}", file=sys.stderr, flush=True)
                times.setdefault(names[side], []).append(team.turn(1))
    row: Row = {f"{side}_seconds": median(values) for side, values in times.items()}
    return row | compare(times)


def has_cuda() -> bool:
    command = [
        sys.executable,
        "-c",
        "import torch; raise SystemExit(not torch.cuda.is_available())",
    ]
    return subprocess.run(command, check=False).returncode == 0


# --- what is shown -------------------------------------------------------------------------------


def judge(case: Case, row: Row) -> None:
    for column, least in case.at_least:
        if column in row:
            verdict = "holds" if row[column] >= least else "DOES NOT HOLD"
            between = f"[{row[f'{column}_low']:.2f}, {row[f'{column}_high']:.2f}]"
            print(f"{case.name}: {column} {row[column]:.2f} {between}; at least {least} {verdict}")
    for column, most in case.at_most:
        if column in row:
            verdict = "holds" if row[column] <= most else "DOES NOT HOLD"
            print(f"{case.name}: {column} {row[column]:.2f}; at most {most} {verdict}")


def show(rows: list[Row]) -> None:
    import pandas as pd

    if not rows:
        raise SystemExit("no case of that name; see CASES in benchmarks/joint_training.py")
    for kind in (False, True):
        chosen = [in_megabytes(row) for row in rows if ("state_bytes" in row) is kind]
        if chosen:
            shown = pd.DataFrame(chosen).set_index("case").T
            print(shown.to_markdown(floatfmt=".3g"), end="\n\n")


def in_megabytes(row: Row) -> Row:
    return {
        name.replace("_bytes", "_MB"): round(value / 1e6, 1) if name.endswith("_bytes") else value
        for name, value in row.items()
    }


if __name__ == "__main__":
    typer.run(main)
