"""The base's model, run with weights of tenants in the place of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fleet.alike import first_names, named_tensors, places
from fleet.errors import FleetError
from fleet.serving.inputs import Form, Together
from fleet.serving.owned import Layout, NoRuleError
from fleet.serving.products import Products
from fleet.serving.tail import first_tokens, found_tail

TAIL_ROWS, TAIL_TOKENS = 2, 5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Adapter:
    """A bottleneck after a module: y + up(act(down(y))) (1902.00751)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str

    def __call__(self, y: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            t.to(y.dtype) for t in (self.down, self.down_bias, self.up, self.up_bias)
        )
        narrow = ACTIVATIONS[self.activation](F.linear(y, down, down_bias))
        return y + F.linear(narrow, up, up_bias)


# By module, an adapter or none for each segment.
Adapters = Mapping[str, Sequence[Adapter | None]]


class BoundModel:
    """`model` in evaluation mode with the base's weights.

    Raises FleetError where the base's tensors are not those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.model = model.eval()
        self.firsts, self._places = first_names(model), places(model)
        self.stored_dtypes = {
            self.firsts[name]: tensor.dtype for name, tensor in base.items() if name in self.firsts
        }
        self.modules = dict(model.named_modules())
        self._load(base, device, dtype)
        self.base = named_tensors(model)
        floats = [tensor.dtype for tensor in self.base.values() if tensor.is_floating_point()]
        self.dtype = floats[0] if floats else torch.get_default_dtype()
        self.device = device
        self.products = Products(self.base.values())
        self.products.serve(model)
        self._tails: dict[Form, tuple[str, ...]] = {}
        self._places_of: dict[str, list[str]] = {}
        for place, first in self._places.items():
            self._places_of.setdefault(first, []).append(place)

    def _load(
        self, base: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        kept = self.model.state_dict()
        covered = {self.firsts[name] for name in base if name in self.firsts}
        for name, tensor in base.items():
            if name not in self.firsts:
                near = get_close_matches(name, self.firsts, n=1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise FleetError(f"the base has {name!r}, which the model has not{hint}")
            wanted = _at(self.model, name)
            if wanted.shape != tensor.shape:
                raise FleetError(
                    f"{name!r} is {list(tensor.shape)} in the base and {list(wanted.shape)} in the "
                    "model; build the model that the store was made of"
                )
        missing = [name for name in kept if self.firsts.get(name, name) not in covered]
        missing = [name for name in missing if name in self.firsts]
        if missing:
            raise FleetError(
                f"the base has no {missing[0]!r}, which the model has ({len(missing)} such); build "
                "the model that the store was made of"
            )
        state = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in base.items()
        }
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.to(device)
        self.model.requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)

    def first_name(self, name: str) -> str:
        """The name that a tied tensor is kept under; FleetError for one that the model has not."""
        if name not in self.firsts:
            near = get_close_matches(name, self.firsts, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise FleetError(f"has the tensor {name!r}, which the model has not{hint}")
        return self.firsts[name]

    def forward(
        self,
        inputs: Together,
        weights: Mapping[str, Tensor] | None = None,
        adapters: Adapters | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """The model's output, logits where it names them, with some weights replaced."""
        state = {
            place: tensor
            for name, tensor in (weights or {}).items()
            for place in self._places_of[name]
        }
        tail = self._tails.get(inputs.form, ())
        with (
            self._adapted(adapters or {}, layout),
            first_tokens(self.modules, tail, inputs.rows),
        ):
            found = functional_call(
                self.model,
                state,
                inputs.args,
                dict(inputs.kwargs),
                tie_weights=False,
            )
        return _output(found)

    def twin(self) -> BoundModel:
        """The same tensors in modules of their own, for another thread."""
        shared = [*self.model.parameters(), *self.model.buffers(), self.products]
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, {id(one): one for one in shared})
        other.modules = dict(other.model.named_modules())
        return other

    def learn_tail(self, inputs: Together) -> None:
        """From now on compute no tokens that nobody looks at, for inputs of this form."""
        if inputs.form in self._tails:
            return
        self._tails[inputs.form] = ()
        some = inputs.made_up(TAIL_ROWS, TAIL_TOKENS)
        self._tails[inputs.form] = found_tail(self.modules, lambda: self.forward(some), TAIL_ROWS)

    @contextmanager
    def _adapted(self, adapters: Adapters, layout: Layout | None) -> Iterator[None]:
        """Bottlenecks after modules, while the model runs."""
        handles = []
        try:
            for name, of_segments in adapters.items():
                assert layout is not None
                hook = _hook(name, of_segments, layout)
                handles.append(self.modules[name].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(name: str, adapters: Sequence[Adapter | None], layout: Layout) -> Callable[..., Any]:
    def adapted(module: nn.Module, args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, Tensor) or not y.dim():
            raise NoRuleError(f"adapter after {name!r}: it returns no tensor", [name])
        one = len(layout.counts) == 1
        if not one and not layout.sites.is_rows("adapter", (name,), len(y), layout.rows):
            raise NoRuleError(f"adapter after {name!r}: its first axis is not the rows'", [name])
        widths = {len(adapter.up) for adapter in adapters if adapter is not None}
        if not one and widths != {y.shape[-1]}:
            raise NoRuleError(f"adapter after {name!r}: is for another width", [name])
        entries = 1 if one else len(y) // layout.rows
        edges = [(0, len(y))] if one else layout.edges
        parts = [
            part if adapter is None else adapter(part)
            for (start, stop), adapter in zip(edges, adapters, strict=True)
            for part in [y[start * entries : stop * entries]]
        ]
        y = torch.cat(parts)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return adapted


def _at(model: nn.Module, name: str) -> Tensor:
    module, _, part = name.rpartition(".")
    return getattr(model.get_submodule(module), part)


def _output(found: Any) -> Tensor:
    """The logits of what a model returns, else its first tensor."""
    if isinstance(found, Tensor):
        return found
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(found, Mapping):
        values = list(found.values())
    else:
        values = list(found) if isinstance(found, tuple | list) else []
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise FleetError(f"the model returns {type(found).__name__}, wanted a tensor, or one in it")
