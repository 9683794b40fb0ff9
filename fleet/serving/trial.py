"""A model tried with tenants that are made up: which of its tensors may differ within a batch.

Two runs with different numbers of rows tell which operands have a row for each request; both are
compared with each tenant alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.bound import BoundModel
from fleet.serving.inputs import Together
from fleet.serving.owned import Layout, LowRank, NoRuleError, Own, PerTenant
from fleet.serving.tenant_tensor import TenantTensor, origin

logger = logging.getLogger(__name__)

# Numbers of rows that share no factor with each other, and hardly one with a model's sizes.
ROWS = ((3, 4), (5, 7), (11, 13))
ATTEMPTS = 64
# Of the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
LOOSE = 0.1
MISTAKEN = "its operand has a length that the number of rows divides by chance"

Site = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """What may differ within a batch: `sites` says of an operation and a tensor (with what it went
    through) whether its other operand has rows; `heads` may have other shapes; `reasons` of the
    tensors whose owners run alone.
    """

    sites: dict[Site, bool]
    heads: frozenset[str]
    reasons: dict[str, str]

    def is_rows(
        self, op: str, names: Sequence[str], length: int, rows: int, has_rule: bool = True
    ) -> bool:
        found = {self.sites.get((op, name)) for name in names}
        if len(found) != 1 or None in found:
            raise NoRuleError(f"{op} of {names[0]!r}: was not met when the model was tried", names)
        by_row = found == {True}
        if by_row and length % rows:
            raise NoRuleError(f"{op} of {names[0]!r}: {length} entries for {rows} rows", names)
        return by_row


class _Recording:
    """Takes for rows what their number divides, and notes it."""

    def __init__(self) -> None:
        self.calls: dict[Site, list[tuple[int, bool]]] = {}

    def is_rows(
        self, op: str, names: Sequence[str], length: int, rows: int, has_rule: bool = True
    ) -> bool:
        taken = has_rule and length > 0 and length % rows == 0
        for name in names:
            self.calls.setdefault((op, name), []).append((length, taken))
        return taken

    def not_by_row(self, names: Sequence[str]) -> NoRuleError:
        """What is wrong where an output made from `names` is one for each tenant, not each row."""
        origins = {origin(name) for name in names}
        for (op, name), calls in self.calls.items():
            if origin(name) in origins and not all(taken for _, taken in calls):
                what = f"{op} of {name!r}: there is no rule for it"
                return NoRuleError(what, [name])
        return NoRuleError(f"the output, of {names[0]!r}, has no rows", names)


def tried(bound: BoundModel, example: Together) -> Plan:
    """The plan for inputs like the rows of `example`; it says in the log what has to run alone."""
    reasons: dict[str, str] = {}
    names = []
    for name, tensor in bound.base.items():
        if tensor.is_floating_point():
            names.append(name)
        elif not name.endswith("num_batches_tracked"):
            reasons[name] = f"it is {tensor.dtype}"
    sites: dict[Site, bool] = {}
    heads: frozenset[str] = frozenset()
    agreed = False
    for rows in ROWS:
        without = dict(reasons)
        kept = list(names)
        first = _run(bound, example, rows[0], kept, without, frozenset())
        if first is None:
            continue
        recording, heads = first
        second = _run(bound, example, rows[1], kept.copy(), without.copy(), heads)
        if heads and second is None:
            heads = frozenset()
            second = _run(bound, example, rows[1], kept.copy(), without.copy(), heads)
        if second is None:
            continue
        sites, unclear = _merged(recording, second[0], rows)
        if rows != ROWS[-1] and MISTAKEN in unclear.values():
            continue
        reasons = without | {origin(name): f"{op}: {why}" for (op, name), why in unclear.items()}
        agreed = True
        break
    if not agreed:
        why = "the model's answers were not those of its tenants alone"
        reasons.update({name: why for name in names if name not in reasons})
    said = [(n, why) for n, why in reasons.items() if bound.base[n].is_floating_point()]
    if said:
        logger.warning(
            "%s: tenants that own %r%s run alone: %s",
            type(bound.model).__name__,
            said[0][0],
            f" or one of {len(said) - 1} others" if len(said) > 1 else "",
            said[0][1],
        )
    return Plan(sites, heads, reasons)


def _run(
    bound: BoundModel,
    example: Together,
    rows: int,
    names: list[str],
    reasons: dict[str, str],
    heads: frozenset[str],
) -> tuple[_Recording, frozenset[str]] | None:
    """One run: what was noted, and what may be heads; None where answers are wrong.

    Tensors without a rule go from `names` to `reasons`; with `heads`, which then have other widths,
    there are to be none.
    """
    inputs = example.made_up(rows)
    counts = [rows // 2, 1, rows - rows // 2 - 1]
    for _ in range(ATTEMPTS):
        owns = _made_up(bound, names, heads)
        recording = _Recording()
        layout = Layout(counts, recording, bound.products, bound.device)
        weights = {
            name: TenantTensor.of(PerTenant((name,), bound.base[name], own, layout))
            for name, own in owns.items()
        }
        try:
            with _noted(bound, recording, rows):
                output = bound.forward(inputs, weights)
            if isinstance(output, TenantTensor):
                raise recording.not_by_row(output.per_tenant.names)
        except NoRuleError as error:
            gone = {origin(name) for name in error.names} & set(names)
            if heads:
                return None
            if not gone:
                raise
            reasons.update({name: str(error) for name in names if name in gone})
            names[:] = [name for name in names if name not in gone]
            continue
        del weights
        agrees = _agrees(bound, inputs, layout, owns, output)
        return (recording, _heads(layout, output)) if agrees else None
    return None


def _heads(layout: Layout, output: Tensor) -> frozenset[str]:
    """The tensors of the last linear layer, if the output is as wide: they may be its head."""
    if layout.last_product is None or layout.last_product[0].shape[-1] != output.shape[-1]:
        return frozenset()
    names = layout.last_product[1]
    return frozenset(names if all(name == origin(name) for name in names) else ())


def _agrees(
    bound: BoundModel,
    inputs: Together,
    layout: Layout,
    owns: dict[str, list[Own | None]],
    output: Tensor,
) -> bool:
    limit = TOLERANCES.get(bound.dtype, LOOSE)
    for place, (start, stop) in enumerate(layout.edges):
        dense = {
            name: own.dense(bound.base[name])
            for name, by_segment in owns.items()
            for own in [by_segment[place]]
            if own is not None
        }
        wanted = bound.forward(inputs.select(slice(start, stop)), dense)
        mine = output[start:stop]
        if mine.dim() == wanted.dim() and wanted.shape[-1] < mine.shape[-1]:
            mine = mine[..., : wanted.shape[-1]]
        if mine.shape != wanted.shape:
            return False
        if not bool((mine - wanted).abs().max() <= limit * wanted.abs().max()):
            return False
    return True


def _made_up(
    bound: BoundModel, names: Iterable[str], heads: frozenset[str]
) -> dict[str, list[Own | None]]:
    """Two tenants beside the base: one of low rank where that can be, one with other values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(bound.device, bound.dtype)

    owns: dict[str, list[Own | None]] = {}
    for name in names:
        base = bound.base[name]
        if name in heads:
            shapes = [(len(base) + 3, *base.shape[1:]), (1, *base.shape[1:])]
            values = [normal(*shape) * _size(base) for shape in shapes]
            mine = [Own(value, shape=value.shape) for value in values]
        else:
            factor = 1 + 0.1 * torch.rand(base.shape, generator=generator).to(base.device)
            shift = 0.05 * _size(base) * normal(*base.shape)
            # A variance is to stay one.
            value = base * factor if name.endswith("running_var") else base * factor + shift
            mine = [Own(value.to(base.dtype))] * 2
            if base.dim() == 2:
                up, down = normal(len(base), 2), normal(2, base.shape[1])
                mine[0] = Own(term=LowRank(down, up, 0.1 * _size(base)))
        owns[name] = [mine[0], None, mine[1]]
    return owns


