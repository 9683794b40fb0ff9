"""The model card: what was merged, how, from what, and how to open it; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from inputs.budget import format_bytes
from merge.documentation import reference
from merge.registry import METHODS
from merge.result.companions import library_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAMES_SHOWN = 8
PLACE = "path/to/this/folder"


def model_card(config_yaml: str, record: Mapping[str, Any], *, folder: Path | None = None) -> str:
    """The README.md of a result, from its config and the record of the merge.

    `folder` holds the result's config files; they tell which library opens it. Local models go by
    their file names, but the config is there as it was given, paths included.
    """
    library = library_of(folder) if folder is not None else None
    sections = (
        _front_matter(record, library),
        f"# {_title(record)}\n\n{_opening(record)}",
        f"## Use\n\n{_fenced(_snippet(library, folder), 'python')}",
        _section("Models", _models(record)),
        _section("Config", _fenced(config_yaml.strip("\n"), "yaml")),
        _section("Methods", _methods(record)),
        _section("Not merged", _carried(record)),
        _section("Notes", "\n".join(f"- {_plain(note)}" for note in record.get("notes", ()))),
        _section("Run", _run(record)),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


# --- what it is ---------------------------------------------------------------------------------


def _front_matter(record: Mapping[str, Any], library: str | None) -> str:
    """What the Hub reads: only models that can be found there are named."""
    ids = dict.fromkeys(i for one in _ingredients(record) for i in _hub_ids(one["name"]))
    content: dict[str, Any] = {}
    if ids:
        content |= {"base_model": [*ids], "base_model_relation": "merge"}
    if library is not None:
        content["library_name"] = library
    content["tags"] = ["merge"]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _title(record: Mapping[str, Any]) -> str:
    names = ", ".join(record.get("methods", ())) or "merge"
    return f"{names}: {_counted(len(_ingredients(record)), 'model')}"


def _opening(record: Mapping[str, Any]) -> str:
    methods = [_linked(name) for name in record.get("methods", ())]
    by = f" by {_joined(methods)}" if methods else ""
    count = _counted(len(_ingredients(record)), "model")
    return (
        f"The weights were merged from {count}{by}. The config below makes them again. Their "
        "licences are those of the models."
    )


def _linked(name: str) -> str:
    method = METHODS.get(name)
    return f"`{name}`" if method is None else f"[`{name}`]({reference(method.paper)})"


def _hub_ids(name: str) -> list[str]:
    """The Hub's models in a reference: `owner/model@revision+owner/adapter`."""
    parts = [part.partition("@")[0] for part in name.split("+")]
    weights = (".safetensors", ".json", ".pt", ".pth", ".bin")
    return [
        part
        for part in parts
        if HUB_ID.fullmatch(part) and not part.endswith(weights) and not Path(part).parent.exists()
    ]


# --- tables and lists ---------------------------------------------------------------------------


def _models(record: Mapping[str, Any]) -> str:
    rows = [
        (_model(one["name"]), f"`{one['sha256']}`" if one.get("sha256") else "not read")
        for one in _ingredients(record)
    ]
    return _table(("model", "SHA-256 of its tensors"), rows) if rows else ""


def _model(name: str) -> str:
    ids = _hub_ids(name)
    if ids:
        return f"[{_plain(name)}](https://huggingface.co/{ids[0]})"
    path = Path(name)
    return f"`{path.name or name}`"


def _methods(record: Mapping[str, Any]) -> str:
    counts = record.get("methods", {})
    rows = [
        (_linked(name), str(count), _plain(METHODS[name].summary) if name in METHODS else "")
        for name, count in counts.items()
    ]
    return _table(("method", "tensors", ""), rows) if rows else ""


def _carried(record: Mapping[str, Any]) -> str:
    """The tensors that were taken as they are, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in record.get("carried", {}).items():
        reasons.setdefault(reason, []).append(name)
    rows = [(_plain(reason), str(len(n)), _names(n)) for reason, n in reasons.items()]
    return _table(("why", "tensors", ""), rows) if rows else ""


def _run(record: Mapping[str, Any]) -> str:
    lines = []
    if "bytes_read" in record and "bytes_written" in record:
        lines.append(
            f"- {format_bytes(record['bytes_read'])} read, "
            f"{format_bytes(record['bytes_written'])} written"
        )
    if "seconds" in record and "peak_bytes" in record:
        lines.append(
            f"- {record['seconds']:.1f} s, at most {format_bytes(record['peak_bytes'])} of memory"
        )
    versions = record.get("versions", {})
    if versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(lines)


def _ingredients(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return record.get("ingredients", ())


# --- how to open it -----------------------------------------------------------------------------


def _snippet(library: str | None, folder: Path | None) -> str:
    if library == "transformers":
        kind = _architecture(folder) or "AutoModel"
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{PLACE}")'
    if library == "timm":
        return f'import timm\n\nmodel = timm.create_model("local-dir:{PLACE}", pretrained=True)'
    if library == "open_clip":
        call = f'open_clip.create_model_and_transforms("local-dir:{PLACE}")'
        return f"import open_clip\n\nmodel, _, preprocess = {call}"
    return "\n".join(
        [
            "from pathlib import Path",
            "",
            "from safetensors.torch import load_file",
            "",
            "weights = {}",
            f'for file in Path("{PLACE}").glob("*.safetensors"):',
            "    weights |= load_file(file)",
            "model.load_state_dict(weights)",
        ]
    )


def _architecture(folder: Path | None) -> str | None:
    """The class that config.json names, if it is a name at all and not of code of its own."""
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_bytes())
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = isinstance(name, str) and name.isidentifier() and not config.get("auto_map")
    return name if known else None


# --- Markdown -----------------------------------------------------------------------------------


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def _fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN]) + more


def _plain(text: str) -> str:
    """Text on one line that Markdown does not take for markup."""
    return re.sub(r"([\\`*_<\[\]])", r"\\\1", " ".join(text.split()))


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
