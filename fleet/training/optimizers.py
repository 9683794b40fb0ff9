"""Each model's own optimizer: SGD, Adam, AdamW, gradient clipping and SAM, all in place.

The arithmetic is torch's fused kernels, called without what `torch.optim` does around them at every
step: for small models that costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fleet.errors import FleetError

if TYPE_CHECKING:
    from fleet.recipes import Recipe

STEP_BYTES = 4

_ADAMS = {
    "adam": torch._fused_adam_,  # pyright: ignore[reportPrivateImportUsage]
    "adamw": torch._fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
}


class ModelOptimizer:
    """One model's optimizer over views into stacked tensors, updated in place.

    `parameters` are those that are trained, by name, each with one model's shape. Weights decay,
    but not vectors and not those whose name ends in "bias". Gives the bits of `torch.optim.SGD`
    (Nesterov where momentum > 0), `Adam` (1412.6980) or `AdamW` (1711.05101) with `fused=True` and
    these two groups; the state is allocated here and freed with this object.
    """

    def __init__(self, recipe: Recipe, parameters: Mapping[str, Float[Tensor, " ..."]]):
        self.recipe = recipe
        self._shapes = {name: value.shape for name, value in parameters.items()}
        self._moments = {
            kind: {
                name: torch.zeros_like(value, requires_grad=False)
                for name, value in parameters.items()
            }
            for kind in _moment_names(recipe)
        }
        self._steps: dict[torch.device, Tensor] = {}
        if recipe.optimizer != "sgd":
            for value in parameters.values():
                if value.device not in self._steps:
                    # On the parameters' device, where the fused kernels read it.
                    self._steps[value.device] = torch.zeros(
                        (), dtype=torch.float32, device=value.device
                    )
        self._done = 0
        self._groups: list[_Group] = []
        self.bind(parameters)

    def bind(self, parameters: Mapping[str, Float[Tensor, " ..."]]) -> None:
        """The same parameters lie elsewhere now; FleetError if they are not the same ones."""
        found = {name: value.shape for name, value in parameters.items()}
        if found != self._shapes:
            wrong = sorted(
                name
                for name in found.keys() | self._shapes.keys()
                if found.get(name) != self._shapes.get(name)
            )
            raise FleetError(
                f"optimizer: {wrong[0]!r} has shape {_shape(found, wrong[0])}, at the start it had "
                f"{_shape(self._shapes, wrong[0])}; bind the parameters it was made for, or make a "
                "new optimizer"
            )
        for name, value in parameters.items():
            if not torch.ops.aten.is_non_overlapping_and_dense(value):
                raise FleetError(
                    f"optimizer: {name!r} has gaps in memory: shape {list(value.shape)}, "
                    f"strides {value.stride()}; stack models along the first axis"
                )
            for moments in self._moments.values():
                moments[name] = _laid_like(value, moments[name])
        members: dict[tuple[torch.device, torch.dtype, float], list[str]] = {}
        for name, value in parameters.items():
            decay = self.recipe.weight_decay if _decays(name, value) else 0.0
            members.setdefault((value.device, value.dtype, decay), []).append(name)
        self._groups = [
            _Group(
                names,
                [parameters[name] for name in names],
                [parameters[name].stride() for name in names],
                [[moments[name] for name in names] for moments in self._moments.values()],
                [self._steps[device]] * len(names) if device in self._steps else [],
                decay,
            )
            for (device, _, decay), names in members.items()
        ]

    def release(self) -> None:
        """Let go of the parameters until they are bound again."""
        self._groups = []

    def step(self, gradients: Mapping[str, Float[Tensor, " ..."]], lr: float) -> None:
        """One step with these gradients, which are not changed; FleetError if one is missing."""
        recipe, first = self.recipe, self._done == 0
        with torch.no_grad():
            all_taken = [_gradients(group, gradients) for group in self._groups]
            for count in self._steps.values():
                count.add_(1)
            for group, taken in zip(self._groups, all_taken, strict=True):
                if recipe.optimizer == "sgd":
                    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                        group.parameters,
                        taken,
                        group.moments[0] if group.moments else [],
                        weight_decay=group.decay,
                        momentum=recipe.momentum,
                        lr=lr,
                        dampening=0.0,
                        nesterov=recipe.momentum > 0,
                        maximize=False,
                        is_first_step=first and recipe.momentum > 0,
                    )
                    continue
                _ADAMS[recipe.optimizer](
                    group.parameters,
                    taken,
                    group.moments[0],
                    group.moments[1],
                    [],
                    group.steps,
                    amsgrad=False,
                    lr=lr,
                    beta1=recipe.beta1,
                    beta2=recipe.beta2,
                    weight_decay=group.decay,
                    eps=recipe.eps,
                    maximize=False,
                )
        self._done += 1

    def tensors(self) -> dict[str, Tensor]:
        """The state for a snapshot, not copied: "steps", and for each moment "moment/parameter"."""
        moments = {
            f"{kind}/{name}": value
            for kind, values in self._moments.items()
            for name, value in values.items()
        }
        return {"steps": torch.tensor(self._done)} | moments

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors()` gave; FleetError where names or shapes are not this state."""
        restore(self.tensors(), tensors, "optimizer")
        self._done = int(tensors["steps"])
        for count in self._steps.values():
            count.fill_(self._done)

    @staticmethod
    def state_bytes(recipe: Recipe, parameters: Mapping[str, Tensor]) -> int:
        """Bytes that the state of one model will take; `parameters` may be on "meta".

        SAM's kept weights are not part of it: `Ascent` holds them between `climb` and `back` only.
        """
        steps = 0 if recipe.optimizer == "sgd" else STEP_BYTES
        return steps + len(_moment_names(recipe)) * sum(
            value.numel() * value.element_size() for value in parameters.values()
        )


