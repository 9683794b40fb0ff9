"""One variant, or one domain, as records and tensors over what the store has."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.adapter_folder import EMBEDDING, LAYER, TRANSPOSED
from fleet.storage.adding import GROUP_BYTES
from fleet.storage.choosing import Choice, choose
from fleet.storage.config import HowToStore
from fleet.storage.decoding import Decoder
from fleet.storage.domains import Domain
from fleet.storage.encodings import ENCODINGS, MergedVector, delta_of, same_bits
from fleet.storage.hashes import tensor_hash
from fleet.storage.records import BASE, Encoded
from fleet.storage.zoo import Zoo
from fleet.variants import Store
from inputs.budget import format_bytes
from merge.adapters import Adapter, is_adapter, open_adapter
from merge.adapters.matching import is_transposed, match_names, transposed_leaves
from merge.checkpoints import Checkpoint, open_checkpoint

# Copies of a tensor that are alive while its encoding is searched, some in float64.
COPIES = 12
# What a node holds is kept so much closer than what is made from it.
NODE_SHARE = 0.5
# What it takes to say what a tensor is, beside its values.
RECORD_BYTES = 200
# Variants of a domain on which is tried out whether a node pays.
SAMPLE = 8


@dataclass
class Written:
    """Records of tensors, what they refer to by hash, and how far they are from the originals.

    `error` and `size` are sums of squares, of ŵ − w and of w − base.
    """

    records: dict[str, Encoded] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    nbytes: int = 0
    held_bytes: int = 0
    own_plain_bytes: int = 0
    error: float = 0.0
    size: float = 0.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.size) if self.size > 0 else 0.0

    def take(self, key: str, choice: Choice, plain_bytes: int) -> None:
        self.error += choice.error**2
        if choice.encoding is None:
            return
        hashes = {part: tensor_hash(tensor) for part, tensor in choice.parts.items()}
        self.records[key] = Encoded(choice.encoding, hashes, choice.settings)
        for part, tensor in choice.parts.items():
            if hashes[part] not in self.tensors:
                self.tensors[hashes[part]] = tensor
                self.held_bytes += tensor.nbytes
        self.nbytes += choice.nbytes
        values = choice.parts["values"].nbytes if choice.encoding == "changed" else plain_bytes
        self.own_plain_bytes += values


class Writer:
    """Makes records for the variants of a zoo over the nodes of a store, tensor by tensor.

    At most a few copies of one tensor are in memory, and what is to be stored of one variant.
    Raises FleetError where the budget does not hold that.
    """

    def __init__(self, store: Store, zoo: Zoo, how: HowToStore) -> None:
        self.store, self.zoo, self.how = store, zoo, how
        self._allowed = tuple(how.encodings or ENCODINGS)
        self._decoder = Decoder(store.packs)
        self._room = self.check_budget(zoo, how)
        # Variants that wait to be written together.
        self.group_bytes = min(GROUP_BYTES, self._room // 4)
        self._values: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._values_bytes = 0

    @staticmethod
    def check_budget(zoo: Zoo, how: HowToStore) -> int:
        """The bytes that the budget leaves for what is to be stored; FleetError if none."""
        largest = max(info.nbytes for info in zoo.base.tensors.values())
        room = int(how.memory_budget) - COPIES * largest
        if room <= 0:
            raise FleetError(
                f"memory_budget: {format_bytes(int(how.memory_budget))} is too little, wanted "
                f"{format_bytes((COPIES + 1) * largest)}: {COPIES} times the largest tensor "
                f"({format_bytes(largest)}), and what one variant keeps"
            )
        return room

    def value(self, node: str, key: str) -> Shaped[Tensor, ...]:
        """A tensor of a node, decoded; not to be changed: the latest are kept."""
        found = self._values.pop((node, key), None)
        if found is None:
            found = self.store.node_tensor(node, key)
            self._values_bytes += found.nbytes
        self._values[node, key] = found
        while self._values_bytes > self._room // 4:
            _, dropped = self._values.popitem(last=False)
            self._values_bytes -= dropped.nbytes
        return found

    def variant(
        self,
        name: str,
        node: str,
        tolerance: float,
        unified: Mapping[str, Float[Tensor, ...]] | None = None,
    ) -> Written:
        """A variant over `node`, every tensor within `tolerance` of its difference to the base."""
        written = Written()
        given = self._factors(name) if is_adapter(self.zoo.paths[name]) else {}
        checkpoint = self.zoo.open(name)
        for key, info in checkpoint.tensors.items():
            if key in given:
                written.take(key, given[key], info.nbytes)
                continue
            value = checkpoint.read(key)
            choice = self._chosen(key, value, node, tolerance, (unified or {}).get(key), written)
            written.take(key, choice, info.nbytes)
            if written.held_bytes > self._room // 2:
                raise FleetError(
                    f"memory_budget: {format_bytes(int(self.how.memory_budget))} does not hold "
                    f"twice what variant {name!r} keeps up to {key!r} "
                    f"({format_bytes(written.held_bytes)}); raise it, or widen the tolerance"
                )
        return written

    def decoded(self, name: str, node: str, written: Written) -> dict[str, Shaped[Tensor, ...]]:
        """Every tensor of a variant as the store would give it."""
        found: dict[str, Tensor] = {}
        for key in self.zoo.open(name).tensors:
            encoded = written.records.get(key)
            parent = self.value(node, key) if key in self.zoo.base.tensors else None
            if encoded is not None and encoded.encoding == "plain":
                parent = None
            if encoded is not None:
                parent = self._decoder.value(key, [encoded], written.tensors, parent=parent)
            assert parent is not None
            found[key] = parent
        return found

    def node(
        self,
        domain: Domain,
        tolerance: float,
        *,
        direct: Sequence[str],
        checkpoint: str | Path | None = None,
    ) -> tuple[Written, dict[str, Tensor]]:
        """What a domain's node holds, and of other tensors the merged vectors for its variants.

        The mean of the variants below it, or the `checkpoint`, where that costs fewer bytes with
        what the variants keep over it than without, as tried on a few of them. With tolerance 0,
        what all of them have alike, bit for bit. `direct` are the variants whose own node it is.
        """
        written, merged = Written(), {}
        if checkpoint is not None:
            with open_checkpoint(checkpoint, names=self.zoo.base.tensors) as given:
                for key in self.zoo.comparable():
                    if key in given.tensors and self._fits(given, key):
                        choice = self._of_node(domain, key, given.read(key), tolerance)
                        written.take(key, choice, choice.nbytes)
            return written, {}
        if tolerance == 0:
            for keys in self._blocks(8):
                for key, value in self._alike(domain, keys).items():
                    parent, allowed = self.value(domain.parent, key), self._without_emr()
                    choice = choose(value, parent, 0.0, allowed=allowed)
                    written.take(key, choice, choice.nbytes)
            return written, {}
        held = 0
        for keys in self._blocks(48):
            means, vectors = self._summed(domain, keys, direct)
            for key in keys:
                vector = vectors.get(key)
                if vector is not None and held + vector.nbytes > self._room // 4:
                    vector = None
                choice, vector = self._shared(domain, key, tolerance, direct, means[key], vector)
                if vector is not None:
                    merged[key] = vector
                    held += vector.nbytes
                written.take(key, choice, choice.nbytes)
        return written, merged

    # --- one tensor ---

    def _chosen(
        self,
        key: str,
        value: Tensor,
        node: str,
        tolerance: float,
        unified: Tensor | None,
        written: Written,
    ) -> Choice:
        if key not in self.zoo.base.tensors:
            return choose(value, None, tolerance)
        base = self.value(BASE, key)
        parent = base if node == BASE else self.value(node, key)
        size = _distance(value, base)
        if size is not None:
            written.size += size**2
        without = self.how.leave_out
        if "general" in without and same_bits(value, parent):
            return choose(value, None, 0.0)
        if "task" in without:
            return choose(value, parent, 0.0, allowed=["plain"])
        return choose(value, parent, tolerance, size=size, allowed=self._allowed, unified=unified)

    def _blocks(self, bytes_each: int) -> Iterator[list[str]]:
        """The comparable tensors, so many at a time as half the room holds: a file that is opened
        is read for all of them."""
        block: list[str] = []
        room = self._room // 2
        for key in self.zoo.comparable():
            size = bytes_each * self.zoo.base.tensors[key].numel
            if block and size > room:
                yield block
                block, room = [], self._room // 2
            block.append(key)
            room -= size
        if block:
            yield block

    def _alike(self, domain: Domain, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors that all variants of a domain have alike, bit for bit."""
        first, *others = domain.variants
        found = {key: self.zoo.open(first).read(key) for key in keys}
        for other in others:
            checkpoint = self.zoo.open(other)
            found = {k: value for k, value in found.items() if same_bits(checkpoint.read(k), value)}
            if not found:
                break
        return found

    def _summed(
        self, domain: Domain, keys: Sequence[str], direct: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each tensor the mean over a domain, and the merged vector of the `direct` variants if
        there are several, and masks of it are allowed."""
        base = self.zoo.base.tensors
        totals = {key: torch.zeros(base[key].shape, dtype=torch.float64) for key in keys}
        masked = "emr" in self._allowed and len(direct) > 1
        vectors = {key: MergedVector() for key in keys if masked}
        own = set(direct)
        for name in domain.variants:
            checkpoint = self.zoo.open(name)
            for key in keys:
                value = checkpoint.read(key)
                totals[key] += value
                if masked and name in own:
                    vectors[key].add(delta_of(value, self.value(domain.parent, key)))
        count = len(domain.variants)
        means = {key: (total / count).to(base[key].dtype) for key, total in totals.items()}
        return means, {key: v.value().to(torch.bfloat16) for key, v in vectors.items()}

    def _of_node(self, domain: Domain, key: str, value: Tensor, tolerance: float) -> Choice:
        size = _distance(value, self.value(BASE, key))
        parent = self.value(domain.parent, key)
        allowed = self._without_emr()
        return choose(value, parent, tolerance * NODE_SHARE, size=size, allowed=allowed)

    def _shared(
        self,
        domain: Domain,
        key: str,
        tolerance: float,
        direct: Collection[str],
        mean: Tensor,
        vector: Tensor | None,
    ) -> tuple[Choice, Tensor | None]:
        """The node's own tensor, or the merged vector, or neither."""
        base, parent = self.value(BASE, key), self.value(domain.parent, key)
        own = self._of_node(domain, key, mean, tolerance)
        if own.encoding is None or not bool(mean.isfinite().all()):
            return Choice(None), None
        centre = ENCODINGS[own.encoding].decode(own.parts, own.settings, parent)
        sample = _spread(domain.variants)
        # Bytes of all variants: of each over the parent, over the mean, with the merged vector.
        plainly, centred = 0.0, float(own.nbytes + RECORD_BYTES)
        masked = math.inf if vector is None else float(vector.nbytes + RECORD_BYTES)
        for name in sample:
            value = self.zoo.open(name).read(key)
            weight = len(domain.variants) / len(sample)
            size, allowed = _distance(value, base), self._without_emr()
            over_parent = choose(value, parent, tolerance, size=size, allowed=allowed).nbytes
            over_mean = choose(value, centre, tolerance, size=size, allowed=allowed).nbytes
            over_both = over_parent
            if vector is not None and name in direct:
                over_both = choose(
                    value, parent, tolerance, size=size, allowed=self._allowed, unified=vector
                ).nbytes
            plainly += over_parent * weight
            centred += over_mean * weight
            masked += over_both * weight
        if plainly <= min(centred, masked):
            return Choice(None), None
        return (own, None) if centred <= masked else (Choice(None), vector)

    def _without_emr(self) -> Collection[str]:
        return [name for name in self._allowed if name != "emr"]

    def _fits(self, checkpoint: Checkpoint, key: str) -> bool:
        mine, theirs = self.zoo.base.tensors[key], checkpoint.tensors[key]
        return (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)

    def _factors(self, name: str) -> dict[str, Choice]:
        """What an adapter adds to weights of the base, as it has it."""
        with open_adapter(self.zoo.paths[name]) as adapter:
            renamed = match_names(self.zoo.base, adapter)
            leaves = transposed_leaves(self.zoo.base)
            found: dict[str, Choice] = {}
            for module in adapter.modules.values():
                key = renamed(f"{module.name}.weight")
                if f"{module.name}.weight" in adapter.saved:
                    continue  # the weight under the factors is the adapter's own: read whole
                info = self.zoo.base.tensors[key]
                crossed = is_transposed(self.zoo.base, adapter, module, info, leaves)
                b, a = adapter.factors(module.name, dtype=_stored_dtype(adapter, module.a))
                up, down = (a.T, b.T) if crossed else (b, a)
                settings: dict[str, Any] = {"scale": module.scaling}
                if crossed:
                    settings[LAYER] = EMBEDDING if module.kind == EMBEDDING else TRANSPOSED
                parts = {"up": up.contiguous(), "down": down.contiguous()}
                nbytes = ENCODINGS["low_rank"].nbytes(parts)
                found[key] = Choice("low_rank", parts, settings, nbytes)
        return found


def _stored_dtype(adapter: Adapter, factor: str) -> torch.dtype:
    return adapter.checkpoint.tensors[factor].dtype


def _distance(value: Tensor, base: Tensor) -> float | None:
    """‖value − base‖; None where there is no such number."""
    if value.shape != base.shape or not value.is_floating_point() or value.dtype.itemsize < 2:
        return None
    found = float(torch.linalg.vector_norm(delta_of(value, base), dtype=torch.float64))
    return found if math.isfinite(found) else None


def _spread(names: Sequence[str]) -> list[str]:
    """A few of the names, evenly spread."""
    count = min(len(names), SAMPLE)
    return [names[k * len(names) // count] for k in range(count)]
