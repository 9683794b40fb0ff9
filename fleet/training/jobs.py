"""Which models are to be trained, and what is wrong with that, before anything long begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fleet.capture.trace import first_line
from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.trainee import TrainingData

# So many names are written out.
FEW = 3

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Job:
    """A model that is to be trained."""

    index: int
    name: str
    make: Make
    recipe: Recipe
    data: TrainingData

    @property
    def rows(self) -> int:
        """How many images its largest batch has."""
        return min(self.recipe.batch_size, len(self.data.fit))

    @property
    def steps_per_epoch(self) -> int:
        count, size = len(self.data.fit), self.recipe.batch_size
        return count // size if self.recipe.drop_last else -(-count // size)

    @property
    def steps(self) -> int:
        return (self.recipe.head_epochs + self.recipe.epochs) * self.steps_per_epoch


def checked_jobs(
    models: Sequence[Make],
    recipes: Sequence[Recipe],
    sets: Sequence[TrainingData],
    names: Sequence[str],
) -> list[Job]:
    """FleetError that names every problem with them."""
    if not len(models) == len(recipes) == len(names) == len(sets):
        raise FleetError(
            f"{len(models)} models, {len(recipes)} recipes, {len(names)} names, {len(sets)} data "
            "sets: give one recipe, name and data set for each model"
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise FleetError(f"several models are named '{twice[0]}'; give each a name of its own")
    jobs = [Job(i, *own) for i, own in enumerate(zip(names, models, recipes, sets, strict=True))]
    problems: dict[str, list[str]] = {}
    for job in jobs:
        for problem in _problems(job.recipe, job.data):
            problems.setdefault(problem, []).append(f"{job.name} (number {job.index})")
    if problems:
        raise FleetError("; ".join(_of(who, what) for what, who in problems.items()))
    return jobs


def _of(names: Sequence[str], problem: str) -> str:
    first, *others = names
    more = f" and {len(others) - FEW} more" if len(others) > FEW else ""
    so_too = f" (so too {', '.join(others[:FEW])}{more})" if others else ""
    return f"{first}: {problem}{so_too}"


def _problems(recipe: Recipe, data: TrainingData) -> Iterator[str]:
    if len(data.tune) == 0:
        yield "the tune split is empty; give it images"
    if len(data.fit) < (recipe.batch_size if recipe.drop_last else 1):
        yield (
            f"the fit split has {len(data.fit)} images, one batch takes {recipe.batch_size}; "
            "lower batch_size or enlarge fit"
        )
        return
    side = min(data.fit.pixels(torch.zeros(1, dtype=torch.int64)).shape[-2:])
    if recipe.shift >= side:
        yield f"shift is {recipe.shift}, the images are {side} pixels wide; use less than that"


def classes_of(model: nn.Module, job: Job) -> int:
    """The width of the model's logits; FleetError where it does not fit the labels."""
    model.eval()
    images = job.data.fit
    pixels = images.normalise(images.pixels(torch.zeros(1, dtype=torch.int64)))
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            logits = model(pixels.to(parameter.device, parameter.dtype))
    except RuntimeError as error:
        raise FleetError(
            f"{job.name}: {type(model).__name__} does not take images {list(pixels.shape[1:])} "
            f"({first_line(error)}); give it images of the size and channels that it was made for"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FleetError(
            f"{job.name}: {type(model).__name__} returns {found} for one image, wanted logits "
            "[1, classes]; wrap the model so that it returns them"
        )
    largest = max(int(split.labels.max()) for split in (job.data.fit, job.data.tune))
    if largest >= logits.shape[1]:
        raise FleetError(
            f"{job.name}: labels go up to {largest}, but {type(model).__name__} has "
            f"{logits.shape[1]} logits; give it a head with {largest + 1} classes or more"
        )
    return logits.shape[1]
