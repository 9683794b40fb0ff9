"""One run of a config: what is open, what it depends on, and the folder that remembers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inputs.data import LearningData
from inputs.models import describe_model
from soups.config import LearnConfig
from soups.diversity import Diversity, diversity
from soups.folds import fold_count
from soups.meter import Meter
from soups.record import RunRecord, Steps, fingerprint
from soups.rows import load_predictions, save_predictions
from soups.session import IngredientScores, Session


@dataclass
class Run:
    """One run of a config: the session that learners use, and the folder that remembers."""

    config: LearnConfig
    root: Path
    folder: Path
    data: LearningData
    session: Session
    steps: Steps
    record: RunRecord

    def soup(self, row: str) -> Path:
        """Where the row's cooked soup is."""
        return self.folder / "soups" / f"{row}.safetensors"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every learner's result depends on, beside its own settings."""
        config, zoo = self.config, self.session.zoo
        return {
            "ingredients": [i.sha256 for i in zoo.ingredients],
            "names": list(zoo.names),
            "base": zoo.base_ingredient.sha256 if zoo.base_ingredient else None,
            "carried": zoo.preflight.carried,
            "model": describe_model(config.model, self.root),
            "select": self.data.select.digest(),
            "fit": self.data.fit.digest() if config.norm_buffers == "recalibrate" else None,
            "mean": config.data.mean,
            "std": config.data.std,
            "seed": config.seed,
            "norm_buffers": config.norm_buffers,
            "train_mode": config.train_mode,
            "device": self.session.device.type,
        }

    def score_ingredients(self) -> None:
        """Whether each ingredient is right on each image of *select*, once for all learners."""
        session, steps = self.session, self.steps
        if session.ingredients.accuracies:
            return
        inputs = fingerprint(self.inputs | {"of": "each image"})
        path = self.folder / "work" / "ingredients" / "predictions.npz"
        if not steps.is_done("ingredients", inputs):
            with Meter(session.device) as meter:
                right = session.evaluate_ingredients().right
            session.release()
            path.parent.mkdir(parents=True, exist_ok=True)
            # By number: a name may be a path.
            outcomes = {str(k): {"select": own.numpy()} for k, own in enumerate(right)}
            save_predictions(path, outcomes)
            steps.finish("ingredients", inputs, [path], {"seconds": meter.seconds})
        saved = load_predictions(path)
        names = session.zoo.names
        right = torch.stack([torch.from_numpy(saved[str(k)]["select"]) for k in range(len(names))])
        session.ingredients = IngredientScores.of(right, steps.result("ingredients")["seconds"])
        named = dict(zip(names, session.ingredients.accuracies, strict=True))
        found = {"select_accuracy": named}
        if self.diversity is not None:
            found |= vars(self.diversity)
        self.record.add(ingredients=found)

    @cached_property
    def diversity(self) -> Diversity | None:
        """How alike the ingredients err on *select*; None of a single one."""
        right = self.session.ingredients.right
        assert right is not None, "score_ingredients comes first"
        return diversity(right.numpy()) if len(right) > 1 else None

    @cached_property
    def folds(self) -> int:
        """How many folds of *select* learners are cross-fitted on; 0 for not at all."""
        wanted, labels = self.config.out_of_fold, self.data.select.labels
        return fold_count(labels, wanted, where="out_of_fold") if wanted else 0
