"""A merge from its config to its folder: open, plan, stream, and put in place."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from inputs.budget import format_bytes, peak_resident_bytes, resident_bytes
from inputs.command import choose_device
from merge.adapters.settings import CONFIG_NAME
from merge.checkpoints import Checkpoint, CheckpointWriter, Hasher, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.checkpoints.writer import split_shards, write_index
from merge.coefficients import Coefficients
from merge.cooking import plan_cooking
from merge.engine import plan_work
from merge.errors import MergeError
from merge.opening import Statistics, gather_statistics, open_models, wanted_statistics
from merge.planning.config import MergeConfig, parse_config
from merge.planning.plan import MergePlan, plan_merge
from merge.result.card import model_card
from merge.result.companions import check_config, check_tokenizer, copy_companions
from merge.result.hashes import KnownHashes
from merge.result.output import Output, check_output, is_file, open_output
from merge.result.vocabularies import check_tokenizers
from merge.statistics.gathering import Kind
from merge.stream import Work, forecast, stream

if TYPE_CHECKING:
    from merge.alignment import Alignment

log = logging.getLogger(__name__)

PACKAGES = ("model-soups-toolkit", "torch", "numpy", "safetensors")


def merge(
    config: MergeConfig | Mapping[str, Any],
    out: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Merge as `config` says (a mapping in mergekit's shape will do) into `out`; the record.

    `out` is a folder, or one file if it ends in `.safetensors`; it is complete or not there at
    all. `resume` goes on with what a killed merge has finished, shard by shard. Raises InputError
    or MergeError, with all that is wrong at once, before anything is written.
    """
    config = config if isinstance(config, MergeConfig) else parse_config(config)
    out = Path(out).resolve()
    check_output(out, overwrite=overwrite)
    with ExitStack() as opened:
        order = prepare(config, opened)
        order.check_output(out)
        shards = _shards(order.outputs, out, max_shard_bytes)
        stamp = order.fingerprint(shards)
        with open_output(out, fingerprint=stamp, resume=resume, overwrite=overwrite) as output:
            folder = out.with_name(f"{out.name}.statistics")
            work = order.work(order.statistics(folder, opened, progress=progress))
            record = _run(order, work, output, shards, progress=progress)
            if order.alignment is not None and order.alignment.recalibrates:
                record["notes"].append(order.alignment.recalibrate(output.work))
            if not output.is_file:
                _accompany(order, output.work, record)
            output.commit(record)
    return record


