"""Measure which strategy is fastest on this machine: `python -m kernels.measure`.

Writes the table that `kernels.cpu.strategies` reads into the user's cache folder. Threads are those
of the environment (OMP_NUM_THREADS); rows that were measured with other numbers are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.cpu import convolution, linear, strategies

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Call = Callable[[Tensor], Tensor]

LINEAR = [
    *((32, rows, 64, 64) for rows in (1, 4, 16, 64, 512)),
    *((32, 17 * rows, 64, 192) for rows in (1, 16, 128)),
    *((32, rows, ins, outs) for rows in (1, 16) for ins, outs in ((64, 10), (256, 256))),
    *((8, rows, 768, 768) for rows in (1, 4, 8, 16, 50, 200)),
    *((8, rows, 768, 3072) for rows in (1, 4, 50)),
    *((8, rows, 3072, 768) for rows in (1, 50)),
    *((8, rows, 2048, 1000) for rows in (1, 16)),
    *((8, rows, 384, 1536) for rows in (1, 17, 197)),
    (2, 800, 768, 3072),
]
CONV2D = [
    # models, rows, channels, out (both per group), groups, pixels, kernel
    *((32, rows, 1, 8, 1, 64, 9) for rows in (1, 16, 64)),
    *((32, rows, 8, 16, 1, 64, 9) for rows in (1, 16, 64)),
    *((32, rows, 16, 48, 1, 16, 9) for rows in (1, 16, 64)),
    *((32, rows, 32, 32, 1, 16, 9) for rows in (1, 16, 64)),
    *((32, rows, 48, 48, 1, 16, 9) for rows in (1, 16, 64)),
    *((32, rows, 1, 64, 1, 16, 4) for rows in (1, 16, 128)),
    *((32, rows, 3, 64, 1, 256, 49) for rows in (1, 16)),
    *((32, rows, 64, 64, 1, 64, 9) for rows in (1, 16)),
    *((32, rows, 64, 128, 1, 16, 1) for rows in (1, 16)),
    *((32, rows, 64, 128, 1, 16, 9) for rows in (1, 16)),
    *((32, rows, 128, 128, 1, 16, 9) for rows in (1, 16)),
    *((32, rows, 256, 256, 1, 4, 9) for rows in (1, 16)),
    *((32, rows, 512, 512, 1, 1, 9) for rows in (1, 16)),
    *((8, rows, 3, 64, 1, 12544, 49) for rows in (1, 4)),
    *((8, rows, 64, 256, 1, 3136, 1) for rows in (1, 2)),
    *((8, rows, 256, 64, 1, 3136, 1) for rows in (1, 4)),
    *((8, rows, 64, 64, 1, 3136, 9) for rows in (1, 4)),
    *((8, rows, 512, 128, 1, 784, 1) for rows in (1, 4)),
    *((8, rows, 128, 128, 1, 784, 9) for rows in (1, 4)),
    *((8, rows, 1024, 256, 1, 196, 1) for rows in (1, 4)),
    *((8, rows, 256, 256, 1, 196, 9) for rows in (1, 4)),
    *((8, rows, 2048, 512, 1, 49, 1) for rows in (1, 4)),
    *((8, rows, 512, 2048, 1, 49, 1) for rows in (1, 4)),
    *((8, rows, 512, 512, 1, 49, 9) for rows in (1, 4)),
    *((8, rows, 3, 768, 1, 49, 1024) for rows in (1, 4)),
    *((8, rows, 1, 1, 96, 784, 49) for rows in (1, 8)),
    *((8, rows, 1, 1, 96, 3136, 49) for rows in (1, 4)),
    *((8, rows, 1, 1, 384, 196, 49) for rows in (1, 8)),
    *((8, rows, 1, 1, 384, 49, 49) for rows in (1, 8)),
    *((32, rows, 1, 1, 40, 64, 49) for rows in (1, 16)),
    *((8, rows, 1, 1, 96, 3136, 9) for rows in (1, 8)),
    *((8, rows, 1, 1, 480, 196, 25) for rows in (1, 8)),
    *((8, rows, 4, 4, 32, 196, 9) for rows in (1, 8)),
]


def linear_calls(shape: Shape) -> tuple[Tensor, Iterator[tuple[str, Call]]]:
    """The input, and each strategy as a function of it."""
    models, rows, ins, outs = shape
    x, weights = torch.randn(models, rows, ins), _randn((models, outs, ins), (models, outs))
    return x, _calls(linear.grouped_linear, linear.STRATEGIES, x, weights)


def conv2d_calls(shape: Shape) -> tuple[Tensor, Iterator[tuple[str, Call]]]:
    """The input, and each strategy as a function of it.

    A kernel of 1, 4 and 32 by its size moves by 1, 2 and 32, others by 1; the channels of an image
    are adjacent in memory, as they are in the results of most strategies.
    """
    models, rows, channels, outs, groups, pixels, kernel = shape
    size, kernel_size = round(pixels**0.5), round(kernel**0.5)
    patches = kernel_size in (2, 32)
    stride = kernel_size if patches else 1
    x = torch.randn(models, rows, size * stride, size * stride, channels * groups)
    x = x.permute(0, 1, 4, 2, 3)
    weights = _randn(
        (models, outs * groups, channels, kernel_size, kernel_size), (models, outs * groups)
    )
    names = [name for name in convolution.STRATEGIES if groups == 1 or name != "columns"]
    padding = 0 if patches else kernel_size // 2
    settings = {"stride": (stride,) * 2, "padding": (padding,) * 2, "groups": groups}
    return x, _calls(convolution.grouped_conv2d, names, x, weights, **settings)


POINTS: dict[str, tuple[Callable, list[Shape]]] = {
    "linear": (linear_calls, LINEAR),
    "conv2d": (conv2d_calls, CONV2D),
}


def _randn(*shapes: Shape) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


def _calls(
    function: Callable[..., Tensor],
    names: Any,
    x: Tensor,
    weights: tuple[Tensor, ...],
    **settings: Any,
) -> Iterator[tuple[str, Call]]:
    for name in names:

        def call(x: Tensor, *weights: Tensor, name: str = name) -> Tensor:
            return function(x, *weights, **settings, force=name)

        if name.endswith("packed"):
            yield name, prepared(call, x, *weights)
        else:
            yield name, lambda x, call=call: call(x, *weights)


def prepared(function: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Call:
    """`function` of x alone: what depends on the weights alone is computed now."""
    graph = make_fx(function)(x, *weights)
    values = Interpreter(graph, garbage_collect_values=False)
    values.run(x, *weights)
    first = next(iter(graph.graph.nodes))
    varies = {first}
    for node in list(graph.graph.nodes):
        if node is first or node.op == "output":
            continue
        if varies.intersection(node.all_input_nodes):
            varies.add(node)
        elif node.op == "call_function" and isinstance(values.env[node], Tensor):
            graph.register_buffer(f"of_weights_{node.name}", values.env[node])
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"of_weights_{node.name}"))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return lambda x: graph(x, *weights)


def measure(op: str, shape: Shape, seconds: float) -> dict[str, float]:
    """The least time in microseconds that each strategy took for one shape, turn by turn."""
    make, _ = POINTS[op]
    x, calls = make(shape)
    turns = {name: (call, _repeats(call, x)) for name, call in calls}
    times = dict.fromkeys(turns, float("inf"))
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < stop:
        for name, (call, repeats) in turns.items():
            times[name] = min(times[name], _microseconds(call, x, repeats))
        rounds += 1
    return {name: float(f"{taken:.3g}") for name, taken in times.items()}


def _repeats(call: Call, x: Tensor) -> int:
    call(x)
    return max(1, int(500 / _microseconds(call, x, 1)))


def _microseconds(call: Call, x: Tensor, repeats: int) -> float:
    # One thread's own time does not count what other programs take from it.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call(x)
    return max(clock() - start, 1e-9) / repeats * 1e6


def measured(seconds: float) -> dict[str, list[dict[str, Any]]]:
    """The rows of all points, with as many threads as torch uses now."""
    threads = min(torch.get_num_threads(), 2)
    found: dict[str, list[dict[str, Any]]] = {}
    for op, (_, shapes) in POINTS.items():
        found[op] = []
        for shape in shapes:
            times = measure(op, shape, seconds)
            logger.info("%s %s: %s", op, shape, min(times, key=times.__getitem__))
            found[op].append({"threads": threads, "shape": list(shape), "times": times})
    return found


def merged(
    new: dict[str, list[dict[str, Any]]], old: dict[str, list[strategies.Measured]]
) -> dict[str, list[dict[str, Any]]]:
    """The new rows, and the old ones that were measured with other numbers of threads."""
    threads = {row["threads"] for rows in new.values() for row in rows}
    return {
        op: rows + [row._asdict() for row in old.get(op, ()) if row.threads not in threads]
        for op, rows in new.items()
    }


def write(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The table as JSON, a line for each row, written beside its place and renamed."""
    lines = [
        f'"{op}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in of_op) + "\n]"
        for op, of_op in rows.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.measure", description=__doc__)
    parser.add_argument("--out", type=Path, default=strategies.measured_path())
    parser.add_argument("--seconds", type=float, default=0.2, help="for each shape")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    old = strategies.parse(options.out.read_text()) if options.out.exists() else strategies.table()
    with torch.no_grad():
        write(merged(measured(options.seconds), old), options.out)
    logger.info("%s", options.out)


if __name__ == "__main__":
    main()
