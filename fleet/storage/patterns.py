"""Records as the manifest holds them: what many variants have alike is said once; no torch.

A pattern is how one tensor is stored, without what only one variant has: hashes and numbers. Of a
part it says which it is:

    ""                        the tensor of the variant's next hash
    "/<offset>/<dtype>/<n>"   a piece of the tensor of its next hash
    "<dtype>/<n>x<m>"         the next piece of its first tensor, from where the one before ended

and of a setting its value, or null for the variant's next number. A variant (or node) is then a
list of patterns by their numbers, of hashes, and of numbers: a few hundred bytes, however many
tensors it has.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fleet.errors import FleetError
from fleet.storage.records import (
    CheckedTensors,
    Encoded,
    Node,
    Variant,
    check_keys,
    check_name,
    fields_of,
)
from fleet.storage.references import (
    HASH_LENGTH,
    Piece,
    is_hash,
    piece_in,
    piece_of,
    reference_to,
    tensor_of,
)

Kind = Literal["tensor", "adapter"]

_NEXT = re.compile(r"[a-z].*")
_ANY_HASH = "0" * HASH_LENGTH


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the tensor `key` (or the adapter after the module `key`) is stored."""

    kind: Kind
    key: str
    encoding: str
    parts: tuple[tuple[str, str | Piece], ...]
    settings: dict[str, Any]
    hashes: int
    numbers: int

    @staticmethod
    def from_json(content: object) -> Pattern:
        """The pattern in `content`; FleetError says what is wrong with it."""
        fields = fields_of(content, {"encoding", "parts", "settings"}, {"tensor", "adapter"})
        kind: Kind = "tensor" if "tensor" in fields else "adapter"
        parts, settings = fields["parts"], fields["settings"]
        key, encoding = fields.get(kind), fields["encoding"]
        if (
            len(fields) != 4
            or not (isinstance(key, str) and isinstance(encoding, str))
            or not (isinstance(parts, dict) and isinstance(settings, dict))
        ):
            raise FleetError(f"found {reprlib.repr(content)}, wanted the record of one tensor")
        read = tuple((part, _part(part, text)) for part, text in parts.items())
        own = sum(isinstance(part, str) for _, part in read)
        numbers = sum(value is None for value in settings.values())
        pattern = Pattern(kind, key, encoding, read, settings, own, numbers)
        made = pattern.filled(iter([_ANY_HASH] * own), iter([0.0] * numbers), _ANY_HASH, [0])
        check_keys({key: Encoded(made.encoding, made.parts, made.settings)}, "pattern", Encoded)
        return pattern

    @property
    def continues(self) -> bool:
        """Whether it has pieces of the variant's first tensor."""
        return self.hashes < len(self.parts)

    def filled(
        self, hashes: Iterator[str], numbers: Iterator[float], first: str, at: list[int]
    ) -> Encoded:
        """The record of a variant that has these next; `at` is where its next piece begins."""
        parts = {}
        for part, which in self.parts:
            if isinstance(which, str):
                parts[part] = next(hashes) + which
            else:
                parts[part] = reference_to(first, Piece(at[0], which.dtype, which.shape))
                at[0] += which.nbytes
        settings = self.settings
        if self.numbers:
            settings = {k: next(numbers) if v is None else v for k, v in settings.items()}
        return Encoded.unchecked(self.encoding, parts, settings)


class Patterned(CheckedTensors):
    """The records of a variant, made when they are asked for, all at once."""

    __slots__ = ("_kind", "_numbers", "_patterns", "hashes")

    def __init__(
        self,
        kind: Kind,
        patterns: tuple[Pattern, ...],
        hashes: tuple[str, ...],
        numbers: tuple[float, ...],
    ) -> None:
        self._kind: Kind = kind
        self._patterns, self.hashes, self._numbers = patterns, hashes, numbers

    def __getitem__(self, key: str) -> Encoded:
        return self._made()[key]

    def __iter__(self) -> Iterator[str]:
        return (pattern.key for pattern in self._patterns if pattern.kind == self._kind)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return any(name == key for name in self)

    def __repr__(self) -> str:
        return repr(self._made())

    def items(self) -> ItemsView[str, Encoded]:
        return self._made().items()

    def values(self) -> Any:
        return self._made().values()

    def _made(self) -> dict[str, Encoded]:
        own, numbers, at = iter(self.hashes), iter(self._numbers), [0]
        first = next(own) if _continues(self._patterns) else ""
        return {
            pattern.key: made
            for pattern in self._patterns
            for made in [pattern.filled(own, numbers, first, at)]
            if pattern.kind == self._kind
        }


