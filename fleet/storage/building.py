"""A base and its variants → one store; and the table of what each of them takes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Shaped
from torch import Tensor
from tqdm.auto import tqdm

from fleet.errors import FleetError
from fleet.storage.adapter_folder import bottleneck_files, is_bottlenecks, read_bottlenecks
from fleet.storage.base import stored_base
from fleet.storage.config import BuildConfig, DomainConfig, HowToStore
from fleet.storage.creating import check_new
from fleet.storage.domains import Domain, delta_distances, find_domains, given_domains, home_of
from fleet.storage.judging import Architecture, Judge, Score
from fleet.storage.manifest import MANIFEST_NAME
from fleet.storage.records import BASE, Node, Variant
from fleet.storage.writing import Writer, Written
from fleet.storage.zoo import Zoo
from fleet.variants import Store
from inputs.budget import format_bytes
from inputs.data import ImageSet, load_learning_data
from merge.adapters import is_adapter
from merge.checkpoints import Checkpoint, open_checkpoint

__all__ = [
    "BuildConfig",
    "Built",
    "HowToStore",
    "add_variant",
    "build",
    "build_table",
    "level_bytes",
]

logger = logging.getLogger(__name__)

# Relative errors that are tried where an accuracy is to be kept; beyond the last a tensor may as
# well be the base's.
LADDER = (
    *(0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4),
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9),
)
# At which of them it is decided what nodes hold: signs leave about 0.6.
PLANNED = 0.65
COLUMNS = (
    "variant",
    "node",
    "bytes",
    "plain_bytes",
    "shared",
    "error",
    "accuracy_before",
    "accuracy_after",
)


@dataclass(frozen=True)
class Built:
    """A row for each variant; and the bytes of all as plain tensors, of the tensors of each level
    here, and of the store's files."""

    table: pd.DataFrame
    plain_bytes: int
    level_bytes: dict[str, int]
    disk_bytes: int

    def describe(self, most: int | None = None) -> str:
        """The table (of at most so many rows) and the sums, to be printed."""
        rows = self.table.head(most) if most is not None else self.table
        shown = rows.assign(
            bytes=[format_bytes(n) for n in rows["bytes"]],
            plain_bytes=[format_bytes(n) for n in rows["plain_bytes"]],
        ).dropna(axis="columns", how="all")
        rest = len(self.table) - len(rows)
        levels = ", ".join(f"{level} {format_bytes(n)}" for level, n in self.level_bytes.items())
        share = f", {self.disk_bytes / self.plain_bytes:.2%}" if self.plain_bytes else ""
        return (
            f"{shown.to_markdown(index=False, floatfmt='.4g')}\n"
            + (f"and {rest} more: python -m fleet.store list\n" if rest else "")
            + f"{len(self.table)} variants: {format_bytes(self.plain_bytes)} as plain checkpoints, "
            f"{format_bytes(self.disk_bytes)} on disk{share} ({levels})"
        )


def build(
    config: BuildConfig,
    out: str | Path,
    *,
    root: Path = Path(),
    score: Score | None = None,
    progress: bool = True,
) -> Built:
    """Make the store that `config` describes in the folder `out`, a variant at a time.

    Bottleneck adapters are kept as they are, over the base. A build that was killed goes on where
    it was. `score` replaces the accuracy on the config's data; `root` is where the model's relative
    paths start. Raises FleetError, MergeError and InputError for what does not fit together, before
    anything is written, and for a folder with another store in it.
    """
    paths = config.paths()
    bottlenecks = {name: path for name, path in paths.items() if is_bottlenecks(path)}
    whole = {name: path for name, path in paths.items() if name not in bottlenecks}
    with Zoo(lambda: open_checkpoint(config.base), whole) as zoo:
        fingerprint = _fingerprint(config, zoo, bottlenecks)
        out = Path(out)
        architecture = _architecture(config, zoo.base, root)
        images = _images(config)
        if score is None and architecture is not None and images is not None:
            score = Judge(architecture, images)
        if config.accuracy is not None and score is None:
            raise FleetError("accuracy: there is nothing to measure it with; give model and data")
        if (out / MANIFEST_NAME).exists():
            store = Store(out)
            domains = _begun(store, fingerprint, out)
        else:
            check_new(out)
            for name, path in bottlenecks.items():
                read_bottlenecks(name, path)
            domains = _domains(config, zoo, bottlenecks, progress)
            about = _about(config, zoo.base, architecture, images, fingerprint, domains)
            Writer.check_budget(zoo, config)
            store = Store.create(out, zoo.base, about=about)
        _fill(store, zoo, bottlenecks, config, domains, architecture, score, progress)
    return build_table(store)


