"""The rows of several tenants through the model: all at once where that can be, else tenant by
tenant."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.bound import Adapters, BoundModel
from fleet.serving.catalogue import Catalogue, Held, Tenant
from fleet.serving.features import FeatureCache
from fleet.serving.inputs import Asked, InputReader, Kind, Together
from fleet.serving.owned import Layout, NoRuleError, Own, PerTenant
from fleet.serving.sides import Sides
from fleet.serving.tenant_tensor import TenantTensor
from fleet.serving.trial import Plan, tried

logger = logging.getLogger(__name__)

EXAMPLES = 4


@dataclass(frozen=True)
class Work:
    """Requests of one kind, each tenant's together, and their tenants' parts in memory."""

    asked: Sequence[Asked]
    tenants: Sequence[Tenant]
    held: Held
    catalogue: Catalogue


@dataclass
class Segment:
    """What one tenant is asked, and what it owns."""

    tenant: Tenant
    asked: list[Asked]
    owns: Mapping[str, Own]
    answers: list[Tensor] | None = None


@dataclass(frozen=True)
class Piece:
    """Segments that go through the model at once."""

    work: Work
    plan: Plan
    segments: Sequence[Segment]


class Answers:
    """Answers requests from their tenants' parts in memory; one caller at a time."""

    def __init__(
        self, bound: BoundModel, reader: InputReader, features: FeatureCache | None
    ) -> None:
        self.alone = 0
        self._bound = bound
        self._reader = reader
        self._features = features
        self._sides = Sides(bound)
        self._plans: dict[Kind, Plan] = {}
        self._said: set[str] = set()

    @property
    def at_once(self) -> int:
        """How many batches gain from being computed at once."""
        return self._sides.count if self._features is None else 1

    def close(self) -> None:
        """End the threads."""
        self._sides.close()

    def of(self, works: Sequence[Work]) -> list[list[Tensor]]:
        """Logits of each request, in the order of the works and theirs.

        A single work is halved where there are two sides, several are computed side by side.
        """
        pieces: list[Piece] = []
        segments = [_segments(work) for work in works]
        for work, mine in zip(works, segments, strict=True):
            plan = self._plan(work.asked)
            together = [segment for segment in mine if _may_join(segment, plan)]
            rows = [len(segment.asked) for segment in together]
            whole = len(works) > 1 or self.at_once == 1
            parts = [together] if whole else self._sides.halves(together, rows)
            pieces += [Piece(work, plan, part) for part in parts if part]
        self._sides.run(self._join, pieces)
        for work, mine in zip(works, segments, strict=True):
            for segment in mine:
                if segment.answers is None:
                    self._answer_alone(segment, work.held)
        return [[a for segment in mine for a in segment.answers or ()] for mine in segments]

    def _plan(self, asked: Sequence[Asked]) -> Plan:
        """What may differ within a batch of such inputs: tried when they are first seen."""
        kind = tuple((name, dtype, (len(shape),)) for name, dtype, shape in asked[0].kind)
        if kind not in self._plans:
            example = self._reader.together(asked[:EXAMPLES])
            self._bound.learn_tail(example)
            self._plans[kind] = tried(self._bound, example)
            self._sides.learn(example)
        return self._plans[kind]

    def _join(self, bound: BoundModel, piece: Piece) -> None:
        """The rows of all segments at once; no answers where an operation has no rule."""
        segments, held, plan = piece.segments, piece.work.held, piece.plan
        counts = [len(segment.asked) for segment in segments]
        nodes = [segment.tenant.variant.node for segment in segments]
        layout = Layout(counts, plan, bound.products, bound.device, nodes)
        weights: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for segment in segments for name in segment.owns):
            owns = [segment.owns.get(name) for segment in segments]
            weights[name] = TenantTensor.of(PerTenant((name,), bound.base[name], owns, layout))
        adapters = _adapters([segment.tenant for segment in segments], held)
        inputs = self._reader.together([one for segment in segments for one in segment.asked])
        bound.learn_tail(inputs)
        try:
            if self._features is None:
                found = bound.forward(inputs, weights, adapters, layout)
            else:
                catalogue = piece.work.catalogue
                found = self._features.forward(inputs, weights, adapters, layout, catalogue)
        except NoRuleError as error:
            self._say(str(error))
            return
        rows = iter(found.cpu().unbind(0))
        for segment in segments:
            width = self._width(segment.owns, plan)
            segment.answers = [_cut(next(rows), one, inputs, width) for one in segment.asked]

    def _width(self, owns: Mapping[str, Own], plan: Plan) -> int | None:
        """The width of a tenant's head, where heads may differ."""
        for name in plan.heads:
            shape = owns[name].shape if name in owns else None
            return (self._bound.base[name].shape if shape is None else shape)[0]
        return None

    def _answer_alone(self, segment: Segment, held: Held) -> None:
        """The rows of one tenant, with its decoded weights."""
        bound, tenant = self._bound, segment.tenant
        weights = {name: own.dense(bound.base[name]) for name, own in segment.owns.items()}
        inputs = self._reader.together(segment.asked)
        bound.learn_tail(inputs)
        layout = Layout([len(segment.asked)], _Alone(), bound.products, bound.device)
        try:
            found = bound.forward(inputs, weights, _adapters([tenant], held), layout)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise FleetError(
                f"tenant {tenant.variant.name!r}: the model does not run with its weights: {error}"
            ) from error
        rows = found.cpu().unbind(0)
        self.alone += len(rows)
        segment.answers = [
            _cut(row, one, inputs, None) for row, one in zip(rows, segment.asked, strict=True)
        ]

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s: tenants run alone: %s", type(self._bound.model).__name__, what)


class _Alone:
    """Rows of a single tenant: all that there is is its."""

    def is_rows(
        self, op: str, names: Sequence[str], length: int, rows: int, has_rule: bool = True
    ) -> bool:
        return True


def _segments(work: Work) -> list[Segment]:
    segments: list[Segment] = []
    for one, tenant in zip(work.asked, work.tenants, strict=True):
        if not segments or segments[-1].tenant is not tenant:
            segments.append(Segment(tenant, [], tenant.owns(work.held)))
        segments[-1].asked.append(one)
    return segments


def _may_join(segment: Segment, plan: Plan) -> bool:
    if plan.reasons and not plan.reasons.keys().isdisjoint(segment.owns):
        return False
    return not any(
        own.shape is not None and name not in plan.heads for name, own in segment.owns.items()
    )


def _adapters(tenants: Sequence[Tenant], held: Held) -> Adapters:
    found = [tenant.adapters(held) for tenant in tenants]
    modules = dict.fromkeys(module for one in found for module in one)
    return {module: [one.get(module) for one in found] for module in modules}


def _cut(row: Tensor, asked: Asked, inputs: Together, width: int | None) -> Tensor:
    """A request's own part of what is as wide as the widest head and as long as the longest."""
    if width is not None:
        row = row[..., :width]
    if asked.tokens is not None and row.dim() > 1 and len(row) == inputs.tokens:
        row = row[: asked.tokens]
    return row.clone()
