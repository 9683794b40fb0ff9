"""Where a block-coordinate learner stands after a block: the centre and the coefficients."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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

    `accuracies` on *select* are known after the last block where rows are compressed: `compressed`
    is that of the weights which the block was learned on, `originals` that of the same
    coefficients over the originals.
    """

    coefficient: dict[str, float]
    displacement: dict[str, float]
    row_error: dict[str, float]
    accuracies: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Coefficients over the originals [ingredients, groups] after a number of blocks."""

    matrix: np.ndarray
    blocks_done: int
    findings: Findings


def save_progress(
    folder: Path, mixture: Mixture, matrix: np.ndarray, blocks_done: int, findings: Findings
) -> None:
    """Write the state beside the old one and rename it, so that one of the two is always whole."""
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps(asdict(findings)).encode()
    tensors = {
        "centre": mixture.centre.cpu(),
        "matrix": torch.from_numpy(matrix),
        "blocks_done": torch.tensor(blocks_done),
        "report": torch.frombuffer(bytearray(report), dtype=torch.uint8),
    }
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with CheckpointWriter(folder / FILE, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load_progress(folder: Path, mixture: Mixture) -> Progress | None:
    """The saved state, its centre put into `mixture`; None where there is none."""
    if not (folder / FILE).exists():
        return None
    with open_checkpoint(folder / FILE) as state:
        state.read("centre", out=mixture.centre)
        report = json.loads(bytes(state.read("report").tolist()))
        return Progress(
            matrix=state.read("matrix").numpy(),
            blocks_done=int(state.read("blocks_done")),
            findings=Findings(**report),
        )
