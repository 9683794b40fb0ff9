"""How the learning rate rises and falls over a model's steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fleet.recipes import Recipe


def lr_factor(step: int, steps: int, recipe: Recipe) -> float:
    """lr at step 0, 1, … of `steps`, as a multiple of the recipe's lr.

    The first W = round(warmup · steps) steps rise: (step + 1) / W. After them, with
    t = (step − W) / (steps − W),

    - `constant` stays at 1;
    - `linear` falls evenly: 1 − t;
    - `cosine` falls slowly, fast, slowly: ½ (1 + cos(π t)) (1608.03983, without restarts).

    Both that fall begin at 1 and would be 0 at the step after the last.
    """
    warm = round(recipe.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    done = (step - warm) / (steps - warm)
    if recipe.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))
