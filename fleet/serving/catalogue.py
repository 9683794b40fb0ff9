"""What each variant of a store owns, as the model takes it: one snapshot of the store."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.bound import ACTIVATIONS, Adapter, BoundModel
from fleet.serving.owned import LowRank, Own
from fleet.serving.reading import PartsUnit, aligned
from fleet.serving.slots import Tensors, Unit
from fleet.storage.encodings import ENCODINGS, Encoding, encoding_named
from fleet.storage.objects import Packs
from fleet.storage.records import BASE, Encoded, Node, Variant
from fleet.variants import Store

Held = Mapping[Hashable, Tensors]
_serials = count()


@dataclass
class ValuesUnit:
    """Values that are decoded when they are fetched: a node's, or those of a variant.

    `chains` says of each tensor of the model what is over the base's, whose value is `base` or, by
    its hash, to be read; the values are cast to the dtypes of the tensors that they are `like`.
    """

    key: Hashable
    packs: Packs
    chains: Mapping[str, Sequence[Encoded]]
    base: Mapping[str, Tensor | str]
    like: Mapping[str, Tensor]
    nbytes: int

    def load(self, slot: Tensor) -> tuple[Tensors, int]:
        """Read what they are made of, and decode it tensor by tensor."""
        tensors: Tensors = {}
        start = read = 0
        for name, chain in self.chains.items():
            value = self.base.get(name)
            if isinstance(value, str):
                value = self.packs.read(value)
                read += value.nbytes
            for encoded in chain:
                parts = self.packs.read_many(encoded.parts.values())
                read += sum(tensor.nbytes for tensor in parts.values())
                named = {part: parts[digest] for part, digest in encoded.parts.items()}
                value = encoding_named(encoded.encoding).decode(named, encoded.settings, value)
            like = self.like[name]
            if value is None or value.shape != like.shape:
                found = None if value is None else list(value.shape)
                raise FleetError(f"{name!r} is {found}, wanted {list(like.shape)}, as in the base")
            stop = start + like.nbytes
            tensors[name] = slot[start:stop].view(like.dtype).view(like.shape).copy_(value)
            start += aligned(like.nbytes)
        return tensors, read


class Tenant:
    """A variant: the units it needs in memory, and what it owns once they are there.

    `key` orders a batch: tenants of one node lie together. Raises FleetError for tensors and
    modules that the model has not.
    """

    def __init__(
        self, variant: Variant, nodes: Sequence[Node], bound: BoundModel, catalogue: Catalogue
    ) -> None:
        self.variant = variant
        self.key = (*(node.name for node in nodes), variant.name)
        self._bound = bound
        self._values_of: dict[str, Unit] = {}
        for node in nodes:
            unit = catalogue.node_unit(node)
            self._values_of.update({bound.first_name(name): unit for name in node.tensors})
        self._encoded = self._by_first_name(variant.tensors)
        self._check_adapters()
        units: list[Unit] = []
        decoded = [n for n, e in self._encoded.items() if catalogue.decodes(n, e)]
        if decoded:
            chains = {name: [self._encoded.pop(name)] for name in decoded}
            units.append(catalogue.values_unit(("variant", next(_serials)), nodes, chains))
            self._values_of.update(dict.fromkeys(decoded, units[0]))
        own, shared = self._hashes()
        self._part_of: dict[str, Hashable] = {}
        if own:
            units.append(PartsUnit(("variant", next(_serials)), catalogue.packs, own))
            self._part_of.update(dict.fromkeys(own, units[-1].key))
        for digest in shared:
            units.append(catalogue.shared_unit(digest))
            self._part_of[digest] = units[-1].key
        needed = {unit.key: unit for unit in (*units, *self._values_of.values())}
        self.units: Sequence[Unit] = list(needed.values())

    def owns(self, held: Held) -> dict[str, Own]:
        """Its values, and its node's, from the units' tensors."""
        owns = {
            name: Own(held[unit.key][name])
            for name, unit in self._values_of.items()
            if name not in self._encoded
        }
        for name, encoded in self._encoded.items():
            owns[name] = self._own(name, encoded, held)
        return owns

    def adapters(self, held: Held) -> dict[str, Adapter]:
        """Its adapters by module."""
        return {
            module: Adapter(
                **self._parts(encoded, held), activation=str(encoded.settings["activation"])
            )
            for module, encoded in self.variant.adapters.items()
        }

    def _own(self, name: str, encoded: Encoded, held: Held) -> Own:
        base, encoding = self._bound.base[name], encoding_named(encoded.encoding)
        parts = self._parts(encoded, held)
        if encoding.name == "plain":
            value = parts["value"].to(base.dtype)
            return Own(value, shape=None if value.shape == base.shape else value.shape)
        unit = self._values_of.get(name)
        value = None if unit is None else held[unit.key][name]
        if _is_product(encoding, base):
            scale = float(encoded.settings["scale"])
            return Own(value, LowRank(parts["down"], parts["up"], scale))
        stored = self._bound.stored_dtypes[name]
        return Own(value, decode=partial(_decoded, encoding, parts, encoded.settings, stored))

    def _parts(self, encoded: Encoded, held: Held) -> dict[str, Tensor]:
        return {part: held[self._part_of[d]][d] for part, d in encoded.parts.items()}

    def _by_first_name(self, tensors: Mapping[str, Encoded]) -> dict[str, Encoded]:
        found: dict[str, Encoded] = {}
        for name, encoded in tensors.items():
            first = self._bound.first_name(name)
            if found.setdefault(first, encoded) != encoded:
                raise FleetError(
                    f"{name!r} and {first!r} are one tensor in the model, but differ here"
                )
        # Batch normalisation counts its batches while it is trained, and looks at them only then.
        return {n: e for n, e in found.items() if not n.endswith("num_batches_tracked")}

    def _check_adapters(self) -> None:
        modules = self._bound.modules
        for module, encoded in self.variant.adapters.items():
            if module not in modules:
                near = get_close_matches(module, modules, n=1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise FleetError(f"adapts the module {module!r}, which the model has not{hint}")
            activation = encoded.settings.get("activation")
            if activation not in ACTIVATIONS:
                raise FleetError(
                    f"its adapter after {module!r} has the activation {activation!r}, wanted "
                    f"{' or '.join(ACTIVATIONS)}"
                )

    def _hashes(self) -> tuple[list[str], list[str]]:
        """The tensors that are the variant's own, and those that several refer to."""
        own: dict[str, None] = {}
        shared: dict[str, None] = {}
        for encoded in (*self._encoded.values(), *self.variant.adapters.values()):
            encoding = ENCODINGS.get(encoded.encoding)
            for part, digest in encoded.parts.items():
                several = encoding is not None and part in encoding.shared
                (shared if several else own)[digest] = None
        return [digest for digest in own if digest not in shared], list(shared)


