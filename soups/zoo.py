"""Make a zoo: one base, fine-tuned again and again by recipes from a space."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from fleet.recipes import Recipe
from fleet.train import TrainResult, train
from inputs.files import write_whole
from inputs.models import build_model, describe_model
from inputs.randomness import generator
from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint, scan
from merge.statistics.gathering import load_weights as give_weights
from soups.config import FinetuneConfig, LearnConfig, Range
from soups.errors import SoupError
from soups.ingredients import holds_checkpoint

if TYPE_CHECKING:
    from inputs.data import LearningData

logger = logging.getLogger(__name__)

BASE_FILE = "base.safetensors"
TABLE_FILE = "zoo.csv"
RECORD_FILE = "zoo.json"


def make_zoo(
    config: LearnConfig,
    data: LearningData,
    *,
    root: Path,
    device: torch.device | str = "cpu",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Make, or finish, the zoo in `config.zoo.path`; its table, one row per ingredient.

    Without `zoo.base` a base is trained first, into `base.safetensors`. Ingredient i is written
    to `{i:02d}.safetensors` (and `{i:02d}_e{epoch}.safetensors` with `checkpoints_every`), its
    recipe, *tune* scores and seconds to `zoo.csv`; `zoo.json` knows that, the base's scores and
    what the zoo was made from.
    What is finished is kept. `fresh` removes the files that were made here, and no others.
    `root` is the folder that a user's model factory is looked for in.

    Raises SoupError for a folder that holds a zoo made from something else, or other files.
    """
    finetune = config.zoo.finetune
    if finetune is None:
        raise SoupError(
            f"{config.zoo.path}: nothing says how to make this zoo; add `zoo.finetune`, "
            "or name finished checkpoints in `zoo.ingredients`"
        )
    folder = _Folder(config.zoo.path)
    if fresh:
        folder.remove()
    recipes = sample_recipes(finetune)
    record = _origin(config, finetune, data, root)
    names = [names_of_run(i, recipe, finetune) for i, recipe in enumerate(recipes)]
    folder.refuse_other_origin(record)
    folder.refuse_other_files({f"{name}.safetensors" for run in names for name in run})
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(**record)

    def build() -> nn.Module:
        return build_model(
            config.model, classes=len(data.classes), channels=config.data.channels, root=root
        )

    if config.zoo.base is None and not folder.has_base():
        _train_base(folder, build, finetune.base, data, device, progress)
    unfinished = [i for i, run in enumerate(names) if not all(map(folder.has_row, run))]
    logger.info(
        "zoo %s: %d of %d ingredients to fine-tune", folder.path, len(unfinished), len(recipes)
    )
    if unfinished:
        start = _loaded(build, config.zoo.base or str(folder.path / BASE_FILE))
        order = [name for run in names for name in run]

        def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
            run = unfinished[result.index]
            name = names[run][-1] if final else _partial_name(run, result.epochs)
            save_weights(model, folder.path / f"{name}.safetensors")
            folder.add_row(_row(name, recipes[run], result), order)

        train(
            [lambda: copy.deepcopy(start)] * len(unfinished),
            [recipes[i] for i in unfinished],
            data,
            keep,
            device=device,
            names=[names[i][-1] for i in unfinished],
            checkpoints_every=finetune.checkpoints_every,
            progress=progress,
        )
    return folder.table()


def describe(table: pd.DataFrame) -> str:
    """The zoo as a table to read: what differs between its recipes, and the scores on *tune*."""
    scores = ["trained_epochs", "tune_accuracy", "tune_loss", "seconds"]
    fields = [field for field in Recipe.model_fields if field != "seed"]
    varied = [field for field in fields if len(set(table[field].astype(str))) > 1]
    shown = table.loc[:, ["name", *varied, *scores]]
    return shown.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def sample_recipes(finetune: FinetuneConfig) -> list[Recipe]:
    """The ingredients' recipes; recipe i does not depend on how many there are."""
    if finetune.search == "grid":
        lists = {f: v if isinstance(v, list) else [v] for f, v in finetune.recipe.items()}
        chosen = [
            dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
        ]
    else:
        chosen = [
            {field: _draw(finetune, i, field, space) for field, space in finetune.recipe.items()}
            for i in range(finetune.ingredients)
        ]
    return [
        Recipe.model_validate({"seed": _draw(finetune, i, "seed", Range(low=0, high=2**31)), **own})
        for i, own in enumerate(chosen[: finetune.ingredients])
    ]


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


def _draw(finetune: FinetuneConfig, ingredient: int, field: str, space: Any) -> Any:
    """One field of one ingredient, from a stream of its own."""
    if not isinstance(space, Range | list):
        return space
    draws = generator(finetune.seed, f"recipe/{ingredient}/{field}")
    uniform = torch.rand((), generator=draws, dtype=torch.float64).item()
    if isinstance(space, list):
        return space[int(uniform * len(space))]
    low, high = space.low, space.high
    whole = Recipe.model_fields[field].annotation is int
    if whole:
        # Each whole number gets an interval of length 1.
        low, high = low - 0.5, high + 0.5
    if space.log:
        drawn = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        drawn = low + uniform * (high - low)
    return min(max(round(drawn), int(space.low)), int(space.high)) if whole else drawn


