"""Running statistics that belong to merged weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from merge.align.tracing import evaluating
from merge.errors import MergeError

Batch = Shaped[Tensor, "..."] | Sequence[Shaped[Tensor, "..."]]
"""A model's input, examples first; or a sequence that starts with it (images, labels)."""


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Estimate BatchNorm's running statistics anew for the weights at hand; how many norms.

    Merging shrinks the variance of what a layer puts out; the statistics of the merged weights on
    data put it right (REPAIR, arXiv 2211.08403). They become the mean over all examples, whatever
    the batches; all but these norms is in eval mode. A model without them (LayerNorm keeps no
    statistics) stays as it is, and the batches are not read: 0.
    Raises MergeError where there are no batches, or the statistics come out not finite.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    ]
    if not norms:
        return 0
    device = next(chain(model.parameters(), model.buffers())).device
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        try:
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                seen += len(images)
                for norm in norms:
                    norm.momentum = len(images) / seen
                model(images.to(device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen:
        raise MergeError(
            f"{type(model).__name__}: found no batches to estimate the running statistics of "
            f"{len(norms)} norms on; wanted at least one"
        )
    _check_finite(model)
    return len(norms)


def _check_finite(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            for statistics in (module.running_mean, module.running_var):
                if statistics is not None and not torch.isfinite(statistics).all():
                    raise MergeError(
                        f"{name!r}: the running statistics are not finite; look for NaN or "
                        "infinity in the weights and in the batches"
                    )
