"""What a store's manifest says of nodes and variants: plain data, checked; imports no torch."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from fleet.errors import FleetError
from fleet.storage.references import is_reference, tensor_of

BASE = "base"
NAME_LIMIT = 200
KEY_LIMIT = 1000
DEPTH_LIMIT = 20

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,63}")
# One component of a path on every system, of a URL, and no option of a command.
_NAME = re.compile(r"\w[\w.+=@ -]*(?<![. ])")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Encoded:
    """How a tensor is made from its parent's: by the encoding of this name, of stored tensors.

    `parts` maps the encoding's names of its parts to tensors, by their hashes (or to pieces of
    them: `fleet.storage.references`), `settings` are its numbers.
    """

    encoding: str
    parts: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(_is_identifier(self.encoding), "encoding", self.encoding, "a lower-case identifier")
        _check(isinstance(self.parts, dict), "parts", self.parts, "an object")
        for part, reference in self.parts.items():
            _check(_is_identifier(part), "parts", part, "lower-case identifiers")
            if not is_reference(reference):
                _refuse_reference(reference)
        _check(isinstance(self.settings, dict), "settings", self.settings, "an object")
        for name, value in self.settings.items():
            _check(_is_identifier(name), "settings", name, "lower-case identifiers")
            if value is None or isinstance(value, dict):
                raise FleetError(
                    f"settings.{name}: found {reprlib.repr(value)}, wanted a number, a text or a "
                    "list"
                )
            check_json(value, f"settings.{name}")

    @staticmethod
    def unchecked(encoding: str, parts: dict[str, str], settings: dict[str, Any]) -> Encoded:
        """The record of what was checked already."""
        made = object.__new__(Encoded)
        object.__setattr__(made, "encoding", encoding)
        object.__setattr__(made, "parts", parts)
        object.__setattr__(made, "settings", settings)
        return made

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        settings = {"settings": self.settings} if self.settings else {}
        return {"encoding": self.encoding, "parts": self.parts, **settings}

    @staticmethod
    def from_json(content: object) -> Encoded:
        """The record in `content`; FleetError says what is wrong with it."""
        fields = fields_of(content, {"encoding", "parts"}, {"settings"})
        encoding, settings = fields["encoding"], fields.get("settings", {})
        _check(isinstance(encoding, str), "encoding", encoding, "a text")
        _check(isinstance(settings, dict), "settings", settings, "an object")
        return Encoded(sys.intern(encoding), _parts(fields["parts"]), settings)


class CheckedTensors(Mapping[str, Encoded]):
    """Records that were checked when they were read; `hashes` are the tensors that the variant or
    node whose they are refers to."""

    __slots__ = ()
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """What several variants share: the tensors in which they differ alike from the parent.

    The root is called `base`, has no parent, and all its tensors are `plain`. A tensor that is not
    named is the parent's.
    """

    name: str
    parent: str | None
    tensors: Mapping[str, Encoded]

    def __post_init__(self) -> None:
        check_name(self.name, "a node")
        if (self.parent is None) != (self.name == BASE):
            raise FleetError(
                f"node {self.name!r}: its parent is {self.parent!r}; the root alone has none, and "
                f"is called {BASE!r}"
            )
        if self.parent is not None:
            check_name(self.parent, f"the parent of node {self.name!r}")
        check_keys(self.tensors, f"node {self.name!r}: tensors", Encoded)
        if self.parent is None:
            other = [name for name, e in self.tensors.items() if e.encoding != "plain"]
            if other or not self.tensors:
                found = f"{other[0]!r} is {self.tensors[other[0]].encoding}" if other else "none"
                raise FleetError(
                    f"node {BASE!r}: tensors: {found}; wanted at least one, all of them plain"
                )

    def hashes(self) -> Collection[str]:
        """The tensors that it refers to, wholly or a piece of."""
        return _hashes(self.tensors, self.tensors.values())

    def to_json(self) -> dict[str, Any]:
        """As the base stands in the manifest."""
        return {"name": self.name, "parent": self.parent, "tensors": _to_json(self.tensors)}

    @staticmethod
    def from_json(content: object) -> Node:
        """The record in `content`; FleetError says what is wrong with it."""
        fields = fields_of(content, {"name", "parent", "tensors"}, set())
        name, parent = check_name(fields["name"], "a node"), fields["parent"]
        if parent is not None:
            check_name(parent, f"the parent of node {name!r}")
        tensors = mapping_of(fields["tensors"], f"node {name!r}: tensors", Encoded.from_json)
        return Node(name, parent, tensors)


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the store: what it has beside its node's tensors.

    `tensors` are made from the node's; one of another shape than there is `plain`. `adapters` maps
    names of modules to bottleneck adapters after them (1902.00751), which are no tensors of a
    checkpoint. `classes` is the width of its head. `about` is what the builder found: bytes,
    error, accuracy_before, accuracy_after, source.
    """

    name: str
    node: str
    tensors: Mapping[str, Encoded]
    classes: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Encoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "a variant")
        check_name(self.node, f"the node of variant {self.name!r}")
        check_keys(self.tensors, f"variant {self.name!r}: tensors", Encoded)
        check_keys(self.adapters, f"variant {self.name!r}: adapters", Encoded)
        where = f"variant {self.name!r}: "
        classes = self.classes
        fits = classes is None or (type(classes) is int and 0 < classes < 1 << 31)
        _check(fits, f"{where}classes", classes, "null or a positive number")
        _check(isinstance(self.about, dict), f"{where}about", self.about, "an object")
        check_json(self.about, f"{where}about")

    def encoded(self) -> Iterator[Encoded]:
        """Every record of how something of this variant is stored."""
        yield from self.tensors.values()
        yield from self.adapters.values()

    def hashes(self) -> Collection[str]:
        """The tensors that it refers to, wholly or a piece of."""
        return _hashes(self.tensors, self.encoded())


