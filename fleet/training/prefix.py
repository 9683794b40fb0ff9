"""What layers that all models share and freeze make of the images, computed once for each image."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Int
from torch import Tensor

from fleet.training.feed import Feed
from fleet.training.step import Kernel, Outcome, Replay, ones
from inputs.budget import format_bytes
from inputs.data import ImageSet

logger = logging.getLogger(__name__)

ROWS = 64
# Of the largest feature: sums over rows may be in another order where there are others.
TOLERANCE = 1e-4

Named = Mapping[str, Tensor]
Step = tuple[Tensor, Tensor, Sequence[Tensor]]


class FeatureStore:
    """The features of whole sets of images, as far as they fit into `room` bytes.

    Where the first layers are frozen, the same in all models and look at nothing but the image,
    a step goes on from here and reads no images. Features are computed in the order of the images
    and always in batches of 64, so that they do not depend on who trains.
    """

    def __init__(self, kernel: Kernel, room: int) -> None:
        self._kernel, self._room, self._lock = kernel, room, Lock()
        self._sets: dict[int, list[Tensor] | None] = {}
        self._steps: dict[tuple[int, ...], _Resumable | None] = {}

    def forget(self) -> None:
        """The shared tensors are others now."""
        self._sets.clear()
        self._steps.clear()

    def knows(self, images: ImageSet, models: int, rows: int) -> bool:
        """Whether a step of so many models and rows can go on from features."""
        return self._steps.get((id(images), models, rows)) is not None

    def learn(
        self,
        feed: Feed,
        stacked: Named,
        shared: Named,
        batch: Step,
        indices: Int[Tensor, "models rows"],
    ) -> None:
        """Get ready for steps like this one, where that is possible: looked at once for each."""
        with self._lock:
            key = id(feed.images), *batch[0].shape[:2]
            if key not in self._steps:
                self._steps[key] = self._fitting(
                    feed.images, stacked, shared, batch, indices, feed.classes
                )

    def _fitting(
        self,
        images: ImageSet,
        stacked: Named,
        shared: Named,
        batch: Step,
        indices: Tensor,
        classes: int,
    ) -> _Resumable | None:
        """What runs such steps, where it can go on from features that are kept."""
        pixels, targets, drawn = batch
        if id(images) not in self._sets:
            self._sets[id(images)] = self._computed(images, stacked, shared, pixels, classes)
        kept = self._sets[id(images)]
        replay = self._kernel.replay(stacked, shared, pixels, targets, drawn)
        if kept is None or replay is None:
            return None
        found = replay.features(*stacked.values(), *shared.values(), pixels, targets, *drawn)
        step = _Resumable(replay, found)
        wanted = step.gathered(kept, indices.flatten())
        fits = wanted is not None and all(map(_close, found, wanted))
        return step if fits else None

    def step(
        self, images: ImageSet, tensors: Sequence[Tensor], indices: Int[Tensor, "models rows"]
    ) -> Outcome:
        """The outcome of a step on these images; `tensors` are the kernel's, of pixels any."""
        kept, step = self._sets[id(images)], self._steps[(id(images), *indices.shape)]
        assert kept is not None
        assert step is not None
        features = step.gathered(kept, indices.flatten())
        assert features is not None
        return self._kernel.resumed(step.replay, features, tensors)

    def _computed(
        self, images: ImageSet, stacked: Named, shared: Named, pixels: Tensor, classes: int
    ) -> list[Tensor] | None:
        one = {name: tensor[:1] for name, tensor in stacked.items()}
        kept: list[Tensor] = []
        for start in range(0, len(images), ROWS):
            numbers = torch.arange(start, start + ROWS).clamp(max=len(images) - 1)
            own = images.normalise(images.pixels(numbers)).to(pixels.device, pixels.dtype)
            own = own[None]
            if pixels.stride(2) == 1:
                own = own.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
            targets = own.new_zeros(1, ROWS, classes)
            drawn = [ones(d, own.device) for d in self._kernel.draws(own, targets, one, shared)]
            replay = self._kernel.replay(one, shared, own, targets, drawn)
            if replay is None or not replay.prefix_products:
                return None
            every = replay.features(*one.values(), *shared.values(), own, targets, *drawn)
            found = [f for f, at in zip(every, replay.layouts, strict=True) if at is not None]
            if not kept:
                if any(ROWS not in feature.shape[:2] for feature in found):
                    return None
                wanted = sum(f.numel() * f.element_size() for f in found) // ROWS * len(images)
                if wanted > self._room:
                    text = format_bytes(wanted)
                    logger.info("features of %s take %s: not kept", images.name, text)
                    return None
                kept = [f.new_empty(len(images), f.numel() // ROWS) for f in found]
            for place, feature in zip(kept, found, strict=True):
                place[start : start + ROWS] = feature.reshape(ROWS, -1)[: len(place) - start]
        return kept


@dataclass(frozen=True)
class _Resumable:
    """Steps of one shape, and what their first part made once; of that only what is the same for
    all images is looked at."""

    replay: Replay
    made: Sequence[Tensor]

    def gathered(
        self, kept: Sequence[Tensor], indices: Int[Tensor, " rows"]
    ) -> list[Tensor] | None:
        """The features of these images as the recording has them; None where they do not fit."""
        stream, results = iter(kept), []
        for layout, made in zip(self.replay.layouts, self.made, strict=True):
            feature = None if layout is None else next(stream, None)
            if layout is None or feature is None:
                if layout is not None:
                    return None
                results.append(made)
                continue
            sizes = zip(layout.shape, layout.stride, strict=True)
            overlaps = any(size > 1 and stride == 0 for size, stride in sizes)
            if overlaps or math.prod(layout.shape) != len(indices) * feature.shape[1]:
                return None
            result = torch.empty_strided(
                layout.shape, layout.stride, dtype=layout.dtype, device=feature.device
            )
            results.append(result.copy_(feature.index_select(0, indices).view(layout.shape)))
        return results if next(stream, None) is None else None


def _close(found: Tensor, kept: Tensor) -> bool:
    limit = TOLERANCE * float(found.abs().max())
    return torch.allclose(found, kept, rtol=0, atol=limit)


def plain(feeds: Sequence[Feed]) -> bool:
    """Whether all look at the same images, and at nothing but them."""
    return all(feed.plain and feed.images is feeds[0].images for feed in feeds)