def patterns_of(
    tensors: Mapping[str, Encoded], adapters: Mapping[str, Encoded]
) -> tuple[list[dict[str, Any]], list[str], list[float]]:
    """The patterns of records as JSON, their hashes and their numbers."""
    records = [("tensor", *named) for named in tensors.items()]
    records += [("adapter", *named) for named in adapters.items()]
    every = [reference for _, _, encoded in records for reference in encoded.parts.values()]
    first = next((tensor_of(reference) for reference in every if _begins(reference)), None)
    at = 0
    hashes: list[str] = [] if first is None else [first]
    numbers: list[float] = []
    patterns: list[dict[str, Any]] = []
    for kind, key, encoded in records:
        parts: dict[str, str] = {}
        for part, reference in encoded.parts.items():
            piece = piece_of(reference)
            if piece is not None and tensor_of(reference) == first and piece.offset == at:
                parts[part] = reference_to("", piece).removeprefix(f"/{at}/")
                at += piece.nbytes
            else:
                hashes.append(tensor_of(reference))
                parts[part] = reference[HASH_LENGTH:]
        settings: dict[str, Any] = dict(encoded.settings)
        for name, value in settings.items():
            if isinstance(value, float):
                settings[name] = None
                numbers.append(value)
        patterns.append(
            {kind: key, "encoding": encoded.encoding, "parts": parts, "settings": settings}
        )
    return patterns, hashes, numbers


def pattern_text(content: object) -> str:
    """What tells the pattern in `content` from others; pieces follow the order of its parts."""
    return json.dumps(content, allow_nan=False)


def records_json(patterns: list[int], hashes: list[str], numbers: list[float]) -> dict[str, Any]:
    """Records as they stand in the manifest, by the numbers of their patterns."""
    found: dict[str, Any] = {"patterns": patterns, "hashes": hashes}
    return {**found, "numbers": numbers} if numbers else found


def variant_from_json(content: object, known: Sequence[Pattern], new: Sequence[Pattern]) -> Variant:
    """The variant in `content`, of patterns that are known and the new ones that follow them.

    FleetError says what is wrong with it.
    """
    wanted = {"name", "node", "patterns", "hashes", "classes", "about"}
    fields = fields_of(content, wanted, {"numbers"})
    name = check_name(fields["name"], "a variant")
    where = f"variant {name!r}"
    node = check_name(fields["node"], f"the node of {where}")
    classes, about = fields["classes"], fields["about"]
    if not (classes is None or type(classes) is int) or not isinstance(about, dict):
        raise FleetError(
            f"{where}: classes, about: found {reprlib.repr([classes, about])}, wanted a number or "
            "null, and an object"
        )
    tensors, adapters = _records(fields, known, new, where)
    return Variant(name, node, tensors, classes, about, adapters)


def node_from_json(content: object, known: Sequence[Pattern], new: Sequence[Pattern]) -> Node:
    """The node in `content`, but the base, as `variant_from_json`."""
    fields = fields_of(content, {"name", "parent", "patterns", "hashes"}, {"numbers"})
    name = check_name(fields["name"], "a node")
    parent = check_name(fields["parent"], f"the parent of node {name!r}")
    tensors, adapters = _records(fields, known, new, f"node {name!r}")
    if adapters:
        raise FleetError(f"node {name!r}: has adapters, wanted tensors alone")
    return Node(name, parent, tensors)


def _records(
    fields: Mapping[str, Any], known: Sequence[Pattern], new: Sequence[Pattern], where: str
) -> tuple[Mapping[str, Encoded], Mapping[str, Encoded]]:
    """Tensors and adapters."""
    places, hashes, numbers = fields["patterns"], fields["hashes"], fields.get("numbers", [])
    count = len(known)
    if not isinstance(places, list) or not all(
        type(at) is int and 0 <= at < count + len(new) for at in places
    ):
        raise FleetError(
            f"{where}: patterns: found {reprlib.repr(places)}, wanted a list of numbers below "
            f"{count + len(new)}"
        )
    patterns = tuple(known[at] if at < count else new[at - count] for at in places)
    if len({(pattern.kind, pattern.key) for pattern in patterns}) < len(patterns):
        raise FleetError(f"{where}: patterns: two of them are of one tensor")
    own = _continues(patterns) + sum(pattern.hashes for pattern in patterns)
    if not isinstance(hashes, list) or len(hashes) != own or not all(map(is_hash, hashes)):
        raise FleetError(
            f"{where}: hashes: found {reprlib.repr(hashes)}, wanted a list of {own} SHA-256"
        )
    own = sum(pattern.numbers for pattern in patterns)
    if (
        not isinstance(numbers, list)
        or len(numbers) != own
        or not all(type(number) is float and math.isfinite(number) for number in numbers)
    ):
        raise FleetError(
            f"{where}: numbers: found {reprlib.repr(numbers)}, wanted a list of {own} finite ones"
        )
    held = patterns, tuple(map(sys.intern, hashes)), tuple(numbers)
    adapted = any(pattern.kind == "adapter" for pattern in patterns)
    return Patterned("tensor", *held), Patterned("adapter", *held) if adapted else {}


def _continues(patterns: Sequence[Pattern]) -> bool:
    return any(pattern.continues for pattern in patterns)


def _begins(reference: str) -> bool:
    piece = piece_of(reference)
    return piece is not None and piece.offset == 0


def _part(part: str, text: object) -> str | Piece:
    """Which part it is: a piece of the first tensor, or what follows the next hash."""
    if isinstance(text, str) and not _NEXT.fullmatch(text):
        return sys.intern(text)
    piece = piece_in(f"/0/{text}") if isinstance(text, str) else None
    if piece is None:
        raise FleetError(f"parts.{part}: found {reprlib.repr(text)}, wanted a piece, or none")
    return piece
