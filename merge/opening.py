"""Everything that a merge reads: checkpoints, adapters on their bases, statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inputs.data import ImageSet, load_learning_data
from inputs.models import build_model
from merge.adapters import applied, is_adapter, open_adapter
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.checkpoints.envelopes import PREFIXES, WRAPPERS
from merge.errors import MergeError
from merge.planning.config import MergeConfig, StatisticsConfig, split_reference
from merge.planning.plan import Source, TensorMerge
from merge.result.hashes import KnownHashes
from merge.statistics.gathering import Kind, choose_images, gather, read_record

log = logging.getLogger(__name__)


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
        checkpoint = open_checkpoint(path, names=names, prefixes=PREFIXES if names else WRAPPERS)
        opened.enter_context(checkpoint)
        if adapter is not None:
            low_rank = opened.enter_context(open_adapter(adapter))
            checkpoint = opened.enter_context(applied(checkpoint, low_rank))
        checkpoints[reference] = checkpoint
    return checkpoints


def wanted_statistics(
    config: MergeConfig, tensors: Collection[TensorMerge]
) -> dict[Kind, tuple[str, ...]]:
    """Which kinds of statistics the methods need, and of which models.

    Raises MergeError where the config does not say on what they are gathered.
    """
    wanted: dict[Kind, dict[str, None]] = {}
    for merge in tensors:
        if merge.method is not None and merge.method.statistics is not None:
            wanted.setdefault(merge.method.statistics, {}).update(dict.fromkeys(merge.labels))
    if wanted and config.statistics is None:
        raise MergeError(
            f"merge_method needs statistics ({', '.join(sorted(wanted))}) that are gathered on "
            "images; say with `statistics` from which model, and on which data"
        )
    return {kind: tuple(labels) for kind, labels in wanted.items()}


@dataclass(frozen=True)
class Statistics:
    """The gathered statistics of each kind and model (by its reference)."""

    gathered: Mapping[tuple[str, str], Checkpoint] = field(default_factory=dict)

    def of(self, merge: TensorMerge) -> tuple[Source, ...]:
        """Those of a tensor, one per model; none where a model has none of it."""
        kind = merge.method.statistics if merge.method is not None else None
        if kind is None or not self.gathered:
            return ()
        found = [
            Source(self.gathered[kind, label], model.name)
            for label, model in zip(merge.labels, merge.models, strict=True)
            if model.name in self.gathered[kind, label].tensors
        ]
        return tuple(found) if len(found) == len(merge.models) else ()


def gather_statistics(
    config: MergeConfig,
    wanted: Mapping[Kind, tuple[str, ...]],
    checkpoints: Mapping[str, Checkpoint],
    folder: Path,
    opened: ExitStack,
    *,
    device: torch.device,
    progress: bool,
) -> Statistics:
    """Gather into `folder` what is wanted; what is there of these weights and images stays."""
    settings = config.statistics
    if not wanted or settings is None:
        return Statistics()
    data = load_learning_data(settings.data, memory_budget=config.memory_budget)
    images: ImageSet = getattr(data, settings.split)
    torch.manual_seed(config.seed)
    model = build_model(
        settings.model,
        classes=len(data.classes),
        channels=settings.data.channels,
        root=Path.cwd(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    known = KnownHashes()
    gathered: dict[tuple[str, str], Checkpoint] = {}
    for kind, labels in wanted.items():
        for number, label in enumerate(labels):
            file = folder / f"{kind}-{number:02d}.safetensors"
            expected = _expected(kind, settings, images, config.seed)
            expected["sha256"] = known.of(checkpoints[label])
            if not _is_there(file, expected):
                log.info("gathering %s statistics of %s", kind, label)
                gather(
                    kind,
                    model,
                    checkpoints[label],
                    images,
                    file,
                    memory_budget=config.memory_budget,
                    labels=settings.labels,
                    examples=settings.examples,
                    batch_size=settings.batch_size,
                    seed=config.seed,
                    device=device,
                    progress=progress,
                )
            gathered[kind, label] = opened.enter_context(open_checkpoint(file, prefixes=()))
    known.save()
    return Statistics(gathered)


def _expected(
    kind: Kind, settings: StatisticsConfig, images: ImageSet, seed: int
) -> dict[str, Any]:
    chosen = choose_images(images, settings.examples, seed)
    said = {
        "kind": kind,
        "images_sha256": chosen.digest(),
        "examples": len(chosen),
        "seed": seed,
    }
    return said | ({"labels": settings.labels} if kind == "fisher" else {})


def _is_there(file: Path, expected: Mapping[str, Any]) -> bool:
    if not file.is_file():
        return False
    try:
        with open_checkpoint(file, prefixes=()) as found:
            record = read_record(found)
    except MergeError as error:
        log.warning("%s: is gathered again (%s)", file, error)
        return False
    return all(record.get(key) == value for key, value in expected.items())
