"""Modules that behave differently in train mode."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fleet.errors import FleetError


def refuse_training(model: nn.Module) -> None:
    """FleetError if `model` has norms or dropout in train mode: no state to be judged in."""
    found = [*_updating(model), *_drawing(model)]
    if found:
        raise FleetError(
            f"{_listed(found)} in train mode: outputs depend on the rest of the batch or on "
            "chance; call model.eval() first"
        )


def check_training(model: nn.Module, stacked: Container[str]) -> None:
    """FleetError for what several models cannot do together in train mode."""
    drawing = list(_drawing(model))
    if drawing:
        raise FleetError(
            f"{_listed(drawing)} in train mode: each model would draw its own random numbers; set "
            "the rate to 0 or call model.eval()"
        )
    for name, module in _updating(model):
        running = f"{name}.running_mean".lstrip(".")
        if module.track_running_stats and running not in stacked:
            raise FleetError(
                f"'{name}' in train mode: each model updates its running statistics, but they are "
                f"shared; stack '{running}' and running_var, or call model.eval()"
            )


def drop_rate(module: nn.Module) -> float | None:
    """The rate of dropout, stochastic depth or attention dropout; None for other modules."""
    drops = any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))
    names = ("p", "drop_prob") if drops else ("dropout",)
    rates = (getattr(module, name, None) for name in names)
    return next((rate for rate in rates if isinstance(rate, float | int)), None)


def _updating(model: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    for name, module in model.named_modules():
        depends = isinstance(module, _BatchNorm) or getattr(module, "track_running_stats", False)
        if isinstance(module, _NormBase) and depends and module.training:
            yield name, module


def _drawing(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if module.training and drop_rate(module):
            yield name, module


def _listed(found: list[tuple[str, nn.Module]]) -> str:
    names = [f"'{name}' ({type(module).__name__})" for name, module in found[:3]]
    return ", ".join(names) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
