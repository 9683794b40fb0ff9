"""Corruptions of images at five severities, for the extra report sets.

Each image is shifted by itself, with random numbers drawn by its row's name: order and batch size
change nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from inputs.randomness import generator

__all__ = ["Shift", "shift_image"]

Shift = Literal["noise", "blur", "rotation", "contrast"]


def shift_image(
    image: UInt8[Tensor, "channels height width"],
    kind: Shift,
    severity: int,
    *,
    seed: int,
    row: int,
) -> UInt8[Tensor, "channels height width"]:
    """`image`, the one in `row` of its source, corrupted at `severity` 1 to 5.

    - noise: Gaussian, standard deviation 0.06 x severity on [0, 1];
    - blur: Gaussian, sigma 0.3 + severity x side / 160 pixels (side: the shorter one);
    - rotation: by 9 x severity degrees, to the left or the right at random;
    - contrast: multiplied by 1 - 0.17 x severity.
    """
    # torchvision imports PIL, which reading the tensor cache does not need.
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    random = generator(seed, f"{kind}_{severity}/{row}")
    if kind == "noise":
        # v2's gaussian_noise draws from the global generator, so the noise is added here.
        noise = torch.randn(image.shape, generator=random) * (0.06 * severity * 255)
        return (image + noise).round_().clamp_(0, 255).to(torch.uint8)
    if kind == "blur":
        side = min(image.shape[-2:])
        sigma = 0.3 + severity * side / 160
        width = min(2 * math.ceil(3 * sigma) + 1, 2 * side - 1)
        return F.gaussian_blur(image, [width, width], [sigma, sigma])
    if kind == "rotation":
        sign = 1 if torch.rand((), generator=random) < 0.5 else -1
        return F.rotate(image, sign * 9.0 * severity, InterpolationMode.BILINEAR)
    return F.adjust_contrast(image, 1 - 0.17 * severity)
