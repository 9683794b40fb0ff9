"""Where a block-coordinate learner stands after a block: the centre and the coefficients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint
from soups.deltas import Mixture

FILE = "progress.safetensors"


@dataclass(frozen=True)
class Progress:
    """Coefficients over the originals [ingredients, groups] after a number of blocks.

    `largest` coefficient and `displacement` of any block so far, for each group.
    """

    matrix: np.ndarray
    blocks_done: int
    largest: dict[str, float]
    displacement: dict[str, float]


def save_progress(
    folder: Path,
    mixture: Mixture,
    matrix: np.ndarray,
    blocks_done: int,
    largest: dict[str, float],
    displacement: dict[str, float],
) -> None:
    """Write the state beside the old one and rename it, so that one of the two is always whole."""
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"largest": largest, "displacement": displacement}).encode()
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
            largest=report["largest"],
            displacement=report["displacement"],
        )
