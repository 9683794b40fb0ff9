"""What each model sees at each of its steps: made by its own recipe, read for all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fleet.augment import beta, draw_mirrored, draw_moves, move
from fleet.errors import FleetError
from fleet.training.draws import fill
from inputs.randomness import generator
from kernels.draws import Draw

if TYPE_CHECKING:
    from fleet.recipes import Recipe
    from inputs.data import ImageSet

Device = torch.device | str

# Images from this size on are looked for twice in a batch before they are decoded.
LARGE_IMAGE_BYTES = 1 << 14


@dataclass(frozen=True)
class Batch:
    """One step's images and soft targets of several models."""

    pixels: Float[Tensor, "models rows channels height width"]
    targets: Float[Tensor, "models rows classes"]


@dataclass(frozen=True)
class Epoch:
    """One epoch's draws of a model, cut into batches."""

    number: int
    indices: Sequence[Tensor]
    labels: Sequence[Tensor]
    moves: Sequence[Tensor]
    mirrored: Sequence[Tensor]


class Feed:
    """One model's batches in one phase of its training: a function of recipe, stream and step.

    Order, flips and shifts of an epoch are drawn by the names `{stream}/{epoch}/order`, `flip` and
    `shift`; noise and mixup by those of the step. So any step can be made without those before it.
    `shape` is that of one image; `plain` says that pixels depend on the image alone.

    Raises FleetError where *fit* has no batch, and for labels beyond `classes`.
    """

    def __init__(
        self, images: ImageSet, recipe: Recipe, classes: int, stream: str, epochs: int
    ) -> None:
        count, size = len(images), recipe.batch_size
        self.images, self.recipe, self.classes, self.stream = images, recipe, classes, stream
        self.steps_per_epoch = count // size if recipe.drop_last else -(-count // size)
        self.steps = epochs * self.steps_per_epoch
        self.plain = not (recipe.flip or recipe.shift or recipe.noise or recipe.mixup)
        if not self.steps_per_epoch:
            raise FleetError(
                f"the {images.name} split has {count} images, one batch takes {size}; lower "
                f"batch_size{', set drop_last: false' if count else ''} or enlarge {images.name}"
            )
        largest = int(images.labels.max())
        if largest >= classes:
            raise FleetError(
                f"the {images.name} split has a label {largest}, the model {classes} classes; "
                "give it a head for all classes"
            )
        self.shape = tuple(images.pixels(torch.zeros(1, dtype=torch.int64)).shape[1:])
        self._epoch: Epoch | None = None

    def rows(self, step: int) -> int:
        """How many images the batch has."""
        size = self.recipe.batch_size
        return min(size, len(self.images) - step % self.steps_per_epoch * size)

    def indices(self, step: int) -> Int[Tensor, " rows"]:
        """Which images of the set the batch has."""
        epoch, place = self.at(step)
        return epoch.indices[place]

    def labels(self, step: int) -> Int[Tensor, " rows"]:
        epoch, place = self.at(step)
        return epoch.labels[place]

    def at(self, step: int) -> tuple[Epoch, int]:
        """The epoch that a step belongs to, with its draws, and the place of its batch in it."""
        number, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = self._draw(number)
        return self._epoch, place

    def _draw(self, number: int) -> Epoch:
        recipe, count, size = self.recipe, len(self.images), self.recipe.batch_size
        name = f"{self.stream}/{number}"
        order = torch.randperm(count, generator=generator(recipe.seed, f"{name}/order"))
        moves: Sequence[Tensor] = ()
        mirrored: Sequence[Tensor] = ()
        if recipe.flip or recipe.shift:
            looked = torch.zeros(2, count, dtype=torch.int64)
            turned = torch.zeros(count, dtype=torch.bool)
            if recipe.shift:
                looked = draw_moves(count, recipe.shift, generator(recipe.seed, f"{name}/shift"))
            if recipe.flip:
                turned = draw_mirrored(count, generator(recipe.seed, f"{name}/flip"))
            moves, mirrored = looked.split(size, dim=1), turned.split(size)
        labels = self.images.labels[order]
        return Epoch(number, order.split(size), labels.split(size), moves, mirrored)