class Ascent:
    """SAM's way up and back (2010.01412): the step is taken with the gradient at w + ε.

    ε = rho · g / (‖g‖ + 1e-12), with the norm over all trained parameters of the model.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def climb(
        self,
        parameters: Mapping[str, Float[Tensor, " ..."]],
        gradients: Mapping[str, Float[Tensor, " ..."]],
        rho: float,
    ) -> None:
        """Write w + ε over the parameters and keep w, one copy; gradients are not changed."""
        if self._kept:
            raise FleetError("SAM: climbed already; go back before the next climb")
        with torch.no_grad():
            values = list(parameters.values())
            rises = [gradients[name] for name in parameters]
            self._kept = [(value, value.clone()) for value in values]
            scale = rho / (_norm(rises) + 1e-12)
            scales = [scale.to(rise.dtype) for rise in rises]
            torch._foreach_addcmul_(values, rises, scales)  # pyright: ignore[reportPrivateImportUsage]

    def back(self) -> None:
        """Put w back, bit for bit, and free the copy."""
        with torch.no_grad():
            for value, before in self._kept:
                value.copy_(before)
        self._kept = []


def clip(gradients: Sequence[Float[Tensor, " ..."]], max_norm: float | None) -> Float[Tensor, ""]:
    """Scale one model's gradients in place by min(1, max_norm / (‖g‖ + 1e-6)); ‖g‖ from before.

    Bit for bit `nn.utils.clip_grad_norm_`; with None they stay as they are. No gradients have
    norm 0. The norm stays on its device, so nothing waits for it.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    with torch.no_grad():
        norm = _norm(gradients)
        if max_norm is not None:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def gradient_norms(
    gradients: Mapping[str, Float[Tensor, "models ..."]],
) -> Float[Tensor, " models"]:
    """‖g‖ of each model over all its stacked gradients, in one pass over each tensor.

    For display: the last bits may differ from the norm that `clip` gives for one model. In float32
    or wider. FleetError without gradients, because then nothing says how many models there are.
    """
    if not gradients:
        raise FleetError("gradient_norms: no gradients; give at least one stacked tensor")
    with torch.no_grad():
        norms = [
            torch.linalg.vector_norm(
                value.flatten(1) if value.ndim > 1 else value[:, None],
                dim=1,
                dtype=torch.promote_types(value.dtype, torch.float32),
            )
            for value in gradients.values()
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)


class _Group(NamedTuple):
    """Parameters that one fused call updates."""

    names: list[str]
    parameters: list[Tensor]
    strides: list[tuple[int, ...]]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    decay: float


def _gradients(group: _Group, gradients: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        taken = [gradients[name] for name in group.names]
    except KeyError as missing:
        raise FleetError(
            f"optimizer: no gradient for {missing.args[0]!r}; make the optimizer over the "
            "parameters that the loss depends on"
        ) from missing
    # The fused CPU kernels walk through memory and do not look at strides.
    for place, strides in enumerate(group.strides):
        if taken[place].stride() != strides:
            taken[place] = _laid_like(group.parameters[place], taken[place])
    return taken


def _laid_like(value: Tensor, other: Tensor) -> Tensor:
    """`other` with its elements in memory in the order of those of `value`."""
    if _order(value) == _order(other):
        return other
    return torch.empty_like(value, requires_grad=False).copy_(other)


def _order(value: Tensor) -> tuple[int, ...]:
    return tuple(
        stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1
    )


def _moment_names(recipe: Recipe) -> tuple[str, ...]:
    if recipe.optimizer == "sgd":
        return ("momentum",) if recipe.momentum > 0 else ()
    return ("exp_avg", "exp_avg_sq")


def _decays(name: str, value: Tensor) -> bool:
    return value.ndim > 1 and name.rpartition(".")[2] != "bias"


def _norm(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(gradients, 2.0)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms), 2.0)


def restore(held: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Write `given` over `held`; nothing is written unless all of it fits."""
    for name in sorted(held.keys() | given.keys()):
        if name not in held or name not in given or held[name].shape != given[name].shape:
            found = {key: value.shape for key, value in given.items()}
            wanted = {key: value.shape for key, value in held.items()}
            raise FleetError(
                f"{what}: the saved {name!r} has shape {_shape(found, name)}, wanted "
                f"{_shape(wanted, name)}; resume with the recipe and model it was saved with"
            )
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(given[name])


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"
