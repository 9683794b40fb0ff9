"""Writes an adapter as PEFT reads it: the weights first, the config last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from inputs.files import write_whole
from merge.adapters.adapter import WEIGHT_NAMES, WRAPPER
from merge.adapters.low_rank import Factors
from merge.adapters.settings import CONFIG_NAME
from merge.checkpoints.envelopes import quoted
from merge.checkpoints.tensors import TensorInfo
from merge.checkpoints.writer import CheckpointWriter
from merge.errors import MergeError

WEIGHTS_NAME = WEIGHT_NAMES[0]


@dataclass(frozen=True)
class NewModule:
    """One module of an adapter to be written; `window` is A's shape after the rank."""

    kind: Literal["linear", "conv", "embedding"]
    window: tuple[int, ...]
    factors: Factors

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Float[Tensor, ...]]:
        """A and B under PEFT's names, in PEFT's shapes."""
        a = self.factors.a.reshape(-1, *self.window)
        b = self.factors.b.reshape(*self.factors.b.shape, *[1] * (len(self.window) - 1))
        embedding = self.kind == "embedding"
        left, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        return {
            f"{WRAPPER}{name}.{left}{side}{end}": factor.to(dtype).contiguous()
            for side, factor in (("A", a), ("B", b))
        }


def check_free(out: str | Path) -> Path:
    """`out` as a path, MergeError unless it is free: what a killed run left does not count."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise MergeError(f"{out}: is a file, wanted a new folder for the adapter")
    found = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    left = [n for n in found if n != WEIGHTS_NAME and not (n[0] == "." and n.endswith(".part"))]
    if left:
        raise MergeError(
            f"{out}: is not empty, it holds {quoted(sorted(left))}; name a new folder, or empty it"
        )
    return folder


def write_adapter(
    folder: Path,
    modules: Mapping[str, NewModule],
    saved: Mapping[str, Shaped[Tensor, ...]],
    content: Mapping[str, Any],
    *,
    dtype: torch.dtype,
) -> None:
    """Write modules with scaling 1, tensors under the names in `saved`, and the config.

    `content` are further settings of the config; the ranks are filled in. Until the config is
    there the folder is no adapter.
    """
    tensors = dict(saved)
    for name, module in modules.items():
        tensors.update(module.tensors(name, dtype))
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise MergeError(
            f"{folder}: the result has non-finite values in {quoted(bad)}; look for NaN or "
            "infinity in the inputs, or use a wider dtype"
        )
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with CheckpointWriter(folder / WEIGHTS_NAME, infos, metadata={"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    config = {**_PLAIN, **content, **_ranks({n: m.factors.rank for n, m in modules.items()})}
    write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
}


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns such that every scaling is 1.

    Patterns match the ends of names unless they begin with ^.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{name}": rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}


def exact_targets(modules: Sequence[str]) -> dict[str, Any]:
    """The settings under which PEFT adapts the modules of these whole names."""
    return {"target_modules": sorted(modules), "exclude_modules": None}
