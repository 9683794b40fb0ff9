"""Many models over images in one pass, chunk by chunk within a budget: logits and scores."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fleet import Group, refuse_training
from fleet.alike import places
from inputs.budget import format_bytes
from inputs.data import ImageSet
from soups.activations import forward_bytes
from soups.candidates import Models, Weights
from soups.errors import SoupError

# Activations of all models together on a CPU: more images at a time are not faster.
CACHED_BYTES = 64 << 20
LEAST_IMAGES = 16

# On a CPU a Group beats running models in turn where a quarter of the tensors are shared from the
# first on, and where recording pays: it costs about as much as half a second of plain running and
# four batches. A second of that makes about so many bytes of activations.
WORTH_SHARING = 0.25
WORTH_RECORDING_BYTES = 256 << 20
WORTH_RECORDING_BATCHES = 8

log = logging.getLogger(__name__)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


@torch.inference_mode()
def predict(
    model: nn.Module, images: ImageSet, *, batch_size: int
) -> Float[Tensor, "rows classes"]:
    """The model's logits on `images`, in order, in eval mode, on the CPU in fp32."""
    device = device_of(model)
    training = model.training
    model.eval()
    logits = [model(batch.to(device)).float().cpu() for batch, _ in images.batches(batch_size)]
    model.train(training)
    return torch.cat(logits)


@dataclass(frozen=True)
class Scores:
    """Of each candidate on each image: whether it is right, and its cross-entropy in nats."""

    right: Bool[Tensor, "candidates rows"]
    losses: Float[Tensor, "candidates rows"]

    @classmethod
    def of(
        cls, logits: Float[Tensor, "candidates rows classes"], labels: Int[Tensor, " rows"]
    ) -> Scores:
        """The scores that logits give; where NaN or +inf leave no loss, none is right."""
        losses = torch.stack([F.cross_entropy(own, labels, reduction="none") for own in logits])
        return cls((logits.argmax(2) == labels) & ~losses.isnan(), losses)

    @property
    def accuracies(self) -> Float64[np.ndarray, " candidates"]:
        """The share of images that each candidate has right."""
        return self.right.double().mean(1).numpy()

    @property
    def mean_losses(self) -> Float64[np.ndarray, " candidates"]:
        """The mean cross-entropy of each candidate, in nats."""
        return self.losses.double().mean(1).numpy()


@dataclass(frozen=True)
class Chunk:
    """Models that are in memory together, as their numbers among all of a pass."""

    members: list[int]
    images: int
    _run: Callable[[Tensor], Tensor]

    def logits(
        self, images: ImageSet
    ) -> Iterator[tuple[slice, Float[Tensor, "models rows classes"]]]:
        """Rows of the set, in order, and every model's logits on them in fp32."""
        start = 0
        size = even_batch(len(images), self.images)
        for batch, labels in images.batches(size):
            rows = slice(start, start := start + len(labels))
            # All batches have one size, so that what was recorded for it serves all of them.
            filled = torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
            yield rows, self._run(filled)[:, : len(batch)]