def add_variant(
    store: Store,
    name: str,
    path: str | Path,
    how: HowToStore,
    *,
    node: str = BASE,
    score: Score | None = None,
) -> Variant:
    """Add the checkpoint, LoRA folder or folder of bottleneck adapters at `path` to a store.

    It is made from `node` (adapters: from the base); one of that name is replaced.
    Raises FleetError and MergeError for what does not fit the store's base.
    """
    if node != BASE and (is_adapter(path) or is_bottlenecks(path)):
        raise FleetError(f"{path}: is an adapter, which is over the base itself; give no node")
    if is_bottlenecks(path):
        store.add(*read_bottlenecks(name, path))
        return store.variants[name]
    with Zoo(lambda: stored_base(store), {name: path}) as zoo, store.transaction():
        writer = Writer(store, zoo, how)
        known = store.variants.get(name)
        classes = _own_width(zoo, name) or (known.classes if known else None)
        store.add(*_made(writer, name, node, None, classes, score))
    return store.variants[name]


def build_table(store: Store) -> Built:
    """What each variant of a store takes, as was found when it was added."""
    rows = []
    for name, variant in store.variants.items():
        about = variant.about
        rows.append(
            {
                "variant": name,
                "node": variant.node,
                "bytes": store.nbytes(name),
                "plain_bytes": store.plain_bytes(name),
                **{column: about.get(column) for column in COLUMNS[4:]},
            }
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    plain_bytes = sum(row["plain_bytes"] for row in rows)
    return Built(table, plain_bytes, level_bytes(store), store.disk_bytes())


def level_bytes(store: Store) -> dict[str, int]:
    """Bytes of the tensors of each level of a store; one that several refer to counts once.

    Without the level `general`, what variants have like the base counts for each of them.
    """
    base = {d for e in store.base.tensors.values() for d in e.parts.values()}
    nodes = {
        digest
        for node in store.nodes.values()
        for encoded in node.tensors.values()
        for digest in encoded.parts.values()
    }
    every = [e for variant in store.variants.values() for e in variant.encoded()]
    own = {digest for encoded in every for digest in encoded.parts.values()}
    # A merged vector is its domain's, whichever variants refer to it.
    nodes |= {e.parts["unified"] for e in every if e.encoding == "emr"}
    domain = nodes - base
    levels = {"general": base, "domain": domain, "task": own - domain - base}
    found = {level: sum(map(store.packs.nbytes, held)) for level, held in levels.items()}
    if "general" in store.about.get("build", {}).get("how", {}).get("leave_out", ()):
        found["task"] = sum(map(store.nbytes, store.variants))
    return found


# --- before ---


def _domains(
    config: BuildConfig, zoo: Zoo, bottlenecks: Mapping[str, Path], progress: bool
) -> list[Domain]:
    """Adapters are in none: they are over the base."""
    if "domain" in config.leave_out or config.domains == "none":
        return []
    if isinstance(config.domains, dict):
        members = {
            domain: given.variants if isinstance(given, DomainConfig) else given
            for domain, given in config.domains.items()
        }
        found = given_domains(members, [*zoo.names, *bottlenecks])
        for domain in found:
            adapters = [n for n in domain.variants if n in bottlenecks or is_adapter(zoo.paths[n])]
            if adapters:
                raise FleetError(
                    f"domains.{domain.name}: {adapters[0]!r} is an adapter, which is over the base "
                    "itself; take it out of the domain"
                )
        return found
    whole = {name: zoo.paths[name] for name in zoo.names if not is_adapter(zoo.paths[name])}
    if len(whole) < 2:
        return []
    with Zoo(lambda: open_checkpoint(config.base), whole) as compared:
        compared_bytes = sum(compared.base.tensors[key].nbytes for key in compared.comparable())
        bar = tqdm(
            total=compared_bytes * len(whole),
            desc="comparing",
            unit="B",
            unit_scale=True,
            disable=not progress,
            leave=False,
        )
        with bar:
            distances = delta_distances(
                compared, memory_budget=int(config.memory_budget), advance=bar.update
            )
    count = config.domains if isinstance(config.domains, int) else None
    return find_domains(distances, compared.names, count=count)


def _architecture(config: BuildConfig, base: Checkpoint, root: Path) -> Architecture | None:
    if config.model is None or config.data is None:
        return None
    any_width = Architecture(config.model, config.data, 2, root)
    classes = any_width.classes_of(_shapes(base))
    if classes is None:
        raise FleetError(
            f"{base.path}: has no {any_width.head!r}, the head of the config's model; give the "
            "model that the checkpoints are of"
        )
    return Architecture(config.model, config.data, classes, root)


def _images(config: BuildConfig) -> ImageSet | None:
    """What accuracies are measured on: nothing where every bit is kept."""
    if config.data is None or config.exact:
        return None
    split = config.accuracy.split if config.accuracy is not None else "select"
    data = load_learning_data(config.data, memory_budget=int(config.memory_budget))
    return getattr(data, split)


def _about(
    config: BuildConfig,
    base: Checkpoint,
    architecture: Architecture | None,
    images: ImageSet | None,
    fingerprint: str,
    domains: Sequence[Domain],
) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if config.model is not None:
        about["model"] = config.model.model_dump(mode="json")
    if config.data is not None:
        kept = {"size", "channels", "mean", "std"}
        about["data"] = config.data.model_dump(mode="json", include=kept)
        if images is not None:
            about["data"]["classes"] = list(images.classes)
        elif architecture is not None:
            about["data"]["classes"] = architecture.classes_of(_shapes(base))
    how = HowToStore.model_validate(config.model_dump(include=set(HowToStore.model_fields)))
    about["build"] = {
        "fingerprint": fingerprint,
        "how": how.model_dump(mode="json"),
        "domains": {d.name: {"parent": d.parent, "variants": list(d.variants)} for d in domains},
    }
    return about


def _begun(store: Store, fingerprint: str, out: Path) -> list[Domain]:
    """The domains of a build that was begun; FleetError if it was another one."""
    begun = store.about.get("build")
    if not isinstance(begun, dict) or begun.get("fingerprint") != fingerprint:
        raise FleetError(
            f"{out}: holds a store of another build (other settings, or other checkpoints); name a "
            "new folder, or remove it"
        )
    return [
        Domain(name, found["parent"], tuple(found["variants"]))
        for name, found in begun["domains"].items()
    ]


def _fingerprint(config: BuildConfig, zoo: Zoo, bottlenecks: Mapping[str, Path]) -> str:
    """Of the settings that decide the store, and of the files by size and time."""
    settings = config.model_dump(mode="json", exclude={"memory_budget"})
    files: dict[str, Sequence[Path]] = {}
    files |= {name: bottleneck_files(path) for name, path in bottlenecks.items()}
    for name in (BASE, *zoo.names):
        files[name] = (zoo.base if name == BASE else zoo.open(name)).files
    seen = {
        name: [[stat.st_size, stat.st_mtime_ns] for stat in (file.stat() for file in own)]
        for name, own in files.items()
    }
    text = json.dumps([settings, seen], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# --- the store ---


def _fill(
    store: Store,
    zoo: Zoo,
    bottlenecks: Mapping[str, Path],
    config: BuildConfig,
    domains: Sequence[Domain],
    architecture: Architecture | None,
    score: Score | None,
    progress: bool,
) -> None:
    """Add the nodes and variants that are not there yet: a node, what is made from it, the next."""
    with store.transaction():
        writer = Writer(store, zoo, config)
        homes = {name: home_of(domains, name) for name in zoo.names}
        names = [*zoo.names, *bottlenecks]
        missing = [name for name in names if name not in store.variants]
        bar = tqdm(
            total=len(names),
            initial=len(names) - len(missing),
            desc="storing",
            unit="variant",
            disable=not progress,
        )

        def made() -> Iterator[tuple[Variant, dict[str, Tensor]]]:
            for domain in [None, *domains]:
                home = BASE if domain is None else domain.name
                own = [name for name in missing if homes.get(name) == home]
                merged: dict[str, Tensor] = {}
                if domain is not None and (own or home not in store.nodes):
                    direct = [name for name in domain.variants if homes[name] == home]
                    merged = _add_node(writer, config, domain, direct)
                for name in own:
                    classes = _classes(architecture, zoo, name)
                    yield _made(writer, name, home, merged, classes, score)
                    bar.update()
            for name in missing:
                if name in bottlenecks:
                    yield read_bottlenecks(name, bottlenecks[name])
                    bar.update()

        with bar:
            store.add_many(made(), group_bytes=writer.group_bytes)


def _add_node(
    writer: Writer, config: BuildConfig, domain: Domain, direct: Sequence[str]
) -> dict[str, Tensor]:
    """Add a domain's node unless it is there; the merged vectors for its `direct` variants."""
    tolerance = 0.0 if config.exact else config.tolerance or PLANNED
    if "task" in config.leave_out:
        tolerance = 0.0
    given = config.domains.get(domain.name) if isinstance(config.domains, dict) else None
    soup = given.checkpoint if isinstance(given, DomainConfig) else None
    written, merged = writer.node(domain, tolerance, direct=direct, checkpoint=soup)
    if domain.name not in writer.store.nodes:
        node = Node(domain.name, domain.parent, written.records)
        writer.store.add_node(node, written.tensors)
    return merged


def _made(
    writer: Writer,
    name: str,
    node: str,
    merged: Mapping[str, Shaped[Tensor, ...]] | None,
    classes: int | None,
    score: Score | None,
) -> tuple[Variant, dict[str, Tensor]]:
    """One variant by the measure that was asked for, and its tensors."""
    how = writer.how
    before = after = None
    tolerance = 0.0 if how.exact else how.tolerance or 0.0
    if how.accuracy is None:
        written = writer.variant(name, node, tolerance, merged)
        if score is not None:
            before = _scored(writer, name, node, None, score)
            after = _scored(writer, name, node, written, score)
    else:
        if score is None:
            raise FleetError(
                f"{name}: an accuracy is to be kept, and there is nothing to measure it"
            )
        before = _scored(writer, name, node, None, score)
        tolerance, written, after = _widest(
            writer, name, node, merged, score, before, before - how.accuracy.lost
        )
    plain = sum(info.nbytes for info in writer.zoo.open(name).tensors.values())
    about: dict[str, Any] = {
        "source": Path(writer.zoo.paths[name]).name,
        "shared": 1 - written.own_plain_bytes / plain if plain else 1.0,
        "error": written.relative_error,
        "tolerance": tolerance,
    }
    if before is not None and after is not None:
        about |= {"accuracy_before": before, "accuracy_after": after}
    return Variant(name, node, written.records, classes, about), written.tensors


def _widest(
    writer: Writer,
    name: str,
    node: str,
    merged: Mapping[str, Shaped[Tensor, ...]] | None,
    score: Score,
    before: float,
    least: float,
) -> tuple[float, Written, float]:
    """The widest tolerance of the ladder with an accuracy of at least `least`, by bisection.

    Exact where none has.
    """
    best: tuple[float, Written, float] | None = None
    low, high = 0, len(LADDER)
    while low < high:
        middle = (low + high) // 2
        written = writer.variant(name, node, LADDER[middle], merged)
        after = _scored(writer, name, node, written, score)
        if after >= least - 1e-12:
            best, low = (LADDER[middle], written, after), middle + 1
        else:
            high = middle
    return best or (0.0, writer.variant(name, node, 0.0, merged), before)


def _scored(writer: Writer, name: str, node: str, written: Written | None, score: Score) -> float:
    """The accuracy of a variant as it is, or as it was written."""
    if written is not None:
        return score(name, writer.decoded(name, node, written))
    checkpoint = writer.zoo.open(name)
    return score(name, {key: checkpoint.read(key) for key in checkpoint.tensors})


def _classes(architecture: Architecture | None, zoo: Zoo, name: str) -> int | None:
    if architecture is not None:
        return architecture.classes_of(_shapes(zoo.open(name)))
    return _own_width(zoo, name)


def _own_width(zoo: Zoo, name: str) -> int | None:
    """The width of a head that is not the base's: the one leading size that only it has."""
    base = zoo.base.tensors
    widths = {
        info.shape[0]
        for key, info in zoo.open(name).tensors.items()
        if key in base and info.shape != base[key].shape and info.shape
    }
    return widths.pop() if len(widths) == 1 else None


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in checkpoint.tensors.items()}
