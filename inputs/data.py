"""The images that models learn from and are scored on, in four disjoint splits."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from inputs.config import DataConfig
from inputs.errors import InputError
from inputs.shifts import Shift, shift_image
from inputs.sources import PixelReader, find_split, known_splits, unknown_split
from inputs.splits import take_splits

__all__ = [
    "ImageSet",
    "LearningData",
    "load_learning_data",
    "load_report_data",
    "report_refused",
]

logger = logging.getLogger(__name__)

DIGEST_IMAGES = 256

_SPLITS = ("fit", "tune", "select", "report")


class ImageSet:
    """The images of one split: labels in memory, pixels read by row.

    `rows` are the images' numbers in their source, which `read` takes. Labels are class numbers,
    and every split numbers the classes as `classes` does.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        labels: Int[Tensor, " rows"],
        rows: Int[Tensor, " rows"],
        read: PixelReader,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
    ) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels
        self._rows = rows
        self._read = read
        self._mean = torch.tensor(mean).reshape(-1, 1, 1)
        self._std = torch.tensor(std).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(
        self, indices: Int[Tensor, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """The images at `indices` of this set, 0 to 255."""
        return self._read(self._rows[indices])

    def normalise(
        self, pixels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """(pixels / 255 − mean) / std, per channel, on the device of `pixels`."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]]:
        """Normalised images with their labels: in order, or shuffled by `generator`."""
        count = len(self)
        order = torch.arange(count)
        if generator is not None:
            order = torch.randperm(count, generator=generator)
        for indices in order.split(batch_size):
            if drop_last and len(indices) < batch_size:
                return
            yield self.normalise(self.pixels(indices)), self.labels[indices]

    def digest(self) -> str:
        """SHA-256 of the name, all labels, and the pixels of images spread over the set."""
        count = len(self)
        digest = hashlib.sha256(f"{self.name} {count}".encode())
        digest.update(self.labels.numpy().tobytes())
        spread = torch.linspace(0, count - 1, min(count, DIGEST_IMAGES)).long().unique()
        digest.update(self.pixels(spread).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices: Int[Tensor, " batch"]) -> ImageSet:
        """The images at `indices` as a set of their own, which shares the pixels."""
        return self._like(self.name, self.labels[indices], self._rows[indices], self._read)

    def shifted(self, kind: Shift, severity: int, *, seed: int) -> ImageSet:
        """This set with every image corrupted as it is read (see `shift_image`)."""

        def read(rows: Tensor) -> Tensor:
            images = self._read(rows)
            shifted = [
                shift_image(image, kind, severity, seed=seed, row=row)
                for image, row in zip(images, rows.tolist(), strict=True)
            ]
            return torch.stack(shifted) if shifted else images

        return self._like(f"{self.name}_{kind}_{severity}", self.labels, self._rows, read)

    def _like(self, name: str, labels: Tensor, rows: Tensor, read: PixelReader) -> ImageSet:
        mean, std = tuple(self._mean.flatten().tolist()), tuple(self._std.flatten().tolist())
        return ImageSet(name, self.classes, labels, rows, read, mean=mean, std=std)


@dataclass(frozen=True)
class LearningData:
    """What code that learns is given; *report* is not among it."""

    fit: ImageSet
    tune: ImageSet
    select: ImageSet
    classes: tuple[str, ...]


def load_learning_data(config: DataConfig, *, memory_budget: int) -> LearningData:
    """Fit, tune and select; images are decoded once if they fit in a quarter of `memory_budget`.

    Raises InputError on a source, a split or a column that is not there, on overlapping and on
    empty splits.
    """
    sets = _load(config, ("fit", "tune", "select"), memory_budget)
    return LearningData(**sets, classes=sets["fit"].classes)


# What is raised for *report*, by whom of those that are at work and must not read it.
_refusals: list[Callable[[], Exception]] = []


@contextmanager
def report_refused(error: Callable[[], Exception]) -> Iterator[None]:
    """While this is open, `load_report_data` raises `error()`, in all threads of this process."""
    _refusals.append(error)
    try:
        yield
    finally:
        _refusals.remove(error)


def load_report_data(config: DataConfig, *, memory_budget: int) -> dict[str, ImageSet]:
    """*report*, and each of its shifts as `report_<kind>_<severity>`, made as it is read.

    Raises InputError as `load_learning_data` does, and what `report_refused` was given where that
    is open.
    """
    if _refusals:
        raise _refusals[-1]()
    report = _load(config, ("report",), memory_budget)["report"]
    shifted = [
        report.shifted(kind, severity, seed=config.split_seed)
        for kind, severities in config.shifts.items()
        for severity in severities
    ]
    return {images.name: images for images in (report, *shifted)}


def _load(config: DataConfig, names: tuple[str, ...], memory_budget: int) -> dict[str, ImageSet]:
    splits = {name: getattr(config, name) for name in _SPLITS}
    known = known_splits(config)
    if known is not None:
        unknown = dict.fromkeys(s.source for s in splits.values() if s.source not in known)
        if unknown:
            raise InputError("\n".join(unknown_split(config.path, s, known) for s in unknown))
    # The source of *fit* says which classes there are and how they are numbered.
    needed = dict.fromkeys([config.fit.source, *(splits[name].source for name in names)])
    sources = {source: find_split(config, source) for source in needed}
    classes = sources[config.fit.source].classes
    labels = {
        name: _renumber(source.labels, source.classes, classes, f"data.path={config.path}", name)
        for name, source in sources.items()
    }
    sizes = {name: len(source.labels) for name, source in sources.items()}
    rows = take_splits(splits, sizes, config.split_seed, config.select_seed)
    readers = {
        source: sources[source].open(memory_budget)
        for source in dict.fromkeys(splits[name].source for name in names)
    }
    sets = {}
    for name in names:
        source = splits[name].source
        own = labels[source][rows[name]]
        sets[name] = ImageSet(
            name, classes, own, rows[name], readers[source], mean=config.mean, std=config.std
        )
        _warn_of_missing_classes(sets[name])
    return sets


def _renumber(
    labels: Tensor, own: tuple[str, ...], classes: tuple[str, ...], where: str, source: str
) -> Tensor:
    if own == classes:
        return labels
    strangers = sorted({own[number] for number in labels.unique().tolist()} - set(classes))
    if strangers:
        raise InputError(
            f"{where}: split {source!r} has classes that the source of *fit* has not: "
            f"{', '.join(strangers[:10])}; its {len(classes)} classes are "
            f"{', '.join(classes[:10])}{' …' if len(classes) > 10 else ''}"
        )
    number = {name: index for index, name in enumerate(classes)}
    return torch.tensor([number.get(name, -1) for name in own])[labels]


def _warn_of_missing_classes(images: ImageSet) -> None:
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    missing = [
        name for name, count in zip(images.classes, counts.tolist(), strict=True) if not count
    ]
    if missing:
        logger.warning(
            "data.%s: %d of %d classes have no image: %s",
            images.name,
            len(missing),
            len(images.classes),
            ", ".join(missing[:10]),
        )
