"""A merge from its config to its folder: open, plan, stream, and put in place."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from inputs.budget import format_bytes, peak_resident_bytes, resident_bytes
from inputs.command import choose_device
from merge.card import model_card
from merge.checkpoints import Checkpoint, CheckpointWriter, Hasher, TensorInfo
from merge.checkpoints.writer import split_shards, write_index
from merge.coefficients import Coefficients
from merge.companions import check_config, copy_companions
from merge.config import MergeConfig, parse_config
from merge.cooking import check_output_is_no_input, plan_cooking
from merge.engine import plan_work
from merge.hashes import KnownHashes
from merge.opening import open_models, statistics_of
from merge.output import Output, check_output, open_output
from merge.planning import MergePlan, plan_merge
from merge.stream import Forecast, Work, forecast, stream

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
    out = Path(out)
    check_output(out, overwrite=overwrite)
    with ExitStack() as opened:
        kitchen = prepare(config, out, opened, progress=progress)
        check_output_is_no_input(out, list(kitchen.checkpoints.values()))
        shards = _shards(kitchen.work, out, max_shard_bytes)
        print_ = kitchen.fingerprint(shards)
        with open_output(out, fingerprint=print_, resume=resume, overwrite=overwrite) as output:
            record = _run(kitchen, output, shards, progress=progress)
            if kitchen.alignment is not None and kitchen.alignment.recalibrates:
                record["notes"].append(kitchen.alignment.recalibrate(output.work))
            if not output.is_file:
                _accompany(kitchen, output.work, record)
            output.commit(record, overwrite=overwrite)
    return record


@dataclass
class Kitchen:
    """What a merge needs once everything is open and checked."""

    config: MergeConfig
    checkpoints: dict[str, Checkpoint]
    work: Work
    giver: Checkpoint
    plan: MergePlan | None
    notes: list[str]
    alignment: Alignment | None = None

    def fingerprint(self, shards: Mapping[str, Sequence[TensorInfo]]) -> str:
        """A hash of the config, of the input files' sizes and times, and of the shards."""
        stamps = {
            str(file): [file.stat().st_size, file.stat().st_mtime_ns]
            for checkpoint in self.checkpoints.values()
            for file in checkpoint.files
        }
        names = {file: [info.name for info in part] for file, part in shards.items()}
        text = json.dumps([config_yaml(self.config), stamps, names], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def forecast(self) -> Forecast:
        """What the pass will read, write and hold."""
        return forecast(self.work.items, self.config.memory_budget)


def prepare(config: MergeConfig, out: Path, opened: ExitStack, *, progress: bool) -> Kitchen:
    """Open every checkpoint, check everything, and plan; `opened` closes them."""
    device = choose_device(config.device)
    if config.coefficients is not None:
        return _prepare_soup(config, opened)
    checkpoints = open_models(config, opened)
    alignment = None
    if config.align is not None:
        from merge.alignment import Alignment  # what traces models takes a while to import

        alignment = Alignment(config, config.align)
        checkpoints = alignment.align(checkpoints)
    plan = plan_merge(config, checkpoints)
    check_config(plan.giver.files[0].parent, layers=plan.layers)
    folder = out.with_name(f"{out.name}.statistics")
    statistics = statistics_of(config, plan, checkpoints, folder, opened, progress=progress)
    work = plan_work(
        plan.tensors,
        statistics=statistics,
        seed=config.seed,
        memory_budget=config.memory_budget,
        device=device,
    )
    return Kitchen(config, checkpoints, work, plan.giver, plan, list(plan.notes), alignment)


def _prepare_soup(config: MergeConfig, opened: ExitStack) -> Kitchen:
    assert config.coefficients is not None
    coefficients = Coefficients.load(config.coefficients)
    names = {*coefficients.tensors, *coefficients.carried}
    checkpoints = open_models(config, opened, names=names)
    base = checkpoints.get(config.base_model) if config.base_model else None
    models = [checkpoints[entry.model] for entry in config.models]
    coefficients.check_ingredients(models, base=base)
    work = plan_cooking(coefficients, models, base=base)
    notes = [f"{name}: {reason}" for name, reason in sorted(coefficients.carried.items())]
    return Kitchen(config, checkpoints, work, base or models[0], None, notes)


# --- writing ------------------------------------------------------------------------------------


def _shards(work: Work, out: Path, max_shard_bytes: int) -> dict[str, list[TensorInfo]]:
    outputs = work.outputs
    shards = split_shards(outputs, max_shard_bytes)
    if len(shards) == 1 or out.suffix == ".safetensors":
        return {"model.safetensors": outputs}
    return shards


def _run(
    kitchen: Kitchen, output: Output, shards: Mapping[str, list[TensorInfo]], *, progress: bool
) -> dict[str, Any]:
    known = KnownHashes()
    hashes = {reference: known.get(c) for reference, c in kitchen.checkpoints.items()}
    hashers = {id(c): Hasher(c) for ref, c in kitchen.checkpoints.items() if hashes[ref] is None}

    def observe(checkpoint: Checkpoint, name: str, start: int, tensor: torch.Tensor) -> None:
        if id(checkpoint) in hashers:
            hashers[id(checkpoint)].observe(name, start, tensor)

    if any(output.finished(file) is None for file in shards):
        for items, look in kitchen.work.looks:
            stream(
                items,
                look,
                None,
                memory_budget=kitchen.config.memory_budget,
                progress=progress,
                title="measuring",
            )
    for number, (file, infos) in enumerate(shards.items(), start=1):
        if output.finished(file) is not None:
            continue
        names = {info.name for info in infos}
        title = "merging" if len(shards) == 1 else f"merging shard {number} of {len(shards)}"
        with CheckpointWriter(output.work / file, infos, metadata=kitchen.work.metadata) as writer:
            streamed = stream(
                [item for item in kitchen.work.items if item.output.name in names],
                kitchen.work.make,
                writer,
                memory_budget=kitchen.config.memory_budget,
                observe=observe,
                progress=progress,
                title=title,
            )
        output.finish(file, vars(streamed))
    if len(shards) > 1:
        write_index(output.work / "model.safetensors.index.json", shards)
    done = [output.finished(file) or {} for file in shards]
    for reference, checkpoint in kitchen.checkpoints.items():
        if hashes[reference] is None:
            hashes[reference] = hashers[id(checkpoint)].sha256()
            known.put(checkpoint, hashes[reference] or "")
    known.save()
    return _record(kitchen, hashes) | {
        "bytes_read": sum(one["bytes_read"] for one in done),
        "bytes_written": sum(one["bytes_written"] for one in done),
        "seconds": sum(one["seconds"] for one in done),
        "peak_bytes": peak_resident_bytes(),
    }


def _record(kitchen: Kitchen, hashes: Mapping[str, str | None]) -> dict[str, Any]:
    merges = kitchen.plan.tensors if kitchen.plan is not None else ()
    return {
        "config": config_yaml(kitchen.config),
        "ingredients": [
            {"name": reference, "path": checkpoint.path, "sha256": hashes[reference]}
            for reference, checkpoint in kitchen.checkpoints.items()
        ],
        "methods": dict(Counter(m.method.name for m in merges if m.method is not None)),
        "carried": {m.output.name: m.reason for m in merges if m.method is None},
        "notes": kitchen.notes,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
    }


def _accompany(kitchen: Kitchen, folder: Path, record: dict[str, Any]) -> None:
    """Beside the weights: config and tokenizer files of the giver, and the model card."""
    dtypes = Counter(info.dtype for info in kitchen.work.outputs if info.dtype.is_floating_point)
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else None
    source = kitchen.giver.files[0].parent
    tokenizer = _tokenizer_folder(kitchen)
    record["notes"] += copy_companions(
        source,
        folder,
        layers=kitchen.plan.layers if kitchen.plan is not None else None,
        dtype=dtype,
        tokenizer_from=tokenizer,
    )
    card = model_card(record["config"], record, folder=folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_folder(kitchen: Kitchen) -> Path | None:
    """Where `tokenizer_source` says that the tokenizer comes from."""
    source = kitchen.config.tokenizer_source
    if source is None:
        return None
    reference = kitchen.config.base_model if source == "base" else source
    return kitchen.checkpoints[reference or ""].files[0].parent


def config_yaml(config: MergeConfig) -> str:
    """The config as it would stand in a file: what differs from the defaults."""
    said = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


# --- a look beforehand --------------------------------------------------------------------------


def describe(kitchen: Kitchen, *, max_shard_bytes: int, out: Path) -> str:
    """The plan in words: what is merged by which method, what is read, written and held."""
    ahead = kitchen.forecast()
    merges = kitchen.plan.tensors if kitchen.plan is not None else ()
    methods = Counter(m.method.name if m.method else "carried" for m in merges)
    shards = _shards(kitchen.work, out, max_shard_bytes)
    lines = [
        *(f"{count} tensors: {name}" for name, count in methods.most_common()),
        f"reads {format_bytes(ahead.bytes_read)} from {len(kitchen.checkpoints)} checkpoints, "
        f"writes {format_bytes(ahead.bytes_written)} in {len(shards)} "
        f"file{'s' if len(shards) > 1 else ''}, in {ahead.pieces} pieces",
        f"predicted peak: {format_bytes(resident_bytes() + ahead.held_bytes)} "
        f"({format_bytes(ahead.held_bytes)} of tensors, the rest is the program)",
        *kitchen.notes,
    ]
    return "\n".join(lines)
