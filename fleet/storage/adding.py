"""New nodes and variants of a store: checked, then written in groups, a pack and a line each."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.bundling import bundled
from fleet.storage.decoding import (
    BOTTLENECK,
    BOTTLENECK_PARTS,
    Decoder,
    chains_of,
    check_bottleneck,
)
from fleet.storage.journal import Given, Journal
from fleet.storage.patterns import pattern_text, patterns_of, records_json
from fleet.storage.records import Encoded, Node, Variant

# Variants that are added together are written so many, or so many bytes, at a time, and after so
# long: a process that is killed then loses what waits.
GROUP_VARIANTS = 64
GROUP_BYTES = 16 << 20
GROUP_SECONDS = 2.0


def add_node(journal: Journal, decoder: Decoder, node: Node, tensors: Given) -> None:
    """Add a node below one that is there, in a transaction; FleetError where it does not fit."""
    state, where = journal.state, f"{journal.folder}: node {node.name!r}"
    if node.parent is None or node.name in state.nodes:
        raise FleetError(f"{where}: is there already; give the new one another name")
    parents = chains_of([above.tensors for above in state.path(node.parent)])
    decoder.check(where, node.tensors, parents, tensors)
    _check_used(where, tensors, node.tensors.values())
    records, given = bundled({"tensors": node.tensors}, tensors)
    new: dict[str, tuple[int, Any]] = {}
    numbered = _by_number(journal, records["tensors"], {}, new)
    content = {"name": node.name, "parent": node.parent, **numbered}
    journal.write({"op": "node", **_said(new), "node": content}, given)


def add_variants(
    journal: Journal,
    decoder: Decoder,
    variants: Iterable[tuple[Variant, Given]],
    group_bytes: int,
) -> None:
    """Add variants one after the other, in a transaction; FleetError where one does not fit.

    They are taken one at a time and written in groups of about so many bytes. Where one does not
    fit, or taking the next one fails, those before it are added.
    """
    group: dict[str, tuple[Variant, dict[str, Tensor]]] = {}
    held_bytes, began = 0, time.monotonic()

    def write() -> None:
        nonlocal held_bytes, began
        _write_group(journal, group.values())
        group.clear()
        held_bytes, began = 0, time.monotonic()

    source = iter(variants)
    while True:
        try:
            taken = next(source, None)
            prepared = None if taken is None else _prepared(journal, decoder, *taken)
        except BaseException:
            write()
            raise
        if prepared is None:
            break
        name, nbytes = prepared[0].name, sum(t.nbytes for t in prepared[1].values())
        if held_bytes + nbytes > group_bytes or name in group:
            write()
        group[name] = prepared
        held_bytes += nbytes
        del taken, prepared  # their tensors go with the group, before the next ones come
        late = time.monotonic() - began > GROUP_SECONDS
        if held_bytes >= group_bytes or len(group) >= GROUP_VARIANTS or late:
            write()
    write()


def _prepared(
    journal: Journal, decoder: Decoder, variant: Variant, given: Given
) -> tuple[Variant, dict[str, Tensor]]:
    """A variant that fits, as it is stored."""
    where = f"{journal.folder}: variant {variant.name!r}"
    parents = chains_of([node.tensors for node in journal.state.path(variant.node)])
    decoder.check(where, variant.tensors, parents, given)
    for module, encoded in variant.adapters.items():
        if encoded.encoding != BOTTLENECK or encoded.parts.keys() != BOTTLENECK_PARTS:
            raise FleetError(
                f"{where}: adapters.{module}: found {encoded.encoding!r} of "
                f"{sorted(encoded.parts)}, wanted {BOTTLENECK!r} of "
                f"{sorted(BOTTLENECK_PARTS)}"
            )
        check_bottleneck(f"{where}: {module!r}", decoder.parts(encoded, given))
    _check_used(where, given, variant.encoded())
    try:
        kinds = {"tensors": variant.tensors, "adapters": variant.adapters}
        records, tensors = bundled(kinds, given)
    except FleetError as error:
        raise FleetError(f"{where}: {error}") from error
    return replace(variant, **records), tensors


def _write_group(journal: Journal, group: Iterable[tuple[Variant, Given]]) -> None:
    """Write variants of different names in one pack and one line."""
    new: dict[str, tuple[int, Any]] = {}
    tensors: dict[str, Tensor] = {}
    records = []
    for variant, given in group:
        records.append(
            {
                "name": variant.name,
                "node": variant.node,
                **_by_number(journal, variant.tensors, variant.adapters, new),
                "classes": variant.classes,
                "about": variant.about,
            }
        )
        tensors.update(given)
    if records:
        journal.write({"op": "variants", **_said(new), "variants": records}, tensors)


def _by_number(
    journal: Journal,
    tensors: Mapping[str, Encoded],
    adapters: Mapping[str, Encoded],
    new: dict[str, tuple[int, Any]],
) -> dict[str, Any]:
    """Records by the numbers of their patterns; `new` ones, by their text, get the next."""
    patterns, hashes, numbers = patterns_of(tensors, adapters)
    known, count = journal.state.patterns, journal.state.pattern_count
    places: list[int] = []
    for content in patterns:
        text = pattern_text(content)
        if text in known:
            places.append(known[text])
            continue
        number, _ = new.setdefault(text, (count + len(new), content))
        places.append(number)
    return records_json(places, hashes, numbers)


def _said(new: Mapping[str, tuple[int, Any]]) -> dict[str, Any]:
    """New patterns, in the order of their numbers."""
    return {"patterns": [content for _, content in new.values()]} if new else {}


def _check_used(where: str, given: Collection[str], refers: Iterable[Encoded]) -> None:
    unused = sorted(set(given) - {r for encoded in refers for r in encoded.parts.values()})
    if unused:
        raise FleetError(
            f"{where}: {len(unused)} given tensors are no part of it ({unused[0]}…); give only "
            "those that it refers to"
        )
