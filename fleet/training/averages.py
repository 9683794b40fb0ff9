"""Averages of one model's weights while it is trained: EMA and SWA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.training.optimizers import restore

if TYPE_CHECKING:
    from fleet.recipes import Recipe


class Average:
    """The average that a recipe asks for, of the tensors of one model's state.

    - EMA: after every step, avg ← decay · avg + (1 − decay) · w; it begins as the weights after the
      first step.
    - SWA (1803.05407): the mean of the weights at the ends of the epochs that end after
      round(swa_start · steps) steps, of the last epoch at least.

    Floating tensors are averaged in float32 or wider, norm buffers among them; others are copied.
    The arithmetic is that of `torch.optim.swa_utils.AveragedModel` with `use_buffers=True`, lerp.
    """

    def __init__(self, recipe: Recipe, state: Mapping[str, Shaped[Tensor, " ..."]]):
        if (recipe.ema_decay is None) == (recipe.swa_start is None):
            raise FleetError("average: set ema_decay or swa_start, one of them")
        self._decay, self._start = recipe.ema_decay, recipe.swa_start
        self._dtypes = {name: value.dtype for name, value in state.items()}
        self._averaged = [name for name, value in state.items() if value.is_floating_point()]
        self._copied = [name for name, value in state.items() if not value.is_floating_point()]
        self._values = {
            name: torch.zeros_like(value, dtype=_wide(value.dtype), requires_grad=False)
            for name, value in state.items()
        }
        self._count = 0

    @staticmethod
    def of(recipe: Recipe, state: Mapping[str, Shaped[Tensor, " ..."]]) -> Average | None:
        """The recipe's average over `state`, or None if it asks for none."""
        if recipe.ema_decay is None and recipe.swa_start is None:
            return None
        return Average(recipe, state)

    def update(
        self,
        state: Mapping[str, Shaped[Tensor, " ..."]],
        step: int,
        steps: int,
        steps_per_epoch: int,
    ) -> None:
        """Take in the weights after step 0, 1, … of `steps`; most steps do nothing for SWA."""
        weight = self._weight(step + 1, steps, steps_per_epoch)
        if weight is None:
            return
        with torch.no_grad():
            held = [self._values[name] for name in self._averaged]
            new = [state[name].to(self._values[name].dtype) for name in self._averaged]
            if self._count == 0:
                torch._foreach_copy_(held, new)  # pyright: ignore[reportPrivateImportUsage]
            else:
                torch._foreach_lerp_(held, new, weight)  # pyright: ignore[reportPrivateImportUsage]
            for name in self._copied:
                self._values[name].copy_(state[name])
        self._count += 1

    def value(self) -> dict[str, Tensor]:
        """The averaged state in the model's dtypes; empty before anything was averaged.

        So `{**state, **average.value()}` is what to evaluate at any time. Where no dtype changes
        the tensors are the average's own: copy what has to outlast the next `update`.
        """
        if not self._count:
            return {}
        return {name: value.to(self._dtypes[name]) for name, value in self._values.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The state for a snapshot, not copied: "count", and "average/name" for each tensor."""
        values = {f"average/{name}": value for name, value in self._values.items()}
        return {"count": torch.tensor(self._count)} | values

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors()` gave; FleetError where names or shapes are not this state."""
        restore(self.tensors(), tensors, "average")
        self._count = int(tensors["count"])

    @staticmethod
    def state_bytes(recipe: Recipe, state: Mapping[str, Tensor]) -> int:
        """Bytes that the average of one model will take; `state` may be on "meta"."""
        if recipe.ema_decay is None and recipe.swa_start is None:
            return 0
        return sum(value.numel() * _wide(value.dtype).itemsize for value in state.values())

    def _weight(self, done: int, steps: int, steps_per_epoch: int) -> float | None:
        """How much the new weights count, or None if they are not taken in."""
        if self._decay is not None:
            return 1 - self._decay
        assert self._start is not None
        if done != steps and (done % steps_per_epoch or done < round(self._start * steps)):
            return None
        return 1 / (self._count + 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
