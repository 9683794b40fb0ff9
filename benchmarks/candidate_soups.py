"""Thirty-two candidate soups of the digits zoo in one pass: beside scoring one after another.

    python benchmarks/candidate_soups.py                    # makes the zoo of configs/digits.yaml
    python benchmarks/candidate_soups.py --zoo zoo/digits   # keeps it, or takes one that is there

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from recording import ROOT, append_rows

from inputs.config import Settings, load_config
from soups.config import LearnConfig
from soups.evaluate import predict
from soups.norms import Groups
from soups.pipeline import open_run
from soups.session import Session

CANDIDATES = 32
AT_LEAST = {"all differ": 1.0, "three quarters of the layers shared": 3.0}


def main(
    zoo: Annotated[Path | None, typer.Option(help="The zoo; else a temporary one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; medians count.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
) -> None:
    """Measure scoring candidates, their mixing included."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [f"zoo.path={zoo or Path(temporary) / 'zoo'}"]
        config = load_config(ROOT / "configs/digits.yaml", overrides, LearnConfig)
        opened = open_run(
            config,
            Path(temporary) / "run",
            torch.device("cpu"),
            root=ROOT,
            fresh=False,
            progress=True,
        )
        rows = [measure(opened.session, name, repeats) for name in AT_LEAST]
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"), end="\n\n")
    for row in rows:
        at_least = AT_LEAST[row["case"]]
        verdict = "holds" if row["times_in_memory"] >= at_least else "DOES NOT HOLD"
        print(f"{row['case']}: {row['times_in_memory']:.2f}x; at least {at_least}x {verdict}")
    if record:
        append_rows(Path(__file__).stem, rows, repeats, f"{threads} threads")


def measure(session: Session, name: str, repeats: int) -> dict[str, Any]:
    """One row: medians of interleaved repeats, and by how much accuracies differ."""
    groups, candidates = make_candidates(session, shared=name != "all differ")
    ways: dict[str, Callable[[], np.ndarray]] = {
        "one_pass": lambda: session.evaluate(candidates, groups).accuracies,
        "first_pass": lambda: first_pass(session, candidates, groups),
        "in_memory": in_memory(session, candidates, groups),
        "through_files": lambda: through_files(session, candidates, groups),
    }
    for _ in range(3):  # a search scores population after population: it is recorded by then
        ways["one_pass"]()
    found = {way: run() for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    ours = median(seconds["one_pass"])
    return {
        "case": name,
        **{f"{way}_seconds": median(values) for way, values in seconds.items()},
        "times_in_memory": median(seconds["in_memory"]) / ours,
        "first_times_in_memory": median(seconds["in_memory"]) / median(seconds["first_pass"]),
        "times_through_files": median(seconds["through_files"]) / ours,
        "most_accuracy_apart": float(
            max(abs(other - found["one_pass"]).max() for other in found.values())
        ),
    }


def make_candidates(session: Session, *, shared: bool) -> tuple[Groups, np.ndarray]:
    """Convex candidates, layer by layer; `shared` ones agree in the first three quarters."""
    names = list(session.numels)
    layers: Groups = {}
    for name in names:
        layer = name.rpartition(".")[0]
        layers[layer] = (*layers.get(layer, ()), name)
    generator = np.random.default_rng(0)
    shape = (CANDIDATES, len(layers))
    drawn = generator.dirichlet(np.ones(len(session.zoo.checkpoints)), shape).transpose(0, 2, 1)
    if shared:
        first = 3 * len(layers) // 4
        drawn[:, :, :first] = drawn[:1, :, :first]
    return layers, drawn


def first_pass(session: Session, candidates: np.ndarray, groups: Groups) -> np.ndarray:
    """As a run's first call finds it: nothing in memory, nothing recorded."""
    return replace(session).evaluate(candidates, groups).accuracies


def in_memory(session: Session, candidates: np.ndarray, groups: Groups) -> Callable[[], np.ndarray]:
    """The peer: all ingredients in memory, each candidate mixed and run on full batches."""
    state = dict(session.model.state_dict())
    kept: dict[str, torch.Tensor] = {}

    def run() -> np.ndarray:
        if not kept:
            for name in (*session.numels, *session.norms.names):
                stored = [c.read(session.zoo.stored(c, name)) for c in session.zoo.checkpoints]
                kept[name] = torch.stack(stored)
        accuracies = []
        for matrix in candidates:
            _, buffers = session.norms.columns(groups, matrix)
            for names, column in zip(groups.values(), matrix.T, strict=True):
                for name in names:
                    state[name].copy_(_mixed(column, kept[name]))
            for name in session.norms.names:
                state[name].copy_(_mixed(buffers[:, 0], kept[name]))
            logits = predict(session.model, session.select, batch_size=session.eval_batch_size)
            right = logits.argmax(1) == session.select.labels
            accuracies.append(right.double().mean().item())
        return np.array(accuracies)

    return run


def _mixed(column: np.ndarray, stacked: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(torch.from_numpy(column).float(), stacked, dims=1)


def through_files(session: Session, candidates: np.ndarray, groups: Groups) -> np.ndarray:
    """Each candidate's ingredients read anew, by the sum that cooks soups."""
    accuracies = []
    for matrix in candidates:
        session.load(session.coefficients(groups, matrix, Settings()))
        accuracies.append(session.accuracy())
    return np.array(accuracies)


if __name__ == "__main__":
    typer.run(main)
