"""The files beside the weights: what the result needs to open where its models did; no torch.

Configs, tokenizers and preprocessors of transformers, open_clip and timm travel as data. Weights
are made anew, and what could run when it is opened (pickles, Python) stays behind, by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from inputs.files import write_whole
from merge.errors import MergeError
from merge.result.layer_counts import set_layers
from merge.result.vocabularies import TokenizerCheck, check_tokenizers

__all__ = [
    "COMPANIONS",
    "TokenizerCheck",
    "check_config",
    "check_tokenizer",
    "check_tokenizers",
    "copy_companions",
    "library_of",
]

CONFIGS = (
    "config.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
)
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "*.spm",
    "*.tiktoken",
)
COMPANIONS = (*CONFIGS, *TOKENIZERS)
"""Globs of the files that travel; also what to ask the Hub for besides the weights."""

# What was merged, which needs no mention.
WEIGHTS = ("*.safetensors", "*.index.json", "pytorch_model*.bin", "open_clip_pytorch_model.bin")
CODE = ("*.py", "*.pyc", "*.so")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.th", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
LIMIT_BYTES = 128 << 20
NAMES_SHOWN = 8
DTYPE_KEYS = ("torch_dtype", "dtype")

Json = dict[str, Any]


def copy_companions(
    giver: Path,
    out: Path,
    *,
    layers: int | Sequence[int] | None = None,
    dtype: str | None = None,
    tokenizer_from: Path | None = None,
) -> list[str]:
    """Copy what belongs to a result in the folder `out` from the folder of one of its models.

    config.json then says the result's `dtype` ("bfloat16"; where it says one) and its number of
    layers. `layers` is that number, or for each layer of the result the place of the giver's
    layer that it stands for, which lists with an entry per layer follow. The tokenizer comes from
    `tokenizer_from` where given. Returns notes on what was changed and what was left, and why.
    Raises MergeError for a config.json that is no JSON or cannot say the number of layers.
    """
    if not giver.is_dir():
        return [f"{giver}: is not a folder; no config and no tokenizer were copied"]
    for source in (giver, tokenizer_from):
        if source is not None and source.resolve() == out.resolve():
            raise MergeError(f"{out}: is also the folder that its config would come from")
    taken, notes = _sorted_out(giver, CONFIGS if tokenizer_from else COMPANIONS)
    if tokenizer_from is not None:
        tokenizer, more = _tokenizer_of(tokenizer_from)
        taken |= tokenizer
        notes += [note for note in more if note not in notes]
    config = taken.pop("config.json", None)
    if config is not None:
        content, more = _edited_config(config, layers=layers, dtype=dtype)
        write_whole(out / "config.json", content)
        notes += more
    elif layers is not None:
        notes.append(f"{giver}: has no config.json that says the number of layers")
    for name, path in taken.items():
        write_whole(out / name, path.read_bytes())
    return notes


def check_config(giver: Path, *, layers: int | Sequence[int] | None = None) -> None:
    """Raise what `copy_companions` would raise for the giver's config.json, before any work."""
    config = giver / "config.json"
    if config.is_file() and _reason(config, _home(giver), CONFIGS) is None:
        _edited_config(config, layers=layers, dtype=None)


def check_tokenizer(folder: Path) -> None:
    """Raise what `copy_companions` would raise for `tokenizer_from`, before any work."""
    _tokenizer_of(folder)


