"""Gram matrices of the inputs of a model's linear layers, added up by hooks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import unfold

PATCH_BYTES = 32 << 20  # of a convolution's patches that are unfolded at once


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer: its names, and how many inputs it has."""

    names: tuple[str, ...]
    inputs: int

    @property
    def nbytes(self) -> int:
        """What its sum takes, in float64."""
        return 8 * self.inputs**2


Weights = dict[int, LinearWeight]
Observe = Callable[[Tensor, int, Callable[[], Iterable[Tensor]]], None]


def parameter_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The id of each parameter → its names in the state dict: several where it is tied."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def linear_weights(model: nn.Module) -> Weights:
    """The weights that act on rows of inputs, by the ids of their parameters."""
    names = parameter_names(model)
    found: Weights = {}
    for module in model.modules():
        for weight in _weights_of(module):
            found[id(weight)] = LinearWeight(names[id(weight)], weight[0].numel())
    return found


def _weights_of(module: nn.Module) -> list[Tensor]:
    """The weights of one module whose inputs are seen."""
    if isinstance(module, nn.MultiheadAttention):
        own = [module.in_proj_weight, module.out_proj.weight]
        return [weight for weight in own if weight is not None]
    forward = type(module).forward  # a subclass may do something else with its weight
    plain = isinstance(module, nn.Linear) and forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        plain = module.groups == 1 and zeros
    return [module.weight] if plain else []  # type: ignore[list-item]


class InputGrams:
    """The sums Σ xᵀx of some weights, in float64, and the rows x that every weight has seen."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.rows: Counter[int] = Counter()
        self.sums = {
            key: torch.zeros(w.inputs, w.inputs, dtype=torch.float64, device=device)
            for key, w in weights.items()
        }

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add up what the layers of `model` are called with inside of the `with` block."""
        hooks = [
            module.register_forward_hook(_hook(module, self._observe), with_kwargs=True)
            for module in model.modules()
            if _weights_of(module)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _observe(self, weight: Tensor, rows: int, parts: Callable[[], Iterable[Tensor]]) -> None:
        self.rows[id(weight)] += rows
        if id(weight) in self.sums:
            for part in parts():
                self.sums[id(weight)].add_(part.mT @ part)


def _hook(module: nn.Module, observe: Observe) -> Callable[..., None]:
    if isinstance(module, nn.MultiheadAttention):
        return _AttentionHook(observe)
    return partial(_see_patches if isinstance(module, nn.Conv2d) else _see_rows, observe)


def _see_rows(
    observe: Observe, module: nn.Linear, args: Any, kwargs: Any, output: Float[Tensor, "... out"]
) -> None:
    (inputs,) = (*args, *kwargs.values())
    rows = inputs.reshape(-1, module.in_features).float()
    observe(module.weight, len(rows), lambda: [rows])


def _see_patches(
    observe: Observe,
    module: nn.Conv2d,
    args: Any,
    kwargs: Any,
    output: Float[Tensor, "*batch out height width"],
) -> None:
    """A convolution is a linear layer on patches: one row for each place of its output."""
    (inputs,) = (*args, *kwargs.values())
    images = inputs if inputs.ndim == 4 else inputs[None]
    places = output.shape[-1] * output.shape[-2]
    patch = math.prod(module.weight.shape[1:])
    padding: Any = module.padding  # numbers, see `_weights_of`
    step = max(PATCH_BYTES // (4 * places * patch), 1)

    def parts() -> Iterator[Tensor]:
        for some in images.float().split(step):
            patches = unfold(some, module.kernel_size, module.dilation, padding, module.stride)
            yield patches.transpose(1, 2).reshape(-1, patch)

    observe(module.weight, len(images) * places, parts)


class _AttentionHook:
    """The inputs of torch's own attention, whose two linear layers are not called as modules."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._inside = False

    def __call__(
        self, module: nn.MultiheadAttention, args: Any, kwargs: Any, output: tuple[Tensor, Any]
    ) -> None:
        if self._inside:
            return
        size = module.embed_dim
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query = named["query"]
        if module.in_proj_weight is not None and query is named["key"] is named["value"]:
            rows = query.reshape(-1, size).float()
            self._observe(module.in_proj_weight, len(rows), lambda: [rows])

        def heads() -> list[Tensor]:
            return [self._heads(module, args, kwargs).reshape(-1, size).float()]

        self._observe(module.out_proj.weight, output[0].numel() // size, heads)

    def _heads(self, module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Tensor:
        """What goes into the output's projection: the output where that is the identity."""
        weight = module.out_proj.weight
        identity = {"out_proj.weight": torch.eye(len(weight)).to(weight)}
        if module.out_proj.bias is not None:
            identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        self._inside = True
        try:
            return functional_call(module, identity, args, kwargs)[0]
        finally:
            self._inside = False
