"""Logits of a model on a set of images; everything else is computed from them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inputs.data import ImageSet


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


@torch.inference_mode()
def predict(
    model: nn.Module, images: ImageSet, *, batch_size: int
) -> Float[Tensor, "rows classes"]:
    """The model's logits on `images`, in order, in eval mode, on the CPU in fp32."""
    device = device_of(model)
    training = model.training
    model.eval()
    logits = [model(batch.to(device)).float().cpu() for batch, _ in images.batches(batch_size)]
    model.train(training)
    return torch.cat(logits)
