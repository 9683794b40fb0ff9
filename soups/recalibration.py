"""Running statistics of many models at once, estimated on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fleet import Group
from merge.align.tracing import evaluating


@torch.no_grad()
def recalibrate_group(
    model: nn.Module,
    stacked: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    batches: Iterable[Tensor],
) -> dict[str, Float[Tensor, "models channels"]]:
    """BatchNorm's running statistics of each model, as `recalibrate_norms` estimates those of one.

    `stacked` [models, ...] and `shared` are the models' tensors, as a Group takes them; each batch
    is an input of the model. The statistics become the mean over all examples (REPAIR, 2211.08403);
    all but these norms is in eval mode. Raises FleetError where the model cannot be grouped.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    models = len(next(iter(stacked.values())))
    statistics = {
        f"{name}.{kind}".lstrip("."): getattr(norm, kind).expand(models, -1).clone()
        for name, norm in norms.items()
        for kind in ("running_mean", "running_var")
    }
    counts = {
        f"{name}.num_batches_tracked".lstrip("."): norm.num_batches_tracked.repeat(models)
        for name, norm in norms.items()
        if norm.num_batches_tracked is not None
    }
    own = {**stacked, **statistics, **counts}
    rest = {name: tensor for name, tensor in shared.items() if name not in own}
    group = Group(model, own, shared=rest, capture=False)
    momenta = {norm: norm.momentum for norm in norms.values()}
    seen = 0
    with evaluating(model):
        for norm in norms.values():
            norm.train()
        try:
            for batch in batches:
                seen += len(batch)
                for norm in norms.values():
                    # 1 for the first batch, which forgets what was there before.
                    norm.momentum = len(batch) / seen
                group(batch)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    return statistics
