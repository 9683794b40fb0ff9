"""Do these tensors, and these models, make a group?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.modes import drop_rate


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied one under its first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, and the first name of the same tensor."""
    first: dict[int, str] = {}
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in every}


def places(model: nn.Module) -> dict[str, str]:
    """One name of each place for a parameter or buffer, and the first name of what is there.

    What a functional call is to be given, with tie_weights=False: a module that has two names is
    one place, and would be left with another tensor than its own if that were given under both.
    """
    first = first_names(model)
    return {
        name: first[name]
        for prefix, module in model.named_modules()
        for part, _ in _own_tensors(module)
        for name in [f"{prefix}.{part}".lstrip(".")]
    }


def untied(given: Mapping[str, Tensor], firsts: Mapping[str, str]) -> dict[str, Tensor]:
    """`given` under first names. FleetError for an unknown name, or tied tensors that differ."""
    result: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name not in firsts:
            near = get_close_matches(name, firsts, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "use names of its state_dict()"
            raise FleetError(f"'{name}' is not a parameter or buffer of the model; {hint}")
        first = firsts[name]
        if first in result and not _same(result[first], tensor):
            raise FleetError(
                f"'{name}' and '{first}' are one tensor in the model, but differ here; give one"
            )
        result.setdefault(first, tensor)
    return result


def check_tensors(
    own: Mapping[str, Tensor], stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> int:
    """The number of models; FleetError where a tensor does not fit the model or the others."""
    both = sorted(stacked.keys() & shared.keys())
    if both:
        raise FleetError(f"'{both[0]}' is both stacked and shared; give it once")
    if not stacked:
        raise FleetError("no tensor is stacked, so the number of models is unknown; stack one")
    first, tensor = next(iter(stacked.items()))
    models, device = (len(tensor) if tensor.dim() else 0), tensor.device
    if not models:
        raise FleetError(f"'{first}' is {list(tensor.shape)}; wanted a leading axis of models")
    for name, tensor in (*stacked.items(), *shared.items()):
        wanted = [models] * (name in stacked) + list(own[name].shape)
        if list(tensor.shape) != wanted:
            raise FleetError(
                f"'{name}' is {list(tensor.shape)}, wanted {wanted}: the model's own is "
                f"{list(own[name].shape)}, '{first}' has {models} models; give weights of this "
                "model's architecture"
            )
        if tensor.dtype != own[name].dtype:
            raise FleetError(
                f"'{name}' is {tensor.dtype}, the model's own is {own[name].dtype}; convert one "
                "of them with .to(dtype)"
            )
        if tensor.device != device:
            raise FleetError(
                f"'{name}' is on {tensor.device}, '{first}' is on {device}; move all to one device"
            )
    return models


def architecture(model: nn.Module) -> Hashable:
    """Equal for models that differ in nothing but weights; dropout rates and modes count too."""
    rates = tuple(drop_rate(module) for module in model.modules())
    return type(model), tuple(_described(model)), rates


def check_models(models: Sequence[nn.Module]) -> None:
    """FleetError where the models differ in more than weights, naming the layer."""
    if not models:
        raise FleetError("a group of no models; give at least one")
    mine = dict(_described(models[0]))
    for index, model in enumerate(models[1:], start=1):
        theirs = dict(_described(model))
        for name in mine | theirs:
            kinds = [described.get(name, "nothing") for described in (mine, theirs)]
            if kinds[0] != kinds[1]:
                raise FleetError(
                    f"'{name}' is {kinds[0]} in model 0 and {kinds[1]} in model {index}; a group "
                    "needs models of one architecture, dtype, device and mode"
                )


def _described(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        settings = "" if drop_rate(module) is not None else f"({module.extra_repr()})"
        mode = " in train mode" if module.training else ""
        for part, tensor in _own_tensors(module):
            kind = f"{tensor.dtype} on {tensor.device}"
            yield f"{name}.{part}".lstrip("."), f"{list(tensor.shape)} ({kind})"
        yield name, f"{type(module).__name__}{settings}{mode}"


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))
