"""M models as one group: beside a loop over them, and beside stock `torch.func.vmap`.

    python benchmarks/grouped_forward.py                  # all cases, in processes of their own
    python benchmarks/grouped_forward.py --quick          # small ones, a minute
    python benchmarks/grouped_forward.py --only mlp       # those whose name contains "mlp"

benchmarks/README.md says what the columns mean. With a CUDA device, the cases for one run too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import typer
from medians import interval
from recording import ROOT, append_rows

SECONDS = 20.0
LEAST_REPEATS, MOST_REPEATS = 6, 200


@dataclass(frozen=True)
class Case:
    """Models, an input, and how many times faster than the loop the group is claimed to be."""

    name: str
    models: int
    shape: tuple[int, ...]
    make: str
    settings: dict[str, Any] = field(default_factory=dict)
    at_least: float = 0.97
    shared: str = ""
    stock: bool = True
    quick: bool = False
    device: str = "cpu"
    peers: tuple[str, ...] = ()


SMALL_VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
DEEP_VIT = SMALL_VIT | {"depth": 12}
DIGITS = {"channels": [8, 16, 32, 48], "stem_width": 8, "stem_type": "", "in_chans": 1}
CIFAR = {"dims": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "patch_size": 2}
FIRST_NINE = "cls_token pos_embed patch_embed " + " ".join(f"blocks.{i}." for i in range(9))


def _vit(batch: int, at_least: float) -> Case:
    name = f"small ViT M=32 batch {batch}"
    shape = (batch, 3, 8, 8)
    return Case(name, 32, shape, "vit_tiny_patch16_224", SMALL_VIT, at_least, quick=batch < 128)


def _resnet(name: str, models: int, batch: int, size: int) -> Case:
    return Case(f"{name} M={models} batch {batch}", models, (batch, 3, size, size), name)


def _digits(batch: int) -> Case:
    name = f"digits resnet10t M=32 batch {batch}"
    return Case(name, 32, (batch, 1, 8, 8), "resnet10t", DIGITS, quick=batch == 16)


def _cifar(models: int, batch: int) -> Case:
    name = f"cifar10 convnext M={models} batch {batch}"
    return Case(name, models, (batch, 3, 32, 32), "convnext_atto", CIFAR)


def _h200(name: str, make: str, batch: int, shape: tuple[int, ...]) -> Case:
    return Case(
        f"cuda {name} M=32 batch {batch}",
        32,
        (batch, *shape),
        make,
        at_least=3.6 if batch == 1 else 1.0,
        stock=False,
        device="cuda",
        peers=("loop_in_a_graph",) if batch == 1 else ("compiled_loop",),
    )


CASES = (
    Case("mlp M=32 batch 1", 32, (1, 64), "mlp", at_least=8, quick=True),
    _vit(1, 5.0),
    _vit(16, 1.5),
    _vit(128, 0.97),
    Case("ViT-B/32 M=8 batch 1", 8, (1, 3, 224, 224), "vit_base_patch32_224", at_least=1.0),
    _resnet("resnet18", 32, 1, 32),
    _resnet("resnet18", 32, 16, 32),
    _resnet("resnet50", 8, 1, 224),
    _resnet("resnet50", 8, 16, 224),
    _resnet("resnet50", 2, 128, 224),
    Case(
        "9 of 12 blocks shared M=32 batch 1",
        32,
        (1, 3, 8, 8),
        "vit_tiny_patch16_224",
        DEEP_VIT,
        3.0,
        FIRST_NINE,
        quick=True,
    ),
    Case(
        "9 of 12 blocks shared M=32 batch 64",
        32,
        (64, 3, 8, 8),
        "vit_tiny_patch16_224",
        DEEP_VIT,
        3.0,
        FIRST_NINE,
    ),
    *(_digits(batch) for batch in (16, 64, 512)),
    *(_cifar(models, batch) for models in (16, 32) for batch in (16, 64)),
    *(
        _h200(name, make, batch, shape)
        for batch in (1, 64)
        for name, make, shape in (
            ("ViT-B/32", "vit_base_patch32_224", (3, 224, 224)),
            ("ResNet-50", "resnet50", (3, 224, 224)),
            ("BERT-base", "bert", (128,)),
        )
    ),
)


def main(
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    quick: Annotated[bool, typer.Option(help="Small cases, a second each.")] = False,
    seconds: Annotated[float, typer.Option(help="About how long to measure a case.")] = SECONDS,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    threads: Annotated[int, typer.Option(help="Threads for all; 0: one for each core.")] = 0,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure cases, each in a process of its own; its variants take turns."""
    cases = [case for case in CASES if only in case.name and (case.quick or not quick)]
    if child:
        print(json.dumps(measure(cases[0], seconds)))
        return
    threads = threads or os.cpu_count() or 1
    rows = []
    for case in cases:
        if case.device == "cuda" and not _has_cuda():
            continue
        print(case.name, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--child", "--only", case.name]
        command += ["--seconds", str(1.0 if quick else seconds)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        rows.append({"case": case.name} | json.loads(done.stdout.splitlines()[-1]))
        _judge(case, rows[-1])
    _print(rows)
    if record and not quick:
        append_rows("grouped_forward", rows, MOST_REPEATS, f"{threads} threads, fp32, no grad")


def measure(case: Case, seconds: float) -> dict[str, float]:
    """One row: medians in seconds, and ratios of times that were measured next to each other."""
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        models, group, x = _prepare(case)
        variants: dict[str, Callable[[], Any]] = {
            "loop": lambda: torch.stack([_logits(model(x)) for model in models]),
            "group": lambda: _logits(group(x)),
        }
        wanted = variants["loop"]()
        for _ in range(2):  # the second call is recorded
            variants["group"]()
        found = variants["group"]()
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if case.stock:
            variants["stock"] = _stock(models[0], group, x)
        if "ViT-B" in case.name and case.device == "cpu":
            variants["products"] = _products(models, x.shape[0] * 50)
        for peer in case.peers:
            variants[peer] = PEERS[peer](models, x)
        times = _interleaved(variants, seconds, case.device)
    row = {f"{name}_seconds": median(values) for name, values in times.items()}
    for name, values in times.items():
        if name != "group":
            ratios = [its / ours for its, ours in zip(values, times["group"], strict=True)]
            low, high = interval(ratios)
            prefix = "times_faster" if name == "loop" else f"times_faster_than_{name}"
            row |= {prefix: median(ratios), f"{prefix}_low": low, f"{prefix}_high": high}
    if "products" in times:
        row["ceiling"] = median(
            loop / products for loop, products in zip(times["loop"], times["products"], strict=True)
        )
    kept = getattr(group, "kept_bytes", 0)
    return row | {"error": error, "kept_bytes": kept, "repeats": len(times["loop"])}


def _prepare(case: Case) -> tuple[list[Any], Any, Any]:
    """Models whose weights lie in the stacked ones, the group of them, and an input."""
    import torch

    from fleet import Group

    models = [_model(case).eval().to(case.device) for _ in range(case.models)]
    shared, stacked = {}, {}
    for name, tensor in models[0].state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or name.startswith(tuple(case.shared.split()) or "/"):
            shared[name] = tensor.data
        else:
            noise = 0.01 * torch.randn(case.models, *tensor.shape, device=tensor.device)
            stacked[name] = tensor.data + (noise.abs() if "var" in name else noise)
    for index, model in enumerate(models):
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = stacked[name][index] if name in stacked else shared[name]
    group = Group(models[0], stacked, shared=shared)
    if case.make == "bert":
        return models, group, torch.randint(0, 30000, case.shape, device=case.device)
    return models, group, torch.randn(case.shape, device=case.device)


def _model(case: Case) -> Any:
    from torch import nn

    if case.make == "mlp":
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)
    if case.make == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig())
    import timm

    return timm.create_model(case.make, **case.settings)


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _stock(model: Any, group: Any, x: Any) -> Callable[[], Any]:
    from torch.func import functional_call, vmap

    stacked, shared = dict(group.stacked), dict(group.shared)
    return lambda: vmap(lambda own: functional_call(model, own | shared, (x,)))(stacked)


