"""Files of images from strangers → tensors as the model saw them in training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fleet.server.refusals import RefusedError

__all__ = ["Preprocessing"]

# What browsers and cameras write. Others that the library knows run programs or are rarely tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes [channels, size, size]: (pixels / 255 − mean) / std, per channel.

    Upright, shorter side resized to `size`, cropped at the centre, as `inputs.data` does it. The
    images of one request have at most `max_pixels` together, as files and when resized, which is
    known before any is decoded.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int

    def images(self, files: Sequence[bytes]) -> list[Float[Tensor, "channels height width"]]:
        """Every file's first image; RefusedError (400, 413) for what is not decoded."""
        left = self.max_pixels
        for index, content in enumerate(files):
            with self._opened(content, f"images[{index}]") as image:
                short, long = sorted((image.width, image.height))
                # A line of pixels becomes a wide image when its height is brought to `size`.
                left -= max(short * long, self.size * self.size * long // max(short, 1))
            if left < 0:
                raise self._too_many_pixels()
        return [
            self._normalised(self._pixels(content, f"images[{index}]"))
            for index, content in enumerate(files)
        ]

    def _pixels(self, content: bytes, where: str) -> UInt8[Tensor, "channels height width"]:
        with self._opened(content, where) as image:
            if image.mode[0] in "IF":
                raise RefusedError(
                    400, f"{where}: has mode {image.mode!r}; wanted 8 bits per channel"
                )
            try:
                upright = ImageOps.exif_transpose(image).convert(
                    "L" if self.channels == 1 else "RGB"
                )
            except Exception as error:  # and so do decoders
                raise _broken(where, error) from error
        pixels = F.resize(F.pil_to_tensor(upright), [self.size], antialias=True)
        return F.center_crop(pixels, [self.size, self.size])

    def _normalised(
        self, pixels: UInt8[Tensor, "channels height width"]
    ) -> Float[Tensor, "channels height width"]:
        mean = torch.tensor(self.mean).reshape(-1, 1, 1)
        std = torch.tensor(self.std).reshape(-1, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _opened(self, content: bytes, where: str) -> Image.Image:
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise self._too_many_pixels() from error
        except Exception as error:  # readers of headers raise what a broken file makes them raise
            raise _broken(where, error) from error

    def _too_many_pixels(self) -> RefusedError:
        text = f"the images have too many pixels: wanted at most {self.max_pixels} in a request"
        return RefusedError(413, text)


def _broken(where: str, error: Exception) -> RefusedError:
    return RefusedError(
        400,
        f"{where}: cannot be decoded ({type(error).__name__}); wanted "
        f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
    )
