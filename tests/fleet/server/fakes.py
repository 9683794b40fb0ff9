"""An engine with the interface of `fleet.tenants.Tenants`, and what goes around it in tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.server.images import Preprocessing
from fleet.server.limits import Limits
from fleet.server.model_inputs import ImageInputs, ModelInputs
from fleet.server.service import Service
from fleet.server.tokens import Tokens

SHAPE = (1, 2, 2)
IMAGE = [[[0.0, 1.0], [2.0, 3.0]]]


@dataclass
class Statistics:
    hits: int = 3
    seconds_reading: float = 0.5
    tiers: tuple[str, ...] = ("device",)


@dataclass
class FakeTenants:
    """Answers [sum · scale, 0, …] per image, where a variant's record says scale and classes."""

    variants: dict[str, Any] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)
    refreshes: int = 0
    broken: dict[str, Exception] = field(default_factory=dict)
    open: threading.Event = field(default_factory=threading.Event)
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.open.set()

    def predict(self, requests: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        self.batches.append([name for name, _ in requests])
        self.open.wait(20)
        for name, _ in requests:
            if name in self.broken:
                raise self.broken[name]
            if name not in self.variants:
                raise FleetError(f"no variant {name!r}; the nearest are 'secret'")
        return [self._logits(name, image) for name, image in requests]

    def prefetch(self, names: Sequence[str]) -> None:
        """All is there."""

    def refresh(self) -> None:
        self.refreshes += 1

    def _logits(self, name: str, image: Tensor) -> Tensor:
        variant = self.variants[name]
        logits = torch.zeros(variant.classes)
        logits[0] = image.sum() * variant.scale
        return logits


def variant(classes: int = 2, scale: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(classes=classes, scale=scale)


def image_inputs(max_pixels: int = 10_000) -> ImageInputs:
    return ImageInputs(Preprocessing(1, 2, (0.0,), (1.0,), max_pixels))


def service(
    engine: FakeTenants,
    limits: Limits | None = None,
    *,
    inputs: ModelInputs | None = None,
    read_tokens: Callable[[], Tokens] | None = None,
) -> Service:
    return Service(
        engine,
        lambda: engine.variants,
        inputs or image_inputs(),
        limits or Limits(),
        read_tokens=read_tokens,
    )