def library_of(folder: Path) -> str | None:
    """Which library opens a folder: `transformers`, `open_clip`, `timm`; None if none says so."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    if not (folder / "config.json").is_file():
        return None
    config = _load_config(folder / "config.json")
    if "model_type" in config:
        return "transformers"
    return "timm" if "architecture" in config else None


# --- which files --------------------------------------------------------------------------------


def _sorted_out(
    folder: Path, wanted: Sequence[str], *, unsaid: Sequence[str] = WEIGHTS
) -> tuple[dict[str, Path], list[str]]:
    """Name → file of what travels, and why all else but `unsaid` does not."""
    home = _home(folder)
    taken: dict[str, Path] = {}
    left: dict[str, list[str]] = {}
    entries = sorted(folder.iterdir())
    if not any(_matches(path.name, wanted) for path in entries):
        return {}, []  # just where the weights lie
    for path in entries:
        reason = _reason(path, home, wanted)
        if reason is None:
            taken[path.name] = path
        elif not _matches(path.name, unsaid):
            left.setdefault(reason, []).append(path.name)
    return taken, [f"not copied: {_listed(names)}: {reason}" for reason, names in left.items()]


def _tokenizer_of(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Name → file of a folder's tokenizer, and why other files are none of it."""
    files, notes = _sorted_out(folder, TOKENIZERS, unsaid=(*WEIGHTS, *CONFIGS))
    if not files:
        raise MergeError(
            f"{folder}: holds no tokenizer (wanted one of {', '.join(TOKENIZERS[:2])} or a "
            "vocabulary); name another model in tokenizer_source"
        )
    return files, notes


def _reason(path: Path, home: Path, wanted: Sequence[str]) -> str | None:
    """Why a file stays behind; None for one that travels."""
    name = path.name
    if _matches(name, CODE):
        return "code; read it, and copy it yourself if you trust it"
    if _matches(name, PICKLES):
        return "may be a pickle, which runs code when it is opened"
    if not _matches(name, wanted):
        elsewhere = _matches(name, COMPANIONS)
        return "the tokenizer comes from another model" if elsewhere else "no config or tokenizer"
    if not path.resolve().is_relative_to(home):
        return f"a link to {path.resolve()}, outside {home}; put the file itself there"
    if not path.is_file():
        return "not a regular file"
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        return f"has {size} bytes, at most {LIMIT_BYTES} are copied"
    with path.open("rb") as file:
        if file.read(4).startswith(PICKLE_STARTS):
            return "begins like a pickle, which runs code when it is opened"
    return None


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return ", ".join([*names[:NAMES_SHOWN], *more])


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _home(folder: Path) -> Path:
    """Where links may lead: the folder; in the Hub's cache, the repository with its blobs."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        return home.parent.parent
    return home


# --- config.json --------------------------------------------------------------------------------


def _edited_config(
    path: Path, *, layers: int | Sequence[int] | None, dtype: str | None
) -> tuple[bytes, list[str]]:
    """The content for the result, byte for byte the giver's where nothing is to be changed."""
    config = _load_config(path)
    before = json.dumps(config)
    notes = _code_notes(config)
    if config.pop("quantization_config", None) is not None:
        notes.append("config.json: quantization_config removed: the result is not quantised")
    if dtype is not None:
        notes += _set_dtype(config, dtype)
    if layers is not None:
        notes += set_layers(config, layers, str(path))
    if json.dumps(config) == before:
        return path.read_bytes(), notes
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), notes


def _load_config(path: Path) -> Json:
    try:
        # Not the strict reader of headers: configs may hold Infinity.
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path}: is not valid JSON ({error}); get or write it again") from error
    if not isinstance(config, dict):
        raise MergeError(f"{path}: holds a {type(config).__name__}, wanted keys and values")
    return config


def _code_notes(config: Json) -> list[str]:
    """What the config wants run: it stays named there, and is not copied."""
    if not config.get("auto_map"):
        return []
    return [
        f"config.json: auto_map names code ({json.dumps(config['auto_map'])}) that is not copied; "
        "a model type that the library does not know opens only with it"
    ]


def _set_dtype(config: Json, dtype: str, where: str = "") -> list[str]:
    """Set the dtype where one is said, in the configs of parts too."""
    notes = []
    for key, value in config.items():
        if key in DTYPE_KEYS and isinstance(value, str) and value != dtype:
            config[key] = dtype
            notes.append(f"config.json: {where}{key} set to {dtype}, was {value}")
        elif key.endswith("_config") and isinstance(value, dict):
            notes += _set_dtype(value, dtype, f"{where}{key}.")
    return notes
