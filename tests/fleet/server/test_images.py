import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from fleet.server.images import Preprocessing
from fleet.server.refusals import RefusedError
from inputs.config import DataConfig
from inputs.decode import Decoder


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def preprocessing(channels: int = 3, size: int = 8, max_pixels: int = 100_000) -> Preprocessing:
    mean, std = (0.1, 0.2, 0.3)[:channels], (0.5, 0.6, 0.7)[:channels]
    return Preprocessing(channels, size, mean, std, max_pixels)


def refusal(content: bytes, **settings: int) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        preprocessing(**settings).images([content])
    return caught.value


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_what_they_were_in_training(channels: int):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    files = [
        encoded(picture(20, 13)),
        encoded(picture(9, 31), "JPEG", exif=exif),
        encoded(picture(8, 8, "RGBA")),
        encoded(picture(12, 10, "P"), "GIF"),
        encoded(picture(5, 6, "L"), "BMP"),
        encoded(picture(30, 17), "WEBP", lossless=True),
        encoded(picture(30, 17, "1")),
    ]
    split = {"from": "all"}
    config = DataConfig.model_validate(
        {"path": "x", "size": 8, "channels": channels}
        | dict.fromkeys(("fit", "tune", "select", "report"), split)
    )
    rows = Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in files]},
        features=Features({"image": ImageFeature()}),
    )
    trained = Decoder(rows, "image", config, "x")(torch.arange(len(files)))
    settings = preprocessing(channels)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (settings.mean, settings.std))
    expected = trained.float().div(255).sub(mean).div(std)
    found = torch.stack(settings.images(files))
    assert found.shape == (len(files), channels, 8, 8)
    assert torch.equal(found, expected)


def test_one_mean_for_three_channels():
    (found,) = Preprocessing(3, 4, (0.5,), (0.5,), 1000).images([encoded(picture(4, 4))])
    assert found.shape == (3, 4, 4)
    assert found.min() >= -1.0
    assert found.max() <= 1.0


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large, and is."""

    def block(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * min(10_000_000, (1 + (width + 7) // 8) * height), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", pixels) + block(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(1000, 1000), (30_000, 30_000), (2**30, 2**30)])
def test_decompression_bombs(size: tuple[int, int]):
    content = bomb(*size)
    assert len(content) < 20_000
    error = refusal(content)
    assert error.status == 413
    assert "pixels" in str(error)


def test_a_line_that_would_be_a_bomb_when_resized():
    assert refusal(bomb(90_000, 1)).status == 413
    assert refusal(bomb(1, 90_000)).status == 413


def test_the_images_of_a_request_are_limited_together():
    file = encoded(picture(100, 100))
    settings = preprocessing(max_pixels=30_000)
    assert len(settings.images([file] * 3)) == 3
    with pytest.raises(RefusedError, match="wanted at most 30000") as caught:
        settings.images([file] * 4)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        encoded(picture(20, 20))[:200],
        encoded(picture(20, 20))[:40],
        encoded(picture(40, 40), "JPEG")[:300],
        encoded(picture(40, 40), "WEBP")[:100],
        encoded(picture(40, 40), "GIF")[:900],
        encoded(picture(20, 20), "TIFF"),
    ],
)
def test_files_that_are_no_images(content: bytes):
    error = refusal(content)
    assert error.status == 400
    assert "images[0]: cannot be decoded" in str(error)
    assert "PNG" in str(error)


def test_flipped_bytes_never_pass_an_exception_on():
    whole = bytearray(encoded(picture(16, 16)))
    random = np.random.default_rng(0)
    for place in random.integers(8, len(whole), 300):
        broken = whole.copy()
        broken[place] ^= int(random.integers(1, 256))
        with suppress(RefusedError):
            (found,) = preprocessing().images([bytes(broken)])
            assert found.shape == (3, 8, 8)


def test_more_than_8_bits_per_channel():
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
    error = refusal(encoded(deep), channels=1)
    assert error.status == 400
    assert "wanted 8 bits per channel" in str(error)
