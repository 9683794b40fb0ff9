"""Full fine-tunes of one small ViT on the handwritten digits, and the stores that hold them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fleet.recipes import Recipe
from fleet.storage.building import build
from fleet.storage.config import AccuracyConfig, BuildConfig
from fleet.train import JointTrainer, TrainResult, evaluate
from fleet.variants import Store
from inputs.config import DataConfig, TimmModel
from inputs.data import ImageSet, load_learning_data, load_report_data
from inputs.models import build_model
from soups.zoo import load_weights, save_weights

MODEL = TimmModel(
    source="timm",
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
)
DATA = DataConfig.model_validate(
    {
        "path": "digits",
        "size": 8,
        "channels": 1,
        "mean": [0.3],
        "std": [0.38],
        "fit": {"from": "all", "fraction": 0.4},
        "tune": {"from": "all", "fraction": 0.1},
        "select": {"from": "all", "fraction": 0.25},
        "report": {"from": "all", "fraction": 0.25},
    }
)
BUDGET = 2 << 30
TASKS = 20
LOST = 0.005
LEVELS = ("general", "domain", "task")
# What each level contributes is measured on so many of the variants.
LEVELS_OF = 100
Row = dict[str, float]


@dataclass(frozen=True)
class Images:
    fit: ImageSet
    tune: ImageSet


def store_case(folder: Path, variants: int) -> Row:
    """Sizes of the stores beside the plain files, and the points that their variants lose."""
    learning = load_learning_data(DATA, memory_budget=BUDGET)
    report = load_report_data(DATA, memory_budget=BUDGET)["report"]
    make_zoo(folder / "zoo", variants, Images(learning.fit, learning.tune))
    paths = {file.stem: file for file in sorted((folder / "zoo").glob("[0-9]*.safetensors"))}
    base = folder / "zoo" / "base.safetensors"
    some = dict(list(paths.items())[:LEVELS_OF])

    def score(name: str, tensors: Mapping[str, Tensor]) -> float:
        return accuracy(name, tensors, learning.select)

    kept = {"accuracy": AccuracyConfig(lost=LOST)}
    row: Row = {"levels_of": len(some)}
    builds: list[tuple[str, dict[str, Path], dict[str, Any]]] = [
        ("size", paths, kept),
        ("exact_size", paths, {"exact": True}),
        ("some_size", some, kept),
        *((f"without_{level}_size", some, {**kept, "leave_out": [level]}) for level in LEVELS),
    ]
    for name, variants_of, how in builds:
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        settings = {"base": str(base), "variants": variants_of, "model": MODEL, "data": DATA, **how}
        build(BuildConfig.model_validate(settings), out, score=score)
        row[f"{name}_bytes"] = files_bytes(out)
        row[f"{name}_over_plain"] = files_bytes(out) / plain_bytes(base, variants_of)
    row["plain_bytes"] = plain_bytes(base, paths)
    return row | lost_on_report(Store(folder / "size"), folder / "zoo", report)


def lost_on_report(store: Store, zoo: Path, report: ImageSet) -> Row:
    """Mean accuracies before and after, in points, on images that no build looked at."""
    model = new_model()
    before, after = [], []
    for name in store.variants:
        load_weights(model, str(zoo / f"{name}.safetensors"))
        before.append(evaluate(model, of_task(report, int(name)))[0])
        after.append(accuracy(name, store.tensors(name), report))
    lost = 100 * (np.array(before) - np.array(after))
    return {
        "report_before": 100 * float(np.mean(before)),
        "report_after": 100 * float(np.mean(after)),
        "points_lost": float(lost.mean()),
        "points_lost_at_most": float(lost.max()),
    }


def make_zoo(folder: Path, variants: int, images: Images) -> None:
    """A base, and fine-tunes of it, each on the digits of its task with its own recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.safetensors"
    if not base.exists():
        recipe = Recipe(lr=3e-3, epochs=20, batch_size=32, noise=0.2)
        train([new_model], [recipe], [images], [base])
    missing = [n for n in range(variants) if not file_of(folder, n).exists()]
    draws = np.random.default_rng(0)
    recipes = [
        Recipe(
            lr=float(np.exp(draws.uniform(np.log(3e-4), np.log(3e-3)))),
            weight_decay=float(draws.choice([0.0, 0.05, 0.2])),
            epochs=int(draws.choice([2, 3, 4])),
            batch_size=16,
            label_smoothing=float(draws.choice([0.0, 0.1])),
            noise=float(draws.choice([0.0, 0.2, 0.4])),
            seed=number,
        )
        for number in range(variants)
    ]

    def fine_tuned() -> nn.Module:
        model = new_model()
        load_weights(model, str(base))
        return model

    train(
        [fine_tuned] * len(missing),
        [recipes[n] for n in missing],
        [Images(of_task(images.fit, n), of_task(images.tune, n)) for n in missing],
        [file_of(folder, n) for n in missing],
    )


def train(makes: list[Any], recipes: list[Recipe], data: list[Images], files: list[Path]) -> None:
    """All at once; each model is saved as it is done."""

    def save(model: nn.Module, result: TrainResult, final: bool) -> None:
        save_weights(model, files[result.index])

    if makes:
        JointTrainer(makes, recipes, data, save, memory_budget=BUDGET).run()


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL, classes=10, channels=1, root=Path())


def file_of(folder: Path, number: int) -> Path:
    return folder / f"{number:04}.safetensors"


def of_task(images: ImageSet, number: int) -> ImageSet:
    """The images of the digits that a variant is for: four to ten of them, by its task."""
    draws = np.random.default_rng([1, number % TASKS])
    digits = draws.permutation(10)[: draws.integers(4, 11)]
    return images.subset(torch.isin(images.labels, torch.from_numpy(digits)).nonzero().flatten())


def accuracy(name: str, tensors: Mapping[str, Tensor], images: ImageSet) -> float:
    """The accuracy of a variant with these tensors on the images of its task."""
    model = new_model()
    model.load_state_dict(dict(tensors))
    return evaluate(model, of_task(images, int(name)))[0]


def plain_bytes(base: Path, variants: Mapping[str, Path]) -> int:
    return sum(file.stat().st_size for file in (base, *variants.values()))


def files_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