def check_name(name: object, what: str) -> str:
    """`name`; FleetError unless it can name a node or variant, and a file on every system."""
    if not isinstance(name, str) or len(name) > NAME_LIMIT or not _NAME.fullmatch(name):
        raise FleetError(
            f"{what} is called {reprlib.repr(name)}; wanted a letter, digit or _ and then up to "
            f"{NAME_LIMIT} letters, digits, spaces or _ - . + = @, with no dot or space at the end"
        )
    return name


def check_json(value: object, where: str, depth: int = 0) -> None:
    """FleetError unless JSON can hold `value` and give it back: finite, of 64 bits, not deep."""
    if depth > DEPTH_LIMIT:
        raise FleetError(f"{where}: is nested deeper than {DEPTH_LIMIT} levels")
    match value:
        case None | bool():
            return
        case str():
            _check(_is_unicode(value), where, value, "text that UTF-8 can hold")
        case int():
            _check(-(1 << 63) <= value < 1 << 63, where, value, "a whole number of 64 bits")
        case float():
            _check(math.isfinite(value), where, value, "a finite number")
        case list():
            for entry in value:
                check_json(entry, where, depth + 1)
        case dict():
            for key, entry in value.items():
                _check(isinstance(key, str) and _is_unicode(key), where, key, "texts as keys")
                check_json(entry, f"{where}.{key}"[:KEY_LIMIT], depth + 1)
        case _:
            _check(False, where, value, "what JSON can hold")


def _hashes(tensors: Mapping[str, Encoded], every: Iterable[Encoded]) -> Collection[str]:
    if isinstance(tensors, CheckedTensors):
        return tensors.hashes
    return {tensor_of(reference) for encoded in every for reference in encoded.parts.values()}


def _is_unicode(text: str) -> bool:
    """Not so where half of a surrogate pair stands alone."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_identifier(text: object) -> bool:
    return isinstance(text, str) and _looks_like_identifier(text)


@lru_cache(maxsize=1024)
def _looks_like_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


def _check(fits: bool, where: str, found: object, wanted: str) -> None:
    if not fits:
        raise FleetError(f"{where}: found {reprlib.repr(found)}, wanted {wanted}")


def check_keys(mapping: object, where: str, kind: type) -> None:
    """The names of tensors or modules, and that what they map to is of `kind`."""
    if isinstance(mapping, CheckedTensors):
        return
    if not isinstance(mapping, Mapping):
        raise FleetError(f"{where}: found {reprlib.repr(mapping)}, wanted an object")
    for key, value in mapping.items():
        fits = isinstance(key, str) and 0 < len(key) <= KEY_LIMIT and key.isprintable()
        if not fits or key == "__metadata__":
            raise FleetError(f"{where}: found the name {reprlib.repr(key)}, wanted a tensor's name")
        _check(isinstance(value, kind), f"{where}.{key}", value, f"an {kind.__name__}")


def fields_of(content: object, wanted: set[str], optional: set[str]) -> dict[str, Any]:
    """`content` as an object that has the wanted keys, and no others than these."""
    if not isinstance(content, dict):
        raise FleetError(f"found {reprlib.repr(content)}, wanted an object")
    if not wanted <= content.keys() <= wanted | optional:
        raise FleetError(
            f"found an object with {reprlib.repr(sorted(map(str, content)))}, wanted one with "
            f"{sorted(wanted)}"
        )
    return content


def mapping_of(content: object, where: str, read: Callable[[object], Value]) -> dict[str, Value]:
    if not isinstance(content, dict):
        raise FleetError(f"{where}: found {reprlib.repr(content)}, wanted an object")
    found = {}
    for key, entry in content.items():
        try:
            found[sys.intern(key)] = read(entry)
        except FleetError as error:
            raise FleetError(f"{where}.{reprlib.repr(key)}: {error}") from error
    return found


def _parts(content: object) -> dict[str, str]:
    """Names and hashes as texts; many records have the same ones, each is kept once."""
    if not isinstance(content, dict):
        raise FleetError(f"parts: found {reprlib.repr(content)}, wanted an object")
    for reference in content.values():
        if not isinstance(reference, str):
            _refuse_reference(reference)
    return {sys.intern(part): sys.intern(found) for part, found in content.items()}


def _refuse_reference(found: object) -> NoReturn:
    raise FleetError(f"parts: found {reprlib.repr(found)}, wanted a SHA-256 in 64 hex digits")


def _to_json(tensors: Mapping[str, Encoded]) -> dict[str, Any]:
    return {name: encoded.to_json() for name, encoded in tensors.items()}