def _size(tensor: Tensor) -> float:
    """The root of the mean square; 0.1 of zeros."""
    size = float(torch.linalg.vector_norm(tensor.double())) / max(tensor.numel(), 1) ** 0.5
    return size if size > 0 else 0.1


def _merged(
    first: _Recording, second: _Recording, rows: tuple[int, int]
) -> tuple[dict[Site, bool], dict[Site, str]]:
    """Which operands had as many entries for each row in both runs, and which none."""
    sites: dict[Site, bool] = {}
    unclear: dict[Site, str] = {}
    for site in first.calls.keys() | second.calls.keys():
        pair = first.calls.get(site, []), second.calls.get(site, [])
        if len(pair[0]) != len(pair[1]):
            unclear[site] = "is called of another number of times with other rows"
            continue
        kinds = set()
        for (one, one_taken), (other, other_taken) in zip(*pair, strict=True):
            by_row, fixed = one * rows[1] == other * rows[0], one == other
            if {one_taken, other_taken} != {by_row}:
                unclear[site] = MISTAKEN
            kinds.add(by_row if by_row or fixed else None)
        if len(kinds) != 1 or None in kinds:
            unclear.setdefault(site, "its operand's first axis is not always the rows'")
        else:
            sites[site] = kinds == {True}
    return sites, unclear


@contextmanager
def _noted(bound: BoundModel, recording: _Recording, rows: int) -> Iterator[None]:
    """Note the first axis of what each module returns, for adapters after it."""

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) and output else output
            if isinstance(y, Tensor) and y.dim():
                recording.is_rows("adapter", (name,), len(y), rows)

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in bound.modules.items() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_takes(bound: BoundModel, inputs: Together, where: str) -> None:
    """FleetError unless the base's model can be run on the first row."""
    try:
        bound.forward(inputs.select(slice(0, 1)))
    except (MemoryError, torch.OutOfMemoryError, FleetError):
        raise
    except Exception as error:
        given = [*inputs.args, *inputs.kwargs.values()]
        shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in given)
        raise FleetError(f"{where}: the model does not take inputs {shapes}: {error}") from error
