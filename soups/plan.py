"""What a run will cost, from its settings and one measured step; printed before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from soups.learners.registry import (
    CrossFittedSettings,
    Descent,
    Effort,
    LearnedSettings,
    Level,
    MehlSettings,
    Pooled,
    PooledNewton,
    Scoring,
)

FP32_BYTES = 4
# What derivatives of logits are found within, at most, beside what they are found from.
TANGENT_BYTES = 256 << 20


@dataclass(frozen=True)
class Costs:
    """What the plan is made from, in bytes and counts.

    `in_use`: memory before a learner starts, the model and the images included; `activations`:
    what one training step saves for its backward pass, with its largest gradient; `evaluation`:
    what a batch of evaluation takes; `image`: the activations of one model on one image, when
    `batch_size` of them at most are evaluated at a time on `device`. `sources` are the ingredients
    and the base where it is known; `select` is how many images there are, of `classes`; `tensors`
    how many are mixed.
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
    classes: int = 1
    tensors: int = 1


@dataclass(frozen=True)
class RowPlan:
    """One learner's cost; passes are over *select*.

    Those of cross-fitting it, so that its soups can be scored out of fold, come on top.
    """

    block_size: int | None
    blocks: int | None
    peak_bytes: int
    read_bytes: int
    forward_passes: int
    backward_passes: int
    precision: str | None = None
    out_of_fold_forward_passes: int = 0
    out_of_fold_backward_passes: int = 0


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


def plan_learners(
    learners: Mapping[str, Settings], costs: Costs, *, folds: int = 0
) -> dict[str, RowPlan]:
    """The cost of each row, with block sizes chosen so that the predicted peak is in the budget.

    `folds`: how many each learner is cross-fitted on afterwards; 0 for not at all.
    Raises SoupError that names every row that cannot fit, with the least that would do.
    """
    plans = {
        row: _with_folds(_plan_row(settings, costs), settings, costs, folds)
        for row, settings in learners.items()
    }
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


def largest_batch(learners: Mapping[str, Settings]) -> int:
    """The largest batch that one of them trains with."""
    return max((s.batch_size for s in learners.values() if isinstance(s, Descent)), default=1)


def plan_table(plans: Mapping[str, RowPlan]) -> pd.DataFrame:
    """The plan as it is printed."""
    cross_fitted = any(plan.out_of_fold_forward_passes for plan in plans.values())
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
            | ({"out of fold": _out_of_fold(plan)} if cross_fitted else {})
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


def _out_of_fold(plan: RowPlan) -> str:
    """The passes that cross-fitting adds."""
    forward, backward = plan.out_of_fold_forward_passes, plan.out_of_fold_backward_passes
    return f"{forward} + {backward}" if forward else ""


