"""What can be known to be wrong with a run before any long work; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from inputs.config import Settings
from soups.learners.registry import Descent, GreedyFull, Pooled


def select_problems(learners: Mapping[str, Settings], images: int) -> list[str]:
    """What these learners cannot do with so few images of *select*."""
    problems = [
        f"learners.{row}.batch_size: {settings.batch_size} is more than the {images} images of "
        "select; lower it, or give select more images"
        for row, settings in learners.items()
        if isinstance(settings, Descent)
        and not isinstance(settings, Pooled)  # whose batches are as large as its folds allow
        and settings.batch_size > images
    ]
    return problems + [
        f"learners.{row}.folds: {settings.folds} is more than the {images} images of select; "
        "lower it, or give select more images"
        for row, settings in learners.items()
        if isinstance(settings, GreedyFull) and settings.folds > images
    ]
