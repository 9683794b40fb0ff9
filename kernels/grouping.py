"""Batching rules: what a model's operations become where M models run under `torch.func.vmap`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    get_unwrapped,
    is_batchedtensor,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kernels import ops
from kernels.draws import DRAWING, Drawing, Draws, RandomnessError, recurrent_dropout
from kernels.errors import KernelError
from kernels.multi_head import multi_head_attention

VMAP_DRAWS = "vmap: called random operation"


class Grouping(TorchFunctionMode):
    """While active inside `torch.func.vmap`, operations that have a rule go to `operations`.

    Rules receive the stacked tensors: a model axis of size M in front, or of size 1 where all
    models share the tensor. Calls in which nothing depends on the model go to torch untouched, and
    functions without a rule follow vmap's own. `zero`, a batched scalar, also gives the results of
    factory functions a model axis, so that a module may write into them in place.

    `draws` makes random numbers for operations that draw, dropout for example: it is called with
    what one model asks for and returns that for all, [models, *shape]. The calls come in the order
    of the model's operations, and it needs `zero`. Without it such operations are refused.

    Raises RandomnessError for random numbers that cannot be handed in.
    """

    def __init__(
        self,
        operations: ModuleType | Any = ops,
        *,
        zero: Tensor | None = None,
        draws: Draws | None = None,
    ) -> None:
        super().__init__()
        if draws is not None and (zero is None or not is_batchedtensor(zero)):
            raise KernelError(
                "draws were handed in without `zero`; make it inside of vmap, with a scalar zero "
                "that has an axis of models"
            )
        self.operations = operations
        self.zero = zero
        self.drawing = None if draws is None or zero is None else Drawing(draws, zero)
        self._copied: set[int | None] = set()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._copied and _writes(function, args, kwargs) and _memory(args[0]) in self._copied:
            raise KernelError(
                f"{function.__name__} writes into a view, or what it is a view of, that had to be "
                "copied to put the models side by side; use reshape and operations that return "
                "their result"
            )
        if self.drawing is not None:
            self.drawing.check((args, kwargs))
            if function in DRAWING:
                return DRAWING[function](self.drawing, *args, **kwargs)
        rule = RULES.get(function)
        if rule is not None and any(map(_depends_on_model, (*args, *kwargs.values()))):
            return rule(self, *args, **kwargs)
        if rule is not None and self.drawing is not None and function in DROPPING:
            return rule(self, *args, **kwargs)
        if function in LOOPED and any(map(_depends_on_model, pytree.tree_leaves((args, kwargs)))):
            if self.drawing is not None and recurrent_dropout(function, args):
                raise RandomnessError(
                    f"{function.__name__} with dropout between its layers draws inside of torch; "
                    "set its dropout to 0, or stack single layers with nn.Dropout between them"
                )
            return _loop(function, args, kwargs)
        result = self._call(function, args, kwargs)
        if self.zero is not None and function in FACTORIES and not _depends_on_model(result):
            return _with_model_axis(result, self.zero)
        return result

    def _call(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """torch's own; where random numbers are handed in, without a rule none can be drawn."""
        if self.drawing is None:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if VMAP_DRAWS not in str(error):
                raise
            raise RandomnessError(
                f"{function.__name__} draws random numbers for each model and has no rule for it; "
                "draw them with dropout, bernoulli, rand or randn"
            ) from error

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dim() != 2:
            return F.linear(input, weight, bias)
        return _grouped(F.linear, self.operations.grouped_linear, input, weight, bias)

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        settings = {
            "stride": _pair(stride),
            "padding": padding if isinstance(padding, str) else _pair(padding),
            "dilation": _pair(dilation),
            "groups": groups,
        }
        if input.dim() == 3:
            return self.conv2d(input.unsqueeze(0), weight, bias, **settings).squeeze(0)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.operations.grouped_conv2d(x, weight, bias, **settings)

        return _grouped(F.conv2d, convolve, input, weight, bias, **settings)

    def conv1d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        settings = {
            "stride": (1, _single(stride)),
            "padding": padding if isinstance(padding, str) else (0, _single(padding)),
            "dilation": (1, _single(dilation)),
            "groups": groups,
        }
        return self.conv2d(input.unsqueeze(-2), weight.unsqueeze(-2), bias, **settings).squeeze(-2)

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        shape = tuple(normalized_shape)

        def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return self.operations.grouped_layer_norm(x, shape, weight, bias, eps)

        def original(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, shape, weight, bias, eps)

        return _grouped(original, normalise, input, weight, bias)

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        settings = {"training": training, "momentum": momentum, "eps": eps}
        if training and running_mean is not None and not _depends_on_model(running_mean):
            raise KernelError(
                "batch_norm in training: the models share their running statistics and would each "
                "update them; stack running_mean and running_var, or call .eval()"
            )

        def normalise(x: Tensor, *of_models: Tensor | None) -> Tensor:
            return self.operations.grouped_batch_norm(x, *of_models, **settings)

        return _grouped(
            F.batch_norm, normalise, input, running_mean, running_var, weight, bias, **settings
        )

    def group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        # The statistics do not know the model; only scale and shift do.
        normal = F.group_norm(input, num_groups, eps=eps)
        channels = (-1, *(1,) * (input.dim() - 2))
        if weight is not None:
            normal = normal * weight.reshape(channels)
        return normal if bias is None else normal + bias.reshape(channels)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p > 0:
            if self.drawing is None:
                raise RandomnessError(_own_mask("attention", dropout_p))
            return self.drawing.attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        settings = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.operations.grouped_attention(query, key, value, mask, **settings)

        return _grouped(
            F.scaled_dot_product_attention, attend, query, key, value, attn_mask, **settings
        )

    def embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if max_norm is not None or scale_grad_by_freq or sparse:
            return _loop(
                F.embedding,
                (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
                {},
            )
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]

        def look_up(ids: Tensor, weight: Tensor) -> Tensor:
            return self.operations.grouped_embedding(ids, weight, padding_idx)

        return _grouped(F.embedding, look_up, input, weight, padding_idx=padding_idx)

    def multi_head_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        dropout = None if self.drawing is None else self.drawing.dropout
        settings = inspect.signature(multi_head_attention).bind(
            self.linear, self.attention, *args, dropout=dropout, **kwargs
        )
        rate = settings.arguments["dropout_p"]
        if dropout is None and rate and settings.arguments.get("training", True):
            raise RandomnessError(_own_mask("multi-head attention", rate))
        output, weights = multi_head_attention(*settings.args, **settings.kwargs)
        return output, weights

    def view(self, input: Tensor, *shape: Any) -> Tensor:
        """A copy where the models' results lie between each other, as those of linear layers."""
        try:
            return input.view(*shape)
        except RuntimeError:
            if isinstance(shape[0], torch.dtype):
                raise
        result = input.reshape(*shape)
        # Freed memory may be found again here, which only costs another way of running.
        self._copied |= {_memory(input), _memory(result)}
        return result

    def adaptive_avg_pool2d(self, input: Tensor, output_size: Any) -> Tensor:
        def pool(x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(x.flatten(0, -4), output_size).unflatten(0, x.shape[:-3])

        return _grouped(F.adaptive_avg_pool2d, pool, input)


RULES: dict[Callable, Callable[..., Any]] = {
    F.linear: Grouping.linear,
    F.conv1d: Grouping.conv1d,
    F.conv2d: Grouping.conv2d,
    F.layer_norm: Grouping.layer_norm,
    torch.layer_norm: Grouping.layer_norm,
    F.batch_norm: Grouping.batch_norm,
    F.group_norm: Grouping.group_norm,
    torch.group_norm: Grouping.group_norm,
    F.scaled_dot_product_attention: Grouping.attention,
    F.multi_head_attention_forward: Grouping.multi_head_attention,
    F.embedding: Grouping.embedding,
    F.adaptive_avg_pool2d: Grouping.adaptive_avg_pool2d,
    Tensor.view: Grouping.view,
}
# Rules that draw for every model, also where no argument depends on it.
DROPPING: set[Callable] = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
LOOPED: set[Callable] = {
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.embedding_bag,
    torch.bilinear,
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
}
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imod")
FACTORIES: set[Callable] = {
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
}


class _StackedCall(torch.autograd.Function):
    """`function(*tensors)`, called by vmap with stacked tensors instead of one model's."""

    @staticmethod
    def forward(function: Callable, *tensors: Tensor | None) -> Any:
        raise NotImplementedError("a call that does not depend on the model has no rule")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple, function: Callable, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        result = function(*map(_model_axis_first, tensors, in_dims[1:]))
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)


