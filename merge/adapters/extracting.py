"""A LoRA adapter out of a full fine-tune: the difference to its base, at low rank."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from inputs.randomness import generator
from merge.adapters.adapter import WRAPPER
from merge.adapters.folder import NewModule, check_free, exact_targets, write_adapter
from merge.adapters.low_rank import truncated
from merge.adapters.matching import transposed_leaves
from merge.checkpoints.envelopes import quoted
from merge.checkpoints.strict_json import parse_json
from merge.checkpoints.tensors import Checkpoint, TensorInfo
from merge.errors import MergeError

# Whole embeddings are kept by default: PEFT has other names for their factors, and only the
# model itself says which weights are embeddings.
EMBEDDINGS = ("*embed*", "wte.*", "*.wte.*", "wpe.*", "*.wpe.*", "shared.*", "*.shared.*")

_STRIPPED = re.compile(r"stripped the prefix '(.*)' of every name")


@dataclass
class _Sorted:
    """The changed tensors, by what becomes of them; values are relative changes."""

    low_rank: dict[str, float] = field(default_factory=dict)
    biases: dict[str, float] = field(default_factory=dict)
    modules: dict[str, float] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keep: Sequence[str] = EMBEDDINGS,
    prefix: str | None = None,
    allow_partial: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Write the LoRA adapter in the folder `out` that takes `base` to (nearly) `tuned`.

    `tuned − base ≈ B·A` for every changed weight of two dimensions, and of more (convolutions,
    as [out, in·…]): its SVD, cut to `rank`, to the least rank that holds `energy` of the squared
    singular values, or to both. All else that changed is stored whole: biases as trained biases,
    norms, grouped convolutions and the names that `keep` matches (embeddings) as modules_to_save,
    or in place where they may be tied to the head; heads that only `tuned` has, too. What is
    unchanged is left out. Rounding apart, only the cuts differ from `tuned`: they are recorded.

    What PEFT cannot hold (a bare parameter, an integer buffer outside of a norm) is a MergeError
    that names it with its relative change; with `allow_partial` it is in the record instead.
    `prefix` is put before every name to get the model's own; by default that which opening took
    from a transformers folder.
    """
    folder = check_free(out)
    _check_settings(rank, energy)
    _check_pair(base, tuned)
    prefix = _prefix(base) if prefix is None else prefix
    parts = _sort(base, tuned, keep)
    if parts.lost and not allow_partial:
        what = "; ".join(f"{name} ({reason})" for name, reason in parts.lost.items())
        raise MergeError(
            f"{tuned.path}: {len(parts.lost)} changed tensors cannot be part of an adapter: "
            f"{what}; leave them as in the base with allow_partial"
        )
    if not parts.low_rank:
        raise MergeError(
            f"{tuned.path}: no weight matrix differs from {base.path}, there is nothing to "
            "extract; check that these are two checkpoints"
        )
    leaves = transposed_leaves(base)
    modules: dict[str, NewModule] = {}
    for name in parts.low_rank:
        delta = _difference(base, tuned, name)
        transposed = delta.ndim == 2 and _leaf(name) in leaves
        window = delta.shape[:1] if transposed else delta.shape[1:]
        matrix = delta.T.contiguous() if transposed else delta.flatten(1)
        factors = truncated(
            matrix, rank=rank, energy=energy, generator=generator(seed, f"extract/{name}")
        )
        kind: Literal["linear", "conv"] = "linear" if delta.ndim == 2 else "conv"
        modules[prefix + name.removesuffix(".weight")] = NewModule(kind, tuple(window), factors)
    saved = _stored_whole(tuned, parts, prefix, set(modules))
    write_adapter(
        folder, modules, saved, _content(base, tuned, parts, prefix, modules, leaves), dtype=dtype
    )
    return _record(base, tuned, parts, prefix, modules, rank, energy)


