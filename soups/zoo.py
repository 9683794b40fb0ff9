"""Make a zoo: one base, fine-tuned again and again by recipes from a space, all at once."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from fleet.recipes import Recipe
from fleet.train import Checkpoint, JointTrainer, TrainResult, Watch, prepare
from fleet.training.trainee import Trainee
from inputs.models import build_model, describe_model
from inputs.zoo_files import SNAPSHOT_FILE
from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint, scan
from merge.statistics.gathering import load_weights as give_weights
from soups.config import FinetuneConfig, LearnConfig
from soups.curves import Curves
from soups.errors import SoupError
from soups.event_files import EventFiles, require_tensorboard
from soups.recipe_search import names_of_run, partial_name, sample_recipes
from soups.watch import AtFirst, Watches, new_view
from soups.zoo_folder import BASE_FILE, EVENTS_FOLDER, NOT_OF_THE_WEIGHTS, ZooFolder

if TYPE_CHECKING:
    from inputs.data import LearningData

logger = logging.getLogger(__name__)

BASE = "base"


def make_zoo(
    config: LearnConfig,
    data: LearningData,
    *,
    root: Path = Path(),
    device: torch.device | str = "cpu",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Make, or finish, the zoo in `config.zoo.path`; its table, one row per ingredient.

    Without `zoo.base` a base is trained first, into `base.safetensors`. All ingredients are trained
    together, within the memory budget. Ingredient i is written to `{i:02d}.safetensors` (and
    `{i:02d}_e{epoch}.safetensors` with `checkpoints_every`), its recipe, *tune* scores and seconds
    to `zoo.csv`, all curves to `curves.parquet` and `curves.png`; `zoo.json` knows that, which
    recipes failed or were stopped and why, the base's scores and what the zoo was made from.
    What is finished is kept, and a training that was killed goes on from `training.safetensors`.
    `fresh` removes the files that were made here, and no others.
    `root` is the folder that a user's model factory is looked for in.

    Raises SoupError for a folder that holds a zoo made from something else, or other files, and
    where every recipe failed.
    """
    finetune = config.zoo.finetune
    if finetune is None:
        raise SoupError(
            f"{config.zoo.path}: nothing says how to make this zoo; add `zoo.finetune`, "
            "or name finished checkpoints in `zoo.ingredients`"
        )
    recipes = sample_recipes(finetune)
    runs = [names_of_run(i, recipe, finetune) for i, recipe in enumerate(recipes)]
    folder = ZooFolder(config.zoo.path)
    needs_base = config.zoo.base is None and (fresh or not folder.has_base())
    if finetune.tensorboard and (fresh or needs_base or folder.unfinished(runs)):
        require_tensorboard()
    if fresh:
        folder.remove()
    record = _origin(config, finetune, data, root)
    folder.refuse_other_origin(record)
    folder.refuse_other_files({f"{name}.safetensors" for run in runs for name in run})

    def build() -> nn.Module:
        return build_model(
            config.model, classes=len(data.classes), channels=config.data.channels, root=root
        )

    named = {run[-1]: recipe for run, recipe in zip(runs, recipes, strict=True)}
    _check_recipes(build, {BASE: finetune.base, **named} if needs_base else named, data)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(**record, runs=max(len(runs), folder.record.get("runs", 0)))
    training = _Training(
        folder, finetune, data, torch.device(device), config.memory_budget, progress
    )
    if needs_base:
        _train_base(training, build)
    # Again for those whose files were removed while a snapshot knew them as finished.
    while unfinished := folder.unfinished(runs):
        logger.info(
            "zoo %s: %d of %d ingredients to fine-tune", folder.path, len(unfinished), len(recipes)
        )
        start = _loaded(build, config.zoo.base or str(folder.path / BASE_FILE))
        _train_ingredients(training, start, recipes, runs, folder.begin(runs))
    # That of a training that was killed after its last model was done.
    folder.file(SNAPSHOT_FILE).unlink(missing_ok=True)
    if not folder.rows:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in folder.left.items())
        raise SoupError(
            f"{folder.path}: there is no ingredient; change the recipes and make the zoo again "
            f"with --fresh\n{reasons}"
        )
    return folder.table()


def describe(table: pd.DataFrame, left: Mapping[str, str] | None = None) -> str:
    """The zoo as a table to read: what differs between its recipes, and the scores on *tune*.

    Below it stand those that are `left` out, with the reason.
    """
    scores = ["trained_epochs", "tune_accuracy", "tune_loss", "seconds"]
    fields = [field for field in Recipe.model_fields if field != "seed"]
    varied = [field for field in fields if len(set(table[field].astype(str))) > 1]
    shown = table.loc[:, ["name", *varied, *scores]]
    text = shown.to_string(index=False, float_format=lambda value: f"{value:.4g}")
    return "\n".join([text, *(f"{name} left out: {why}" for name, why in (left or {}).items())])


def left_out(path: Path) -> dict[str, str]:
    """Why those of a zoo's recipes that gave no ingredient did not, by name."""
    return ZooFolder(path).left


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as one safetensors file, beside its place and renamed."""
    state = model.state_dict()
    tensors = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    with CheckpointWriter(path, tensors) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor.detach().cpu().contiguous())


def load_weights(model: nn.Module, path_or_id: str) -> None:
    """Give the model a checkpoint's weights; MergeError that names every tensor that differs."""
    with open_checkpoint(path_or_id, names=[*model.state_dict()]) as checkpoint:
        give_weights(model, checkpoint)