def _partial_name(run: int, epoch: int) -> str:
    return f"{run:02d}_e{epoch}"


def names_of_run(run: int, recipe: Recipe, finetune: FinetuneConfig) -> list[str]:
    """The ingredients along one run, the final one last."""
    every = finetune.checkpoints_every
    epochs = range(every, recipe.epochs, every) if every else ()
    return [*(_partial_name(run, epoch) for epoch in epochs), f"{run:02d}"]


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


def _train_base(
    folder: _Folder,
    build: Callable[[], nn.Module],
    recipe: Recipe,
    data: LearningData,
    device: torch.device | str,
    progress: bool,
) -> None:
    def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
        save_weights(model, folder.path / BASE_FILE)
        folder.write(base={k: v for k, v in asdict(result).items() if k != "index"})

    train([build], [recipe], data, keep, device=device, names=["base"], progress=progress)


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
        "finetune": finetune.model_dump(mode="json", exclude={"ingredients"}),
        "data": settings,
    }
    return json.loads(json.dumps(origin))


@dataclass
class _Folder:
    """The files of one zoo."""

    path: Path

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.record: dict[str, Any] = {}
        if self._file(RECORD_FILE).exists():
            try:
                self.record = json.loads(self._file(RECORD_FILE).read_text())
                self.rows = {row["name"]: row for row in self.record["ingredients"]}
            except (ValueError, KeyError, TypeError) as error:
                raise SoupError(
                    f"{self.path}: {RECORD_FILE} is not the record of a zoo ({error!r}); put the "
                    "folder aside, or give the zoo another (zoo.path=…)"
                ) from error

    def has_base(self) -> bool:
        return "base" in self.record and self._file(BASE_FILE).is_file()

    def has_row(self, name: str) -> bool:
        return name in self.rows and self._file(f"{name}.safetensors").is_file()

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows.values())

    def add_row(self, row: dict[str, Any], order: list[str]) -> None:
        self.rows[row["name"]] = row
        self.rows = {name: self.rows[name] for name in order if name in self.rows}
        self.write()

    def write(self, **changes: Any) -> None:
        """Write the record, then the table, which only shows what the record knows."""
        self.record = {**self.record, **changes, "ingredients": [*self.rows.values()]}
        write_whole(self._file(RECORD_FILE), json.dumps(self.record, indent=2) + "\n")
        write_whole(self._file(TABLE_FILE), self.table().to_csv(index=False))

    def remove(self) -> None:
        """Remove the files of a zoo that was made here; nothing where none was."""
        if not self.record:
            return
        finetune = FinetuneConfig.model_validate(self.record["finetune"])
        runs = {int(name.partition("_")[0]) for name in self.rows} | {0}
        # The first unfinished run may have left a file without a row.
        recipes = sample_recipes(finetune.model_copy(update={"ingredients": max(runs) + 2}))
        own = {
            f"{n}.safetensors" for i, r in enumerate(recipes) for n in names_of_run(i, r, finetune)
        }
        for name in [TABLE_FILE, BASE_FILE, *sorted(own), RECORD_FILE]:
            self._file(name).unlink(missing_ok=True)
        self.rows, self.record = {}, {}

    def refuse_other_origin(self, origin: dict[str, Any]) -> None:
        """SoupError if the zoo here was made from something else; shows what differs."""
        if not self.record:
            return
        parts = [part for part in origin if part != "data"]
        if all(self.record.get(part) == origin[part] for part in parts):
            return
        old, new = (dict(_flatten({k: r.get(k) for k in origin})) for r in (self.record, origin))
        differences = [
            f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}"
            for key in {**old, **new}
            if old.get(key, "not set") != new.get(key, "not set")
        ]
        raise SoupError(
            f"{self.path}: this zoo was made with other settings ({'; '.join(differences)}); "
            "give the new one its own folder (zoo.path=…), or make this one again with --fresh, "
            f"which replaces its {len(self.rows)} ingredients"
        )

    def refuse_other_files(self, own: set[str]) -> None:
        """SoupError if the folder holds checkpoints that this zoo does not make."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise SoupError(f"{self.path}: is a file; give the zoo a folder (zoo.path=…)")
        found = {file.name for file in self.path.iterdir() if holds_checkpoint(file)}
        others = sorted(found - own - {BASE_FILE}) if self.record else sorted(found)
        if others:
            fewer = all(Path(name).stem in self.rows for name in others)
            ask = "raise zoo.finetune.ingredients again" if fewer else "remove `zoo.finetune`"
            raise SoupError(
                f"{self.path}: holds {', '.join(others)}, which this zoo would not make; give it "
                f"its own folder (zoo.path=…), or {ask} to use what is there"
            )

    def _file(self, name: str) -> Path:
        return self.path / name


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _flatten(inner, f"{key}.{part}" if key else part)
    else:
        yield key, value
