"""The approximate cache of lower layers (`NGrams`) on trained text tenants: what it costs in
accuracy, what it finds, and how long a row takes, beside computing all layers.

    python benchmarks/ngrams.py              # trains the base and the tenants first
    python benchmarks/ngrams.py --quick      # short, to see that it works

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from medians import interval
from recording import append_rows
from text_tenants import TextTenants, make_text_tenants
from torch import Tensor

from fleet.serving.ngrams import NGrams
from fleet.tenants import Tenants
from inputs.budget import format_bytes
from inputs.randomness import generator
from inputs.text.corpus import DOMAINS

BUDGETS = (16 << 20, 64 << 20, 256 << 20)
SHORTEST = (1, 2)
BATCH = 64
Row = dict[str, Any]
Asked = list[tuple[str, Tensor]]


def main(
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns; medians count.")] = 9,
    quick: Annotated[bool, typer.Option(help="Hardly trained, few turns.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
) -> None:
    """Train, then measure every budget and shortest context."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        short = {"per_domain": 1, "base_epochs": 1, "epochs": 1} if quick else {}
        made = make_text_tenants(Path(folder) / "store", **short)
        requests, labels = _requests(made)
        exact = opened.enter_context(Tenants(made.store, made.model(), memory_budget=None))
        wanted = _classes(exact, requests)
        cases = [(budget, shortest) for budget in BUDGETS for shortest in SHORTEST]
        rows = [
            _measured(made, exact, wanted, labels, requests, case, 2 if quick else turns)
            for case in (cases[:2] if quick else cases)
        ]
    if record and not quick:
        append_rows(Path(__file__).stem, rows, turns, f"{torch.get_num_threads()} threads")
    _show(rows)


def _requests(made: TextTenants) -> tuple[Asked, Tensor]:
    """The *report* sentences of all tenants, mixed, and their labels."""
    requests: Asked = []
    labels: list[Tensor] = []
    for name in made.classes:
        rows, own = made.asked(name)
        requests += [(name, row) for row in rows]
        labels.append(own)
    order = torch.randperm(len(requests), generator=generator(0, "requests"))
    return [requests[place] for place in order.tolist()], torch.cat(labels)[order]


def _measured(
    made: TextTenants,
    exact: Tenants,
    wanted: Tensor,
    labels: Tensor,
    requests: Asked,
    case: tuple[int, int],
    turns: int,
) -> Row:
    """A budget and a shortest context, beside `exact`, whose answers are `wanted`."""
    budget, shortest = case
    sentences = {"base": made.typical(), **{domain: made.typical(domain) for domain in DOMAINS}}
    ngrams = NGrams(sentences, budget, shortest=shortest)
    with Tenants(made.store, made.model(), memory_budget=None, approximate=ngrams) as tenants:
        began = time.perf_counter()
        tenants.predict(requests[:1])
        growing = time.perf_counter() - began
        found = _classes(tenants, requests)
        counts = tenants.statistics
        sides = {"": tenants, "exact_": exact}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(turns):
            for side in list(sides)[:: 1 - turn % 2 * 2]:
                times[side].append(_seconds(lambda s=side: _classes(sides[s], requests)))
    ratios = [one / other for one, other in zip(times["exact_"], times[""], strict=True)]
    looked_up = counts.feature_hits / (counts.feature_hits + counts.feature_misses)
    return {
        "case": f"{format_bytes(budget)}, contexts of {shortest} or more",
        "exact_accuracy": float((wanted == labels).double().mean()),
        "accuracy": float((found == labels).double().mean()),
        "same_answer": float((found == wanted).double().mean()),
        "tokens_found": looked_up,
        "bytes": float(counts.feature_bytes),
        "growing_seconds": growing,
        "row_seconds": median(times[""]) / len(requests),
        "exact_row_seconds": median(times["exact_"]) / len(requests),
        "times_exact": median(ratios),
        "times_exact_low": interval(ratios)[0],
        "times_exact_high": interval(ratios)[1],
    }


def _classes(tenants: Tenants, requests: Asked) -> Tensor:
    """The class that each request is answered with."""
    answers = [a for batch in _batches(requests) for a in tenants.predict(batch)]
    return torch.stack([answer.argmax() for answer in answers])


def _batches(requests: Asked) -> Iterator[Asked]:
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _show(rows: Sequence[Row]) -> None:
    import pandas as pd

    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"))


if __name__ == "__main__":
    typer.run(main)
