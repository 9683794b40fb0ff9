"""A weight of which the tenants of a batch have values of their own, and the batch's segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.products import Products


class NoRuleError(FleetError):
    """An operation of the model that cannot be computed for several tenants at once.

    `names` are the tensors it was asked of; tenants that own one of them run alone.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


@runtime_checkable
class Sites(Protocol):
    """Says of a call which axis its operand's first one is."""

    def is_rows(
        self, op: str, names: Sequence[str], length: int, rows: int, has_rule: bool = True
    ) -> bool:
        """Whether `length` entries are `length / rows` for each row, or nothing to do with rows.

        `has_rule`: whether the operation could be computed if they are.
        """
        ...


@dataclass
class Layout:
    """The rows of a batch, in segments: those of one tenant lie together.

    `nodes` are their tenants' in the store. `products` multiplies with the base's weights.
    `last_product` is what the last linear layer with a tenant's weights made, and their names.
    """

    counts: Sequence[int]
    sites: Sites
    products: Products
    device: torch.device
    nodes: Sequence[str] = ()
    rows: int = field(init=False)
    last_product: tuple[Tensor, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        self.rows = sum(self.counts)

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """(start, stop) of each segment, in rows."""
        stops, edges = 0, []
        for count in self.counts:
            edges.append((stops, stops + count))
            stops += count
        return edges

    @cached_property
    def segment_of_row(self) -> Int64[Tensor, " rows"]:
        counts = torch.tensor(self.counts)
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.device)


@dataclass(frozen=True)
class LowRank:
    """`scale · up @ down`."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    scale: float


@dataclass(frozen=True)
class Own:
    """A tenant's value of a tensor: `value` (None: the base's; it may be several tenants'), changed
    by `decode`, and a product of low rank added."""

    value: Tensor | None = None
    term: LowRank | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    shape: torch.Size | None = None  # where it is not the base's

    @property
    def is_base(self) -> bool:
        """Whether it is the base's value."""
        return self.value is None and self.term is None and self.decode is None

    def root(self, base: Tensor) -> Tensor:
        """The value without what is added."""
        value = base if self.value is None else self.value
        return (value if self.decode is None else self.decode(value)).to(base.dtype)

    def dense(self, base: Tensor) -> Tensor:
        """The whole value."""
        root = self.root(base)
        if self.term is None:
            return root
        delta = self.term.up.to(root.dtype) @ self.term.down.to(root.dtype)
        return torch.add(root, delta.view(root.shape), alpha=self.term.scale)


@dataclass
class PerTenant:
    """A tensor of which each segment's tenant may have a value of its own; None: the base's.

    `names` are of the tensors of the model that it is made from, with what they went through.
    """

    names: tuple[str, ...]
    base: Tensor
    owns: Sequence[Own | None]
    layout: Layout

    @property
    def device(self) -> torch.device:
        return self.base.device

    def dense(self, segment: int) -> Tensor:
        """A segment's value."""
        own = self.owns[segment]
        return self.base if own is None else own.dense(self.base)

    @property
    def widths_differ(self) -> bool:
        """Whether a segment's value has another shape than the base's."""
        return any(own is not None and own.shape is not None for own in self.owns)

    def roots(self) -> list[tuple[int, int, Callable[[], Tensor]]]:
        """Runs of segments (first, last) that one product can serve, and how to get its weight."""
        return self._runs(lambda own: own.decode is not None, Own.root)

    def values(self) -> list[tuple[int, int, Callable[[], Tensor]]]:
        """Runs of segments (first, last) of one whole value, and how to get it."""
        return self._runs(lambda own: own.decode is not None or own.term is not None, Own.dense)

    def _runs(
        self, apart: Callable[[Own], bool], get: Callable[[Own, Tensor], Tensor]
    ) -> list[tuple[int, int, Callable[[], Tensor]]]:
        runs: list[tuple[int, int, Callable[[], Tensor]]] = []
        before: object = None
        for place, own in enumerate(self.owns):
            if own is None or not (apart(own) or own.value is not None):
                own, key = Own(), "base"
            else:
                key = place if apart(own) else id(own.value)
            if runs and key == before:
                runs[-1] = (runs[-1][0], place + 1, runs[-1][2])
            else:
                runs.append((place, place + 1, lambda own=own: get(own, self.base)))
            before = key
        return runs

    @cached_property
    def stacked(self) -> Shaped[Tensor, "segments *shape"]:  # noqa: UP037
        """The value of each segment."""
        return torch.stack([self.dense(segment) for segment in range(len(self.owns))])

    @cached_property
    def by_row(self) -> Shaped[Tensor, "rows *shape"]:  # noqa: UP037
        """The value of each row."""
        return self.stacked.index_select(0, self.layout.segment_of_row)
