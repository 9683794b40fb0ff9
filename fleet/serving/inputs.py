"""What tenants ask: checked before anything is computed, and laid together for the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleet.errors import FleetError

IDS = "input_ids"
MASK = "attention_mask"
POSITIONAL = ""

Form = tuple[tuple[str, int], ...]
Kind = tuple[tuple[str, str, tuple[int, ...]], ...]
Input = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """One request: its tensors by argument of the model, and its number of tokens, if it is padded.

    Requests of one `kind` go through the model together.
    """

    place: int
    tenant: str
    tensors: Mapping[str, Tensor]
    tokens: int | None
    kind: Kind


@dataclass(frozen=True)
class Together:
    """Inputs of several requests, the first axis theirs; `tokens` is what they are padded to."""

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor]
    tokens: int | None

    @property
    def rows(self) -> int:
        tensors: Sequence[Tensor] = [*self.args, *self.kwargs.values()]
        return len(tensors[0])

    @property
    def form(self) -> Form:
        """The arguments, and how many axes each has."""
        named = [(name, tensor.dim()) for name, tensor in self.kwargs.items()]
        return (*((POSITIONAL, tensor.dim()) for tensor in self.args), *named)

    def select(self, rows: slice | Tensor) -> Together:
        """Some of the rows."""
        kwargs = {name: tensor[rows] for name, tensor in self.kwargs.items()}
        return Together(tuple(tensor[rows] for tensor in self.args), kwargs, self.tokens)

    def made_up(self, rows: int, tokens: int = 0) -> Together:
        """So many rows like these, no two the same, of at least so many tokens."""
        generator = torch.Generator().manual_seed(1)

        def like(name: str, tensor: Tensor) -> Tensor:
            made = tensor[torch.arange(rows) % len(tensor)]
            if made.is_floating_point():
                noise = torch.randn(made.shape, generator=generator).to(made.device, made.dtype)
                size = float(torch.linalg.vector_norm(tensor.double())) / tensor.numel() ** 0.5
                return made + 0.3 * (size or 1.0) * noise
            if name == IDS:
                made = torch.stack([row.roll(place) for place, row in enumerate(made.unbind(0))])
            short = self.tokens is not None and self.tokens < tokens
            return made.repeat(1, -(-tokens // made.shape[1])) if short else made

        args = tuple(like(POSITIONAL, tensor) for tensor in self.args)
        kwargs = {name: like(name, tensor) for name, tensor in self.kwargs.items()}
        length = None if self.tokens is None else len(kwargs[IDS][0])
        return Together(args, kwargs, length)


class InputReader:
    """Knows what a model takes: tensors [C, H, W] and the like, or dictionaries of tokens [T].

    Tokens are padded to the longest of the batch where the model takes an `attention_mask`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        parameters = inspect.signature(model.forward).parameters
        kinds = inspect.Parameter
        named = {kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY}
        self._names = [name for name, p in parameters.items() if p.kind in named]
        # Beside arguments with names, others are for something else, or dropped.
        others = any(p.kind == kinds.VAR_KEYWORD for p in parameters.values())
        self._any_name = others and not self._names
        self._text = IDS in parameters
        self._masks = MASK in parameters
        config = getattr(model, "config", None)
        self._longest = _whole(getattr(config, "max_position_embeddings", None))
        self._types = _whole(getattr(config, "type_vocab_size", None))
        self._padding = _whole(getattr(config, "pad_token_id", None)) or 0
        self._vocabulary = _entries(model) or _whole(getattr(config, "vocab_size", None))

    def read(self, place: int, tenant: str, given: Any) -> Asked:
        """The request at `place`; FleetError where it is not what the model takes."""
        where = f"request {place} (tenant {tenant!r})"
        if isinstance(given, Tensor):
            given = {IDS if self._text else POSITIONAL: given}
        if not isinstance(given, Mapping) or not given:
            wanted = "a tensor, or a dictionary of tensors by the model's argument"
            raise FleetError(f"{where}: found {type(given).__name__}; wanted {wanted}")
        tensors = {}
        for name, tensor in given.items():
            if name != POSITIONAL and name not in self._names and not self._any_name:
                wanted = ", ".join(self._names)
                raise FleetError(f"{where}: the model takes no {name!r}; wanted some of {wanted}")
            if not isinstance(tensor, Tensor):
                raise FleetError(f"{where}: {name!r} is {type(tensor).__name__}, wanted a tensor")
            tensors[name] = self._checked(f"{where}: {name or 'the input'}", name, tensor)
        tokens = self._tokens(where, tensors) if self._text else None
        padded = self._text and self._masks
        kind = tuple(
            (name, str(tensor.dtype), () if padded else tuple(tensor.shape))
            for name, tensor in sorted(tensors.items())
            if not (padded and name == MASK)
        )
        return Asked(place, tenant, tensors, tokens if padded else None, kind)

    def _checked(self, where: str, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_floating_point():
            if self._text and name in (IDS, MASK, "token_type_ids", "position_ids"):
                raise FleetError(f"{where}: found {tensor.dtype}, wanted whole numbers")
            bad = int(tensor.isfinite().logical_not().sum())
            if bad:
                raise FleetError(f"{where}: {bad} of {tensor.numel()} numbers are NaN or infinite")
            return tensor.to(self._device, self._dtype)
        if tensor.is_complex() or (name == POSITIONAL and not self._text):
            raise FleetError(f"{where}: found {tensor.dtype}, wanted {self._dtype}")
        below = {IDS: self._vocabulary, "token_type_ids": self._types, MASK: 2}.get(name)
        if below is not None and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= below:
                raise FleetError(f"{where}: found {low} to {high}, wanted 0 to {below - 1}")
        return tensor.to(self._device, torch.int64)

    def _tokens(self, where: str, tensors: Mapping[str, Tensor]) -> int:
        if IDS not in tensors:
            raise FleetError(f"{where}: found {', '.join(tensors)}; wanted {IDS!r} too")
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        count = tensors[IDS].numel()
        if any(shape != [count] for shape in shapes.values()) or not count:
            raise FleetError(f"{where}: found {shapes}; wanted [tokens] of one length, at least 1")
        if self._longest is not None and count > self._longest:
            raise FleetError(f"{where}: has {count} tokens, the model takes {self._longest}")
        if MASK in tensors and not tensors[MASK].any():
            raise FleetError(f"{where}: its {MASK} hides every token; wanted one that is 1")
        return count

    def together(self, asked: Sequence[Asked]) -> Together:
        """The requests, which are of one kind, in this order."""
        tokens = [one.tokens for one in asked if one.tokens is not None]
        if not tokens:
            named = {
                name: torch.stack([one.tensors[name] for one in asked]) for name in asked[0].tensors
            }
            first = (named.pop(POSITIONAL),) if POSITIONAL in named else ()
            return Together(first, named, None)
        longest = max(tokens)
        kwargs = {
            name: self._padded([one.tensors[name] for one in asked], longest, name)
            for name, _, _ in asked[0].kind
        }
        if min(tokens) < longest or any(MASK in one.tensors for one in asked):
            masks = [one.tensors.get(MASK, torch.ones_like(one.tensors[IDS])) for one in asked]
            kwargs[MASK] = self._padded(masks, longest, MASK)
        return Together((), kwargs, longest)

    def _padded(self, tensors: Sequence[Tensor], longest: int, name: str) -> Tensor:
        if all(len(tensor) == longest for tensor in tensors):
            return torch.stack(list(tensors))
        fill = self._padding if name == IDS else 0
        padded = tensors[0].new_full((len(tensors), longest), fill)
        for row, tensor in zip(padded, tensors, strict=True):
            row[: len(tensor)] = tensor
        return padded


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _entries(model: nn.Module) -> int | None:
    """The size of a model's vocabulary, where it says which its table of tokens is."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return _whole(getattr(get(), "num_embeddings", None)) if callable(get) else None
    except NotImplementedError:
        return None