class Passes:
    """Runs models of one architecture over images, as many at once as fit.

    `room` says how many bytes there are now; `batch_size` is how many images one model is given at
    a time, at most. Models run as a Group where that is faster than one after another: on a GPU,
    where they share their first layers, and where there are batches enough to record the
    computation once and replay it.
    """

    def __init__(self, model: nn.Module, *, batch_size: int, room: Callable[[], int]) -> None:
        self.model, self.batch_size, self.room = model, batch_size, room
        self._names = [*model.state_dict()]
        self._places = places(model)
        self.least_image_bytes = 0
        self._image_bytes: dict[torch.Size, int] = {}
        self._group: Group | None = None
        self._run: Callable[[Tensor], Tensor] | None = None
        self._buffers: tuple[Tensor, ...] = ()
        self._together = 0
        self._batches: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()

    def begin(self) -> None:
        """Forget what was run before, so that how models are run depends on what follows alone."""
        self.release()
        self._batches.clear()
        self._bytes.clear()

    def chunks(
        self,
        models: Models,
        sets: Sequence[ImageSet],
        *,
        kept: int = 0,
        refuse: bool = True,
    ) -> Iterator[Chunk]:
        """The models, family by family, in chunks that fit with `kept` bytes of results for each.

        Each chunk is run on all of `sets`, images of one shape, and is to be used before the next
        is asked for. Raises SoupError where the room is too small for one model and one image
        (without `refuse` they then run one by one, on few images), and FleetError for a model in
        train mode.
        """
        refuse_training(self.model)
        for members, batch in self.parts(models, sets, kept=kept, refuse=refuse):
            weights = models.weights(members, at_once=len(members) * batch, reuse=self._buffers)
            yield self._chunk(members, batch, weights)
            del weights  # so that the next may take its place

    def parts(
        self,
        models: Models,
        sets: Sequence[ImageSet],
        *,
        kept: int = 0,
        refuse: bool = True,
    ) -> Iterator[tuple[list[int], int]]:
        """The members of each chunk and their images at a time, counted as if they were run."""
        for family in models.families():
            shared, own = models.bytes_of(family)
            need = Need(shared, own, self.image_bytes(sets[0]), kept)
            best = partial(
                images_at_once,
                image=need.image,
                batch_size=self.batch_size,
                device=device_of(self.model).type,
            )
            together, batch = fit(need, self.room(), len(family), best, refuse=refuse)
            for members in evenly(family, together):
                if len(members) != self._together:
                    self.release()
                self._together = len(members)
                rows = sum(map(len, sets))
                self._batches[len(members)] += -(-rows // batch)
                self._bytes[len(members)] += len(members) * rows * need.image
                yield members, batch

    def image_bytes(self, images: ImageSet) -> int:
        """What one model needs for one image: its activations, measured once for each shape.

        `least_image_bytes`, where a run has measured that it takes more.
        """
        pixels, _ = next(images.subset(torch.arange(1)).batches(1))
        if pixels.shape not in self._image_bytes:
            measured = forward_bytes(self.model, pixels.to(device_of(self.model)))
            self._image_bytes[pixels.shape] = measured
        return max(self._image_bytes[pixels.shape], self.least_image_bytes)

    def release(self) -> None:
        """Give the memory of the last chunk back, which cannot be used any more."""
        self._group, self._run, self._buffers, self._together = None, None, (), 0

    @property
    def in_memory(self) -> int:
        """Bytes of weights that the last chunk holds."""
        kept = self._group.kept_bytes if self._group is not None else 0
        return kept + sum(tensor.nbytes for tensor in self._buffers)

    def _chunk(self, members: list[int], batch: int, weights: Weights) -> Chunk:
        """These models, ready to run."""
        self._buffers = weights.buffers
        if self._group_pays(len(members), weights):
            if self._group is None:
                self._group = Group(self.model, weights.stacked, shared=weights.shared)
            else:
                self._group.load(weights.stacked, weights.shared)
            self._run = self._group
        else:
            self._group = None
            states = [
                self._state(weights, m) for m in range(len(members) if weights.stacked else 1)
            ]
            self._run = partial(_run_in_turn, self.model, states, len(members))
            if len(members) > 1:
                # One model at a time: no more activations than a group would have.
                batch = min(self.batch_size, 2 * len(members) * batch)
        return Chunk(members, batch, self._logits)

    def _state(self, weights: Weights, m: int) -> dict[str, Tensor]:
        """One model's tensors, in every place that the model has for them."""
        state = weights.shared | {name: tensor[m] for name, tensor in weights.stacked.items()}
        return {place: state[name] for place, name in self._places.items() if name in state}

    @torch.inference_mode()
    def _logits(self, images: Tensor) -> Tensor:
        assert self._run is not None, "the models of this chunk are gone"
        return self._run(images.to(device_of(self.model))).float()

    def _group_pays(self, models: int, weights: Weights) -> bool:
        if not weights.stacked:
            return False
        worth_recording = (
            self._bytes[models] >= WORTH_RECORDING_BYTES
            and self._batches[models] >= WORTH_RECORDING_BATCHES
        )
        if models == 1:
            return worth_recording
        first = next(i for i, name in enumerate(self._names) if name in weights.stacked)
        return (
            device_of(self.model).type != "cpu"
            or first >= WORTH_SHARING * len(self._names)
            or worth_recording
        )


def _run_in_turn(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], models: int, images: Tensor
) -> Tensor:
    """One model after another; one state alone is that of all models."""
    # Tied tensors are given in all their places: finding them takes as long as a small model.
    logits = [functional_call(model, dict(s), (images,), tie_weights=False) for s in states]
    return torch.stack(logits).expand(models, *logits[0].shape)