def _check_settings(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise MergeError("extract: neither rank nor energy is given, wanted one, or both")
    if rank is not None and rank < 1:
        raise MergeError(f"extract: rank is {rank}, wanted at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise MergeError(f"extract: energy is {energy}, wanted a part of the whole in (0, 1]")


def _check_pair(base: Checkpoint, tuned: Checkpoint) -> None:
    common = base.tensors.keys() & tuned.tensors.keys()
    if not common:
        raise MergeError(
            f"{tuned.path}: has no tensor in common with {base.path} ({quoted([*tuned.tensors])} "
            f"and {quoted([*base.tensors])}); give a model and the base it was fine-tuned from"
        )
    for name in sorted(common):
        ours, theirs = base.tensors[name], tuned.tensors[name]
        if ours.shape != theirs.shape:
            raise MergeError(
                f"{tuned.path}: {name!r} is {list(theirs.shape)}, the base {base.path} has "
                f"{list(ours.shape)}; give the base that it was fine-tuned from"
            )
        for path, info in ((base.path, ours), (tuned.path, theirs)):
            if info.dtype.is_floating_point and info.dtype.itemsize < 2:
                raise MergeError(
                    f"{path}: {name!r} is {info.dtype}, quantised; give weights in 16 to 64-bit "
                    "floats"
                )


def _sort(base: Checkpoint, tuned: Checkpoint, keep: Sequence[str]) -> _Sorted:
    """What becomes of each changed tensor."""
    parts = _Sorted()
    others: dict[str, float] = {}
    for name, info in tuned.tensors.items():
        change = _relative_change(base, tuned, name)
        if change == 0:
            continue
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
        if _can_be_low_rank(info) and name in base.tensors and not kept:
            parts.low_rank[name] = change
        else:
            others[name] = change
    for name, change in others.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        alone = name.endswith(".bias") and weight not in others and weight in base.tensors
        reason = None if alone else _why_not_saved(name, tuned)
        if alone:
            parts.biases[name] = change
        elif reason is None:
            parts.modules[_module(name)] = max(change, parts.modules.get(_module(name), 0.0))
        else:
            parts.lost[name] = f"{reason}, relative change {change:.2g}"
    _close_over_endings(parts, tuned)
    return parts


def _can_be_low_rank(info: TensorInfo) -> bool:
    """A weight of a linear layer or of a convolution; one input channel means groups."""
    if not info.name.endswith(".weight") or not info.dtype.is_floating_point:
        return False
    return len(info.shape) == 2 or (3 <= len(info.shape) <= 5 and info.shape[1] > 1)


def _why_not_saved(name: str, tuned: Checkpoint) -> str | None:
    """Why PEFT cannot store the module of this tensor whole; None where it can."""
    module, _, last = name.rpartition(".")
    if not module or last.isdigit():
        return "a bare parameter"
    if any(other.startswith(f"{module}.") and _module(other) != module for other in tuned.tensors):
        return "a bare parameter beside other modules"
    return None


def _close_over_endings(parts: _Sorted, tuned: Checkpoint) -> None:
    """Also keep the modules whose names end with that of a kept one: PEFT matches by endings."""
    if not parts.modules:
        return
    for module in {_module(name) for name in tuned.tensors} - parts.modules.keys():
        if any(module.endswith(kept) for kept in parts.modules):
            parts.modules[module] = 0.0
            parts.low_rank.pop(f"{module}.weight", None)
            parts.biases.pop(f"{module}.bias", None)


def _relative_change(base: Checkpoint, tuned: Checkpoint, name: str) -> float:
    """`‖tuned − base‖ / ‖base‖`, infinite where the base is zero or has no such tensor."""
    if name not in base.tensors:
        return math.inf
    if not base.tensors[name].numel:
        return 0.0
    delta = _difference(base, tuned, name)
    change = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if not math.isfinite(change):
        raise MergeError(
            f"{name!r}: the difference of {tuned.path} and {base.path} is not finite; look for NaN "
            "or infinity in them"
        )
    if change == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(_floats(base, name), dtype=torch.float64))
    return change / size if size else math.inf


def _difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Float[Tensor, ...]:
    return _floats(tuned, name) - _floats(base, name)


def _floats(checkpoint: Checkpoint, name: str) -> Float[Tensor, ...]:
    info = checkpoint.tensors[name]
    wide = info.dtype == torch.float64 or not info.dtype.is_floating_point
    return checkpoint.read(name).to(torch.float64 if wide else torch.float32)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _stored_whole(
    tuned: Checkpoint, parts: _Sorted, prefix: str, adapted: set[str]
) -> dict[str, Shaped[Tensor, ...]]:
    """Tensors under the names that PEFT gives them in the file."""
    saved: dict[str, Tensor] = {}
    for name in tuned.tensors:
        if _module(name) in parts.modules:
            saved[f"{WRAPPER}{prefix}{name}"] = tuned.read(name)
        elif name in parts.biases:
            module = prefix + _module(name)
            wrapped = f"{module}.base_layer" if module in adapted else module
            saved[f"{WRAPPER}{wrapped}.bias"] = tuned.read(name)
    return saved


def _content(
    base: Checkpoint,
    tuned: Checkpoint,
    parts: _Sorted,
    prefix: str,
    modules: Mapping[str, NewModule],
    leaves: frozenset[str],
) -> dict[str, Any]:
    adapted = {f"{name}.bias" for name in modules}
    only_lora = all(prefix + name in adapted for name in parts.biases)
    listed = parts.modules.keys() - _in_place(tuned, parts)
    return {
        **exact_targets([*modules]),
        "base_model_name_or_path": base.path,
        "modules_to_save": sorted(prefix + module for module in listed) or None,
        "bias": "none" if not parts.biases else "lora_only" if only_lora else "all",
        "fan_in_fan_out": any(name.rpartition(".")[2] in leaves for name in modules),
    }


def _in_place(tuned: Checkpoint, parts: _Sorted) -> set[str]:
    """Kept embeddings that may be the head, too: no other tensor outside the layers is as large.

    modules_to_save would copy them, and leave the head as in the base; in the file but not listed
    there, PEFT loads them into the model itself, as it does with resized embeddings.
    """
    shapes = [
        info.shape
        for name, info in tuned.tensors.items()
        if not any(part.isdigit() for part in name.split("."))
    ]
    return {
        module
        for module in parts.modules
        if any(fnmatch.fnmatchcase(f"{module}.weight", pattern) for pattern in EMBEDDINGS)
        and (info := tuned.tensors.get(f"{module}.weight")) is not None
        and len(info.shape) == 2
        and shapes.count(info.shape) <= 1
    }


def _prefix(base: Checkpoint) -> str:
    """What opening took from every name of a transformers folder: its models have those names."""
    stripped = [match[1] for note in base.notes if (match := _STRIPPED.fullmatch(note))]
    config = base.home / "config.json"
    if not stripped or not config.is_file():
        return ""
    content = parse_json(config.read_bytes(), str(config))
    return stripped[0] if isinstance(content, dict) and "architectures" in content else ""


def _record(
    base: Checkpoint,
    tuned: Checkpoint,
    parts: _Sorted,
    prefix: str,
    modules: Mapping[str, NewModule],
    rank: int | None,
    energy: float | None,
) -> dict[str, Any]:
    """What was done with every tensor that differs."""
    return {
        "base": base.path,
        "tuned": tuned.path,
        "rank": rank,
        "energy": energy,
        "prefix": prefix,
        "modules": {
            name: {
                "rank": module.factors.rank,
                "relative_error": module.factors.relative_error,
                "relative_change": parts.low_rank[name.removeprefix(prefix) + ".weight"],
            }
            for name, module in modules.items()
        },
        "biases": dict(sorted(parts.biases.items())),
        "stored_whole": dict(sorted(parts.modules.items())),
        "stored_in_place": sorted(_in_place(tuned, parts)),
        "not_represented": dict(sorted(parts.lost.items())),
        "only_in_base": sorted(base.tensors.keys() - tuned.tensors.keys()),
    }
