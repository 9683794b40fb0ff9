"""What the gradient learners share: the schedule and the loss."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from soups.errors import SoupError


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float):
    """Linear warm-up over the first part of `steps`, then half a cosine down to zero."""
    rising = int(steps * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def soup_loss(
    logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], label_smoothing: float
) -> Float[Tensor, ""]:
    """Cross-entropy in nats, mean over the rows."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def finite(loss: float, row: str, where: str = "") -> float:
    """The loss; SoupError where the descent of a row has left the numbers."""
    if not math.isfinite(loss):
        raise SoupError(
            f"learners.{row}: the loss on *select* is {loss}{where}; lower learners.{row}.lr, or "
            f"set learners.{row}.clip_norm"
        )
    return loss
