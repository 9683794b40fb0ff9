"""Operations that draw random numbers, on numbers that are handed in for each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    TransformType,
    _add_batch_dim,
    is_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from kernels.errors import KernelError

Number = float | int

# The fixed point of SELU (1706.02515): what alpha dropout drops becomes −SELU_FLOOR.
SELU_FLOOR = 1.0507009873554805 * 1.6732632423543772


class RandomnessError(KernelError):
    """An operation that draws random numbers for each model, where none were handed in."""


class Draw(NamedTuple):
    """Random numbers that one model asks for: how they are distributed, and one model's shape.

    `keep`: 1 with `probability`, else 0, as torch.bool. `uniform`: on [0, 1). `normal`: mean 0,
    variance 1.
    """

    kind: Literal["keep", "uniform", "normal"]
    shape: tuple[int, ...]
    probability: float
    dtype: torch.dtype


Draws = Callable[[Draw], Tensor]
"""What is drawn, for every model: [models, *shape], one call after another."""


class Drawing:
    """Rules for operations that draw, inside `torch.func.vmap` over the models.

    Every result has a model axis, whether or not the arguments have one. `zero` is a scalar that
    vmap has batched over the models.
    """

    def __init__(self, draws: Draws, zero: Tensor) -> None:
        self._draws = draws
        self._level = maybe_get_level(zero)
        self._outdated = WeakIdKeyDictionary()

    def check(self, arguments: Any) -> None:
        """RandomnessError for a tensor that random numbers of each model were written into."""
        if not len(self._outdated):
            return
        for leaf in pytree.tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf in self._outdated:
                raise RandomnessError(
                    "random numbers are drawn in place into a tensor that the models share, and "
                    "it is used after that; use what the operation returns"
                )

    def keep(self, shape: Sequence[int], probability: float) -> Tensor:
        return self._draw(Draw("keep", tuple(shape), probability, torch.bool))

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._draw(Draw("uniform", tuple(shape), 0.0, dtype))

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._draw(Draw("normal", tuple(shape), 0.0, dtype))

    def _draw(self, draw: Draw) -> Tensor:
        innermost = peek_interpreter_stack()
        if innermost.key() == TransformType.Vmap and innermost.level() != self._level:
            raise RandomnessError(
                "random numbers are drawn inside a vmap of the model's own; draw them outside of "
                "it and hand them in"
            )
        if not draw.dtype.is_floating_point and draw.kind != "keep":
            raise RandomnessError(f"{draw.kind} random numbers of {draw.dtype}; draw floats")
        with temporarily_pop_interpreter_stack():  # what draws is no part of the models
            drawn = self._draws(draw)
        return _add_batch_dim(drawn, 0, self._level)

    def dropout(
        self, input: Tensor, p: Number = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """`y = x · keep / (1 − p)`."""
        return self._drop(input, input.shape, p, training, inplace)

    def dropout1d(
        self, input: Tensor, p: Number = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        rowless = input.dim() == 2
        return self._drop(input, _channels(input, rowless=rowless), p, training, inplace)

    def dropout2d(
        self, input: Tensor, p: Number = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return self._drop(input, _channels(input), p, training, inplace)

    def dropout3d(
        self, input: Tensor, p: Number = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        rowless = input.dim() == 4
        return self._drop(input, _channels(input, rowless=rowless), p, training, inplace)

    def alpha_dropout(
        self, input: Tensor, p: Number = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        """Mean and variance of a SELU network stay (1706.02515): `y = a · (keep ? x : −α) + b`."""
        return self._drop_to_floor(input, input.shape, p, training, inplace)

    def feature_alpha_dropout(
        self, input: Tensor, p: Number = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        return self._drop_to_floor(input, _channels(input), p, training, inplace)

    def _drop(
        self, input: Tensor, shape: Sequence[int], p: Number, training: bool, inplace: bool
    ) -> Tensor:
        _check_rate(p)
        if not training or p == 0:
            return input
        keep, scale = self.keep(shape, 1 - p), 0.0 if p == 1 else 1 / (1 - p)
        if inplace and is_batchedtensor(input):
            return input.mul_(keep).mul_(scale)
        dropped = input * keep * scale
        return self._write(input, dropped) if inplace else dropped

    def _drop_to_floor(
        self, input: Tensor, shape: Sequence[int], p: Number, training: bool, inplace: bool
    ) -> Tensor:
        _check_rate(p)
        if not training or p == 0:
            return input
        keep = self.keep(shape, 1 - p)
        if p == 1:
            dropped = input * keep
        else:
            scale = 1 / math.sqrt((SELU_FLOOR**2 * p + 1) * (1 - p))
            kept = keep.to(input.dtype)
            dropped = input * (kept * scale) + (kept - (1 - p)) * (SELU_FLOOR * scale)
        return self._write(input, dropped) if inplace else dropped

    def rrelu(
        self,
        input: Tensor,
        lower: Number = 1 / 8,
        upper: Number = 1 / 3,
        training: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        """`y = x > 0 ? x : slope · x` with slopes uniform on [lower, upper) (1505.00853)."""
        if not training:
            return F.leaky_relu(input, (lower + upper) / 2, inplace)
        slopes = self.uniform(input.shape, input.dtype) * (upper - lower) + lower
        result = torch.where(input > 0, input, input * slopes)
        return self._write(input, result) if inplace else result

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: Number = 0.0,
        is_causal: bool = False,
        scale: Number | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`y = dropout(softmax(query · keyᵀ · scale + mask)) · value`."""
        if enable_gqa:
            key, value = (
                t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value)
            )
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query * factor) @ key.transpose(-2, -1)
        if is_causal:
            if attn_mask is not None:
                raise KernelError("attention: is_causal and attn_mask are both given; give one")
            earlier = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~earlier, float("-inf"))
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = torch.softmax(scores, dim=-1) if attn_mask is None else _safe_softmax(scores)
        return self.dropout(weights, dropout_p) @ value

    def bernoulli(
        self,
        input: Tensor,
        p: Number | None = None,
        *,
        generator: torch.Generator | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        _refuse("bernoulli", generator=generator, out=out)
        return self._coins(input, input if p is None else p).to(input.dtype)

    def bernoulli_(
        self, input: Tensor, p: Number | Tensor = 0.5, *, generator: torch.Generator | None = None
    ) -> Tensor:
        _refuse("bernoulli_", generator=generator)
        return self._write(input, self._coins(input, p))

    def _coins(self, input: Tensor, p: Number | Tensor) -> Tensor:
        if not isinstance(p, Tensor):
            _check_rate(p)
            return self.keep(input.shape, float(p))
        wide = p.dtype if p.dtype == torch.float64 else torch.float32
        return self.uniform(input.shape, wide) < p

    def rand(self, *size: Any, **settings: Any) -> Tensor:
        return self._of_size(self.uniform, "rand", size, **settings)

    def randn(self, *size: Any, **settings: Any) -> Tensor:
        return self._of_size(self.normal, "randn", size, **settings)

    def rand_like(self, input: Tensor, **settings: Any) -> Tensor:
        return self._of_size(
            self.uniform, "rand_like", input.shape, **{"dtype": input.dtype, **settings}
        )

    def randn_like(self, input: Tensor, **settings: Any) -> Tensor:
        return self._of_size(
            self.normal, "randn_like", input.shape, **{"dtype": input.dtype, **settings}
        )

    def _of_size(
        self,
        draw: Callable[[Sequence[int], torch.dtype], Tensor],
        name: str,
        sizes: Sequence[Any],
        *,
        size: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        out: Tensor | None = None,
        names: Any = None,
        requires_grad: bool = False,
        **_where: Any,
    ) -> Tensor:
        """Where the numbers lie is what draws them to say: `device` and `layout` are passed by."""
        _refuse(name, generator=generator, out=out, names=names, requires_grad=requires_grad)
        shape = sizes if size is None else size
        if len(shape) == 1 and isinstance(shape[0], Sequence):
            shape = shape[0]
        return draw(shape, dtype or torch.get_default_dtype())

    def uniform_(
        self,
        input: Tensor,
        *bounds: Number,
        generator: torch.Generator | None = None,
        **named: Number,
    ) -> Tensor:
        _refuse("uniform_", generator=generator)
        given = dict(zip(("from", "to"), bounds, strict=False))
        low, high = {"from": 0.0, "to": 1.0, **given, **named}.values()
        return self._write(input, self.uniform(input.shape, input.dtype) * (high - low) + low)

    def normal_(
        self,
        input: Tensor,
        mean: Number = 0.0,
        std: Number = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        _refuse("normal_", generator=generator)
        return self._write(input, self.normal(input.shape, input.dtype) * std + mean)

    def _write(self, input: Tensor, values: Tensor) -> Tensor:
        """The values in the tensor's place; one without a model axis cannot hold them."""
        if is_batchedtensor(input):
            return input.copy_(values)
        self._outdated[input] = True
        return values.to(input.dtype)


DRAWING: dict[Callable, Callable[..., Tensor]] = {
    F.dropout: Drawing.dropout,
    F.dropout1d: Drawing.dropout1d,
    F.dropout2d: Drawing.dropout2d,
    F.dropout3d: Drawing.dropout3d,
    F.alpha_dropout: Drawing.alpha_dropout,
    F.feature_alpha_dropout: Drawing.feature_alpha_dropout,
    F.rrelu: Drawing.rrelu,
    torch.dropout: Drawing.dropout,
    torch.alpha_dropout: Drawing.alpha_dropout,
    torch.feature_dropout: Drawing.dropout2d,
    torch.feature_alpha_dropout: Drawing.feature_alpha_dropout,
    torch.bernoulli: Drawing.bernoulli,
    Tensor.bernoulli: Drawing.bernoulli,
    Tensor.bernoulli_: Drawing.bernoulli_,
    torch.rand: Drawing.rand,
    torch.randn: Drawing.randn,
    torch.rand_like: Drawing.rand_like,
    torch.randn_like: Drawing.randn_like,
    Tensor.uniform_: Drawing.uniform_,
    Tensor.normal_: Drawing.normal_,
}


def recurrent_dropout(function: Callable, args: Sequence[Any]) -> float:
    """The rate with which torch.lstm and its like drop between their layers; 0 for others."""
    if function not in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        return 0.0
    place = next(i for i, value in enumerate(args) if isinstance(value, float))
    layers, rate, training = args[place - 1 : place + 2]
    return rate if training and layers > 1 else 0.0


def _channels(input: Tensor, *, rowless: bool = False) -> tuple[int, ...]:
    """The shape of one number for each channel of each row."""
    if input.dim() < 2:
        raise KernelError(
            f"dropout of channels: found a tensor of shape {list(input.shape)}; wanted [rows, "
            "channels, …]"
        )
    leading = 1 if rowless else 2
    return (*input.shape[:leading], *(1,) * (input.dim() - leading))


def _safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys; 0 where all of them are masked."""
    masked = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(masked, 0.0), dim=-1).masked_fill(masked, 0.0)


def _check_rate(p: Number) -> None:
    if not 0 <= p <= 1:
        raise KernelError(f"the probability is {p}; wanted a number from 0 to 1")


def _refuse(operation: str, **settings: Any) -> None:
    """RandomnessError for a setting that numbers which are handed in cannot follow."""
    given = [name for name, value in settings.items() if value is not None and value is not False]
    if given:
        raise RandomnessError(
            f"{operation} with {', '.join(given)}: each model is handed its own random numbers; "
            "leave that out"
        )
