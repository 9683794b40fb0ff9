"""What a run will cost, from its settings and one measured step; printed before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from inputs.budget import format_bytes
from inputs.config import Settings
from soups.errors import SoupError
from soups.learners.descent import soup_loss
from soups.learners.registry import BestSingle, Greedy, LearnedSettings, MehlSettings, WiseFT

FP32_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What the plan is made from, in bytes and counts.

    `in_use`: memory before a learner starts, the model and the images included; `activations`:
    what one training step saves for its backward pass, with its largest gradient; `evaluation`:
    what a batch of evaluation takes.
    """

    ingredients: int
    weights: int
    ingredient_bytes: int
    in_use: int
    activations: int
    budget: int
    evaluation: int = 0


@dataclass(frozen=True)
class RowPlan:
    """One learner's cost; passes are over *select*."""

    block_size: int | None
    blocks: int | None
    peak_bytes: int
    read_bytes: int
    forward_passes: int
    backward_passes: int


def check_budget(model: nn.Module, *, in_use: int, budget: int) -> None:
    """SoupError where even the model, the centre and one row are more than the budget.

    A first look, before a zoo is made; `plan_learners` measures.
    """
    weights = sum(p.numel() for p in model.parameters()) * FP32_BYTES
    least = in_use + 2 * weights
    if least > budget:
        raise SoupError(
            f"memory_budget: {format_bytes(budget)} is too small: this process holds "
            f"{format_bytes(in_use)} with the model and the images, and learning needs two more "
            f"copies of the weights, {format_bytes(least)} in all; raise the budget"
        )


def plan_learners(learners: Mapping[str, Settings], costs: Costs) -> dict[str, RowPlan]:
    """The cost of each row, with block sizes chosen so that the predicted peak is in the budget.

    Raises SoupError that names every row that cannot fit, with the least that would do.
    """
    plans = {row: _plan_row(settings, costs) for row, settings in learners.items()}
    over = [
        f"{row} needs {format_bytes(plan.peak_bytes)}"
        for row, plan in plans.items()
        if plan.peak_bytes > costs.budget
    ]
    if over:
        raise SoupError(
            f"memory_budget: {format_bytes(costs.budget)} is too small: {'; '.join(over)}; raise "
            "the budget, or take a row out (mehl and mehl_layerwise need least; a smaller "
            "block_size or batch_size helps them)"
        )
    return plans


def plan_table(plans: Mapping[str, RowPlan]) -> pd.DataFrame:
    """The plan as it is printed."""
    return pd.DataFrame(
        [
            {
                "learner": row,
                "block size": plan.block_size or "",
                "blocks": plan.blocks or "",
                "predicted peak": format_bytes(plan.peak_bytes),
                "to read": format_bytes(plan.read_bytes),
                "forward passes": plan.forward_passes,
                "backward passes": plan.backward_passes,
            }
            for row, plan in plans.items()
        ]
    )


def measure_activations(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that one forward pass of a training step keeps for its backward pass.

    Counted from the tensors that autograd saves, each storage once and the weights not at all;
    the largest gradient is added, since gradients are freed one by one.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = soup_loss(model(images), labels, 0.0)
    del loss
    largest = max(p.numel() for p in model.parameters()) * FP32_BYTES
    return sum(saved.values()) + largest


def _plan_row(settings: Settings, costs: Costs) -> RowPlan:
    if isinstance(settings, MehlSettings):
        return _plan_mehl(settings, costs)
    count = costs.ingredients
    forward = backward = reads = copies = 0
    if isinstance(settings, LearnedSettings):
        forward = backward = settings.epochs
        reads, copies = count, count
    if isinstance(settings, BestSingle):
        forward = reads = count
    if isinstance(settings, Greedy) or (isinstance(settings, WiseFT) and settings.soup == "greedy"):
        forward, reads, copies = 2 * count - 1, 2 * count, 2
    if isinstance(settings, WiseFT):
        forward, reads, copies = forward + len(settings.alphas), reads + count + 1, 2
    return RowPlan(
        block_size=None,
        blocks=None,
        peak_bytes=costs.in_use
        + max(costs.activations if backward else 0, costs.evaluation)
        + copies * costs.weights * FP32_BYTES,
        read_bytes=reads * costs.ingredient_bytes,
        forward_passes=forward,
        backward_passes=backward,
    )


def _plan_mehl(settings: MehlSettings, costs: Costs) -> RowPlan:
    copy = costs.weights * FP32_BYTES
    fixed = costs.in_use + max(costs.activations, costs.evaluation) + copy
    fits = max(1, min(costs.ingredients, (costs.budget - fixed) // copy))
    size = min(settings.block_size or fits, costs.ingredients)
    blocks = settings.outer_epochs * -(-costs.ingredients // size)
    init = costs.ingredients if settings.init == "mean_all" else size
    return RowPlan(
        block_size=size,
        blocks=blocks,
        peak_bytes=fixed + size * copy,
        read_bytes=(init + settings.outer_epochs * costs.ingredients) * costs.ingredient_bytes,
        forward_passes=blocks * settings.inner_epochs,
        backward_passes=blocks * settings.inner_epochs,
    )