class Catalogue:
    """The tenants of a store as of some moment; what did not change since the last one stays.

    With `decoded`, what can only be computed with as a whole is decoded when it is fetched.
    """

    def __init__(
        self,
        store: Store,
        bound: BoundModel,
        before: Catalogue | None = None,
        *,
        decoded: bool = False,
    ) -> None:
        self.packs = store.packs
        self._decoded = decoded
        # In this order: what a variant is made from is there before it, and goes after it.
        self.version = store.version
        self.variants = store.variants
        self.nodes = store.nodes
        self._bound = bound
        self._where = store.folder
        self._building = threading.RLock()
        self._stored = {
            bound.first_name(name): encoded.parts["value"]
            for name, encoded in store.base.tensors.items()
        }
        self._node_units: dict[str, ValuesUnit] = {}
        self._shared_units: dict[str, PartsUnit] = {}
        self._tenants: dict[str, Tenant] = {}
        if before is not None:
            self._keep(before)

    def _keep(self, before: Catalogue) -> None:
        """Take over what did not change. A node's parent is never another one."""
        with before._building:
            units, tenants = dict(before._node_units), dict(before._tenants)
            self._shared_units = dict(before._shared_units)
        same = {name for name, node in before.nodes.items() if self.nodes.get(name) is node}
        self._node_units = {name: unit for name, unit in units.items() if name in same}
        self._tenants = {
            name: tenant
            for name, tenant in tenants.items()
            if self.variants.get(name) is tenant.variant and tenant.variant.node in same
        }

    def tenant(self, name: object) -> Tenant:
        """The tenant of that name; FleetError with the nearest names for an unknown one."""
        if not isinstance(name, str) or name not in self.variants:
            near = get_close_matches(name, self.variants, n=3) if isinstance(name, str) else []
            hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
            raise FleetError(f"no tenant is called {name!r}, of {len(self.variants)}{hint}")
        found = self._tenants.get(name)
        if found is None:
            with self._building:
                found = self._tenants.get(name) or self._built(self.variants[name])
                self._tenants[name] = found
        return found

    def _built(self, variant: Variant) -> Tenant:
        try:
            return Tenant(variant, self._path(variant.node), self._bound, self)
        except FleetError as error:
            raise FleetError(f"{self._where}: variant {variant.name!r}: {error}") from error

    def known_units(self) -> set[Hashable]:
        """The keys of the units of the tenants that were asked for, of this state or before."""
        with self._building:
            units = {unit.key for tenant in self._tenants.values() for unit in tenant.units}
        return units | {unit.key for unit in self._node_units.values()}

    def owned(self) -> tuple[set[str], set[str]]:
        """The tensors of which some variant or node has a value of its own, and the modules that
        some variant adapts."""
        named: set[str] = set()
        for record in (*self.variants.values(), *self.nodes.values()):
            if record.name != BASE or isinstance(record, Variant):
                named.update(record.tensors)
        modules = {m for variant in self.variants.values() for m in variant.adapters}
        return {self._bound.firsts.get(name, name) for name in named}, modules

    def decodes(self, name: str, encoded: Encoded) -> bool:
        """Whether a variant's tensor is decoded when it is fetched."""
        encoding = encoding_named(encoded.encoding)
        product = _is_product(encoding, self._bound.base[name])
        return self._decoded and encoding.name != "plain" and not product

    def node_unit(self, node: Node) -> ValuesUnit:
        """The unit of a node's values."""
        if node.name not in self._node_units:
            *above, last = self._path(node.name)
            chains = {self._bound.first_name(n): [e] for n, e in last.tensors.items()}
            unit = self.values_unit(("node", next(_serials)), above, chains)
            self._node_units[node.name] = unit
        return self._node_units[node.name]

    def values_unit(
        self, key: Hashable, above: Sequence[Node], last: Mapping[str, Sequence[Encoded]]
    ) -> ValuesUnit:
        """The unit of values that `last` makes of those of the nodes above."""
        levels = [
            {self._bound.first_name(name): encoded for name, encoded in node.tensors.items()}
            for node in above
        ]
        chains = {
            name: [*(level[name] for level in levels if name in level), *own]
            for name, own in last.items()
        }
        bases = {name: self._bound.base[name] for name in chains}
        return ValuesUnit(
            key,
            self.packs,
            chains,
            {name: self._start(name) for name in chains if name in self._stored},
            bases,
            sum(aligned(base.nbytes) for base in bases.values()),
        )

    def _start(self, name: str) -> Tensor | str:
        """The base's value as it is stored, or its hash where the model has it otherwise."""
        mine = self._bound.base[name]
        as_stored = mine.dtype == self._bound.stored_dtypes[name] and mine.device.type == "cpu"
        return mine if as_stored else self._stored[name]

    def shared_unit(self, digest: str) -> PartsUnit:
        """The unit of one tensor that several variants refer to."""
        if digest not in self._shared_units:
            self._shared_units[digest] = PartsUnit(("shared", digest), self.packs, [digest])
        return self._shared_units[digest]

    def _path(self, node: str) -> list[Node]:
        """The nodes from the one below the base to `node`."""
        path: list[Node] = []
        here: str | None = node
        while here is not None and here != BASE:
            if here not in self.nodes:
                raise FleetError(f"its node {here!r} was removed meanwhile; refresh")
            path.append(self.nodes[here])
            here = path[-1].parent
        return path[::-1]


def _is_product(encoding: Encoding, base: Tensor) -> bool:
    """Whether rows can be multiplied with what is stored, without the decoded tensor."""
    return encoding.product == "low_rank" and base.dim() == 2


def _decoded(
    encoding: Encoding,
    parts: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    stored: torch.dtype,
    parent: Tensor,
) -> Tensor:
    return encoding.decode(parts, settings, parent.to(stored)).to(parent.dtype)
