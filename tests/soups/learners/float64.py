"""Soups in float64 by autograd through the weighted sum of the files' tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from inputs.data import ImageSet
from soups.norms import Groups
from soups.session import Session


def stacked(session: Session, name: str) -> Tensor:
    """A tensor in every ingredient [ingredients, *shape]."""
    return torch.stack([k.read(name).double() for k in session.zoo.checkpoints])


def soup_weights(session: Session, groups: Groups, soup: Tensor) -> dict[str, Tensor]:
    """Σ_k A[k, g] w_k of each tensor of each group."""
    return {
        name: torch.tensordot(column, stacked(session, name), dims=1)
        for column, names in zip(soup.T, groups.values(), strict=True)
        for name in names
    }


def soup_buffers(session: Session, groups: Groups, soup: Tensor) -> dict[str, Tensor]:
    """Running statistics: the mean over the soup's members, or as their layer's coefficients."""
    found = {}
    for name in session.norms.names:
        values = stacked(session, name)
        if session.norms.rule == "convex":
            own = f"{name.rpartition('.')[0]}.weight"
            group = next(g for g, names in enumerate(groups.values()) if own in names)
            share = soup[:, group].clamp_min(0)
        else:
            share = (soup != 0).any(dim=1).double()
        found[name] = torch.tensordot(share / share.sum(), values, dims=1)
    return found


def soup_logits(
    session: Session,
    groups: Groups,
    soup: Tensor,
    images: ImageSet,
    *,
    fixed_buffers: bool = False,
) -> Tensor:
    """The logits of a soup [ingredients, groups] by one plain forward, differentiable in it.

    With `fixed_buffers` only through the weights, with the running statistics as constants.
    """
    model = copy.deepcopy(session.model).double().eval()
    of_buffers = soup.detach() if fixed_buffers else soup
    state = soup_weights(session, groups, soup) | soup_buffers(session, groups, of_buffers)
    (batch,) = [pixels for pixels, _ in images.batches(len(images))]
    return functional_call(model, state, (batch.double(),))


def squared_lengths(session: Session, groups: Groups) -> Tensor:
    """‖w_k − mean‖² in each group [ingredients, groups]."""
    lengths = []
    for names in groups.values():
        rows = [stacked(session, name).flatten(1) for name in names]
        lengths.append(sum((r - r.mean(0)).square().sum(1) for r in rows))
    return torch.stack(lengths, dim=1)
