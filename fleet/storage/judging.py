"""How right a variant is on given images: what a build with an accuracy to keep asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.train import evaluate
from fleet.training.kind import classifier_head
from inputs.config import DataConfig, ModelConfig
from inputs.data import ImageSet
from inputs.models import build_model

Score = Callable[[str, Mapping[str, Tensor]], float]
"""The accuracy (a fraction) of the variant of that name with these tensors."""


class Architecture:
    """Models of one kind with heads of any width."""

    def __init__(self, model: ModelConfig, data: DataConfig, classes: int, root: Path) -> None:
        self._model, self._data, self._root = model, data, root
        self._built: tuple[int, nn.Module] | None = None
        self.head = self._head(self.with_classes(classes))

    def with_classes(self, classes: int) -> nn.Module:
        """The model with a head of this width, and whatever weights."""
        if self._built is None or self._built[0] != classes:
            model = build_model(
                self._model, classes=classes, channels=self._data.channels, root=self._root
            )
            self._built = classes, model
        return self._built[1]

    def classes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The width of the head that tensors of these shapes have."""
        shape = shapes.get(self.head)
        return shape[0] if shape else None

    def _head(self, model: nn.Module) -> str:
        """The name of the head's weight."""
        head = classifier_head(model)
        prefix = next((name for name, module in model.named_modules() if module is head), "")
        names = [name for name, _ in head.named_parameters()]
        chosen = next((n for n in names if n.endswith("weight")), names[0])
        return f"{prefix}.{chosen}".lstrip(".")


class Judge:
    """Scores variants on one set of images."""

    def __init__(self, architecture: Architecture, images: ImageSet) -> None:
        self._architecture, self._images = architecture, images

    def __call__(self, name: str, tensors: Mapping[str, Shaped[Tensor, ...]]) -> float:
        """The accuracy; FleetError where the model does not take the tensors or the labels."""
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        classes = self._architecture.classes_of(shapes)
        labels = int(self._images.labels.max()) + 1
        if classes is None or classes < labels:
            raise FleetError(
                f"{name}: its head {self._architecture.head!r} is for {classes} classes, "
                f"{self._images.name} has {labels}; give data that the variant was trained for, "
                "or a tolerance instead of an accuracy"
            )
        model = self._architecture.with_classes(classes)
        try:
            with torch.no_grad():
                model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise FleetError(
                f"{name}: does not fit the model of the config ({error}); give the model that the "
                "checkpoints are of"
            ) from error
        return evaluate(model, self._images)[0]
