"""What the layers below the first that any tenant owns make of an input, kept for all tenants."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fleet.serving.bound import Adapters, BoundModel
from fleet.serving.catalogue import Catalogue
from fleet.serving.inputs import Together
from fleet.serving.owned import Layout
from merge.checkpoints.tensors import tensor_bytes

logger = logging.getLogger(__name__)

# Of the largest output.
TOLERANCE = 1e-4


class _Reached(Exception):  # noqa: N818  (it is no error)
    """The model has come to the module at which it is to stop."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


@dataclass(frozen=True)
class _Cut:
    """A module whose first input is all that the layers below it are for, and the modules below
    that need not run: what they return, for one row."""

    module: str
    below: Mapping[str, Any]


class FeatureCache:
    """Features of inputs, by the hash of the input, within `budget` bytes; the oldest leave.

    Where the model is cut is found by running it: the modules before the first that a tenant owns
    return NaN, and the answers have to be the same. Exact, up to the rounding of another batch.
    """

    def __init__(self, bound: BoundModel, budget: int) -> None:
        self.hits = self.misses = self.nbytes = 0
        self._bound = bound
        self._budget = budget
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._cuts: dict[tuple[Any, ...], _Cut | None] = {}
        self._first: str | None = None

    def forget_cut(self) -> None:
        """Tenants may own other tensors now."""
        self._cuts.clear()

    def forward(
        self,
        inputs: Together,
        weights: Mapping[str, Tensor],
        adapters: Adapters,
        layout: Layout,
        catalogue: Catalogue,
    ) -> Tensor:
        """The model's output for tenants' weights; lower layers run for what is not kept."""
        run = self._bound.forward
        cut = self._cut(inputs, catalogue) if self._is_for(inputs) else None
        if cut is None:
            return run(inputs, weights, adapters, layout)
        if cut.module != self._first:
            self._begin(cut.module, catalogue)
            self._first = cut.module
        features = self._features(cut.module, inputs, layout, catalogue)
        with replaced(self._bound, cut, features):
            return run(inputs, weights, adapters, layout)

    def _is_for(self, inputs: Together) -> bool:
        return bool(self._budget)

    def _begin(self, module: str, catalogue: Catalogue) -> None:
        """The model is cut at this module from now on."""
        self._kept.clear()
        self.nbytes = 0

    def _features(
        self, module: str, inputs: Together, layout: Layout, catalogue: Catalogue
    ) -> Tensor:
        """What the module is given, of each row: kept, or computed now."""
        keys = _hashes(inputs)
        new = list(dict.fromkeys(key for key in keys if key not in self._kept))
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        made: dict[bytes, Tensor] = {}
        if new:
            rows = torch.tensor([keys.index(key) for key in new])
            fresh = reached(self._bound, module, inputs.select(rows))
            made = dict(zip(new, fresh.unbind(0), strict=True))
        rows_of = {key: made[key] if key in made else self._kept[key] for key in keys}
        features = torch.stack([rows_of[key] for key in keys])
        for key in dict.fromkeys(keys):
            self._keep(key, rows_of[key])
        return features

    def _keep(self, key: bytes, row: Tensor) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if row.nbytes > self._budget:
            return
        self._kept[key] = row.clone()
        self.nbytes += row.nbytes
        while self.nbytes > self._budget:
            _, gone = self._kept.popitem(last=False)
            self.nbytes -= gone.nbytes

    def _cut(self, inputs: Together, catalogue: Catalogue) -> _Cut | None:
        tensors = [*inputs.args, *inputs.kwargs.values()]
        shape = (*inputs.kwargs, *(tuple(tensor.shape[1:]) for tensor in tensors))
        if shape not in self._cuts:
            self._cuts[shape] = found = _found_cut(self._bound, inputs, catalogue)
            if found is not None:
                logger.info(
                    "features are kept at %r: %d modules below", found.module, len(found.below)
                )
        return self._cuts[shape]


