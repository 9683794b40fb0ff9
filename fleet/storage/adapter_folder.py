"""A variant's own as an adapter folder: a LoRA as PEFT reads it, or bottleneck adapters."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.base import stored_base
from fleet.storage.decoding import BOTTLENECK, BOTTLENECK_PARTS
from fleet.storage.hashes import tensor_hash
from fleet.storage.records import BASE, Encoded, Variant
from inputs.files import write_whole
from merge.adapters.adapter import WRAPPER
from merge.adapters.folder import WEIGHTS_NAME, check_free, exact_targets
from merge.adapters.matching import transposed_leaves
from merge.adapters.settings import CONFIG_NAME
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.checkpoints.strict_json import parse_json
from merge.checkpoints.tensors import TensorInfo
from merge.checkpoints.writer import CheckpointWriter

if TYPE_CHECKING:
    from fleet.variants import Store

BOTTLENECKS_CONFIG = "bottlenecks.json"
BOTTLENECKS_WEIGHTS = "bottlenecks.safetensors"
# What a weight of two axes is, where its rows are not its outputs: a setting of `low_rank`.
LAYER = "layer"
EMBEDDING = "embedding"
TRANSPOSED = "transposed"

_OWN, _WHOLE = "adapters", "tensors"


@dataclass
class _Lora:
    """What is written: tensors by PEFT's names, and of each module rank and alpha."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False


def write_adapter_folder(store: Store, name: str, folder: Path, *, prefix: str = "") -> None:
    """Write what a variant has over the base into a new folder; the config comes last.

    Low-rank tensors are LoRA modules, and what is stored whole are modules to save; `prefix` is put
    before each name to get the model's own. Bottleneck adapters, and what is stored whole beside
    them, are `bottlenecks.safetensors` and `bottlenecks.json`.
    Raises FleetError for a variant that is more than that, or made from a node with tensors.
    """
    variant = store.variant(name)
    where = f"{store.folder}: variant {name!r}"
    between = [n.name for n in store.path(name) if n.name != BASE and n.tensors]
    if between:
        raise FleetError(
            f"{where}: is made from the node {between[-1]!r}, which differs from the base; an "
            "adapter is over the base itself: export the whole checkpoint"
        )
    wanted = {"plain"} if variant.adapters else {"plain", "low_rank"}
    other = {key: e.encoding for key, e in variant.tensors.items() if e.encoding not in wanted}
    if other:
        key, encoding = next(iter(other.items()))
        raise FleetError(
            f"{where}: {len(other)} of its tensors are neither of {', '.join(sorted(wanted))} "
            f"({key!r} is {encoding}), as an adapter's are; export the whole checkpoint"
        )
    out = check_free(folder)
    if variant.adapters:
        _write_bottlenecks(store, variant, out)
    else:
        _write_lora(store, variant, out, prefix, where)


def is_bottlenecks(path: str | Path) -> bool:
    """Whether `path` is a folder with bottleneck adapters."""
    return (Path(path) / BOTTLENECKS_CONFIG).is_file()


def bottleneck_files(folder: Path) -> list[Path]:
    """The files of a folder of bottleneck adapters."""
    return [folder / BOTTLENECKS_CONFIG, folder / BOTTLENECKS_WEIGHTS]


def read_bottlenecks(name: str, path: str | Path) -> tuple[Variant, dict[str, Shaped[Tensor, ...]]]:
    """The variant in a folder of bottleneck adapters, over the base, and its tensors by hash.

    Raises FleetError where the files do not belong together; what they hold is checked by the
    store that they are added to.
    """
    config = Path(path) / BOTTLENECKS_CONFIG
    where = str(config)
    content = parse_json(config.read_bytes(), where)
    if not isinstance(content, dict) or content.keys() != {_OWN, "classes"}:
        raise FleetError(f"{where}: found {reprlib.repr(content)}, wanted {_OWN} and classes")
    given, classes = content[_OWN], content["classes"]
    if not isinstance(given, dict) or not all(isinstance(s, dict) for s in given.values()):
        raise FleetError(
            f"{where}: {_OWN}: found {reprlib.repr(given)}, wanted an object of settings by module"
        )
    if classes is not None and type(classes) is not int:
        raise FleetError(
            f"{where}: classes: found {reprlib.repr(classes)}, wanted a number or null"
        )
    tensors: dict[str, Tensor] = {}

    def record(encoding: str, parts: Mapping[str, str], settings: Any) -> Encoded:
        read = {part: checkpoint.read(stored) for part, stored in parts.items()}
        hashes = {part: tensor_hash(value) for part, value in read.items()}
        tensors.update((hashes[part], value) for part, value in read.items())
        return Encoded(encoding, hashes, settings)

    with open_checkpoint(Path(path) / BOTTLENECKS_WEIGHTS) as checkpoint:
        whole = dict(_below(_WHOLE, checkpoint))
        own = {module: sorted(BOTTLENECK_PARTS) for module in given}
        names = {f"{_OWN}/{module}/{part}" for module, parts in own.items() for part in parts}
        if names != {stored for stored, _ in _below(_OWN, checkpoint)}:
            raise FleetError(
                f"{where}: tells of {len(given)} adapters, {BOTTLENECKS_WEIGHTS} holds others; the "
                "files do not belong together: export it again"
            )
        adapters = {
            module: record(
                BOTTLENECK, {part: f"{_OWN}/{module}/{part}" for part in own[module]}, settings
            )
            for module, settings in given.items()
        }
        plain = {key: record("plain", {"value": stored}, {}) for stored, key in whole.items()}
    about = {"source": Path(path).name, "error": 0.0}
    return Variant(name, BASE, plain, classes, about, adapters), tensors