class Mix(NamedTuple):
    """Mixup of some models at a step: which they are, λ of each, and each image's partner."""

    models: list[int]
    weights: Float[Tensor, " models"]
    partners: Int[Tensor, "models rows"]


def load(
    feeds: Sequence[Feed],
    steps: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Batch:
    """The batches of models at their steps, all of them with equally many rows.

    Flips and shifts, then noise, then mixup, each as the model's recipe asks. A model's batch is
    the same, bit for bit, whichever others there are. On a GPU, what follows reading runs there.
    """
    rows = _rows(feeds, steps)
    mix = _mix(feeds, steps, rows)
    pixels = _read(feeds, steps, rows, torch.device(device))
    pixels = pixels.to(torch.promote_types(dtype, torch.float32))
    noisy = [m for m, feed in enumerate(feeds) if feed.recipe.noise]
    if noisy:
        noise = _noise([feeds[m] for m in noisy], [steps[m] for m in noisy], pixels)
        pixels = _changed(pixels, noisy, lambda own: own.add_(noise))
    if mix is not None:
        pixels = _changed(pixels, mix.models, lambda own: _mixed(own, mix))
    return Batch(pixels.to(dtype), _targets(feeds, steps, rows, mix, dtype).to(device))


def targets(
    feeds: Sequence[Feed],
    steps: Sequence[int],
    dtype: torch.dtype,
    device: Device = "cpu",
) -> Float[Tensor, "models rows classes"]:
    """The soft targets alone: λ·smooth(label) + (1 − λ)·smooth(partner's label).

    smooth(y) = (1 − ε)·one_hot(y) + ε / classes; λ is 1 without mixup.
    """
    rows = _rows(feeds, steps)
    return _targets(feeds, steps, rows, _mix(feeds, steps, rows), dtype).to(device)


def _rows(feeds: Sequence[Feed], steps: Sequence[int]) -> int:
    rows = {feed.rows(step) for feed, step in zip(feeds, steps, strict=True)}
    classes = {feed.classes for feed in feeds}
    if len(rows) != 1 or len(classes) != 1:
        raise FleetError(
            f"batches of {sorted(rows)} rows and {sorted(classes)} classes cannot be one; load "
            "models that have equally many"
        )
    return rows.pop()


def _mix(feeds: Sequence[Feed], steps: Sequence[int], rows: int) -> Mix | None:
    models = [m for m, feed in enumerate(feeds) if feed.recipe.mixup]
    if not models:
        return None
    request = Draw("uniform", (1 + rows,), 0.0, torch.float64)
    mine = [feeds[m] for m in models]
    drawn = _drawn(request, mine, [steps[m] for m in models], "mixup", "cpu")
    alphas = torch.tensor([feed.recipe.mixup for feed in mine], dtype=torch.float64)
    return Mix(models, beta(alphas, drawn[:, 0]), drawn[:, 1:].argsort(dim=1, stable=True))


def _drawn(
    request: Draw, feeds: Sequence[Feed], steps: Sequence[int], what: str, device: Device
) -> Tensor:
    seeds = [feed.recipe.seed for feed in feeds]
    streams = [f"{feed.stream}/{what}" for feed in feeds]
    return fill([request], seeds, streams, steps, device)[0]


def _read(
    feeds: Sequence[Feed], steps: Sequence[int], rows: int, device: torch.device
) -> Float[Tensor, "models rows channels height width"]:
    """Normalised images, flipped and shifted: every set is read once."""
    sets = {id(feed.images): feed.images for feed in feeds}
    if len(sets) == 1:
        return _read_one(feeds, steps, rows, device)
    pixels: Tensor | None = None
    for identity in sets:
        places = [m for m, feed in enumerate(feeds) if id(feed.images) == identity]
        mine = _read_one([feeds[m] for m in places], [steps[m] for m in places], rows, device)
        if pixels is None:
            pixels = mine.new_empty(len(feeds), *mine.shape[1:])
        pixels[places] = mine
    assert pixels is not None
    return pixels


def _read_one(
    feeds: Sequence[Feed], steps: Sequence[int], rows: int, device: torch.device
) -> Float[Tensor, "models rows channels height width"]:
    images = feeds[0].images
    found = [feed.at(step) for feed, step in zip(feeds, steps, strict=True)]
    indices = torch.cat([epoch.indices[place] for epoch, place in found])
    pixels = _pixels(images, indices, feeds).to(device, non_blocking=True)
    pixels = pixels.view(len(feeds), rows, *pixels.shape[1:])
    moving = [m for m, (epoch, _) in enumerate(found) if epoch.moves]
    if moving:
        batches = [found[m] for m in moving]
        moves = torch.cat([epoch.moves[place] for epoch, place in batches], dim=1).to(device)
        mirrored = torch.cat([epoch.mirrored[place] for epoch, place in batches]).to(device)
        pixels = _changed(
            pixels,
            moving,
            lambda own: move(own.flatten(0, 1), moves, mirrored).view(own.shape),
        )
    return images.normalise(pixels.flatten(0, 1)).view(pixels.shape)


def _pixels(images: ImageSet, indices: Tensor, feeds: Sequence[Feed]) -> Tensor:
    """The images in a tensor of their own; large ones are decoded once where several see them."""
    channels, height, width = feeds[0].shape
    if len(feeds) > 1 and channels * height * width >= LARGE_IMAGE_BYTES:
        different, places = indices.unique(return_inverse=True)
        if len(different) < len(indices):
            return images.pixels(different)[places]
    return images.pixels(indices)


def _changed(pixels: Tensor, models: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """The pixels with those of some models changed, in place where not all of them are."""
    if len(models) == len(pixels):
        return change(pixels)
    pixels[models] = change(pixels[models])
    return pixels


def _noise(feeds: Sequence[Feed], steps: Sequence[int], pixels: Tensor) -> Tensor:
    request = Draw("normal", tuple(pixels.shape[1:]), 0.0, torch.float32)
    drawn = _drawn(request, feeds, steps, "noise", pixels.device).to(pixels.dtype)
    deviations = _column([feed.recipe.noise for feed in feeds], pixels.dtype, 5)
    return drawn.mul_(deviations.to(pixels.device))


def _mixed(pixels: Tensor, mix: Mix) -> Tensor:
    """λ·image + (1 − λ)·its partner."""
    models = torch.arange(len(pixels), device=pixels.device)[:, None]
    others = pixels[models, mix.partners.to(pixels.device)]
    own, its = (w.to(pixels).view(-1, 1, 1, 1, 1) for w in (mix.weights, 1 - mix.weights))
    # Not torch.lerp, which may round once or twice, by where in memory an element lies.
    return pixels.mul(own).add_(others.mul_(its))


def _targets(
    feeds: Sequence[Feed],
    steps: Sequence[int],
    rows: int,
    mix: Mix | None,
    dtype: torch.dtype,
) -> Float[Tensor, "models rows classes"]:
    labels = torch.cat([feed.labels(step) for feed, step in zip(feeds, steps, strict=True)])
    labels = labels.view(len(feeds), rows, 1)
    shape = (len(feeds), rows, feeds[0].classes)
    smoothing = [feed.recipe.label_smoothing for feed in feeds]
    if mix is None and not any(smoothing):
        return torch.zeros(shape, dtype=dtype).scatter_(2, labels, 1.0)
    wide = torch.promote_types(dtype, torch.float32)
    rest = 1 - _column(smoothing, torch.float64, 3)
    floor = _column([e / feed.classes for e, feed in zip(smoothing, feeds, strict=True)], wide, 3)
    soft = floor.expand(shape).contiguous()
    weights = torch.ones_like(rest)
    if mix is not None:
        weights[mix.models, 0, 0] = mix.weights
        others = labels[mix.models].gather(1, mix.partners[:, :, None])
        theirs = ((1 - weights) * rest)[mix.models].to(wide)
        soft[mix.models] = soft[mix.models].scatter_add_(2, others, theirs.expand_as(others))
    soft.scatter_add_(2, labels, (weights * rest).to(wide).expand_as(labels))
    return soft.to(dtype)


def _column(values: Sequence[float], dtype: torch.dtype, dims: int) -> Tensor:
    """One number for each model, in front of `dims` − 1 other axes."""
    return torch.tensor(values, dtype=dtype).view(-1, *(1,) * (dims - 1))
