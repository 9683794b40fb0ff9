"""Where a block-coordinate learner stands after a block: the centre and the coefficients."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint
from soups.deltas import Mixture

FILE = "progress.safetensors"


@dataclass(frozen=True)
class Findings:
    """What the blocks so far have shown, for each group: the largest `coefficient` of any block,
    its `displacement` and, of compressed rows, their `row_error`.

    `compressed`, after the last block where rows are compressed, is the accuracy on *select* of the
    weights which that block was learned on.
    """

    coefficient: dict[str, float]
    displacement: dict[str, float]
    row_error: dict[str, float]
    compressed: float | None = None


@dataclass(frozen=True)
class Progress:
    """Coefficients over the originals [ingredients, groups] after some blocks and seconds."""

    matrix: np.ndarray
    blocks_done: int
    findings: Findings
    seconds: float


def save_progress(folder: Path | None, mixture: Mixture, progress: Progress) -> None:
    """Write the state beside the old one and rename it, so that one of the two is always whole.

    Without a folder nothing is written.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps(asdict(progress.findings)).encode()
    tensors = {
        "centre": mixture.centre.cpu(),
        "matrix": torch.from_numpy(progress.matrix),
        "blocks_done": torch.tensor(progress.blocks_done),
        "seconds": torch.tensor(progress.seconds, dtype=torch.float64),
        "report": torch.frombuffer(bytearray(report), dtype=torch.uint8),
    }
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with CheckpointWriter(folder / FILE, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load_progress(folder: Path | None, mixture: Mixture) -> Progress | None:
    """The saved state, its centre put into `mixture`; None where there is none."""
    if folder is None or not (folder / FILE).exists():
        return None
    with open_checkpoint(folder / FILE) as state:
        state.read("centre", out=mixture.centre)
        report = json.loads(bytes(state.read("report").tolist()))
        return Progress(
            matrix=state.read("matrix").numpy(),
            blocks_done=int(state.read("blocks_done")),
            findings=Findings(**report),
            seconds=float(state.read("seconds")),
        )