def _write_bottlenecks(store: Store, variant: Variant, folder: Path) -> None:
    parts = store.parts(variant.name)
    tensors = {
        f"{_OWN}/{module}/{part}": value
        for module in variant.adapters
        for part, value in parts[module].items()
    }
    tensors |= {f"{_WHOLE}/{key}": parts[key]["value"] for key in variant.tensors}
    _write(folder / BOTTLENECKS_WEIGHTS, tensors)
    adapters = {module: encoded.settings for module, encoded in variant.adapters.items()}
    _write_json(folder / BOTTLENECKS_CONFIG, {_OWN: adapters, "classes": variant.classes})


def _write_lora(store: Store, variant: Variant, folder: Path, prefix: str, where: str) -> None:
    lora = _Lora()
    with stored_base(store) as base:
        saved = _saved_modules(variant, base, where)
        leaves = transposed_leaves(base)
        parts = store.parts(variant.name)
        for key, encoded in variant.tensors.items():
            if encoded.encoding == "low_rank":
                _take_module(lora, key, encoded, parts[key], base, leaves, prefix, where)
    if not lora.ranks:
        raise FleetError(f"{where}: has no low-rank tensors; export the whole checkpoint")
    biases = {
        key
        for key in variant.tensors
        if key.endswith(".bias") and prefix + key.removesuffix(".bias") in lora.ranks
    }
    for key in [key for module in saved for key in saved[module]] + sorted(biases):
        module, _, last = key.rpartition(".")
        layer = f"{module}.base_layer" if key in biases else module
        lora.tensors[f"{WRAPPER}{prefix}{layer}.{last}"] = store.tensor(variant.name, key)
    _write(folder / WEIGHTS_NAME, lora.tensors)
    rank = Counter(lora.ranks.values()).most_common(1)[0][0]
    alpha = Counter(lora.alphas.values()).most_common(1)[0][0]
    config = {
        **exact_targets([*lora.ranks]),
        "alpha_pattern": {f"^{m}": a for m, a in sorted(lora.alphas.items()) if a != alpha},
        "base_model_name_or_path": None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": lora.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(prefix + module for module in saved) or None,
        "peft_type": "LORA",
        "r": rank,
        # Patterns match the ends of names unless they begin with ^.
        "rank_pattern": {f"^{m}": r for m, r in sorted(lora.ranks.items()) if r != rank},
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    _write_json(folder / CONFIG_NAME, config)


def _take_module(
    lora: _Lora,
    key: str,
    encoded: Encoded,
    parts: Mapping[str, Tensor],
    base: Checkpoint,
    leaves: frozenset[str],
    prefix: str,
    where: str,
) -> None:
    """W + scale · up @ down as A and B of a module."""
    shape = base.tensors[key].shape
    module, dot, last = key.rpartition(".")
    if not dot or last != "weight" or len(shape) < 2:
        raise FleetError(
            f"{where}: {key!r} of {list(shape)} is no weight of a module, which LoRA is on; export "
            "the whole checkpoint"
        )
    up, down = parts["up"], parts["down"]
    layer = encoded.settings.get(LAYER)
    transposed = layer == TRANSPOSED or (layer is None and module.rpartition(".")[2] in leaves)
    rank = len(down)
    if layer == EMBEDDING or (transposed and len(shape) == 2):
        up, down = down.T, up.T
        lora.fan_in_fan_out |= transposed
    elif len(shape) > 2:
        down = down.reshape(rank, *shape[1:])
        up = up.reshape(len(up), rank, *[1] * (len(shape) - 2))
    left, end = ("lora_embedding_", "") if layer == EMBEDDING else ("lora_", ".weight")
    name = prefix + module
    for side, factor in (("A", down), ("B", up)):
        lora.tensors[f"{WRAPPER}{name}.{left}{side}{end}"] = factor.contiguous()
    lora.ranks[name] = rank
    lora.alphas[name] = rank * float(encoded.settings["scale"])


def _saved_modules(variant: Variant, base: Checkpoint, where: str) -> dict[str, list[str]]:
    """Modules of which a tensor is stored whole, and all of their tensors.

    Also modules whose names end with one of theirs: PEFT matches by endings.
    """
    low_rank = {key for key, e in variant.tensors.items() if e.encoding == "low_rank"}
    own: dict[str, list[str]] = {}
    for key in {**dict.fromkeys(base.tensors), **dict.fromkeys(variant.tensors)}:
        own.setdefault(key.rpartition(".")[0], []).append(key)
    whole = {
        key.rpartition(".")[0]
        for key in variant.tensors.keys() - low_rank
        if not (key.endswith(".bias") and f"{key.removesuffix('.bias')}.weight" in low_rank)
    }
    if "" in whole:
        raise FleetError(
            f"{where}: {own[''][0]!r} is a bare parameter, which PEFT cannot store; export the "
            "whole checkpoint"
        )
    saved = {module: own[module] for module in own if any(module.endswith(w) for w in whole)}
    both = sorted(low_rank & {key for keys in saved.values() for key in keys})
    if both:
        raise FleetError(
            f"{where}: {both[0]!r} is low-rank in a module that is stored whole; export the whole "
            "checkpoint"
        )
    return saved


def _below(kind: str, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    for stored in checkpoint.tensors:
        if stored.startswith(f"{kind}/"):
            yield stored, stored.removeprefix(f"{kind}/")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with CheckpointWriter(path, infos, metadata={"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