def _found_cut(bound: BoundModel, inputs: Together, catalogue: Catalogue) -> _Cut | None:
    """The innermost module around the first that a tenant owns at which the model can be cut."""
    rows = torch.arange(2) % inputs.rows
    inputs = inputs.select(rows)
    wanted, order, outputs = _observed(bound, inputs)
    names, adapted = catalogue.owned()
    owners = {place.rpartition(".")[0] for place, first in bound.firsts.items() if first in names}
    # What is not called itself is used by a module around it.
    owners = {_called(name, order) for name in owners | adapted}
    first = next((name for name in order if name in owners), None)
    if first is None or not first:
        return None
    parts = first.split(".")
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        below: dict[str, Any] = {}
        for name in order[: order.index(module)] if module in order else ():
            inside = any(name.startswith(f"{other}.") for other in below)
            if name and not module.startswith(f"{name}.") and not inside and name in outputs:
                below[name] = outputs[name]
        if not below:
            continue
        cut = _Cut(module, below)
        if _holds(bound, cut, inputs, wanted, names):
            return cut
    return None


def _called(name: str, order: Sequence[str]) -> str:
    while name and name not in order:
        name = name.rpartition(".")[0]
    return name


def _holds(
    bound: BoundModel, cut: _Cut, inputs: Together, wanted: Tensor, owned: Iterable[str]
) -> bool:
    """Whether the features depend on nothing that is owned, and nothing but them is needed."""
    floats = [name for name in owned if name in bound.base and bound.base[name].is_floating_point()]
    unknown = {name: torch.full_like(bound.base[name], float("nan")) for name in floats}
    try:
        features = reached(bound, cut.module, inputs, unknown)
        if len(features) != inputs.rows or not features.isfinite().all():
            return False
        with replaced(bound, cut, features):
            found = bound.forward(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _observed(bound: BoundModel, inputs: Together) -> tuple[Tensor, list[str], dict[str, Any]]:
    """The output, the modules in the order in which they begin, and what each returns."""
    order: list[str] = []
    outputs: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def note(module: Any, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            order.append(name)

        return note

    def after(name: str) -> Callable[..., None]:
        def note(module: Any, args: Any, output: Any) -> None:
            outputs[name] = output

        return note

    with _hooks() as handles:
        for name, module in bound.modules.items():
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
        wanted = bound.forward(inputs)
    once = {name: output for name, output in outputs.items() if calls[name] == 1}
    return wanted, list(dict.fromkeys(order)), once


def reached(
    bound: BoundModel,
    module: str,
    inputs: Together,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The first input of a module, the model run up to there."""

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        raise _Reached(given[0])

    with _hooks() as handles:
        target = bound.modules[module]
        handles.append(target.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            bound.forward(inputs, weights)
        except _Reached as reached:
            return reached.features
    raise RuntimeError(f"the model did not come to {module!r}")


@contextmanager
def replaced(bound: BoundModel, cut: _Cut, features: Tensor) -> Iterator[None]:
    """The modules below the cut do nothing, and the cut one is given `features`."""

    def given(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (features, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: features}

    below = [bound.modules[name] for name in cut.below]
    before = [module.__dict__.get("forward") for module in below]
    with _hooks() as handles:
        target = bound.modules[cut.module]
        handles.append(target.register_forward_pre_hook(given, with_kwargs=True))
        try:
            for module, output in zip(below, cut.below.values(), strict=True):
                module.__dict__["forward"] = _nothing(output, len(features))
            yield
        finally:
            for module, own in zip(below, before, strict=True):
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = own


def _nothing(output: Any, rows: int) -> Callable[..., Any]:
    """Returns what looks like `output`, of two rows, for so many, and is NaN."""

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.dim() or len(value) % 2:
            return value
        shape = (len(value) // 2 * rows, *value.shape[1:])
        fill = float("nan") if value.is_floating_point() else 0
        # One number, whatever the shape: nobody reads it.
        return value.new_full((), fill).expand(shape)

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(like, output)

    return nothing


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _hashes(inputs: Together) -> list[bytes]:
    """Of each row, with what it is padded to."""
    named = [("", tensor) for tensor in inputs.args] + list(inputs.kwargs.items())
    keys = []
    for row in range(inputs.rows):
        digest = hashlib.blake2b(digest_size=20)
        for name, tensor in named:
            values = tensor[row].contiguous().cpu()
            digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
            digest.update(tensor_bytes(values))
        keys.append(digest.digest())
    return keys
