"""Which tensor belongs to which layer, from the names alone; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from merge.errors import MergeError

# What lists of layers are called: `model.layers.3`, `transformer.h.3`, `blocks.3`, `layer1.0`.
_LIST = re.compile(r"(\w+_)?(layers?|(res|dense)?blocks?|stages?|groups?)(_\w+)?|h")
# Lists of blocks inside a stage: `stages.1.blocks.2`; `experts.2` or `layer.2` (T5) is none.
_INNER = re.compile(r"layers|(res)?blocks|units")
_NUMBERED = re.compile(r"([A-Za-z_]*)(\d+)")
_STAGE_OF_NUMBERED = {"s": "b", "denseblock": "denselayer"}  # regnet: s1.b2; densenet

# Words in the names of tensors that are in no layer, in the order in which they decide.
_OUTSIDE: tuple[tuple[Literal["before", "after"], re.Pattern[str]], ...] = (
    ("after", re.compile(r"heads?|classifier|fc|logits?|out|outputs?|post|final|score")),
    (
        "before",
        re.compile(
            r"emb\w*|wte|wpe|patch\w*|stem|pos\w*|tok\w*|shared|pre|input|in|(conv|bn|norm)[01]"
        ),
    ),
    ("after", re.compile(r"norm|layernorm|ln|rmsnorm|proj\w*|pool\w*|cls|predictions|seq|bn2")),
)


@dataclass(frozen=True)
class _Place:
    """Where a name is numbered: `stem` is the list, `at` the part that has the number."""

    stem: str
    number: tuple[int, ...]  # of the layer, or of the stage and of the block in it
    at: int
    known: bool


@dataclass(frozen=True)
class Layers:
    """The layers of a model: one list of them (`sequences` has one stem), or several towers.

    Lists that are called like layers (`layers`, `h`, `blocks`, `stages` …) count; where there is
    none, the longest numbered list does. Blocks in stages are counted through, in order; what is
    in a stage but in no block of it belongs to the stage's first block.
    """

    sequences: Mapping[str, tuple[tuple[int, ...], ...]]
    first: int  # the places of the first and the last layered name in the order given
    last: int
    order: Mapping[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Layers:
        """The layers of a model whose tensors have these names.

        Their order decides only on which side of the layers a name is that does not tell it.
        """
        order = {name: place for place, name in enumerate(names)}
        found: dict[str, set[tuple[int, ...]]] = {}
        known: set[str] = set()
        for name in order:
            if (place := _find(name)) is not None:
                found.setdefault(place.stem, set()).add(place.number)
                known |= {place.stem} if place.known else set()
        sequences = {stem: _in_order(numbers) for stem, numbers in found.items()}
        chosen = {stem: sequences[stem] for stem in sequences if stem in known}
        if not chosen:
            longest = max(sequences, key=lambda stem: len(sequences[stem]), default=None)
            chosen = {s: n for s, n in sequences.items() if s == longest and len(n) > 1}
        if any(len(numbers) > 1 for numbers in chosen.values()):
            chosen = {stem: numbers for stem, numbers in chosen.items() if len(numbers) > 1}
        layered = [k for n, k in order.items() if (p := _find(n)) and p.stem in chosen]
        first, last = (layered[0], layered[-1]) if layered else (0, -1)
        return cls(chosen, first, last, order)

    @property
    def count(self) -> int:
        """How many layers the longest sequence has; 0 where nothing is numbered."""
        return max(map(len, self.sequences.values()), default=0)

    def index(self, name: str) -> int | None:
        """The layer that the tensor is in, counted from 0 in its own tower; None outside."""
        place = _find(name)
        if place is None or place.stem not in self.sequences:
            return None
        numbers = self.sequences[place.stem]
        if place.number in numbers:
            return numbers.index(place.number)
        inside = [k for k, number in enumerate(numbers) if number[0] == place.number[0]]
        return inside[0] if inside else None

    def position(self, name: str) -> int | Literal["before", "after"]:
        """The layer, or on which side of the layers the tensor is.

        Embeddings and stems are before, final norms, projections and heads after, as the words in
        the name tell; where they do not, names given later than the last layer's are after.
        """
        index = self.index(name)
        if index is not None:
            return index
        words = [word.lower() for word in re.split(r"[._]", name)]
        for side, pattern in _OUTSIDE:
            if any(pattern.fullmatch(word) for word in words):
                return side
        return "after" if self.order.get(name, 0) > self.last else "before"

    def fraction(self, name: str) -> float:
        """The place of a layer for gradients: `i / (n − 1)`, 1 for a single one, 0 outside."""
        index = self.index(name)
        return 0.0 if index is None else self._share(name, index)

    def depth(self, name: str) -> float:
        """How deep the tensor is: `i / (n − 1)` for layer i, 0 before the layers, 1 after them."""
        position = self.position(name)
        if isinstance(position, int):
            return self._share(name, position)
        return 0.0 if position == "before" else 1.0

    def rename(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer.

        Raises MergeError unless there is one list of layers, numbered through from 0.
        """
        if (problem := self.unsliceable()) is not None:
            raise MergeError(f"{name!r}: {problem}")
        place = _find(name)
        if place is None or place.stem not in self.sequences:
            raise MergeError(f"{name!r}: is in no layer, and has no other layer's name")
        parts = name.split(".")
        parts[place.at] = re.sub(r"\d+", str(layer), parts[place.at])
        return ".".join(parts)

    def unsliceable(self) -> str | None:
        """Why layers cannot be taken out and put elsewhere; None where they can."""
        remedy = "merge whole models with models instead of slices"
        if not self.sequences:
            return (
                "slices need numbered layers (such as model.layers.0), the names have none; "
                f"{remedy}"
            )
        if len(self.sequences) > 1:
            found = ", ".join(f"{stem!r} ({len(n)})" for stem, n in self.sequences.items())
            return f"slices need one list of layers, found {found}; {remedy}"
        ((stem, numbers),) = self.sequences.items()
        if any(len(number) > 1 for number in numbers):
            return f"slices need a plain list of layers, {stem!r} is one of stages; {remedy}"
        if numbers != tuple((k,) for k in range(len(numbers))):
            shown = ", ".join(str(number) for (number,) in numbers[:8])
            return (
                f"slices need layers that are numbered through from 0, {stem!r} has {shown}"
                f"{' …' if len(numbers) > 8 else ''}; {remedy}"
            )
        return None

    def _share(self, name: str, index: int) -> float:
        place = _find(name)
        assert place is not None
        count = len(self.sequences[place.stem])
        return index / (count - 1) if count > 1 else 1.0


