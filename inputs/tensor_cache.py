"""Decoded images on disk: one safetensors file for each split of a source.

Reading one needs neither `datasets` nor PIL, nor the images it was made from, so that a cache can
be carried to another machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inputs.config import DataConfig

__all__ = ["Decoded", "cache_file", "read_decoded", "write_decoded"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """The images and labels of one split of a source."""

    pixels: UInt8[Tensor, "rows channels height width"]
    labels: Int[Tensor, " rows"]
    classes: tuple[str, ...]


def cache_file(config: DataConfig, split: str) -> Path:
    """The file for `split` of the source, named by all that decides what is in it."""
    settings = [
        config.path.rstrip("/"),
        split,
        config.size,
        config.channels,
        config.image_column,
        config.label_column,
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{Path(config.path).name}-{split}").strip("-")
    return config.cache / f"{words}-{key}.safetensors"


def read_decoded(file: Path, signature: str | None) -> Decoded | None:
    """What `file` holds; None where it is missing, corrupt, or was made from other images.

    `signature` says which images are at the source now; None where the source is out of reach,
    and the file is all there is. Pixels are mapped: pages are read as they are used.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            pixels, labels = content.get_tensor("pixels"), content.get_tensor("labels")
        classes = tuple(json.loads(metadata["classes"]))
        made_from = metadata["signature"]
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s: corrupt image cache (%s); it is made again", file, error)
        return None
    if (
        (pixels.dtype, pixels.ndim, labels.dtype) != (torch.uint8, 4, torch.int64)
        or labels.shape != pixels.shape[:1]
        or not all(0 <= label < len(classes) for label in labels.unique().tolist())
    ):
        logger.warning("%s: corrupt image cache (wrong shapes); it is made again", file)
        return None
    if signature not in (None, made_from):
        logger.info("%s: the images have changed since; it is made again", file)
        return None
    return Decoded(pixels, labels, classes)


def write_decoded(file: Path, decoded: Decoded, signature: str) -> None:
    """Write `decoded` beside `file`, then rename it into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    metadata = {"classes": json.dumps(decoded.classes), "signature": signature}
    try:
        save_file({"pixels": decoded.pixels, "labels": decoded.labels}, beside, metadata)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