def _with_folds(plan: RowPlan, settings: Settings, costs: Costs, folds: int) -> RowPlan:
    """The plan with the passes of learning without each fold in turn, and of scoring on it.

    Each image is learned from by all soups but one, so in `folds − 1` passes for each of the
    learner's. Where a learner scores candidates, its effort on fewer images says how many these
    are; what the ingredients score is known of each image. Learners that cross-fit themselves, as
    those with `folds` of their own do, are not cross-fitted again.
    """
    if not folds or hasattr(settings, "folds"):
        return plan
    if isinstance(settings, Scoring):
        seen = costs.select - costs.select // folds
        effort = settings.effort(costs.ingredients, seen)
        learning = -(-folds * effort.examples // costs.select)
        learning += costs.ingredients if effort.scored else 0
    else:
        learning = (folds - 1) * plan.forward_passes
    return replace(
        plan,
        out_of_fold_forward_passes=learning + 1,
        out_of_fold_backward_passes=(folds - 1) * plan.backward_passes,
    )


def _plan_row(settings: Settings, costs: Costs) -> RowPlan:
    if isinstance(settings, MehlSettings):
        return _plan_mehl(settings, costs)
    if isinstance(settings, LearnedSettings):
        return _plan_learned(settings, costs)
    if isinstance(settings, Pooled):
        return _plan_pooled(settings, costs)
    if isinstance(settings, PooledNewton):
        return _plan_pooled_newton(settings, costs)
    if not isinstance(settings, Scoring):
        raise TypeError(f"{type(settings).__name__}: how is it planned? Give it an `effort`")
    return _plan_effort(settings.effort(costs.ingredients, costs.select), costs)


def _plan_effort(effort: Effort, costs: Costs) -> RowPlan:
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


def _plan_pooled(settings: Pooled, costs: Costs) -> RowPlan:
    row = costs.weights * FP32_BYTES
    paths = len(settings.levels) * len(settings.penalties)
    # Logits out of fold, as they come and as they are kept.
    logits = (2 * paths + 2) * costs.select * costs.classes * FP32_BYTES
    fixed = costs.in_use + max(costs.activations, costs.evaluation) + row + logits
    # Where the rows come in blocks, the mean stays beside the centre.
    fits = (costs.budget - fixed) // row
    fits = fits if fits >= costs.ingredients else max(1, fits - 1)
    size = min(settings.block_size or fits, costs.ingredients)
    blocks = -(-costs.ingredients // size)
    learners = settings.folds + settings.refit
    batches = learners * settings.steps * blocks * paths
    learned = -(-batches * min(settings.batch_size, costs.select) // costs.select)
    loads = 1 if blocks == 1 else 1 + learners * paths * (2 + blocks)
    walks = _fold_greedy(settings, costs)
    return RowPlan(
        block_size=size,
        blocks=blocks,
        peak_bytes=max(walks.peak_bytes, fixed + (size + (blocks > 1)) * row),
        read_bytes=walks.read_bytes + (1 + loads) * costs.ingredients * costs.ingredient_bytes,
        forward_passes=walks.forward_passes + paths + learned,
        backward_passes=learned,
    )


def _plan_pooled_newton(settings: PooledNewton, costs: Costs) -> RowPlan:
    row = costs.weights * FP32_BYTES
    numbers = costs.ingredients * _numbers(settings.level, costs)
    # Found in fp32, joined, and solved with in fp64.
    derivatives = 16 * costs.select * costs.classes * numbers + 80 * numbers**2
    fixed = costs.in_use + _held(costs) + derivatives + max(TANGENT_BYTES, costs.evaluation) + row
    # Ingredients less their mean, and as much again while they are made.
    fits = max(1, (costs.budget - fixed) // (2 * row))
    size = min(settings.block_size or fits, costs.ingredients)
    blocks = -(-costs.ingredients // size)
    walks = _fold_greedy(settings, costs)
    return RowPlan(
        block_size=size,
        blocks=blocks,
        peak_bytes=max(walks.peak_bytes, fixed + 2 * size * row),
        read_bytes=walks.read_bytes
        + 3 * settings.linearisations * blocks * costs.ingredients * costs.ingredient_bytes,
        forward_passes=walks.forward_passes
        + 3  # out of fold, and what can be dropped
        + settings.linearisations * (costs.ingredients + blocks + 1),
        backward_passes=settings.linearisations * blocks * costs.classes,
    )


def _numbers(level: Level, costs: Costs) -> int:
    """How many numbers each ingredient has at most."""
    return {"ingredient": 1, "depth": 3, "group": 3 + costs.tensors}[level]


def _fold_greedy(settings: CrossFittedSettings, costs: Costs) -> RowPlan:
    """Greedy on all folds and on all of *select*, at most; it and the uniform soup out of fold."""
    walks = Effort(
        candidates=(settings.folds + 1) * (costs.ingredients - 1),
        examples=(settings.folds + 1) * (costs.ingredients - 1) * costs.select,
        at_once=settings.folds + 1,
        reads=2 * (settings.folds + 1) * costs.ingredients,
        scored=True,
    )
    return _plan_effort(walks + Effort(2, 2 * costs.select, 1, 2 * costs.ingredients), costs)
