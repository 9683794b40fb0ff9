"""Which modules have to compute only the first token, as nothing looks at the others after them.

Of a classifier that reads one token (BERT's pooler, a vision transformer's class token) the last
layer is needed for that token alone, but for the keys and values of its attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

# So many in a row that need all tokens, and those before them are not tried.
PATIENCE = 6
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}

Run = Callable[[], Tensor]
Change = Callable[[Tensor], Tensor]


def found_tail(modules: dict[str, nn.Module], run: Run, rows: int) -> tuple[str, ...]:
    """The names of modules that may compute only the first token, in a run of `rows` rows.

    Found by trying, from the last module back: the output has to be the same with them, and with
    NaN in place of the other tokens. Tokens are the second of three axes.
    """
    with torch.inference_mode():
        calls, wanted = _observed(modules, run, rows)
        if wanted.dtype not in TOLERANCES or not wanted.isfinite().all():
            return ()
        found: list[str] = []
        failed = 0
        for name in reversed(calls):
            if any(name.startswith(f"{other}.") for other in found):
                continue
            if _agrees(modules, [name], run, rows, _first, wanted):
                found.insert(0, name)
                failed = 0
            else:
                failed += 1
            if failed == PATIENCE:
                break
        proven = all(_agrees(modules, found, run, rows, how, wanted) for how in (_first, _hidden))
    if found and proven:
        logger.info("only the first token is computed from %r on", found[0])
        return tuple(found)
    return ()


@contextmanager
def first_tokens(modules: dict[str, nn.Module], names: Sequence[str], rows: int) -> Iterator[None]:
    """While the model runs, these modules compute the first token; the others get its result."""
    with _changed(modules, names, rows, _first):
        yield


def _first(operand: Tensor) -> Tensor:
    return operand[:, :1]


def _hidden(operand: Tensor) -> Tensor:
    hidden = operand.clone()
    hidden[:, 1:] = float("nan")
    return hidden


@contextmanager
def _changed(
    modules: dict[str, nn.Module], names: Sequence[str], rows: int, change: Change
) -> Iterator[None]:
    """Every operand [rows, tokens, width] of these modules changed, while the model runs."""
    counts: dict[nn.Module, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tokens = [leaf.shape[1] for leaf in leaves if _has_tokens(leaf, rows)]
        if not tokens:
            return None
        counts[module] = tokens[0]
        leaves = [change(leaf) if _has_tokens(leaf, rows) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, spec)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        count = counts.pop(module, 1)

        def long(leaf: Any) -> Any:
            short = isinstance(leaf, Tensor) and leaf.dim() == 3 and leaf.shape[:2] == (rows, 1)
            return leaf.expand(-1, count, -1) if short else leaf

        return output if count == 1 else pytree.tree_map(long, output)

    handles = []
    try:
        for name in names:
            handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
            handles.append(modules[name].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_tokens(leaf: Any, rows: int) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() != 3 or not leaf.is_floating_point():
        return False
    return len(leaf) == rows and leaf.shape[1] > 1


def _observed(modules: dict[str, nn.Module], run: Run, rows: int) -> tuple[list[str], Tensor]:
    """The modules with parameters that are called once, with tokens, as they end; the output."""
    met: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if any(_has_tokens(leaf, rows) for leaf in pytree.tree_leaves((args, kwargs))):
                met.append(name)

        return note

    own = {n: m for n, m in modules.items() if n and next(m.parameters(), None) is not None}
    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in own.items()]
    try:
        wanted = run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in dict.fromkeys(met) if met.count(name) == 1], wanted


def _agrees(
    modules: dict[str, nn.Module],
    names: Sequence[str],
    run: Run,
    rows: int,
    change: Change,
    wanted: Tensor,
) -> bool:
    with _changed(modules, names, rows, change):
        try:
            found = run()
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    if found.shape != wanted.shape:
        return False
    limit = TOLERANCES[wanted.dtype] * float(wanted.abs().max())
    return bool((found - wanted).abs().max() <= limit)
