"""From rows of a `datasets` set to uint8 tensors: which columns, which labels, which pixels."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from inputs.config import DataConfig, nearest
from inputs.errors import InputError

__all__ = ["Decoder", "find_columns", "read_labels"]

_CHUNK_ROWS = 256


def find_columns(rows: datasets.Dataset, config: DataConfig, where: str) -> tuple[str, str]:
    """The columns of the images and of the labels: those that the config names, or the only ones.

    Raises InputError where one is missing or could be several.
    """
    features = rows.features
    images = [name for name, feature in features.items() if _holds_images(feature)]
    class_labels = [
        n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    plain = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value)
        and feature.dtype.startswith(("int", "uint", "string", "large_string"))
    ]
    return (
        _one_column("image", config.image_column, images, list(features), where),
        _one_column("label", config.label_column, class_labels or plain, list(features), where),
    )


def _holds_images(feature: Any) -> bool:
    # Parquet that was not written by `datasets` has the same bytes without saying what they are.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _one_column(
    kind: str, named: str | None, found: list[str], columns: list[str], where: str
) -> str:
    setting = f"data.{kind}_column"
    if named is not None:
        if named not in columns:
            raise InputError(f"{where}: {setting}: no column {named!r}{nearest(named, columns)}")
        return named
    if len(found) != 1:
        what = f"{len(found)} columns that may be the {kind}: {', '.join(found)}"
        if not found:
            what = f"no {kind} column among {', '.join(columns)}"
        raise InputError(f"{where}: found {what}; name the one you mean with {setting}")
    return found[0]


def read_labels(
    rows: datasets.Dataset, column: str, where: str
) -> tuple[Int[Tensor, " rows"], tuple[str, ...]]:
    """Labels as class numbers, and the names of the classes.

    Texts and integers that are not declared as classes are numbered in sorted order.
    """
    values = rows[column][:]
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names: list[str] = list(feature.names)
        numbers = values
    else:
        kinds = {type(value) for value in values}
        if not (kinds <= {int} or kinds <= {str}):
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"{where}: column {column!r} holds {found}; wanted labels: all integers or all "
                "texts, none missing"
            )
        distinct = sorted(set(values))
        numbering = {value: number for number, value in enumerate(distinct)}
        names = [str(value) for value in distinct]
        numbers = [numbering[value] for value in values]
    missing = [row for row, number in enumerate(numbers) if number is None or number < 0]
    if missing:
        raise InputError(
            f"{where}: {len(missing)} of {len(numbers)} images have no label in {column!r}, the "
            f"first in row {missing[0]}; choose a split that is labelled"
        )
    return torch.tensor(numbers, dtype=torch.int64), tuple(names)


class Decoder:
    """Pixels of any rows, decoded when called."""

    def __init__(self, rows: datasets.Dataset, column: str, config: DataConfig, where: str) -> None:
        self._rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._size = config.size
        self._mode = "L" if config.channels == 1 else "RGB"
        self._where = where
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._shape = self._decode(0, self._rows[0][column]).shape

    def total_bytes(self) -> int:
        """What all images take when decoded."""
        return len(self._rows) * self._shape.numel()

    def __call__(
        self, indices: Int[Tensor, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        numbers = indices.tolist()
        if not numbers:
            return torch.empty((0, *self._shape), dtype=torch.uint8)
        stored = self._rows[numbers][self._column]
        return torch.stack(list(self._pool.map(self._decode_alike, numbers, stored)))

    def all(self) -> UInt8[Tensor, "rows channels height width"]:
        """Every image, with a bar while it lasts."""
        count = len(self._rows)
        pixels = torch.empty((count, *self._shape), dtype=torch.uint8)
        with tqdm(total=count, desc=f"decode {self._where}", unit="image") as bar:
            for rows in torch.arange(count).split(_CHUNK_ROWS):
                pixels[rows[0] : rows[-1] + 1] = self(rows)
                bar.update(len(rows))
        return pixels

    def _decode_alike(self, row: int, stored: dict[str, Any]) -> Tensor:
        pixels = self._decode(row, stored)
        if pixels.shape != self._shape:
            raise InputError(
                f"{self._where}: the image in row {row} is {_size(pixels.shape)}, the one in row 0 "
                f"is {_size(self._shape)}; set data.size to bring all to one size"
            )
        return pixels

    def _decode(self, row: int, stored: dict[str, Any] | None) -> Tensor:
        where = f"{self._where}: the image in row {row}"
        if stored is None:
            raise InputError(f"{where} is missing; take the row out")
        path, content = stored["path"], stored["bytes"]
        try:
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                if image.mode[0] in "IF":
                    raise InputError(
                        f"{where} has mode {image.mode!r}; wanted 8 bits per channel: convert it"
                    )
                upright = ImageOps.exif_transpose(image).convert(self._mode)
        except OSError as error:
            raise InputError(
                f"{where}{f' ({path})' if path else ''} cannot be decoded: {error}; "
                "replace it or take the row out"
            ) from error
        pixels = F.pil_to_tensor(upright)
        if self._size is not None:
            pixels = F.resize(pixels, [self._size], antialias=True)
            pixels = F.center_crop(pixels, [self._size, self._size])
        return pixels


def _size(shape: torch.Size) -> str:
    return f"{shape[-1]}x{shape[-2]}"
