"""Everything that a merge reads: checkpoints, adapters on their bases, statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from inputs.data import load_learning_data
from inputs.files import write_whole
from inputs.models import build_model
from merge.adapters import applied, is_adapter, open_adapter
from merge.checkpoints import Checkpoint, open_checkpoint, scan
from merge.checkpoints.envelopes import PREFIXES, WRAPPERS
from merge.config import MergeConfig, StatisticsConfig, split_reference
from merge.errors import MergeError
from merge.gathering import gather, read_record
from merge.planning import MergePlan, Source, TensorMerge


def open_models(
    config: MergeConfig, opened: ExitStack, *, names: Collection[str] = ()
) -> dict[str, Checkpoint]:
    """Reference in the config → its checkpoint; adapters are applied to their base.

    `names` are those of the tensors, where they are known.
    """
    checkpoints: dict[str, Checkpoint] = {}
    for reference in config.references:
        path, adapter = split_reference(reference)
        if adapter is None and is_adapter(path):
            if config.base_model is None or config.base_model == reference:
                raise MergeError(
                    f"{path}: is a LoRA adapter, which is applied to a base; name that with "
                    "base_model, or merge adapters into an adapter: python -m merge adapters"
                )
            path, adapter = config.base_model, path
        # Libraries find their tensors by the whole name: the model's own prefix stays.
        checkpoint = open_checkpoint(
            path,
            names=names,
            prefixes=PREFIXES if names else WRAPPERS,
            memory_budget=config.memory_budget,
        )
        opened.enter_context(checkpoint)
        if adapter is not None:
            low_rank = opened.enter_context(open_adapter(adapter))
            checkpoint = opened.enter_context(applied(checkpoint, low_rank))
        checkpoints[reference] = checkpoint
    return checkpoints


def statistics_of(
    config: MergeConfig,
    plan: MergePlan,
    checkpoints: Mapping[str, Checkpoint],
    folder: Path,
    opened: ExitStack,
    *,
    progress: bool,
) -> Callable[[TensorMerge], tuple[Source, ...]]:
    """Which statistics belong to a tensor's models; gathered into `folder` where they are not.

    What an earlier run gathered there with the same settings from the same weights is used again.
    """
    wanted: dict[str, dict[str, Checkpoint]] = {}
    for merge in plan.tensors:
        if merge.method is not None and merge.method.statistics is not None:
            wanted.setdefault(merge.method.statistics, {}).update(
                (label, checkpoints[label]) for label in merge.labels
            )
    if wanted and config.statistics is None:
        raise MergeError(
            f"merge_method needs statistics ({', '.join(sorted(wanted))}) that are gathered on "
            "images; say with `statistics` from which model, and on which data"
        )
    gathered: dict[tuple[str, str], Checkpoint] = {}
    for kind, models in wanted.items():
        for number, (label, checkpoint) in enumerate(models.items()):
            file = folder / f"{kind}-{number:02d}.safetensors"
            assert config.statistics is not None
            _gather(kind, checkpoint, file, config.statistics, config, progress)
            gathered[kind, label] = opened.enter_context(open_checkpoint(file))

    def find(merge: TensorMerge) -> tuple[Source, ...]:
        kind = merge.method.statistics if merge.method is not None else None
        if kind is None:
            return ()
        found = [
            Source(gathered[kind, label], model.name)
            for label, model in zip(merge.labels, merge.models, strict=True)
            if model.name in gathered[kind, label].tensors
        ]
        return tuple(found) if len(found) == len(merge.models) else ()

    return find


def _gather(
    kind: str,
    checkpoint: Checkpoint,
    file: Path,
    settings: StatisticsConfig,
    config: MergeConfig,
    progress: bool,
) -> None:
    said = {"kind": kind, "examples": settings.examples, "seed": config.seed}
    said |= {"settings": settings.model_dump(mode="json"), "sha256": scan(checkpoint).sha256}
    beside = file.with_suffix(".json")
    if file.is_file() and beside.is_file() and json.loads(beside.read_text()) == said:
        with open_checkpoint(file) as known:
            read_record(known)
        return
    data = load_learning_data(settings.data, memory_budget=config.memory_budget)
    torch.manual_seed(config.seed)
    model = build_model(
        settings.model,
        classes=len(data.classes),
        channels=settings.data.channels,
        root=Path.cwd(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    gather(
        "fisher" if kind == "fisher" else "gram",
        model,
        checkpoint,
        getattr(data, settings.split),
        file,
        memory_budget=config.memory_budget,
        labels=settings.labels,
        examples=settings.examples,
        batch_size=settings.batch_size,
        seed=config.seed,
        device=config.device if config.device != "auto" else "cpu",
        progress=progress,
    )
    write_whole(beside, json.dumps(said, indent=1, sort_keys=True))
