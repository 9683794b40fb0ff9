"""One run of a config: what is open, what it depends on, and the folder that remembers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inputs.data import LearningData
from inputs.models import describe_model
from soups.config import LearnConfig
from soups.learners.registry import Descent
from soups.meter import Meter
from soups.record import RunRecord, Steps, fingerprint
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
        """Each ingredient's accuracy on *select*, once for all learners."""
        session, steps = self.session, self.steps
        if session.ingredients.accuracies:
            return
        inputs = fingerprint(self.inputs)
        if not steps.is_done("ingredients", inputs):
            with Meter(session.device) as meter:
                accuracies = session.evaluate_ingredients().accuracies.tolist()
            session.release()
            steps.finish(
                "ingredients", inputs, [], {"accuracies": accuracies, "seconds": meter.seconds}
            )
        result = steps.result("ingredients")
        session.ingredients = IngredientScores(tuple(result["accuracies"]), result["seconds"])
        named = dict(zip(session.zoo.names, result["accuracies"], strict=True))
        self.record.add(ingredients={"select_accuracy": named})

    @property
    def largest_batch(self) -> int:
        """The largest batch that a learner trains with."""
        learners = self.config.learners.values()
        return max((s.batch_size for s in learners if isinstance(s, Descent)), default=1)