def _products(models: Sequence[Any], rows: int) -> Callable[[], Any]:
    """The matrix products of all linear layers and nothing else, as the loop computes them."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers = [layer for model in models for layer in model.modules() if type(layer) is nn.Linear]
    inputs = {width: torch.randn(rows, width) for width in {layer.in_features for layer in layers}}

    def run() -> None:
        for layer in layers:
            F.linear(inputs[layer.in_features], layer.weight, layer.bias)

    return run


def _loop_in_a_graph(models: Sequence[Any], x: Any) -> Callable[[], Any]:
    import torch

    def loop() -> Any:
        return torch.stack([_logits(model(x)) for model in models])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay


def _compiled_loop(models: Sequence[Any], x: Any) -> Callable[[], Any]:
    import torch
    from torch.func import functional_call

    names = list(models[0].state_dict())
    one = torch.compile(lambda state: _logits(functional_call(models[0], state, (x,))))
    states = [{name: model.state_dict()[name] for name in names} for model in models]
    return lambda: torch.stack([one(state) for state in states])


PEERS = {"loop_in_a_graph": _loop_in_a_graph, "compiled_loop": _compiled_loop}


def _interleaved(
    variants: dict[str, Callable[[], Any]], seconds: float, device: str
) -> dict[str, list[float]]:
    """Times of the variants in turn, the first of which changes, for about `seconds` in all."""
    import torch

    def timed(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once = sum(min(timed(run) for _ in range(2)) for run in variants.values())
    repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(repeats):
        for name in order:
            times[name].append(timed(variants[name]))
        order = order[1:] + order[:1]
    return times


def _judge(case: Case, row: dict[str, Any]) -> None:
    low, ratio = row["times_faster_low"], row["times_faster"]
    # Claims of at least 0.97 hold for the lower end, those of a speed-up for the median.
    verdict = "holds" if (low if case.at_least < 1 else ratio) >= case.at_least else "DOES NOT HOLD"
    high = row["times_faster_high"]
    text = f"{case.name}: {ratio:.2f}x the loop [{low:.2f}, {high:.2f}]"
    print(f"{text}; at least {case.at_least}x {verdict}")
    if "stock_seconds" in row and row["stock_seconds"] > row["loop_seconds"]:
        stock = row["times_faster_than_stock"]
        verdict = "holds" if stock >= 1.3 else "DOES NOT HOLD"
        print(f"    {stock:.2f}x stock vmap, which loses to the loop; at least 1.3x {verdict}")
    if "loop_in_a_graph_seconds" in row:
        graph = row["times_faster_than_loop_in_a_graph"]
        verdict = "holds" if graph >= 2 else "DOES NOT HOLD"
        print(f"    {graph:.2f}x the loop in a CUDA graph; at least 2x {verdict}")
    if "compiled_loop_seconds" in row:
        compiled = row["times_faster_than_compiled_loop"]
        verdict = "holds" if compiled >= 1 else "DOES NOT HOLD"
        print(f"    {compiled:.2f}x the compiled loop; at least 1x {verdict}")
    if "ceiling" in row:
        print(f"    the loop over its matrix products alone: {row['ceiling']:.2f}x")
    if row["error"] > 1e-5:
        print(f"    largest error {row['error']:.1e}: MORE THAN 1e-5")


def _print(rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    shown = pd.DataFrame(rows)
    shown["kept_MB"] = (shown.pop("kept_bytes") / 1e6).round(0)
    print(shown.to_markdown(index=False, floatfmt=".3g"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    typer.run(main)
