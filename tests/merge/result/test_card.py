"""The model card says what was merged, and breaks on nothing that the record holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge.result.card import model_card

CONFIG = "merge_method: linear\nmodels:\n- model: owner/a\n- model: zoo/b\n"
RECORD: dict[str, Any] = {
    "config": CONFIG,
    "ingredients": [
        {"name": "owner/a@main", "path": "owner/a", "sha256": "a" * 64},
        {"name": "/home/me/zoo/b_x.safetensors", "path": "/home/me/zoo/b_x", "sha256": "b" * 64},
    ],
    "methods": {"linear": 7, "odd|one": 1},
    "carried": {"steps": "integers", "head.weight": "skip: 'head.*'", "n": "integers"},
    "notes": ["config.json: torch_dtype set to bfloat16", "a *star* and a\nbreak"],
    "bytes_read": 3 << 20,
    "bytes_written": 1 << 20,
    "seconds": 1.25,
    "peak_bytes": 1 << 30,
    "versions": {"python": "3.11", "torch": "2.6"},
}


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0]


def test_the_front_matter_names_what_the_hub_has() -> None:
    assert front_matter(model_card(CONFIG, RECORD)) == {
        "base_model": ["owner/a"],
        "base_model_relation": "merge",
        "tags": ["merge"],
    }


def test_local_models_are_no_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["zoo/a", "x/b.safetensors", "./c/d", "owner/base@v1+owner/adapter", "e"]
    record = {"ingredients": [{"name": name, "path": name, "sha256": "0"} for name in names]}
    assert front_matter(model_card(CONFIG, record))["base_model"] == ["owner/base", "owner/adapter"]


def test_local_models_go_by_their_file_names_outside_of_the_config() -> None:
    config = CONFIG.replace("zoo/b", "/home/me/zoo/b_x.safetensors")
    card = model_card(config, RECORD)
    assert "`b_x.safetensors`" in section(card, "Models")
    assert card.count("/home/me") == section(card, "Config").count("/home/me") == 1


def test_the_sections_say_what_the_record_holds() -> None:
    card = model_card(CONFIG, RECORD)
    assert "# linear, odd|one: 2 models\n" in card
    assert "from 2 models by [`linear`](https://arxiv.org/abs/2203.05482) and `odd|one`." in card
    models = section(card, "Models").splitlines()
    assert models[2:] == [
        f"| [owner/a@main](https://huggingface.co/owner/a) | `{'a' * 64}` |",
        f"| `b_x.safetensors` | `{'b' * 64}` |",
    ]
    assert "/home/me" not in card
    assert section(card, "Config") == f"```yaml\n{CONFIG}```"
    assert (
        section(card, "Methods")
        .splitlines()[2]
        .startswith("| [`linear`](https://arxiv.org/abs/2203.05482) | 7 | ")
    )
    assert section(card, "Not merged").splitlines()[2:] == [
        "| integers | 2 | `steps`, `n` |",
        "| skip: 'head.\\*' | 1 | `head.weight` |",
    ]
    assert section(card, "Notes").splitlines() == [
        "- config.json: torch\\_dtype set to bfloat16",
        "- a \\*star\\* and a break",
    ]
    assert section(card, "Run").splitlines() == [
        "- 3.00 MiB read, 1.00 MiB written",
        "- 1.2 s, at most 1.00 GiB of memory",
        "- python 3.11, torch 2.6",
    ]


def test_every_row_of_a_table_has_its_columns() -> None:
    rows = [line for line in model_card(CONFIG, RECORD).splitlines() if line.startswith("|")]
    blocks = {title: section(model_card(CONFIG, RECORD), title) for title in ("Methods", "Models")}
    assert len(rows) > 8
    for block in blocks.values():
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_a_fence_in_the_config_does_not_end_its_block() -> None:
    card = model_card("# ````\nmerge_method: linear\n", RECORD)
    assert "`````yaml\n# ````\nmerge_method: linear\n`````" in card


def test_many_names_are_counted() -> None:
    record = RECORD | {"carried": {f"t{k}": "skip" for k in range(20)}}
    assert "| skip | 20 | `t0`, " in model_card(CONFIG, record)
    assert "`t7` and 12 more |" in model_card(CONFIG, record)
    assert "`t8`" not in model_card(CONFIG, record)


@pytest.mark.parametrize(
    ("files", "library", "code"),
    [
        (
            {"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}},
            "transformers",
            "LlamaForCausalLM.from_pretrained(",
        ),
        (
            {"config.json": {"model_type": "x", "architectures": ["X); import os"]}},
            "transformers",
            "AutoModel.from_pretrained(",
        ),
        (
            {"config.json": {"model_type": "x", "architectures": ["X"], "auto_map": {"a": "b"}}},
            "transformers",
            "AutoModel.from_pretrained(",
        ),
        ({"config.json": {"architecture": "resnet50"}}, "timm", "timm.create_model("),
        ({"open_clip_config.json": {}}, "open_clip", "open_clip.create_model_and_transforms("),
        ({}, None, "load_file(file)"),
    ],
)
def test_the_code_that_opens_it(
    tmp_path: Path, files: dict[str, Any], library: str | None, code: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    card = model_card(CONFIG, RECORD, folder=tmp_path)
    assert front_matter(card).get("library_name") == library
    snippet = section(card, "Use").removeprefix("```python\n").removesuffix("\n```")
    assert code in snippet
    compile(snippet, "snippet", "exec")


def test_a_record_without_anything_makes_a_card() -> None:
    card = model_card(CONFIG, {})
    assert front_matter(card) == {"tags": ["merge"]}
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == ["Use", "Config"]