@dataclass(frozen=True)
class Need:
    """Bytes that a pass takes: of shared weights, each model's own, a model on an image, results.

    Several models at once take twice as much: a Group keeps weights in the form that it needs, and
    puts what models give side by side.
    """

    shared: int
    own: int
    image: int
    kept: int = 0

    def __call__(self, models: int, images: int) -> int:
        twice = 1 if models == 1 else 2
        return self.shared + models * (twice * (self.own + images * self.image) + self.kept)


def images_at_once(models: int, *, image: int, batch_size: int, device: str) -> int:
    """How many images are best run at a time: on a CPU, as many as stay near its caches."""
    if device != "cpu":
        return batch_size
    return min(batch_size, max(LEAST_IMAGES, CACHED_BYTES // max(models * image, 1)))


def fit(
    need: Need, room: int, models: int, images: Callable[[int], int], *, refuse: bool = True
) -> tuple[int, int]:
    """How many models run at once, and on how many images; SoupError where not even one fits.

    `images` says how many are best for a number of models; where that is too much even for one
    model, it gets as many as fit. Without `refuse`, one model on few images where nothing fits.
    """
    least = need(1, 1)
    if least > room:
        if not refuse:
            log.warning(
                "memory_budget: %s are left for evaluating and %s are needed; going on all the "
                "same, one model at a time",
                format_bytes(max(room, 0)),
                format_bytes(least),
            )
            return 1, min(LEAST_IMAGES, images(1))
        raise SoupError(
            f"memory_budget: {format_bytes(max(room, 0))} are left for evaluating, and one "
            f"candidate on one image needs {format_bytes(least)}; raise the budget by at least "
            f"{format_bytes(least - room)}"
        )
    fitting = [m for m in range(1, models + 1) if need(m, images(m)) <= room]
    if fitting:
        return fitting[-1], images(fitting[-1])
    return 1, max(b for b in range(1, images(1) + 1) if need(1, b) <= room)


def evenly(members: Sequence[int], most: int) -> list[list[int]]:
    """The members in order, in as few parts of at most `most` as will do, of almost one size."""
    parts = -(-len(members) // most)
    return [part.tolist() for part in np.array_split(np.asarray(members), parts)]


def even_batch(rows: int, most: int) -> int:
    """The size of batches of at most `most` that are as few as can be and almost equal."""
    return -(-rows // -(-rows // most))


def evaluate(
    chunks: Callable[[Models, Sequence[ImageSet]], Iterable[Chunk]],
    models: Models,
    images: ImageSet,
) -> Scores:
    """The score of every model on every image; the weights of a chunk are made once.

    `chunks` are those of a session, or of `Passes`.
    """
    right = torch.empty(len(models), len(images), dtype=torch.bool)
    losses = torch.empty(len(models), len(images))
    for chunk in chunks(models, [images]):
        for rows, logits in chunk.logits(images):
            scores = Scores.of(logits, images.labels[rows].to(logits.device))
            right[chunk.members, rows] = scores.right.cpu()
            losses[chunk.members, rows] = scores.losses.cpu()
    return Scores(right, losses)
