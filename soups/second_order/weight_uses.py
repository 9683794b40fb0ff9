"""Where a model's weights meet what depends on the image, and what moving them does there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
)
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kernels.multi_head import multi_head_attention
from kernels.ops import grouped_conv2d, grouped_linear
from soups.errors import SoupError

Tangents = dict[str, Tensor]
REMEDY = "use the learner pooled, which needs no derivative of each image's logits"


@dataclass(frozen=True)
class ByGradient:
    """∂/∂weight of Σ cotangent·output, for each row; for weights that are small."""

    pull: Callable[[Float[Tensor, "classes rows ..."]], Float[Tensor, "classes rows ..."]]


@dataclass(frozen=True)
class ByOutput:
    """The change of the output along directions; for weights that are many."""

    push: Callable[[Float[Tensor, "directions ..."]], Float[Tensor, "directions rows ..."]]


@dataclass(frozen=True)
class Use:
    """A weight, or what was computed from weights alone, in a call on what depends on the image.

    `along`: name of a parameter or buffer → how this weight moves in its directions.
    """

    edge: GradientEdge
    row_axis: int
    derivative: ByGradient | ByOutput
    along: Tangents
    operation: str
    outputs: int
    saved: tuple[tuple[Tensor, int], ...]

    def times(
        self, cotangents: Float[Tensor, "classes rows ..."], tangents: Float[Tensor, "k ..."]
    ) -> Float[Tensor, "rows classes k"]:
        """Σ cotangent · (change of the output), by row."""
        for tensor, version in self.saved:
            if tensor._version != version:
                raise SoupError(
                    f"{self.operation}: what it was given was later changed in place, so its "
                    f"derivative is lost; {REMEDY}"
                )
        if isinstance(self.derivative, ByGradient):
            gradients = self.derivative.pull(cotangents).flatten(2)
            return (gradients @ tangents.flatten(1).T).transpose(0, 1)
        moved = self.derivative.push(tangents).flatten(2)
        return torch.bmm(cotangents.flatten(2).transpose(0, 1), moved.permute(1, 2, 0))


class WeightUses(TorchFunctionMode):
    """While active inside `vmap` over rows, records each use of the weights that have tangents.

    Under vmap a tensor is batched exactly if it depends on the image. What is computed from
    weights alone is followed with its tangents (forward), until it meets the image.
    """

    def __init__(self, weights: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._along = {id(weights[name]): {name: tangents[name]} for name in tangents}
        self._alive: list[Tensor] = []

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if id(leaf) in self._along]
        if not places:
            return function(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                found = multi_head_attention(F.linear, _attention, *args, **kwargs)
            return found.output, found.weights
        meant, written = _without_writing(function)
        if written:  # what is written into is needed as it was
            leaves = [leaf.clone() if _of_image(leaf) else leaf for leaf in leaves]
        result = function(*args, **kwargs)
        if _of_image(result) and get_unwrapped(result)._is_view() and not written:
            result = result.clone()  # what is later written into a view goes around it, backward
        if function in NOT_FOLLOWED:
            return result
        for which, output in enumerate(pytree.tree_leaves(result)):
            if id(output) in self._along or not _is_number(output):
                continue  # such as `to` gives where there is nothing to do; or indices
            call = _Call(meant, leaves, spec, which)
            if _of_image(output):
                self.uses += _uses(call, places, output, self._along)
            else:
                self._follow(call, places, output)
        return result

    def _follow(self, call: _Call, places: Sequence[int], output: Tensor) -> None:
        """Tangents of what is computed from weights alone."""
        along: Tangents = {}
        for place in places:
            for name, tangents in self._along[id(call.leaves[place])].items():

                def forward(weight: Tensor, place: int = place) -> Tensor:
                    return call({place: weight})

                moved = _pushed(forward, call.leaves[place], tangents, call.name)
                along[name] = along[name] + moved if name in along else moved
        self._along[id(output)] = along
        self._alive.append(output)  # so that its id is not given to another


@dataclass(frozen=True)
class _Call:
    """A call with its arguments flattened; `which` of its results is meant."""

    function: Callable
    leaves: list[Any]
    spec: Any
    which: int

    @property
    def name(self) -> str:
        return _name(self.function)

    def __call__(self, others: Mapping[int, Tensor]) -> Tensor:
        """With other tensors at some places."""
        leaves = [others.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return pytree.tree_leaves(self.function(*args, **kwargs))[self.which]


def _uses(
    call: _Call, places: Sequence[int], output: Tensor, along: Mapping[int, Tangents]
) -> list[Use]:
    """The uses of the weights at `places` in a call with this one output."""
    physical = get_unwrapped(output)
    if not physical.requires_grad:
        return []  # as autograd has it: what is detached does not move
    edge, row_axis = get_gradient_edge(physical), maybe_get_bdim(output)
    data = {i: _rows_first(leaf) for i, leaf in enumerate(call.leaves) if _of_image(leaf)}
    saved = tuple((tensor, tensor._version) for tensor in data.values())
    known = _known(call, data)
    found = []
    for place in places:
        weight = call.leaves[place]
        derivative = known.get(id(weight)) or _general(call, place, data, output.numel())
        found.append(
            Use(edge, row_axis, derivative, along[id(weight)], call.name, output.numel(), saved)
        )
    return found


def _known(call: _Call, data: Mapping[int, Tensor]) -> dict[int, ByGradient | ByOutput]:
    """id of a weight → its derivative, for calls that have a rule: those of layers on an input."""
    rule = RULES.get(call.function)
    if rule is None:
        return {}
    leaves = [data.get(i, leaf) for i, leaf in enumerate(call.leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    named = inspect.signature(rule).bind(*args, **kwargs).arguments
    if any(named.get("input") is not tensor for tensor in data.values()):
        return {}  # such as weights that depend on the image
    by_name = rule(**named)
    ids = [id(named[name]) for name in by_name]
    if len(set(ids)) < len(ids):
        return {}  # one tensor as two operands
    return {id(named[name]): derivative for name, derivative in by_name.items()}


def _general(
    call: _Call, place: int, data: Mapping[int, Tensor], outputs: int
) -> ByGradient | ByOutput:
    """By torch.func, the cheaper way round."""
    weight = call.leaves[place].detach()

    def of_row(weight: Tensor, row: Mapping[int, Tensor]) -> Tensor:
        return call({**row, place: weight})

    def pull(cotangents: Tensor) -> Tensor:
        def one(row: Mapping[int, Tensor], cotangent: Tensor) -> Tensor:
            return vjp(lambda weight: of_row(weight, row), weight)[1](cotangent)[0]

        over_rows = vmap(one)
        return vmap(lambda cotangent: over_rows(data, cotangent))(cotangents)

    def push(tangents: Tensor) -> Tensor:
        def rows(weight: Tensor) -> Tensor:
            return vmap(of_row, in_dims=(None, 0))(weight, data)

        return _pushed(rows, weight, tangents, call.name)

    return ByGradient(pull) if weight.numel() <= outputs else ByOutput(push)


def _pushed(
    function: Callable[[Tensor], Tensor], weight: Tensor, tangents: Tensor, name: str
) -> Tensor:
    """The change of `function(weight)` along each of the tangents."""
    try:
        return vmap(lambda tangent: jvp(function, (weight.detach(),), (tangent,))[1])(tangents)
    except (RuntimeError, NotImplementedError) as error:
        raise SoupError(f"{name} has no forward-mode derivative ({error}); {REMEDY}") from error


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict:
    if weight.dim() != 2:
        return {}

    def push(tangents: Tensor) -> Tensor:
        return grouped_linear(input[None], tangents)

    def pull(cotangents: Tensor) -> Tensor:
        return cotangents.flatten(2, -2).sum(2) if cotangents.dim() > 3 else cotangents

    return {"weight": ByOutput(push)} | ({} if bias is None else {"bias": ByGradient(pull)})


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict:
    if input.dim() != 5:  # rows, one image each
        return {}

    def push(tangents: Tensor) -> Tensor:
        moved = grouped_conv2d(
            input.flatten(0, 1)[None],
            tangents,
            stride=_pair(stride),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(dilation),
            groups=groups,
        )
        return moved.unflatten(1, input.shape[:2])

    def pull(cotangents: Tensor) -> Tensor:
        return cotangents.sum((2, -2, -1))

    return {"weight": ByOutput(push)} | ({} if bias is None else {"bias": ByGradient(pull)})


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> dict:
    shape = tuple(normalized_shape)

    def summed(values: Tensor) -> Tensor:
        axes = tuple(range(2, values.dim() - len(shape)))
        return values.sum(axes) if axes else values

    def scale(cotangents: Tensor) -> Tensor:
        return summed(cotangents * F.layer_norm(input, shape, eps=eps))

    both = {"weight": ByGradient(scale), "bias": ByGradient(summed)}
    return {n: both[n] for n, t in (("weight", weight), ("bias", bias)) if t is not None}


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict:
    """In evaluation: y = (x − m)/√(v + eps)·w + b, by channel."""
    if training or running_mean is None or running_var is None:
        raise SoupError(
            "batch_norm with the statistics of the batch: one image's logits depend on the others; "
            "give the model running statistics and call model.eval()"
        )
    mean, inverse = running_mean.detach(), (running_var.detach() + eps).rsqrt()
    slope = inverse if weight is None else inverse * weight.detach()
    channels = (-1, *[1] * (input.dim() - 3))

    def summed(values: Tensor) -> Tensor:
        return values.flatten(4).sum((2, 4)) if values.dim() > 4 else values.sum(2)

    def scale(cotangents: Tensor) -> Tensor:
        normal = (input - mean.view(channels)) * inverse.view(channels)
        return summed(cotangents * normal)

    every = {
        "running_mean": (running_mean, lambda c: -slope * summed(c)),
        "running_var": (running_var, lambda c: -0.5 * slope * inverse * scale(c)),
        "weight": (weight, scale),
        "bias": (bias, summed),
    }
    return {name: ByGradient(pull) for name, (tensor, pull) in every.items() if tensor is not None}


RULES: dict[Callable, Callable[..., dict[str, ByGradient | ByOutput]]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
}
NOT_FOLLOWED: set[Callable] = {Tensor.detach}
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow")


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    first, second = values * 2 if len(values) == 1 else values
    return first, second


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def _rows_first(tensor: Tensor) -> Tensor:
    """What vmap's tensor holds, the axis of the rows in front."""
    return get_unwrapped(tensor).detach().movedim(maybe_get_bdim(tensor), 0)


def _without_writing(function: Callable) -> tuple[Callable, bool]:
    """The function that returns what this one writes into its first argument; if it writes."""
    name = _name(function)
    special = name.startswith("__") and name.endswith("__")
    if special and name != "__setitem__":
        twin = f"__{name[3:]}" if name[2:-2] in IN_PLACE else None
    elif name.endswith("_"):
        twin = name[:-1]
    else:
        return function, False
    if twin is None and name != "__setitem__":
        return function, False
    if twin is None or not hasattr(Tensor, twin):
        raise SoupError(f"{name} writes weights into a tensor; {REMEDY}")
    return getattr(Tensor, twin), True


def _name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _of_image(value: Any) -> bool:
    return isinstance(value, Tensor) and is_batchedtensor(value)
