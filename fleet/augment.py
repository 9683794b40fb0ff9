"""Augmentation of a whole batch of normalised images, with randomness that is passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from fleet.recipes import Recipe

Images = Float[Tensor, "rows channels height width"]


def augment(images: Images, recipe: Recipe, generator: torch.Generator) -> Images:
    """Flip, shift and noise as `recipe` asks; draws nothing for what it does not ask."""
    if recipe.flip or recipe.shift:
        images = flip_and_shift(images, flip=recipe.flip, shift=recipe.shift, generator=generator)
    if recipe.noise:
        images = images + recipe.noise * torch.randn(
            images.shape, generator=generator, dtype=images.dtype
        )
    return images


def flip_and_shift(images: Images, *, flip: bool, shift: int, generator: torch.Generator) -> Images:
    """Each image mirrored left to right with probability ½, then moved by up to `shift` pixels.

    The moves are uniform on {−shift, …, shift}² and the border is filled by reflection (without
    repeating the edge), so `shift` must be smaller than both sides. One gather does it all.
    """
    rows, channels, height, width = images.shape
    down = torch.arange(height).expand(rows, -1)
    across = torch.arange(width).expand(rows, -1)
    if shift:
        moves = torch.randint(-shift, shift + 1, (2, rows, 1), generator=generator)
        down = _reflect(down + moves[0], height)
        across = _reflect(across + moves[1], width)
    if flip:
        mirrored = torch.rand(rows, 1, generator=generator) < 0.5
        across = torch.where(mirrored, width - 1 - across, across)
    pixels = (down[:, :, None] * width + across[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    return moved.view(images.shape)


def mixup(
    images: Images, alpha: float, generator: torch.Generator
) -> tuple[Images, Int[Tensor, " rows"], float]:
    """λ·images + (1 − λ)·images[partners] with λ ~ Beta(α, α), its partners and λ (1710.09412)."""
    from scipy.special import betaincinv

    # torch draws Beta only from its global generator; the inverse of the distribution function
    # turns a uniform number from ours into one.
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    weight = float(betaincinv(alpha, alpha, uniform))
    partners = torch.randperm(len(images), generator=generator)
    return torch.lerp(images[partners], images, weight), partners, weight


def _reflect(index: Int[Tensor, "rows pixels"], size: int) -> Int[Tensor, "rows pixels"]:
    return (size - 1) - ((size - 1) - index.abs()).abs()
