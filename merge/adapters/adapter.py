"""A LoRA adapter of PEFT: which modules it changes, their factors, and what it stores whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from merge.adapters.settings import CONFIG_NAME, AdapterConfig, read_config
from merge.checkpoints.envelopes import quoted
from merge.checkpoints.open import open_checkpoint
from merge.checkpoints.tensors import Checkpoint
from merge.errors import MergeError

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."

# `<module>.lora_A[.<adapter>].weight`, and for embeddings `<module>.lora_embedding_A[.<adapter>]`.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?()")


@dataclass(frozen=True)
class Module:
    """One adapted module: the change of its weight is `scaling · B @ A`.

    B is [out, rank] and A [rank, in], whatever the weight's own layout: `linear` weights are
    [out, in] (or [in, out]), `conv` ones [out, *window] with in = Π window, `embedding` ones are
    [in, out]. `a`, `b` and `b_bias` are the names of the tensors in the adapter's file.
    """

    name: str
    kind: Literal["linear", "conv", "embedding"]
    a: str
    b: str
    b_bias: str | None
    rank: int
    scaling: float
    rows: int
    window: tuple[int, ...]

    @property
    def describe(self) -> str:
        """What the factors are for, in words."""
        sizes = [self.rows, *self.window]
        return f"{self.kind} {sizes[::-1] if self.kind == 'embedding' else sizes}"


class Adapter:
    """A LoRA adapter that is read one module at a time; a context manager.

    `modules` maps the names of the adapted modules (as in the model, without PEFT's wrapper) to
    what is known of them, `saved` the names of tensors that the adapter stores whole (trained
    biases, modules_to_save) to their names in `checkpoint`. `content` is the config file.
    """

    def __init__(
        self, path: str, config: AdapterConfig, content: dict[str, Any], checkpoint: Checkpoint
    ) -> None:
        self.path = path
        self.config = config
        self.content = content
        self.checkpoint = checkpoint
        self.notes = checkpoint.notes
        self.modules, self.saved = _sort(path, config, checkpoint)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Adapter({self.path!r}, {len(self.modules)} modules)"

    def factors(
        self, name: str, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """B and A of one module, without the scaling."""
        module = self.modules[name]
        shapes = ((module.b, (module.rows, module.rank)), (module.a, (module.rank, -1)))
        b, a = (self.checkpoint.read(stored).to(dtype).reshape(shape) for stored, shape in shapes)
        return b, a

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        self.checkpoint.close()


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder with an adapter's config."""
    return (Path(path) / CONFIG_NAME).is_file()


def open_adapter(path: str | Path) -> Adapter:
    """Open a folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises MergeError for files that are missing or malformed, factors that do not fit each other
    or the config, and for variants that are not `W + s·B·A` (DoRA, PiSSA without conversion, …).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MergeError(f"{path}: is no folder; wanted one with {CONFIG_NAME} and the weights")
    config, content = read_config(folder)
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise MergeError(
            f"{path}: has no weights; wanted {' or '.join(WEIGHT_NAMES)} beside the config"
        )
    checkpoint = open_checkpoint(weights)
    try:
        return Adapter(str(path), config, content, checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _sort(
    path: str, config: AdapterConfig, checkpoint: Checkpoint
) -> tuple[dict[str, Module], dict[str, str]]:
    """The tensors of an adapter as factors of modules and as tensors stored whole."""
    parts: dict[tuple[str, bool], dict[str, str]] = {}
    saved: dict[str, str] = {}
    adapters: set[str | None] = set()
    for stored in checkpoint.tensors:
        name = stored.removeprefix(WRAPPER)
        found = _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if found:
            module, side, adapter, suffix = found.groups()
            adapters.add(adapter)
            part = f"{side}.bias" if suffix == "bias" else side
            factors = parts.setdefault((module, ".lora_embedding_" in name), {})
            if part in factors:
                raise MergeError(
                    f"{path}: has {factors[part]!r} and {stored!r}, wanted one of them"
                )
            factors[part] = stored
        elif ".lora_" in name:
            raise MergeError(
                f"{path}: holds {stored!r}, which is no part of a plain LoRA (lora_A and lora_B); "
                "merge it with PEFT (merge_and_unload) and give the merged model"
            )
        else:
            saved[_name_in_model(name)] = stored
    if len(adapters) > 1:
        raise MergeError(
            f"{path}: holds several adapters ({quoted(sorted(map(str, adapters)))}) in one file, "
            "wanted one; save each in a folder of its own"
        )
    if not parts:
        raise MergeError(f"{path}: has no tensor named lora_A or lora_B; it is no LoRA adapter")
    modules = {
        module: _check(path, module, factors, embedding, config, checkpoint)
        for (module, embedding), factors in sorted(parts.items())
    }
    return modules, saved


def _name_in_model(name: str) -> str:
    """The model's own name of a tensor below PEFT's wrappers of its module."""
    name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name)
    return re.sub(r"\.base_layer(?=\.[^.]+$)", "", name)


def _check(
    path: str,
    name: str,
    parts: Mapping[str, str],
    embedding: bool,
    config: AdapterConfig,
    checkpoint: Checkpoint,
) -> Module:
    """A module whose factors fit each other and the config; else MergeError."""
    where = f"{path}: {name!r}"
    if not {"A", "B"} <= parts.keys() or "A.bias" in parts:
        raise MergeError(f"{where}: has {quoted(sorted(parts.values()))}; wanted lora_A and lora_B")
    infos = {part: checkpoint.tensors[stored] for part, stored in parts.items()}
    for info in infos.values():
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise MergeError(f"{where}: {info.name!r} is {info.dtype}, wanted 16 to 64-bit floats")
    a, b = list(infos["A"].shape), list(infos["B"].shape)
    fits = len(a) >= 2 and len(b) == len(a) and a[0] == b[1] and set(b[2:]) <= {1}
    if not fits or 0 in (*a, *b):
        raise MergeError(
            f"{where}: lora_A is {a} and lora_B {b}; wanted [rank, in] and [out, rank] "
            "(of a convolution [rank, in, *kernel] and [out, rank, 1, …])"
        )
    if "B.bias" in infos and infos["B.bias"].shape != (b[0],):
        found = list(infos["B.bias"].shape)
        raise MergeError(f"{where}: the bias of lora_B is {found}, wanted [{b[0]}]")
    if a[0] != config.rank_of(name):
        raise MergeError(
            f"{where}: its factors have rank {a[0]}, {CONFIG_NAME} says {config.rank_of(name)} "
            "(r, rank_pattern), which the scaling depends on; the files do not belong together"
        )
    return Module(
        name=name,
        kind="embedding" if embedding else "linear" if len(a) == 2 else "conv",
        a=parts["A"],
        b=parts["B"],
        b_bias=parts.get("B.bias"),
        rank=a[0],
        scaling=config.scaling_of(name),
        rows=b[0],
        window=tuple(a[1:]),
    )