@dataclass
class Order:
    """A merge once everything is open and checked: what is to be made, and from what."""

    config: MergeConfig
    device: torch.device
    checkpoints: dict[str, Checkpoint]
    giver: Checkpoint
    notes: list[str]
    plan: MergePlan | None = None
    soup: Work | None = None
    wanted_statistics: dict[Kind, tuple[str, ...]] = field(default_factory=dict)
    alignment: Alignment | None = None

    @property
    def outputs(self) -> list[TensorInfo]:
        """The tensors of the result, in the order of the file."""
        if self.plan is not None:
            return [merge.output for merge in self.plan.tensors]
        return self.soup.outputs if self.soup is not None else []

    @property
    def tokenizer(self) -> Path | None:
        """The folder that `tokenizer_source` means."""
        source = self.config.tokenizer_source
        if source is None:
            return None
        reference = self.config.base_model if source == "base" else source
        return self.checkpoints[reference or ""].home

    def statistics(self, folder: Path, opened: ExitStack, *, progress: bool) -> Statistics:
        """The statistics that the methods need, gathered into `folder`."""
        return gather_statistics(
            self.config,
            self.wanted_statistics,
            self.checkpoints,
            folder,
            opened,
            device=self.device,
            progress=progress,
        )

    def work(self, statistics: Statistics) -> Work:
        """What the stream has to do."""
        if self.plan is None:
            assert self.soup is not None
            return self.soup
        return plan_work(
            self.plan.tensors,
            statistics=statistics.of,
            seed=self.config.seed,
            memory_budget=self.config.memory_budget,
            device=self.device,
        )

    def check_output(self, out: Path) -> None:
        """MergeError where an input is in the place of the output, or below it."""
        for reference, checkpoint in self.checkpoints.items():
            for file in checkpoint.files:
                if file.resolve().is_relative_to(out) or (out.exists() and file.samefile(out)):
                    raise MergeError(
                        f"{out}: is the output, and holds the input {reference} ({file}); name a "
                        "path that no input is in"
                    )

    def fingerprint(self, shards: Mapping[str, Sequence[TensorInfo]]) -> str:
        """A hash of the config, of the files read (sizes, times), and of the shards."""
        files = {file for c in self.checkpoints.values() for file in c.files}
        files |= {folder / CONFIG_NAME for folder in {file.parent for file in files}}
        if self.config.coefficients is not None:
            files.add(self.config.coefficients)
        stamps = {
            str(file): [file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        }
        names = {file: [info.name for info in part] for file, part in shards.items()}
        text = json.dumps([config_yaml(self.config), stamps, names], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def prepare(config: MergeConfig, opened: ExitStack) -> Order:
    """Open every checkpoint, check everything, and plan; `opened` closes them."""
    device = choose_device(config.device)
    if config.coefficients is not None:
        return _prepare_soup(config, device, opened)
    checkpoints = open_models(config, opened)
    alignment = None
    if config.align is not None:
        from merge.alignment import Alignment  # what traces models takes a while to import

        alignment = Alignment(config, config.align)
        checkpoints = alignment.align(checkpoints)
    plan = plan_merge(config, checkpoints)
    wanted = wanted_statistics(config, plan.tensors)
    order = Order(
        config,
        device,
        checkpoints,
        plan.giver,
        list(plan.notes),
        plan=plan,
        wanted_statistics=wanted,
        alignment=alignment,
    )
    return _with_checked_companions(order)


def _prepare_soup(config: MergeConfig, device: torch.device, opened: ExitStack) -> Order:
    assert config.coefficients is not None
    coefficients = Coefficients.load(config.coefficients)
    names = {*coefficients.tensors, *coefficients.carried}
    checkpoints = open_models(config, opened, names=names)
    base = checkpoints.get(config.base_model) if config.base_model else None
    models = [checkpoints[entry.model] for entry in config.models]
    coefficients.check_ingredients(models, base=base)
    notes = [f"{name}: carried, {reason}" for name, reason in sorted(coefficients.carried.items())]
    soup = plan_cooking(coefficients, models, base=base)
    order = Order(config, device, checkpoints, base or models[0], notes, soup=soup)
    return _with_checked_companions(order)


def _with_checked_companions(order: Order) -> Order:
    """Raise what copying config and tokenizer files would raise, and note where those differ."""
    check_config(order.giver.home, layers=order.plan.layers if order.plan is not None else None)
    if order.tokenizer is not None:
        check_tokenizer(order.tokenizer)
    tokenizers = check_tokenizers(sorted({c.home for c in order.checkpoints.values()}))
    order.notes += [*tokenizers.problems, *tokenizers.notes]
    return order


# --- writing ------------------------------------------------------------------------------------


def _shards(
    outputs: list[TensorInfo], out: Path, max_shard_bytes: int
) -> dict[str, list[TensorInfo]]:
    shards = split_shards(outputs, max_shard_bytes)
    if len(shards) == 1 or is_file(out):
        return {"model.safetensors": outputs}
    return shards


def _run(
    order: Order,
    work: Work,
    output: Output,
    shards: Mapping[str, list[TensorInfo]],
    *,
    progress: bool,
) -> dict[str, Any]:
    known = KnownHashes()
    hashes = {reference: known.get(c) for reference, c in order.checkpoints.items()}
    hashers = {id(c): Hasher(c) for ref, c in order.checkpoints.items() if hashes[ref] is None}

    def observe(checkpoint: Checkpoint, name: str, start: int, tensor: torch.Tensor) -> None:
        if id(checkpoint) in hashers:
            hashers[id(checkpoint)].observe(name, start, tensor)

    looked = 0
    if any(output.finished(file) is None for file in shards):
        for items, look in work.looks:
            looked += stream(
                items,
                look,
                None,
                memory_budget=order.config.memory_budget,
                progress=progress,
                title="measuring",
            ).bytes_read
    for number, (file, infos) in enumerate(shards.items(), start=1):
        if output.finished(file) is not None:
            continue
        names = {info.name for info in infos}
        title = "merging" if len(shards) == 1 else f"merging shard {number} of {len(shards)}"
        with CheckpointWriter(output.work / file, infos, metadata=work.metadata) as writer:
            streamed = stream(
                [item for item in work.items if item.output.name in names],
                work.make,
                writer,
                memory_budget=order.config.memory_budget,
                observe=observe,
                progress=progress,
                title=title,
            )
        output.finish(file, vars(streamed))
    if len(shards) > 1:
        write_index(output.work / "model.safetensors.index.json", shards)
    done = [output.finished(file) or {} for file in shards]
    for reference, checkpoint in order.checkpoints.items():
        if hashes[reference] is None:
            hashes[reference] = hashers[id(checkpoint)].sha256()
            known.put(checkpoint, hashes[reference] or "")
    known.save()
    return _record(order, hashes) | {
        "bytes_read": looked + sum(one["bytes_read"] for one in done),
        "bytes_written": sum(one["bytes_written"] for one in done),
        "seconds": sum(one["seconds"] for one in done),
        "peak_bytes": peak_resident_bytes(),
    }


def _record(order: Order, hashes: Mapping[str, str | None]) -> dict[str, Any]:
    merges = order.plan.tensors if order.plan is not None else ()
    return {
        "config": config_yaml(order.config),
        "ingredients": [
            {"name": reference, "path": checkpoint.path, "sha256": hashes[reference]}
            for reference, checkpoint in order.checkpoints.items()
        ],
        "methods": dict(Counter(m.method.name for m in merges if m.method is not None)),
        "carried": {m.output.name: m.reason for m in merges if m.method is None},
        "notes": order.notes,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
    }


def _accompany(order: Order, folder: Path, record: dict[str, Any]) -> None:
    """Beside the weights: config and tokenizer files of the giver, and the model card."""
    dtypes = Counter(info.dtype for info in order.outputs if info.dtype.is_floating_point)
    record["notes"] += copy_companions(
        order.giver.home,
        folder,
        layers=order.plan.layers if order.plan is not None else None,
        dtype=dtype_name(dtypes.most_common(1)[0][0]) if dtypes else None,
        tokenizer_from=order.tokenizer,
    )
    card = model_card(record["config"], record, folder=folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def config_yaml(config: MergeConfig) -> str:
    """The config as it would stand in a file: what differs from the defaults."""
    said = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


# --- a look beforehand --------------------------------------------------------------------------


def describe(order: Order, *, max_shard_bytes: int, out: Path) -> str:
    """The plan in words: what is merged by which method, what is read, written and held."""
    work = order.work(Statistics())
    passes = [work.items, *(items for items, _ in work.looks)]
    ahead = [forecast(items, order.config.memory_budget) for items in passes]
    held_bytes = max(one.held_bytes for one in ahead)
    merges = order.plan.tensors if order.plan is not None else ()
    methods = Counter(m.method.name if m.method else "carried" for m in merges)
    shards = _shards(order.outputs, out, max_shard_bytes)
    lines = [
        *(f"{count} tensors: {name}" for name, count in methods.most_common()),
        *(
            f"gathers {kind} statistics of {len(labels)} models first, and reads those too"
            for kind, labels in order.wanted_statistics.items()
        ),
        f"reads {format_bytes(sum(one.bytes_read for one in ahead))} from "
        f"{len(order.checkpoints)} checkpoints, writes {format_bytes(ahead[0].bytes_written)} in "
        f"{len(shards)} file{'s' if len(shards) > 1 else ''}, in {ahead[0].pieces} pieces",
        f"predicted peak: {format_bytes(resident_bytes() + held_bytes)} "
        f"({format_bytes(held_bytes)} of tensors, the rest is the program)",
        *order.notes,
    ]
    return "\n".join(lines)
