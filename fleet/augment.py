"""Augmentation of a whole batch of normalised images, with randomness that is passed in."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Images = Float[Tensor, "rows channels height width"]
Pixels = Shaped[Tensor, "rows channels height width"]


def flip_and_shift(images: Images, *, flip: bool, shift: int, generator: torch.Generator) -> Images:
    """Each image mirrored left to right with probability ½, then moved by up to `shift` pixels.

    The moves are uniform on {−shift, …, shift}² and the border is filled by reflection (without
    repeating the edge), so `shift` must be smaller than both sides. One gather does it all.
    """
    rows = len(images)
    moves = torch.zeros(2, rows, dtype=torch.int64)
    mirrored = torch.zeros(rows, dtype=torch.bool)
    if shift:
        moves = draw_moves(rows, shift, generator)
    if flip:
        mirrored = draw_mirrored(rows, generator)
    return move(images, moves, mirrored)


def draw_moves(rows: int, shift: int, generator: torch.Generator) -> Int[Tensor, "2 rows"]:
    """Pixels to look down and across for each image, uniform on {−shift, …, shift}²."""
    return torch.randint(-shift, shift + 1, (2, rows, 1), generator=generator).squeeze(2)


def draw_mirrored(rows: int, generator: torch.Generator) -> Bool[Tensor, " rows"]:
    """Which images are mirrored: each with probability ½."""
    return (torch.rand(rows, 1, generator=generator) < 0.5).squeeze(1)


def move(images: Pixels, moves: Int[Tensor, "2 rows"], mirrored: Bool[Tensor, " rows"]) -> Pixels:
    """Each image mirrored where asked, and seen through a window moved (down, across).

    Outside of the image are its reflections (without the edge again), so that moves must be
    smaller than both sides.
    """
    channels, height, width = images.shape[1:]
    down = _reflect(torch.arange(height, device=images.device) + moves[0][:, None], height)
    across = _reflect(torch.arange(width, device=images.device) + moves[1][:, None], width)
    across = torch.where(mirrored[:, None], width - 1 - across, across)
    pixels = (down[:, :, None] * width + across[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    return moved.view(images.shape)


def beta(
    alpha: Float[Tensor, " models"], uniform: Float[Tensor, " models"]
) -> Float[Tensor, " models"]:
    """Beta(α, α) from numbers that are uniform on [0, 1): the inverse of its distribution."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), uniform.numpy()))


def _reflect(index: Int[Tensor, "rows pixels"], size: int) -> Int[Tensor, "rows pixels"]:
    return (size - 1) - ((size - 1) - index.abs()).abs()
