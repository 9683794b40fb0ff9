"""Variants of a store as tensors: decoded, as they are stored, or written as a checkpoint again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.decoding import Chain, Decoder, chains_of
from fleet.storage.journal import Journal
from fleet.storage.records import Node, Variant
from merge.checkpoints.writer import CheckpointWriter


class Reader:
    """Reads what the variants and nodes that a journal sees are made of."""

    def __init__(self, journal: Journal, decoder: Decoder) -> None:
        self._journal = journal
        self._decoder = decoder
        self._folder, self._packs = journal.folder, journal.packs

    def tensors(self, name: str) -> dict[str, Shaped[Tensor, ...]]:
        """Every tensor of a variant."""
        with self._reading(name) as chains:
            return {key: self._decoder.value(key, chain) for key, chain in chains.items()}

    def tensor(self, name: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a variant."""
        with self._reading(name) as chains:
            if key not in chains:
                raise FleetError(f"has no tensor {key!r}, it has {len(chains)} others")
            return self._decoder.value(key, chains[key])

    def node_tensor(self, node: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a node."""
        with self._journal.seen() as state:
            path = state.path(node)
        chain = chains_of([{key: n.tensors[key]} for n in path if key in n.tensors]).get(key)
        if chain is None:
            raise FleetError(f"{self._folder}: node {node!r} has no tensor {key!r}")
        return self._decoder.value(key, chain)

    def parts(self, name: str) -> dict[str, dict[str, Shaped[Tensor, ...]]]:
        """What is a variant's own, as it is stored: tensor (or adapted module) → part → values."""
        with self._journal.seen() as state:
            variant = state.variant(name)
        own = {**variant.tensors, **variant.adapters}
        with self._journal.superseded(variant):
            found = self._packs.read_many(d for e in own.values() for d in e.parts.values())
        return {
            key: {part: found[digest] for part, digest in encoded.parts.items()}
            for key, encoded in own.items()
        }

    def export(self, name: str, path: str | Path) -> None:
        """Write a variant as a safetensors checkpoint, tensor by tensor."""
        with self._journal.seen() as state:
            modules = sorted(state.variant(name).adapters)
        if modules:
            raise FleetError(
                f"{self._folder}: variant {name!r}: has bottleneck adapters after "
                f"{', '.join(map(repr, modules[:8]))}, which are no tensors of a checkpoint of the "
                "base's architecture; export it as an adapter, or serve it from the store"
            )
        with self._reading(name) as chains:
            infos = [self._decoder.info(key, chain) for key, chain in chains.items()]
            with CheckpointWriter(path, infos, metadata={"format": "pt"}) as writer:
                for key, chain in chains.items():
                    writer.write(key, self._decoder.value(key, chain))

    def verify(self) -> list[str]:
        """Every problem: each pack is read and hashed, each reference resolved."""
        self._journal.refresh()
        with self._journal.seen() as state:
            packs = list(self._packs.contents)
            records = [*state.nodes.values(), *state.variants.values()]
            problems = [problem for record in records for problem in self._unresolved(record)]
        for pack in packs:
            problems += self._packs.verify(pack)
        return problems

    def _unresolved(self, record: Node | Variant) -> Iterator[str]:
        what = f"{'node' if isinstance(record, Node) else 'variant'} {record.name!r}"
        own = dict(record.tensors)
        own.update(record.adapters if isinstance(record, Variant) else {})
        for key, encoded in own.items():
            for problem in self._decoder.unresolved(encoded):
                yield f"{self._folder}: {what}: {key!r}: {problem}"

    @contextmanager
    def _reading(self, name: str) -> Iterator[dict[str, Chain]]:
        """How each tensor of a variant is made; errors inside name the variant."""
        with self._journal.seen() as state:
            variant = state.variant(name)
            chains = chains_of(state.levels(variant))
        with self._journal.superseded(variant):
            try:
                yield chains
            except FleetError as error:
                raise FleetError(f"{self._folder}: variant {name!r}: {error}") from error
