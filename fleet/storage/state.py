"""What the lines of a manifest add up to: the base, nodes, variants and packs; no torch."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fleet.errors import FleetError
from fleet.storage.manifest import Line
from fleet.storage.patterns import Pattern, node_from_json, pattern_text, variant_from_json
from fleet.storage.records import BASE, Encoded, Node, Variant, check_json, check_name
from fleet.storage.references import is_hash

FORMAT = 1

Contents = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Change:
    """One line, checked: what it adds, replaces or takes away."""

    node: Node | None = None
    variants: tuple[Variant, ...] = ()
    patterns: tuple[tuple[str, Pattern], ...] = ()
    removed_variant: str | None = None
    removed_node: str | None = None
    packs: Contents = field(default_factory=dict)
    removed_packs: tuple[str, ...] = ()
    about: dict[str, Any] | None = None


class State:
    """The store as of some line; `nodes` and `variants` are snapshots that never change.

    `patterns` maps the text of each pattern to its number.
    Every node's parent is there before it and is never replaced, so that no circle can be.
    """

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.version = 0
        self.patterns: dict[str, int] = {}
        self._patterns: list[Pattern] = []
        self._nodes: dict[str, Node] = {}
        self._variants: dict[str, Variant] = {}
        self._nodes_seen: Mapping[str, Node] | None = None
        self._variants_seen: Mapping[str, Variant] | None = None

    @property
    def pattern_count(self) -> int:
        """The number that the next pattern gets."""
        return len(self._patterns)

    @property
    def nodes(self) -> Mapping[str, Node]:
        if self._nodes_seen is None:
            self._nodes_seen = MappingProxyType(dict(self._nodes))
        return self._nodes_seen

    @property
    def variants(self) -> Mapping[str, Variant]:
        if self._variants_seen is None:
            self._variants_seen = MappingProxyType(dict(self._variants))
        return self._variants_seen

    def copy(self) -> State:
        """The state as it is now, whatever becomes of this one."""
        copied = State()
        copied.about, copied.version = self.about, self.version
        copied.patterns, copied._patterns = dict(self.patterns), list(self._patterns)
        copied._nodes, copied._nodes_seen = dict(self._nodes), self._nodes_seen
        copied._variants, copied._variants_seen = dict(self._variants), self._variants_seen
        return copied

    def variant(self, name: str) -> Variant:
        """The variant of that name; FleetError with the nearest one."""
        return _named(name, self._variants, "variant")

    def node(self, name: str) -> Node:
        """The node of that name; FleetError with the nearest one."""
        return _named(name, self._nodes, "node")

    def path(self, node: str) -> list[Node]:
        """The nodes from the base to `node`."""
        found = [self.node(node)]
        while (parent := found[-1].parent) is not None:
            found.append(self._nodes[parent])
        return found[::-1]

    def levels(self, variant: Variant) -> list[Mapping[str, Encoded]]:
        """What each level says of its tensors, from the base to the variant."""
        return [*(node.tensors for node in self.path(variant.node)), variant.tensors]

    def hashes(self) -> set[str]:
        """Every tensor that the base, a node or a variant refers to."""
        every = (*self._nodes.values(), *self._variants.values())
        return {digest for record in every for digest in record.hashes()}

    def needing(self, digests: Iterable[str]) -> list[str]:
        """The names of the variants that cannot be made without these tensors, sorted."""
        wanted = set(digests)
        broken = {
            name for name, node in self._nodes.items() if not wanted.isdisjoint(node.hashes())
        }
        below = {n for n in self._nodes if any(node.name in broken for node in self.path(n))}
        return sorted(
            variant.name
            for variant in self._variants.values()
            if variant.node in below or not wanted.isdisjoint(variant.hashes())
        )

    def checked(self, content: Mapping[str, Any]) -> Change:
        """What a record says, if it can follow what is there; else FleetError."""
        op = content.get("op")
        if not isinstance(op, str) or op not in _KEYS:
            raise FleetError(
                f"found the operation {reprlib.repr(op)}, wanted one of "
                f"{', '.join(_KEYS)}; a newer version of this program may have written it"
            )
        wanted, optional = _KEYS[op]
        keys = content.keys() - {"op"}
        if not wanted <= keys <= wanted | optional:
            raise FleetError(
                f"{op}: found the keys {reprlib.repr(sorted(keys))}, wanted {sorted(wanted)}"
            )
        if (self.version == 0) != (op == BASE):
            raise FleetError(f"{op}: a manifest has its base in its first line, and there alone")
        packs = _contents(content.get("packs", {}))
        match op:
            case "base":
                return self._checked_base(content, packs)
            case "node":
                return self._checked_node(content, packs)
            case "variants":
                return self._checked_variants(content, packs)
            case "remove":
                return self._checked_removal(content)
            case _:
                removed = content["removed"]
                if not isinstance(removed, list) or not all(map(is_hash, removed)):
                    raise FleetError(f"gc: found {reprlib.repr(removed)}, wanted a list of hashes")
                return Change(packs=packs, removed_packs=tuple(removed))

    def take(self, change: Change) -> None:
        """Have a checked change done."""
        if change.about is not None:
            self.about = change.about
        if change.node is not None:
            self._nodes[change.node.name] = change.node
        if change.removed_node is not None:
            del self._nodes[change.removed_node]
        for text, pattern in change.patterns:
            self.patterns[text] = len(self._patterns)
            self._patterns.append(pattern)
        self._variants.update({variant.name: variant for variant in change.variants})
        if change.removed_variant is not None:
            del self._variants[change.removed_variant]
        if change.node is not None or change.removed_node is not None:
            self._nodes_seen = None
        if change.variants or change.removed_variant is not None:
            self._variants_seen = None
        self.version += 1

    def _checked_base(self, content: Mapping[str, Any], packs: Contents) -> Change:
        if content["format"] != FORMAT:
            raise FleetError(
                f"the store has format {reprlib.repr(content['format'])}, this program reads "
                f"{FORMAT}; use the version that wrote it"
            )
        about = content["about"]
        if not isinstance(about, dict):
            raise FleetError(f"about: found {reprlib.repr(about)}, wanted an object")
        check_json(about, "about")
        node = Node.from_json(content["node"])
        if node.name != BASE:
            raise FleetError(f"the first line has the node {node.name!r}, wanted {BASE!r}")
        return Change(node=node, packs=packs, about=about)

    def _checked_variants(self, content: Mapping[str, Any], packs: Contents) -> Change:
        patterns, read = self._new_patterns(content)
        records = content["variants"]
        if not isinstance(records, list):
            raise FleetError(f"variants: found {reprlib.repr(records)}, wanted a list")
        variants = [variant_from_json(record, self._patterns, read) for record in records]
        for variant in variants:
            self.node(variant.node)
        return Change(variants=tuple(variants), patterns=patterns, packs=packs)

    def _checked_node(self, content: Mapping[str, Any], packs: Contents) -> Change:
        patterns, read = self._new_patterns(content)
        node = node_from_json(content["node"], self._patterns, read)
        if node.name in self._nodes:
            raise FleetError(
                f"node {node.name!r}: is there already, and what is made from it would change with "
                "it; give the new one another name"
            )
        self.node(str(node.parent))
        return Change(node=node, patterns=patterns, packs=packs)

    def _new_patterns(
        self, content: Mapping[str, Any]
    ) -> tuple[tuple[tuple[str, Pattern], ...], list[Pattern]]:
        new = content.get("patterns", [])
        if not isinstance(new, list):
            raise FleetError(f"patterns: found {reprlib.repr(new)}, wanted a list")
        read = [Pattern.from_json(pattern) for pattern in new]
        return tuple(zip(map(pattern_text, new), read, strict=True)), read

    def _checked_removal(self, content: Mapping[str, Any]) -> Change:
        match content.get("variant"), content.get("node"):
            case str(name), None:
                self.variant(name)
                return Change(removed_variant=name)
            case None, str(name):
                self.node(name)
                users = [f"variant {v.name!r}" for v in self._variants.values() if v.node == name]
                users += [f"node {n.name!r}" for n in self._nodes.values() if n.parent == name]
                if name == BASE or users:
                    used = users[0] if users else "the whole store"
                    raise FleetError(f"node {name!r}: is needed by {used}; remove that first")
                return Change(removed_node=name)
            case _:
                raise FleetError("remove: wanted the name of one variant or of one node")


# Operation → the keys that its record has, and those that it may have.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    BASE: ({"format", "about", "node", "packs"}, set()),
    "node": ({"node"}, {"patterns", "packs"}),
    "variants": ({"variants"}, {"patterns", "packs"}),
    "remove": (set(), {"variant", "node"}),
    "gc": ({"removed"}, {"packs"}),
}


def read_line(state: State, line: Line, where: str) -> Change:
    """What a line says; FleetError that names it."""
    try:
        return state.checked(line.content)
    except FleetError as error:
        raise FleetError(
            f"{where}: line {line.number}: {error}; put back a copy of the manifest, or keep the "
            "lines before this one (in a copy of the store)"
        ) from error


def _contents(packs: object) -> Contents:
    if not isinstance(packs, dict):
        raise FleetError(f"packs: found {reprlib.repr(packs)}, wanted an object")
    for pack, tensors in packs.items():
        fits = is_hash(pack) and isinstance(tensors, dict)
        if not fits or not all(
            is_hash(digest) and type(nbytes) is int and 0 <= nbytes < 1 << 63
            for digest, nbytes in tensors.items()
        ):
            raise FleetError(
                f"packs: found {reprlib.repr(pack)}: {reprlib.repr(tensors)}, wanted hashes of "
                "files, and for each the hashes of tensors and their bytes"
            )
    return {
        pack: {sys.intern(digest): nbytes for digest, nbytes in tensors.items()}
        for pack, tensors in packs.items()
    }


def _named(name: object, known: Mapping[str, Any], what: str) -> Any:
    check_name(name, f"a {what}")
    assert isinstance(name, str)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
        raise FleetError(f"the store has no {what} {name!r}, it has {len(known)}{hint}")
    return known[name]