def _grouped(
    original: Callable, grouped: Callable[..., Tensor], *tensors: Tensor | None, **settings: Any
) -> Tensor:
    """`grouped` of the stacked tensors; `original` where none of them depends on the model."""
    if any(map(_depends_on_model, tensors)):
        return _StackedCall.apply(grouped, *tensors)
    return original(*tensors, **settings)


def _loop(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`function` for one model after another, with stacked results."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def over_models(*tensors: Tensor) -> Any:
        results = []
        for model in range(max(map(len, tensors))):
            mine = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                mine[place] = tensor[model if len(tensor) > 1 else 0]
            args, kwargs = pytree.tree_unflatten(mine, spec)
            results.append(function(*args, **kwargs))
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(map(torch.stack, zip(*results, strict=True)))

    return _StackedCall.apply(over_models, *(leaves[place] for place in places))


def _depends_on_model(value: Any) -> bool:
    return isinstance(value, Tensor) and is_batchedtensor(value)


def _writes(function: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument."""
    name = function.__name__
    if name.endswith("__"):
        return name == "__setitem__" or name[2:-2] in IN_PLACE
    return name.endswith("_") or bool(kwargs.get("inplace")) or any(v is True for v in args[1:])


def _memory(tensor: Any) -> int | None:
    """The memory that a tensor lies in, whether or not it is one of vmap's."""
    if not isinstance(tensor, Tensor):
        return None
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.untyped_storage()._cdata


def _model_axis_first(tensor: Tensor | None, axis: int | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if axis is None else tensor.movedim(axis, 0)


def _with_model_axis(tensor: Tensor, zero: Tensor) -> Tensor:
    return tensor | zero.bool() if tensor.dtype == torch.bool else tensor + zero.to(tensor.dtype)


def _own_mask(operation: str, rate: float) -> str:
    return (
        f"{operation} with dropout {rate}: each model would draw its own mask; call .eval() or set "
        "the dropout to 0"
    )


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    first, second = values * 2 if len(values) == 1 else values
    return first, second


def _single(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]