@dataclass(frozen=True)
class _Training:
    """How models are trained in a zoo's folder, whichever they are."""

    folder: ZooFolder
    finetune: FinetuneConfig
    data: LearningData
    device: torch.device
    memory_budget: int
    progress: bool

    def run(
        self,
        models: Sequence[Callable[[], nn.Module]],
        recipes: Mapping[str, Recipe],
        keep: Checkpoint,
        *,
        ingredients: bool,
    ) -> list[TrainResult]:
        """Train the models, named and in order as `recipes` has them; write their curves.

        What is under way is kept in a snapshot, which is removed when all are done. Halving and
        `checkpoints_every` are for ingredients.
        """
        snapshot = self.folder.file(SNAPSHOT_FILE)
        curves = Curves(self.folder.path, recipes, len(self.data.fit))
        view = new_view(str(self.folder.path)) if self.progress else None
        watches: list[Watch] = [] if view is None else [view]
        if self.finetune.tensorboard:
            watches.append(EventFiles(self.folder.file(EVENTS_FOLDER)))

        def show_beginning() -> None:
            if view is not None:
                view.take_up(trainer.curves)
            logger.info("%s", trainer.plan)

        def keep_all(model: nn.Module, result: TrainResult, final: bool) -> None:
            # First the curves: who is finished is not trained again.
            curves.write(trainer.curves)
            keep(model, result, final)

        trainer = JointTrainer(
            models,
            [*recipes.values()],
            self.data,
            keep_all,
            names=[*recipes],
            device=self.device,
            at_once=None if self.finetune.joint else 1,
            memory_budget=self.memory_budget,
            halving=self.finetune.halving if ingredients else None,
            checkpoints_every=self.finetune.checkpoints_every if ingredients else None,
            snapshot=snapshot,
            snapshot_minutes=self.finetune.save_every,
            watch=Watches([AtFirst(show_beginning), *watches]),
        )
        try:
            results = trainer.run()
        finally:
            curves.finish(trainer.curves, draw=ingredients)
        return results


def _train_base(training: _Training, build: Callable[[], nn.Module]) -> None:
    folder = training.folder

    def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
        save_weights(model, folder.file(BASE_FILE))
        shown = ("epochs", "tune_accuracy", "tune_loss", "seconds")
        folder.write(base={k: v for k, v in asdict(result).items() if k in shown})

    recipes = {BASE: training.finetune.base}
    (result,) = training.run([build], recipes, keep, ingredients=False)
    if result.state != "done":
        raise SoupError(f"{folder.path}: base: {result.reason}")


def _train_ingredients(
    training: _Training,
    start: nn.Module,
    recipes: Sequence[Recipe],
    runs: Sequence[Sequence[str]],
    chosen: Sequence[int],
) -> None:
    folder = training.folder
    order = [name for run in runs for name in run]
    names = [runs[i][-1] for i in chosen]

    def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
        run = chosen[result.index]
        name = runs[run][-1] if final else partial_name(run, result.epochs)
        save_weights(model, folder.file(f"{name}.safetensors"))
        folder.add_row(_row(name, recipes[run], result), order)

    results = training.run(
        [lambda: copy.deepcopy(start)] * len(chosen),
        {name: recipes[i] for name, i in zip(names, chosen, strict=True)},
        keep,
        ingredients=True,
    )
    pairs = zip(names, results, strict=True)
    folder.end({name: result.reason for name, result in pairs if result.state != "done"})


def _row(name: str, recipe: Recipe, result: TrainResult) -> dict[str, Any]:
    return {
        "name": name,
        "file": f"{name}.safetensors",
        **recipe.model_dump(mode="json"),
        "trained_epochs": result.epochs,
        "tune_accuracy": result.tune_accuracy,
        "tune_loss": result.tune_loss,
        "seconds": round(result.seconds, 3),
    }


def _check_recipes(
    build: Callable[[], nn.Module], recipes: Mapping[str, Recipe], data: LearningData
) -> None:
    """FleetError for recipes by which this model cannot be trained on these images.

    Before the base is trained: its hours would be lost.
    """
    JointTrainer([build] * len(recipes), [*recipes.values()], data, names=[*recipes])
    with torch.random.fork_rng([]):
        model = build()
    for i, (name, recipe) in enumerate(recipes.items()):
        trainee = Trainee(
            i, name, recipe, data, classes=len(data.classes), dtype=torch.get_default_dtype()
        )
        prepare(model, trainee)
        trainee.next_phase()
        prepare(model, trainee)


def _loaded(build: Callable[[], nn.Module], path_or_id: str) -> nn.Module:
    with torch.random.fork_rng([]):
        model = build()
    load_weights(model, path_or_id)
    return model


def _origin(
    config: LearnConfig, finetune: FinetuneConfig, data: LearningData, root: Path
) -> dict[str, Any]:
    """What decides the weights of the zoo, as JSON has it.

    Not the number of ingredients: a zoo may grow. Not the other splits: the images of *fit* and
    *tune* are told by a digest, so the same images from another path, or with another *select*,
    are the same.
    """
    base = None
    if config.zoo.base is not None:
        with open_checkpoint(config.zoo.base) as checkpoint:
            base = {"checkpoint": config.zoo.base, "sha256": scan(checkpoint).sha256}
    settings = config.data.model_dump(mode="json", by_alias=True)
    origin = {
        "model": describe_model(config.model, root),
        "images": {
            "mean": settings.pop("mean"),
            "std": settings.pop("std"),
            "fit": f"{len(data.fit)} images, {data.fit.digest()}",
            "tune": f"{len(data.tune)} images, {data.tune.digest()}",
        },
        "start": base,
        "finetune": finetune.model_dump(mode="json", exclude=NOT_OF_THE_WEIGHTS),
        "data": settings,
    }
    return json.loads(json.dumps(origin))
