"""All models in training as one file, from which they go on to the same weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fleet.errors import FleetError
from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint

RECORD = "record"
VERSION = 1


class Snapshot(NamedTuple):
    """What JSON holds of a moment of training, and each model's tensors."""

    record: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save(
    path: Path, record: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write beside `path` and rename: a killed run leaves the old file or the new one."""
    text = json.dumps({"version": VERSION, "models": [*tensors], **record}).encode()
    every = {RECORD: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    every |= {
        f"{number}:{name}": tensor
        for number, own in enumerate(tensors.values())
        for name, tensor in own.items()
    }
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in every.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(path, infos) as writer:
        for name, tensor in every.items():
            writer.write(name, tensor.detach().cpu().contiguous())


def load(path: Path) -> Snapshot:
    """FleetError for a file that is no snapshot of this version."""
    with open_checkpoint(path, prefixes=()) as checkpoint:
        if RECORD not in checkpoint.tensors:
            raise FleetError(
                f"{path}: is a checkpoint, but no snapshot of a training; give another file"
            )
        try:
            record = json.loads(bytes(checkpoint.read(RECORD).tolist()))
        except ValueError as error:
            raise FleetError(f"{path}: its record is no JSON ({error}); remove the file") from error
        if record.get("version") != VERSION:
            raise FleetError(
                f"{path}: is of version {record.get('version')}, wanted {VERSION}; remove the "
                "file to train from the beginning"
            )
        tensors: dict[str, dict[str, Tensor]] = {}
        for full in checkpoint.tensors:
            number, _, name = full.partition(":")
            if name:
                model = record["models"][int(number)]
                tensors.setdefault(model, {})[name] = checkpoint.read(full)
    return Snapshot(record, tensors)


class Saving:
    """When the snapshot is due, and where it is."""

    def __init__(self, path: Path | None, minutes: float, rounds: int | None) -> None:
        self.path, self._seconds, self._every = path, 60 * minutes, rounds
        self._rounds, self._last = 0, time.monotonic()

    def load(self) -> Snapshot | None:
        there = self.path is not None and self.path.exists()
        return load(self.path) if there and self.path is not None else None

    def is_due(self) -> bool:
        """To be asked once after every step of all models."""
        self._rounds += 1
        if self.path is None:
            return False
        often = self._every is not None and self._rounds % self._every == 0
        return often or time.monotonic() - self._last > self._seconds

    def save(self, record: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.path is not None:
            save(self.path, record, tensors)
        self._last = time.monotonic()

    def finish(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
