"""What a run will cost, from its settings and one measured step; printed before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from inputs.budget import format_bytes
from inputs.config import Settings
from soups.deltas import row_bytes
from soups.errors import SoupError
from soups.evaluate import Need, fit, images_at_once
from soups.learners.descent import soup_loss
from soups.learners.registry import LearnedSettings, MehlSettings, Scoring

FP32_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What the plan is made from, in bytes and counts.

    `in_use`: memory before a learner starts, the model and the images included; `activations`:
    what one training step saves for its backward pass, with its largest gradient; `evaluation`:
    what a batch of evaluation takes; `image`: the activations of one model on one image, when
    `batch_size` of them at most are evaluated at a time on `device`. `sources` are the ingredients
    and the base where it is known; `select` is how many images there are.
    """

    ingredients: int
    weights: int
    ingredient_bytes: int
    in_use: int
    activations: int
    budget: int
    evaluation: int = 0
    image: int = 0
    batch_size: int = 512
    device: str = "cpu"
    sources: int = 0
    select: int = 1


@dataclass(frozen=True)
class RowPlan:
    """One learner's cost; passes are over *select*."""

    block_size: int | None
    blocks: int | None
    peak_bytes: int
    read_bytes: int
    forward_passes: int
    backward_passes: int
    precision: str | None = None


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
                "precision": plan.precision or "",
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
    if isinstance(settings, LearnedSettings):
        return _plan_learned(settings, costs)
    if not isinstance(settings, Scoring):
        raise TypeError(f"{type(settings).__name__}: how is it planned? Give it an `effort`")
    effort = settings.effort(costs.ingredients, costs.select)
    # The ingredients are scored before, once for all learners that ask.
    scored = costs.ingredients if effort.scored else 0
    held = _held(costs)
    return RowPlan(
        block_size=None,
        blocks=None,
        peak_bytes=costs.in_use
        + max(costs.evaluation, _evaluation_bytes(effort.at_once, costs) if effort.at_once else 0),
        read_bytes=(scored + (costs.sources if held and effort.candidates else effort.reads))
        * costs.ingredient_bytes,
        forward_passes=scored + -(-effort.examples // costs.select),
        backward_passes=0,
    )


def _plan_learned(settings: LearnedSettings, costs: Costs) -> RowPlan:
    copies = costs.ingredients * costs.weights * FP32_BYTES
    return RowPlan(
        block_size=None,
        blocks=None,
        peak_bytes=costs.in_use + max(costs.activations, costs.evaluation) + copies,
        read_bytes=costs.ingredients * costs.ingredient_bytes,
        forward_passes=settings.epochs,
        backward_passes=settings.epochs,
    )


def _evaluation_bytes(candidates: int, costs: Costs) -> int:
    """What evaluating that many candidates in one call takes, as a session does it."""
    held = _held(costs)
    weights = costs.weights * FP32_BYTES
    # The soup that candidates are mixed from, where the ingredients do not fit.
    kept = held or weights
    need = Need(0, weights, costs.image)
    free = costs.budget - costs.in_use - kept
    if need(1, 1) > free:
        return kept + need(1, 1)
    best = partial(
        images_at_once, image=costs.image, batch_size=costs.batch_size, device=costs.device
    )
    return kept + need(*fit(need, free, candidates, best))


def _held(costs: Costs) -> int:
    """The bytes of all sources, where they are held in memory; else 0."""
    sources = max(costs.sources, costs.ingredients) * costs.weights * FP32_BYTES
    return sources if 2 * sources <= costs.budget - costs.in_use else 0


def _plan_mehl(settings: MehlSettings, costs: Costs) -> RowPlan:
    row = row_bytes(costs.weights, settings.precision)
    fixed = costs.in_use + max(costs.activations, costs.evaluation) + costs.weights * FP32_BYTES
    fits = max(1, min(costs.ingredients, (costs.budget - fixed) // row))
    size = min(settings.block_size or fits, costs.ingredients)
    blocks = settings.outer_epochs * -(-costs.ingredients // size)
    init = costs.ingredients if settings.init == "mean_all" else size
    # Compressed rows are folded from the originals, which are read again, and evaluated once more.
    exact = settings.precision == "fp32"
    reads = init + settings.outer_epochs * costs.ingredients * (1 if exact else 2)
    return RowPlan(
        block_size=size,
        blocks=blocks,
        peak_bytes=fixed + size * row,
        read_bytes=reads * costs.ingredient_bytes,
        forward_passes=blocks * settings.inner_epochs + (0 if exact else 2),
        backward_passes=blocks * settings.inner_epochs,
        precision=settings.precision,
    )
