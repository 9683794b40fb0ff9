"""A zoo's recipes, drawn from the space in its config, and the names of what they give."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import torch
from pydantic import ValidationError

from fleet.recipes import Recipe
from inputs.randomness import generator
from soups.config import FinetuneConfig, Range, choices
from soups.errors import SoupError


def sample_recipes(finetune: FinetuneConfig) -> list[Recipe]:
    """The ingredients' recipes; recipe i does not depend on how many there are.

    Raises SoupError that names every ingredient whose values cannot be together.
    """
    if finetune.search == "grid":
        lists = {field: _listed(field, value) for field, value in finetune.recipe.items()}
        chosen = [
            dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
        ]
    else:
        chosen = [
            {field: _draw(finetune, i, field, space) for field, space in finetune.recipe.items()}
            for i in range(finetune.ingredients)
        ]
    recipes, problems = [], []
    for i, own in enumerate(chosen[: finetune.ingredients]):
        seed = _draw(finetune, i, "seed", Range(low=0, high=2**31))
        try:
            recipes.append(Recipe.model_validate({"seed": seed, **own}))
        except ValidationError as error:
            texts = [one["msg"].removeprefix("Value error, ") for one in error.errors()]
            problems.append(f"zoo.finetune.recipe: ingredient {i:02d}: {'; '.join(texts)}")
    if problems:
        raise SoupError("\n".join(problems))
    return recipes


def names_of_run(run: int, recipe: Recipe, finetune: FinetuneConfig) -> list[str]:
    """The ingredients along one run, the final one last."""
    every = finetune.checkpoints_every
    epochs = range(every, recipe.epochs, every) if every else ()
    return [*(partial_name(run, epoch) for epoch in epochs), f"{run:02d}"]


def partial_name(run: int, epoch: int) -> str:
    """The ingredient that a run leaves after an epoch before its last."""
    return f"{run:02d}_e{epoch}"


def _listed(field: str, value: Any) -> list[Any]:
    listed = choices(field, value)
    return [value] if listed is None else listed


def _draw(finetune: FinetuneConfig, ingredient: int, field: str, space: Any) -> Any:
    """One field of one ingredient, from a stream of its own."""
    listed = choices(field, space)
    if listed is None and not isinstance(space, Range):
        return space
    draws = generator(finetune.seed, f"recipe/{ingredient}/{field}")
    uniform = torch.rand((), generator=draws, dtype=torch.float64).item()
    if not isinstance(space, Range):
        assert listed is not None
        return listed[int(uniform * len(listed))]
    low, high = space.low, space.high
    whole = _is_whole(Recipe.model_fields[field].annotation)
    if whole:
        # Each whole number gets an interval of length 1.
        low, high = low - 0.5, high + 0.5
    if space.log:
        drawn = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        drawn = low + uniform * (high - low)
    return min(max(round(drawn), int(space.low)), int(space.high)) if whole else drawn


def _is_whole(annotation: Any) -> bool:
    """Whether a field counts something: int, or int | None."""
    return annotation is int or any(_is_whole(part) for part in get_args(annotation))
