"""Many variants of one base in a folder: base, nodes of what several share, variants.

A store is a manifest (`fleet.storage.manifest`) and packs of tensors (`fleet.storage.objects`).
Whoever opens it reads; writers take turns. Killed at any moment it holds the old or the new state.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.adapter_folder import write_adapter_folder
from fleet.storage.bundling import bundled
from fleet.storage.collecting import batches, unneeded_packs
from fleet.storage.creating import MANIFEST_PART, PACK_BYTES, check_new, locked, write_base
from fleet.storage.decoding import (
    BOTTLENECK,
    BOTTLENECK_PARTS,
    Chain,
    Decoder,
    chains_of,
    check_filled,
    own_parts,
    plain_part,
)
from fleet.storage.disk import remove_files
from fleet.storage.manifest import MANIFEST_NAME, Manifest
from fleet.storage.objects import (
    Packs,
    Place,
    tensor_hash,
)
from fleet.storage.patterns import pattern_text, patterns_of, records_json
from fleet.storage.records import BASE, Encoded, Node, Variant
from fleet.storage.state import FORMAT, Change, State, read_line
from merge.checkpoints.tensors import Checkpoint
from merge.checkpoints.writer import CheckpointWriter

__all__ = [
    "Encoded",
    "Node",
    "Place",
    "Store",
    "SupersededError",
    "Variant",
    "tensor_hash",
]

PACKS_PER_LINE = 100_000
# Variants that are added together are written so many, or so many bytes, at a time, and after so
# long: a process that is killed then loses what waits.
GROUP_VARIANTS = 64
GROUP_BYTES = 16 << 20
GROUP_SECONDS = 2.0
# A pack of which less is needed is written anew.
NEEDED_SHARE = 0.5

Given = Mapping[str, Shaped[Tensor, "..."]]


class SupersededError(FleetError):
    """What was asked for was replaced or removed, and its tensors with it: refresh, ask again."""


class Store:
    """The store in `folder`; FleetError if there is none. Threads may read it at once.

    It is seen as of the last `refresh` (or own change): `nodes` and `variants` are snapshots that
    never change. `packs` reads single tensors by what records refer to them by. Where `gc` moved
    tensors meanwhile they are read from their new place.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.packs = Packs(self.folder, self._needing, self._catch_up)
        self._decoder = Decoder(self.packs)
        self._manifest = Manifest(self.folder)
        self._state = State()
        self._seen: State | None = None
        self._broken: FleetError | None = None
        self._seeing = threading.RLock()
        self._writing = threading.RLock()
        self._locked = False
        self.refresh()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        base: Mapping[str, Shaped[Tensor, ...]] | Checkpoint,
        *,
        about: Mapping[str, Any] | None = None,
    ) -> Store:
        """Make a store of a base in a new or empty folder, tensor by tensor.

        `about` is kept with it. Raises FleetError for a folder with other things in it, and for
        tensors that a store cannot hold; what fails leaves no store.
        """
        check_new(folder)
        home = Path(folder).resolve()
        home.mkdir(parents=True, exist_ok=True)
        with locked(home):
            check_new(folder)
            packs = Packs(home)
            try:
                node = write_base(packs, base, str(folder))
                Manifest.create(
                    home,
                    {
                        "op": BASE,
                        "format": FORMAT,
                        "about": dict(about or {}),
                        "node": node.to_json(),
                        "packs": packs.contents,
                    },
                )
            except BaseException:
                for pack in packs.contents:
                    packs.path(pack).unlink(missing_ok=True)
                raise
        return cls(folder)

    # --- what is there ---

    @property
    def base(self) -> Node:
        """The root: every tensor of the base."""
        return self.node(BASE)

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by name, the base among them."""
        with self._seeing:
            return self._view.nodes

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The variants by name."""
        with self._seeing:
            return self._view.variants

    @property
    def about(self) -> dict[str, Any]:
        """What was said of the base when the store was made."""
        with self._seeing:
            return self._view.about

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        with self._seeing:
            return self._view.version

    def refresh(self) -> bool:
        """Take up what others changed since; whether there was something.

        Raises FleetError for a manifest that was altered; what was seen before stays.
        """
        with self._seeing:
            before = self.version
            self._take_lines()
            self._seen = None
            return self._state.version != before

    def node(self, name: str) -> Node:
        """The node of that name; FleetError with the nearest one."""
        with self._seeing:
            return self._view.node(name)

    def variant(self, name: str) -> Variant:
        """The variant of that name; FleetError with the nearest ones."""
        with self._seeing:
            return self._view.variant(name)

    def path(self, name: str) -> list[Node]:
        """The nodes from the base to a variant's own."""
        with self._seeing:
            return self._view.path(self._view.variant(name).node)

    # --- reading ---

    def tensors(self, name: str) -> dict[str, Shaped[Tensor, ...]]:
        """Every tensor of a variant, decoded.

        Raises FleetError for an unknown name, and for a damaged file that this variant needs;
        SupersededError where the variant was replaced or removed, and `gc` was faster.
        """
        with self._reading(name) as chains:
            return {key: self._decoder.value(key, chain) for key, chain in chains.items()}

    def tensor(self, name: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a variant, decoded; FleetError as `tensors`."""
        with self._reading(name) as chains:
            if key not in chains:
                raise FleetError(f"has no tensor {key!r}, it has {len(chains)} others")
            return self._decoder.value(key, chains[key])

    def node_tensor(self, node: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a node, decoded; FleetError for unknown names, and as `tensors`."""
        with self._seeing:
            path = self._view.path(node)
        chain = chains_of([{key: n.tensors[key]} for n in path if key in n.tensors]).get(key)
        if chain is None:
            raise FleetError(f"{self.folder}: node {node!r} has no tensor {key!r}")
        return self._decoder.value(key, chain)

    def parts(self, name: str) -> dict[str, dict[str, Shaped[Tensor, ...]]]:
        """What is a variant's own, as it is stored: tensor (or adapted module) → part → values."""
        with self._seeing:
            variant = self._view.variant(name)
        own = {**variant.tensors, **variant.adapters}
        with self._superseded(variant):
            found = self.packs.read_many(d for e in own.values() for d in e.parts.values())
        return {
            key: {part: found[digest] for part, digest in encoded.parts.items()}
            for key, encoded in own.items()
        }

    def nbytes(self, name: str) -> int:
        """The bytes that are a variant's own; what several refer to counts for each of them."""
        with self._seeing:
            return sum(map(self.packs.nbytes, own_parts(self._view.variant(name))))

    def plain_bytes(self, name: str) -> int:
        """The bytes of a variant as a plain checkpoint."""
        with self._seeing:
            chains = chains_of(self._view.levels(self._view.variant(name)))
            return sum(self.packs.nbytes(plain_part(k, chain)) for k, chain in chains.items())

    def disk_bytes(self) -> int:
        """The bytes of all files of the store: what is needed, names, and what `gc` would free."""
        manifest = (self.folder / MANIFEST_NAME).stat().st_size
        return manifest + sum(self.packs.files().values())

    def export(self, name: str, path: str | Path) -> None:
        """Write a variant as a safetensors checkpoint, tensor by tensor.

        Bit for bit what was added where its encodings are exact. Raises FleetError as `tensors`,
        for bottleneck adapters, which no checkpoint holds, and for a place inside the store.
        """
        self._check_outside(path)
        with self._seeing:
            modules = sorted(self._view.variant(name).adapters)
        if modules:
            raise FleetError(
                f"{self.folder}: variant {name!r}: has bottleneck adapters after "
                f"{', '.join(map(repr, modules[:8]))}, which are no tensors of a checkpoint of the "
                "base's architecture; export it as an adapter, or serve it from the store"
            )
        with self._reading(name) as chains:
            infos = [self._decoder.info(key, chain) for key, chain in chains.items()]
            with CheckpointWriter(path, infos, metadata={"format": "pt"}) as writer:
                for key, chain in chains.items():
                    writer.write(key, self._decoder.value(key, chain))

    def export_adapter(self, name: str, path: str | Path, *, prefix: str = "") -> None:
        """Write what a variant has over the base into a new folder.

        A LoRA as PEFT reads it, each name with `prefix`, or bottleneck adapters
        (`fleet.storage.adapter_folder`). Raises FleetError as `tensors`, and for a variant that is
        more than that.
        """
        self._check_outside(path)
        write_adapter_folder(self, name, Path(path), prefix=prefix)

    def verify(self) -> list[str]:
        """Every problem: each pack is read and hashed, each reference resolved."""
        with self._seeing:
            self.refresh()
            packs = list(self.packs.contents)
            nodes, variants = self.nodes.values(), self.variants.values()
            problems = []
            for record in (*nodes, *variants):
                what = f"{'node' if isinstance(record, Node) else 'variant'} {record.name!r}"
                own = dict(record.tensors)
                own.update(record.adapters if isinstance(record, Variant) else {})
                for key, encoded in own.items():
                    for problem in self._decoder.unresolved(encoded):
                        problems.append(f"{self.folder}: {what}: {key!r}: {problem}")
        for pack in packs:
            problems += self.packs.verify(pack)
        return problems

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other writers out of several changes; each is seen by readers as it is made.

        Raises FleetError with the process that writes at the moment.
        """
        with self._writing:
            if self._locked:
                yield
                return
            with locked(self.folder):
                with self._seeing:
                    self.refresh()
                    self._manifest.cut_torn_line()
                self._locked = True
                try:
                    yield
                finally:
                    self._locked = False

    def add(self, variant: Variant, tensors: Given) -> None:
        """Add a variant, or replace the one of its name, at once and whole.

        `tensors` maps hashes to what `variant` refers to and the store may not have; small ones
        are stored together, and the record refers to pieces then. Each tensor is decoded before
        anything is written. Raises FleetError for what does not fit the node.
        """
        self.add_many([(variant, tensors)])

    def add_many(
        self, variants: Iterable[tuple[Variant, Given]], *, group_bytes: int = GROUP_BYTES
    ) -> None:
        """`add` one after the other, many to a pack and to a line: much quicker for thousands.

        They are taken one at a time and written in groups of about so many bytes; each group is
        seen at once and whole. Where one does not fit, or taking the next one fails, those before
        it are added.
        """
        with self.transaction():
            group: dict[str, tuple[Variant, dict[str, Tensor]]] = {}
            held_bytes, began = 0, time.monotonic()

            def write() -> None:
                nonlocal held_bytes, began
                self._add_group(group.values())
                group.clear()
                held_bytes, began = 0, time.monotonic()

            source = iter(variants)
            while True:
                try:
                    taken = next(source, None)
                    prepared = None if taken is None else self._prepared(*taken)
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

    def add_node(self, node: Node, tensors: Mapping[str, Shaped[Tensor, ...]]) -> None:
        """Add a node below one that is there; FleetError for a name that is taken, and as `add`."""
        with self.transaction():
            where = f"{self.folder}: node {node.name!r}"
            if node.parent is None or node.name in self._state.nodes:
                raise FleetError(f"{where}: is there already; give the new one another name")
            parents = chains_of([above.tensors for above in self._state.path(node.parent)])
            self._decoder.check(where, node.tensors, parents, tensors)
            _check_used(where, tensors, node.tensors.values())
            records, given = bundled({"tensors": node.tensors}, tensors)
            new: dict[str, tuple[int, Any]] = {}
            content = {
                "name": node.name,
                "parent": node.parent,
                **self._by_number(records["tensors"], {}, new),
            }
            self._write({"op": "node", **_said(new), "node": content}, given)

    def remove(self, name: str) -> None:
        """Remove a variant; `gc` frees its bytes. FleetError for an unknown name."""
        with self.transaction():
            self._commit({"op": "remove", "variant": name})

    def remove_node(self, name: str) -> None:
        """Remove a node that no variant and no node is made from; else FleetError."""
        with self.transaction():
            self._commit({"op": "remove", "node": name})

    def gc(self) -> int:
        """Remove packs of which nothing is needed, and what killed writers left; bytes freed.

        Packs of which less than NEEDED_SHARE is needed are written anew without the rest. Whoever
        reads what was removed or replaced before gets SupersededError from then on, and the new
        state after `refresh`. A damaged pack stays as it is: `verify` tells of it.
        """
        with self.transaction():
            files = self.packs.files()
            known = {self.packs.path(pack) for pack in self.packs.contents}
            # Leftovers first: on a full disk they make room for the line.
            left = {path: size for path, size in files.items() if path not in known}
            for entry in self.folder.iterdir():
                if (
                    MANIFEST_PART.fullmatch(entry.name)
                    and entry.is_file()
                    and not entry.is_symlink()
                ):
                    left[entry] = entry.stat().st_size
            remove_files(left)
            freed = sum(left.values())
            dead, sparse = unneeded_packs(self.packs, self._state.hashes(), NEEDED_SHARE)
            for first in range(0, len(dead), PACKS_PER_LINE):
                freed += self._replace_packs(dead[first : first + PACKS_PER_LINE], [])
            for packs, kept in batches(self.packs, sparse, PACK_BYTES):
                freed += self._replace_packs(packs, kept)
            return freed

    # --- parts of the above ---

    @property
    def _view(self) -> State:
        """What is seen: the state, unless tensors were looked for in a later one."""
        return self._state if self._seen is None else self._seen

    def _take_lines(self) -> bool:
        """Take up what the manifest says since; whether there was something."""
        if self._broken is not None:
            raise self._broken
        try:
            lines = self._manifest.read()
            for line in lines:
                self._take(read_line(self._state, line, str(self._manifest.path)))
        except BaseException as error:
            self._check_taken(error)
            raise
        return bool(lines)

    def _take(self, change: Change) -> None:
        self.packs.learn(change.packs)
        self.packs.forget(change.removed_packs)
        self._state.take(change)

    def _check_taken(self, error: BaseException) -> None:
        """Refuse to go on where a line is there, and an error came before all of it was taken."""
        if self._manifest.count > self._state.version and self._broken is None:
            interrupted = FleetError(
                f"{self.folder}: was interrupted, and what is seen is not what is there; open the "
                "store again"
            )
            self._broken = error if isinstance(error, FleetError) else interrupted

    def _catch_up(self) -> bool:
        """Take up where tensors are now, and nothing that is seen; whether there was something."""
        with self._seeing:
            if self._broken is not None or not self._manifest.has_more():
                return False
            if self._seen is None:
                self._seen = self._state.copy()
            return self._take_lines()

    def _needing(self, pack: str) -> list[str]:
        with self._seeing:
            return self._state.needing(self.packs.held_by(pack))

    def _check_outside(self, path: str | Path) -> None:
        if Path(path).resolve().is_relative_to(self.folder):
            raise FleetError(f"{path}: is inside the store; name a place outside of it")

    @contextmanager
    def _reading(self, name: str) -> Iterator[dict[str, Chain]]:
        """How each tensor of a variant is made; errors inside name the variant."""
        with self._seeing:
            variant = self._view.variant(name)
            chains = chains_of(self._view.levels(variant))
        with self._superseded(variant):
            try:
                yield chains
            except FleetError as error:
                raise FleetError(f"{self.folder}: variant {name!r}: {error}") from error

    @contextmanager
    def _superseded(self, variant: Variant) -> Iterator[None]:
        """Tell tensors that went with an older state from damage."""
        try:
            yield
        except FleetError as error:
            with self._seeing:
                now = self._state.variants.get(variant.name)
                if now is variant and not self._manifest.has_more():
                    raise
            raise SupersededError(
                f"{self.folder}: variant {variant.name!r}: the store was changed while it was "
                f"read ({error}); refresh and ask again"
            ) from error

    def _prepared(self, variant: Variant, given: Given) -> tuple[Variant, dict[str, Tensor]]:
        """A variant that fits, as it is stored."""
        where = f"{self.folder}: variant {variant.name!r}"
        parents = chains_of([node.tensors for node in self._state.path(variant.node)])
        self._decoder.check(where, variant.tensors, parents, given)
        for module, encoded in variant.adapters.items():
            if encoded.encoding != BOTTLENECK or encoded.parts.keys() != BOTTLENECK_PARTS:
                raise FleetError(
                    f"{where}: adapters.{module}: found {encoded.encoding!r} of "
                    f"{sorted(encoded.parts)}, wanted {BOTTLENECK!r} of "
                    f"{sorted(BOTTLENECK_PARTS)}"
                )
            check_filled(f"{where}: {module!r}", self._decoder.parts(encoded, given))
        _check_used(where, given, variant.encoded())
        try:
            kinds = {"tensors": variant.tensors, "adapters": variant.adapters}
            records, tensors = bundled(kinds, given)
        except FleetError as error:
            raise FleetError(f"{where}: {error}") from error
        return replace(variant, **records), tensors

    def _add_group(self, group: Iterable[tuple[Variant, Given]]) -> None:
        """Write variants of different names in one pack and one line."""
        new: dict[str, tuple[int, Any]] = {}
        tensors: dict[str, Tensor] = {}
        records = []
        for variant, given in group:
            records.append(
                {
                    "name": variant.name,
                    "node": variant.node,
                    **self._by_number(variant.tensors, variant.adapters, new),
                    "classes": variant.classes,
                    "about": variant.about,
                }
            )
            tensors.update(given)
        if records:
            self._write({"op": "variants", **_said(new), "variants": records}, tensors)

    def _by_number(
        self,
        tensors: Mapping[str, Encoded],
        adapters: Mapping[str, Encoded],
        new: dict[str, tuple[int, Any]],
    ) -> dict[str, Any]:
        """Records by the numbers of their patterns; `new` ones, by their text, get the next."""
        patterns, hashes, numbers = patterns_of(tensors, adapters)
        known, count = self._state.patterns, self._state.pattern_count
        places: list[int] = []
        for content in patterns:
            text = pattern_text(content)
            if text in known:
                places.append(known[text])
                continue
            number, _ = new.setdefault(text, (count + len(new), content))
            places.append(number)
        return records_json(places, hashes, numbers)

    def _replace_packs(self, packs: Sequence[str], kept: Iterable[str]) -> int:
        """Remove packs after what is `kept` of them was written anew; the bytes freed."""
        sizes = {path: path.stat().st_size for p in packs if (path := self.packs.path(p)).is_file()}
        new = self.packs.copy(kept)
        # Before the files go: a tensor is not to be looked for in a pack that is gone.
        self._commit({"op": "gc", "removed": list(packs), "packs": new}, new)
        remove_files(sizes)
        return sum(sizes.values()) - sum(self.packs.path(pack).stat().st_size for pack in new)

    def _write(self, record: dict[str, Any], given: Given) -> None:
        """Write the given tensors that the store has not, and the record after them."""
        packs = self.packs.put({digest: given[digest] for digest in sorted(given)})
        self._commit({**record, "packs": packs}, packs)

    def _commit(self, record: Mapping[str, Any], written: Collection[str] = ()) -> None:
        """Append a record, and see it; what fails removes the packs that were written for it."""
        try:
            with self._seeing:
                content = json.loads(json.dumps(record, allow_nan=False))
                try:
                    change = self._state.checked(content)
                except FleetError as error:
                    raise FleetError(f"{self.folder}: {error}") from error
                self._manifest.append(content)
                self._take(change)
        except BaseException as error:
            self._check_taken(error)
            if self._broken is not None:
                raise
            self.refresh()  # whether the line is there after all
            for pack in set(written) - self.packs.contents.keys():
                self.packs.path(pack).unlink(missing_ok=True)
            raise


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