@lru_cache(maxsize=1 << 16)
def _find(name: str) -> _Place | None:
    """The first number in the name that counts layers, else the first one that counts anything."""
    parts = name.split(".")
    other: _Place | None = None
    for at, part in enumerate(parts[:-1]):
        match = _NUMBERED.fullmatch(part)
        if match is None:
            continue
        word, number = match[1], int(match[2])
        inner = _inner(word, parts[at + 1 : -1])
        numbers = (number,) if inner is None else (number, inner)
        stem = ".".join([*parts[:at], word] if word else parts[:at])
        called = word or (parts[at - 1] if at else "")
        if _LIST.fullmatch(called) or (word in _STAGE_OF_NUMBERED and inner is not None):
            return _Place(stem, numbers, at, known=True)
        if not word and other is None:
            other = _Place(stem, numbers, at, known=False)
    return other


def _inner(word: str, rest: list[str]) -> int | None:
    """The number of the block, where the rest of a name after a stage's number has one."""
    if not rest:
        return None
    match = _NUMBERED.fullmatch(rest[0])
    if match is not None and match[1] == _STAGE_OF_NUMBERED.get(word, ""):
        return int(match[2])
    if len(rest) > 1 and _INNER.fullmatch(rest[0]) and rest[1].isdigit():
        return int(rest[1])
    return None


def _in_order(numbers: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Layers in order; a stage stands for itself only where it has no blocks."""
    with_blocks = {number[0] for number in numbers if number[1:]}
    return tuple(sorted(number for number in numbers if number[1:] or number[0] not in with_blocks))
