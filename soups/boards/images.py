"""What two rows are compared by on the page: who is right on which image, and the images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from soups.boards.folders import RunFolder
from soups.examples import SEED, SHOWN, ReportExamples

# Above this many bytes of pixels a picture of them is written with loss.
LOSSLESS_BYTES = 256 * 1024
JPEG_QUALITY = 88


def image_sets(runs: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """Report images → their number, and where they were kept the classes, and of some the labels
    and one picture of all thumbnails.

    Runs with the same report images share them.
    """
    return {images: _image_set(members) for images, members in _by_images(runs).items()}


def outcomes(run: RunFolder, row: str, shown: Sequence[int]) -> dict[str, Any] | None:
    """On which report images the row is right, as bits; and its class and confidence, in percent,
    for those that are `shown`. None where that was not kept."""
    if row not in run.right:
        return None
    found: dict[str, Any] = {"images": run.images, "right": _bits(run.right[row])}
    if run.examples is not None:
        own = run.examples.rows[row]
        confidence = np.round(100 * own.confidence[list(shown)])
        found["predicted"] = own.predicted[list(shown)].tolist()
        found["confidence"] = confidence.astype(int).tolist()
    return found


def _by_images(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    found: dict[str, list[RunFolder]] = {}
    for run in runs:
        if run.right:
            found.setdefault(run.images, []).append(run)
    return found


def _image_set(runs: Sequence[RunFolder]) -> dict[str, Any]:
    kept = [run.examples for run in runs if run.examples is not None]
    count = next(run.report_count for run in runs)
    if not kept:
        return {"count": count, "shown": []}
    places: dict[int, tuple[ReportExamples, int]] = {}
    for examples in kept:
        for place, index in enumerate(examples.indices.tolist()):
            places.setdefault(index, (examples, place))
    shown = _some([*places])
    pixels = [places[index][0].thumbnails[places[index][1]] for index in shown]
    found = {
        "count": count,
        "classes": list(kept[0].classes),
        "shown": shown,
        "labels": kept[0].labels[shown].tolist(),
    }
    return found | (_sheet(np.stack(pixels)) if pixels else {})


def _some(indices: list[int]) -> list[int]:
    """At most as many as one run shows, in order."""
    if len(indices) > SHOWN:
        indices = np.random.default_rng(SEED).choice(indices, SHOWN, replace=False).tolist()
    return sorted(indices)


def _sheet(pixels: UInt8[np.ndarray, "shown channels height width"]) -> dict[str, Any]:
    """All thumbnails in one picture, in rows of `across`, as a data URL."""
    from PIL import Image

    shown, channels, height, width = pixels.shape
    across = math.ceil(math.sqrt(shown))
    down = math.ceil(shown / across)
    sheet = np.zeros((down * across, channels, height, width), dtype=np.uint8)
    sheet[:shown] = pixels
    tiles = sheet.reshape(down, across, channels, height, width).transpose(0, 3, 1, 4, 2)
    whole = tiles.reshape(down * height, across * width, channels)
    image = Image.fromarray(whole[:, :, 0] if channels == 1 else whole)
    kind, settings = "png", {"optimize": True}
    if pixels.nbytes > LOSSLESS_BYTES:
        # Colours at full size, so that no tile runs into the next one.
        kind, settings = "jpeg", {"quality": JPEG_QUALITY, "subsampling": 0}
    file = io.BytesIO()
    image.save(file, kind, **settings)
    url = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"sheet": url, "tile": [width, height], "across": across}


def _bits(right: Bool[np.ndarray, " images"]) -> str:
    return base64.b64encode(np.packbits(right, bitorder="little").tobytes()).decode()
