"""Many variants of one base in a folder: base, nodes of what several share, variants.

A store is a manifest (`fleet.storage.manifest`) and packs of tensors (`fleet.storage.objects`).
Whoever opens it reads; writers take turns. Killed at any moment it holds the old or the new state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.adapter_folder import write_adapter_folder
from fleet.storage.adding import GROUP_BYTES, add_node, add_variants
from fleet.storage.collecting import collect
from fleet.storage.creating import check_new, locked, write_base
from fleet.storage.decoding import Decoder, chains_of, own_parts, plain_part
from fleet.storage.hashes import tensor_hash
from fleet.storage.journal import Given, Journal, SupersededError
from fleet.storage.manifest import MANIFEST_NAME, Manifest
from fleet.storage.objects import Packs
from fleet.storage.pack_file import Place
from fleet.storage.reader import Reader
from fleet.storage.records import BASE, Encoded, Node, Variant
from fleet.storage.state import FORMAT
from merge.checkpoints.tensors import Checkpoint

__all__ = [
    "Encoded",
    "Node",
    "Place",
    "Store",
    "SupersededError",
    "Variant",
    "tensor_hash",
]


class Store:
    """The store in `folder`; FleetError if there is none. Threads may read it at once.

    It is seen as of the last `refresh` (or own change): `nodes` and `variants` are snapshots that
    never change. `packs` reads single tensors by what records refer to them by. Where `gc` moved
    tensors meanwhile they are read from their new place.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self._journal = Journal(self.folder)
        self.packs = self._journal.packs
        self._decoder = Decoder(self.packs)
        self._reader = Reader(self._journal, self._decoder)

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
        with self._journal.seen() as state:
            return state.nodes

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The variants by name."""
        with self._journal.seen() as state:
            return state.variants

    @property
    def about(self) -> dict[str, Any]:
        """What was said of the base when the store was made."""
        with self._journal.seen() as state:
            return state.about

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        with self._journal.seen() as state:
            return state.version

    def refresh(self) -> bool:
        """Take up what others changed since; whether there was something.

        Raises FleetError for a manifest that was altered; what was seen before stays.
        """
        return self._journal.refresh()

    def node(self, name: str) -> Node:
        """The node of that name; FleetError with the nearest one."""
        with self._journal.seen() as state:
            return state.node(name)

    def variant(self, name: str) -> Variant:
        """The variant of that name; FleetError with the nearest ones."""
        with self._journal.seen() as state:
            return state.variant(name)

    def path(self, name: str) -> list[Node]:
        """The nodes from the base to a variant's own."""
        with self._journal.seen() as state:
            return state.path(state.variant(name).node)

    def nbytes(self, name: str) -> int:
        """The bytes that are a variant's own; what several refer to counts for each of them."""
        with self._journal.seen() as state:
            return sum(map(self.packs.nbytes, own_parts(state.variant(name))))

    def plain_bytes(self, name: str) -> int:
        """The bytes of a variant as a plain checkpoint."""
        with self._journal.seen() as state:
            chains = chains_of(state.levels(state.variant(name)))
            return sum(self.packs.nbytes(plain_part(k, chain)) for k, chain in chains.items())

    def disk_bytes(self) -> int:
        """The bytes of all files of the store: what is needed, names, and what `gc` would free."""
        manifest = (self.folder / MANIFEST_NAME).stat().st_size
        return manifest + sum(self.packs.files().values())

    # --- reading ---

    def tensors(self, name: str) -> dict[str, Shaped[Tensor, ...]]:
        """Every tensor of a variant, decoded.

        Raises FleetError for an unknown name, and for a damaged file that this variant needs;
        SupersededError where the variant was replaced or removed, and `gc` was faster.
        """
        return self._reader.tensors(name)

    def tensor(self, name: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a variant, decoded; FleetError as `tensors`."""
        return self._reader.tensor(name, key)

    def node_tensor(self, node: str, key: str) -> Shaped[Tensor, ...]:
        """One tensor of a node, decoded; FleetError for unknown names, and as `tensors`."""
        return self._reader.node_tensor(node, key)

    def parts(self, name: str) -> dict[str, dict[str, Shaped[Tensor, ...]]]:
        """What is a variant's own, as it is stored: tensor (or adapted module) → part → values."""
        return self._reader.parts(name)

    def export(self, name: str, path: str | Path) -> None:
        """Write a variant as a safetensors checkpoint, tensor by tensor.

        Bit for bit what was added where its encodings are exact. Raises FleetError as `tensors`,
        for bottleneck adapters, which no checkpoint holds, and for a place inside the store.
        """
        self._check_outside(path)
        self._reader.export(name, path)

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
        return self._reader.verify()

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other writers out of several changes; each is seen by readers as it is made.

        Raises FleetError with the process that writes at the moment.
        """
        with self._journal.transaction():
            yield

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
            add_variants(self._journal, self._decoder, variants, group_bytes)

    def add_node(self, node: Node, tensors: Mapping[str, Shaped[Tensor, ...]]) -> None:
        """Add a node below one that is there; FleetError for a name that is taken, and as `add`."""
        with self.transaction():
            add_node(self._journal, self._decoder, node, tensors)

    def remove(self, name: str) -> None:
        """Remove a variant; `gc` frees its bytes. FleetError for an unknown name."""
        with self.transaction():
            self._journal.commit({"op": "remove", "variant": name})

    def remove_node(self, name: str) -> None:
        """Remove a node that no variant and no node is made from; else FleetError."""
        with self.transaction():
            self._journal.commit({"op": "remove", "node": name})

    def gc(self) -> int:
        """Remove packs of which nothing is needed, and what killed writers left; bytes freed.

        Packs of which little is needed are written anew without the rest, and many small ones as
        few (`fleet.storage.collecting`). Whoever reads what was removed or replaced before gets
        SupersededError from then on, and the new state after `refresh`. A pack of which something
        is damaged that is needed stays as it is: `verify` tells of it.
        """
        with self.transaction():
            return collect(self._journal)

    def _check_outside(self, path: str | Path) -> None:
        if Path(path).resolve().is_relative_to(self.folder):
            raise FleetError(f"{path}: is inside the store; name a place outside of it")
