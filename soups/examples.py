"""What a run keeps of *report*, image by image: each row's prediction, and some of the images.

`examples.npz` in a results folder, plain arrays without pickle:

    labels            int64 [images]      the class of each image of *report*
    classes           text  [classes]     their names
    indices           int64 [shown]       which of the images have a thumbnail
    thumbnails        uint8 [shown, channels, height, width]    0 to 255
    <row>/predicted   int16 [images]      the class with the largest logit
    <row>/confidence  float32 [images]    its probability
    <row>/nll         float32 [images]    −log of the label's probability, in nats

for every row of the table, soups and references.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64, UInt8
from scipy.special import log_softmax

from inputs.files import write_whole
from soups.errors import SoupError

if TYPE_CHECKING:
    from inputs.data import ImageSet
    from soups.statistics import Labels, Logits

FILE = "examples.npz"
# Images are shown where rows disagree: so many at most, drawn with this seed, of this size.
SHOWN = 500
SEED = 0
LONGEST_SIDE = 64

_IMAGES = ("labels", "classes", "indices", "thumbnails")
_OF_ROW = ("predicted", "confidence", "nll")


@dataclass(frozen=True)
class RowOutcomes:
    """One row of the table on each image of *report*: its class, how sure it was, and its loss."""

    predicted: Int16[np.ndarray, " images"]
    confidence: Float32[np.ndarray, " images"]
    nll: Float32[np.ndarray, " images"]

    @classmethod
    def of(cls, logits: Logits, labels: Labels) -> RowOutcomes:
        """The outcomes that logits give; of equal ones the first is the prediction.

        Raises SoupError where there are more classes than int16 has numbers.
        """
        values = np.asarray(logits).astype(np.float64)
        if values.shape[1] > np.iinfo(np.int16).max:
            raise SoupError(f"outcomes: found {values.shape[1]} classes; wanted at most 32,767")
        logs = log_softmax(values, axis=1)
        of_label = np.take_along_axis(logs, np.asarray(labels)[:, None], axis=1)[:, 0]
        return cls(
            values.argmax(axis=1).astype(np.int16),
            np.exp(logs.max(axis=1)).astype(np.float32),
            (-of_label).astype(np.float32),
        )


@dataclass(frozen=True)
class ReportExamples:
    """Every row's outcomes on the images of *report*, and thumbnails of some of the images."""

    labels: Int64[np.ndarray, " images"]
    classes: tuple[str, ...]
    indices: Int64[np.ndarray, " shown"]
    thumbnails: UInt8[np.ndarray, "shown channels height width"]
    rows: Mapping[str, RowOutcomes]

    def right(self, row: str) -> Bool[np.ndarray, " images"]:
        """Whether the row's prediction is the label, for each image."""
        return self.rows[row].predicted == self.labels

    def save(self, path: str | Path) -> None:
        """Write the file, whole; equal examples give equal bytes."""
        arrays: dict[str, np.ndarray] = {
            "labels": self.labels,
            "classes": np.array(self.classes, dtype=np.str_),
            "indices": self.indices,
            "thumbnails": self.thumbnails,
        }
        for row, outcomes in self.rows.items():
            arrays |= {f"{row}/{name}": getattr(outcomes, name) for name in _OF_ROW}
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        write_whole(path, file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> ReportExamples:
        """What `save` wrote; SoupError where there is no such file or it is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            return _checked(arrays)
        except FileNotFoundError as error:
            raise SoupError(
                f"{path}: there is no such file; run `python -m soups.learn` with the config of "
                "this folder, which writes it"
            ) from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise SoupError(
                f"{path}: not a file of examples ({error}); remove it and run again"
            ) from error


def _checked(arrays: Mapping[str, np.ndarray]) -> ReportExamples:
    """ValueError for arrays of the wrong kind or length, KeyError for one that is not there."""
    labels, indices, thumbnails = (arrays[name] for name in ("labels", "indices", "thumbnails"))
    names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if key not in _IMAGES)
    rows = {name: [arrays[f"{name}/{part}"] for part in _OF_ROW] for name in names}
    kinds = [(labels, np.int64), (indices, np.int64), (thumbnails, np.uint8)]
    for parts in rows.values():
        kinds += zip(parts, (np.int16, np.float32, np.float32), strict=True)
    if any(array.dtype != kind for array, kind in kinds):
        raise ValueError("an array has another type")
    lengths = {part.shape for parts in rows.values() for part in parts} | {(len(labels),)}
    if len(lengths) > 1 or thumbnails.ndim != 4 or indices.shape != thumbnails.shape[:1]:
        raise ValueError("the arrays have different lengths")
    if ((indices < 0) | (indices >= len(labels))).any():
        raise ValueError("a thumbnail is of an image that is not there")
    outcomes = {name: RowOutcomes(*parts) for name, parts in rows.items()}
    return ReportExamples(labels, tuple(arrays["classes"].tolist()), indices, thumbnails, outcomes)


def disagreements(
    right: Sequence[Bool[np.ndarray, " images"]], *, most: int = SHOWN
) -> Int64[np.ndarray, " shown"]:
    """The images that some rows have right and others wrong, in order; `most` of them at most."""
    found = np.flatnonzero(np.any(right, axis=0) & ~np.all(right, axis=0)).astype(np.int64)
    if len(found) > most:
        found = np.sort(np.random.default_rng(SEED).choice(found, most, replace=False))
    return found


def thumbnails(
    images: ImageSet, indices: Int64[np.ndarray, " shown"]
) -> UInt8[np.ndarray, "shown channels height width"]:
    """These images as models get them before they are normalised, shrunk to 64 px if larger."""
    import torch
    from torch.nn import functional as F

    if not len(indices):
        return images.pixels(torch.arange(1))[:0].numpy()
    pixels = images.pixels(torch.from_numpy(indices))
    longest = max(pixels.shape[-2:])
    if longest > LONGEST_SIDE:
        size = [max(1, round(side * LONGEST_SIDE / longest)) for side in pixels.shape[-2:]]
        shrunk = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
        pixels = shrunk.round().clamp(0, 255).to(torch.uint8)
    return pixels.numpy()
