"""The files beside the weights: which travel, what is changed in them, and what never does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from merge.errors import MergeError
from merge.result.companions import (
    TokenizerCheck,
    check_config,
    check_tokenizer,
    check_tokenizers,
    copy_companions,
    library_of,
)

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "torch_dtype": "float32",
    "eos_token_id": [1, 2, 3, 4],
    "layer_types": ["sliding", "full", "sliding", "full"],
}


def folder(path: Path, files: dict[str, Any]) -> Path:
    """A folder with these files; what is neither text nor bytes becomes JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = content if isinstance(content, str) else json.dumps(content)
            content = content.encode()
        (path / name).write_bytes(content)
    return path


def copied(
    tmp_path: Path, config: dict[str, Any], **settings: Any
) -> tuple[dict[str, Any], list[str]]:
    notes = copy_companions(
        folder(tmp_path / "a", {"config.json": config}), tmp_path / "o", **settings
    )
    return json.loads((tmp_path / "o" / "config.json").read_text()), notes


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# --- which files --------------------------------------------------------------------------------


def test_configs_and_tokenizers_travel_byte_for_byte(tmp_path: Path) -> None:
    files = {
        "config.json": b'{"model_type":"llama",  "limit": [0.0, Infinity]}',
        "generation_config.json": "{}",
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "open_clip_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer.model": b"\x0a\x0e\x0a",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "vocab.txt": "a",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ x }}",
    }
    giver = folder(tmp_path / "a", files | {"model.safetensors": b"weights"})
    assert copy_companions(giver, tmp_path / "o", dtype="bfloat16") == []
    assert names(tmp_path / "o") == set(files)
    for name in files:
        assert (tmp_path / "o" / name).read_bytes() == (giver / name).read_bytes()


def test_code_pickles_and_the_rest_stay_and_are_named(tmp_path: Path) -> None:
    files = {"modeling_x.py": "boom()", "training_args.bin": b"x", "README.md": "", "a.pkl": b"."}
    giver = folder(tmp_path / "a", files | {"pytorch_model.bin": b"w", "tokenizer.json": "{}"})
    (giver / "onnx").mkdir()
    notes = copy_companions(giver, tmp_path / "o")
    assert names(tmp_path / "o") == {"tokenizer.json"}
    assert notes == [
        "not copied: README.md, onnx: no config or tokenizer",
        "not copied: a.pkl, training_args.bin: may be a pickle, which runs code when it is opened",
        "not copied: modeling_x.py: code; read it, and copy it yourself if you trust it",
    ]


def test_a_folder_with_weights_alone_needs_no_words(tmp_path: Path) -> None:
    giver = folder(tmp_path / "a", {"notes.md": "", "1.pt": b"", "2.safetensors": b""})
    assert copy_companions(giver, tmp_path / "o") == []
    assert not (tmp_path / "o").exists()


def test_a_crowd_of_other_files_is_counted(tmp_path: Path) -> None:
    crowd = {f"{k:02}.md": "" for k in range(11)}
    giver = folder(tmp_path / "a", {"vocab.txt": "", **crowd})
    (note,) = copy_companions(giver, tmp_path / "o")
    assert note.startswith("not copied: 00.md, 01.md, ")
    assert note.endswith(", 07.md, and 3 more: no config or tokenizer")


@pytest.mark.parametrize("start", [b"\x80\x04\x95", b"PK\x03\x04"])
def test_a_pickle_under_a_tokenizers_name_stays(tmp_path: Path, start: bytes) -> None:
    giver = folder(tmp_path / "a", {"tokenizer.model": start + b"x"})
    (note,) = copy_companions(giver, tmp_path / "o")
    assert "tokenizer.model: begins like a pickle" in note
    assert not (tmp_path / "o").exists()


def test_a_file_beyond_the_limit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge.result.companions.LIMIT_BYTES", 3)
    giver = folder(tmp_path / "a", {"vocab.txt": "abc", "merges.txt": "abcd"})
    assert copy_companions(giver, tmp_path / "o") == [
        "not copied: merges.txt: has 4 bytes, at most 3 are copied"
    ]
    assert names(tmp_path / "o") == {"vocab.txt"}


def test_links_out_of_the_folder_stay(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    giver = folder(tmp_path / "a", {"vocab.txt": "abc"})
    (giver / "merges.txt").symlink_to(secret)
    (giver / "vocab.json").symlink_to("vocab.txt")
    (giver / "tokenizer.json").symlink_to("nowhere")
    os.mkfifo(giver / "added_tokens.json")
    notes = copy_companions(giver, tmp_path / "o")
    assert names(tmp_path / "o") == {"vocab.txt", "vocab.json"}
    assert (
        f"not copied: merges.txt: a link to {secret}, outside {giver}; put the file itself there"
        in notes
    )
    assert "not copied: added_tokens.json, tokenizer.json: not a regular file" in notes


def test_the_blobs_of_the_hubs_cache_are_inside(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    blob = folder(repository / "blobs", {"1234": CONFIG}) / "1234"
    snapshot = folder(repository / "snapshots" / "abc", {})
    (snapshot / "config.json").symlink_to(Path("../../blobs") / blob.name)
    assert copy_companions(snapshot, tmp_path / "o") == []
    assert not (tmp_path / "o" / "config.json").is_symlink()
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == CONFIG


def test_a_giver_that_is_a_file_has_no_companions(tmp_path: Path) -> None:
    file = folder(tmp_path, {"a.safetensors": b"x", "config.json": CONFIG}) / "a.safetensors"
    (note,) = copy_companions(file, tmp_path / "o")
    assert "is not a folder" in note
    assert not (tmp_path / "o").exists()


def test_onto_the_giver_is_an_error(tmp_path: Path) -> None:
    giver = folder(tmp_path / "a", {"config.json": CONFIG})
    with pytest.raises(MergeError, match="is also the folder"):
        copy_companions(giver, tmp_path / "a" / ".." / "a", dtype="bfloat16")


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    giver = folder(tmp_path / "a", {"config.json": CONFIG, "tokenizer.json": "1", "vocab.txt": "1"})
    other = folder(tmp_path / "b", {"config.json": "{}", "tokenizer.json": "2", "x.py": ""})
    notes = copy_companions(giver, tmp_path / "o", tokenizer_from=other)
    assert names(tmp_path / "o") == {"config.json", "tokenizer.json"}
    assert (tmp_path / "o" / "tokenizer.json").read_text() == "2"
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == CONFIG
    assert "not copied: tokenizer.json, vocab.txt: the tokenizer comes from another model" in notes
    none = folder(tmp_path / "c", {"config.json": "{}"})
    with pytest.raises(MergeError, match="holds no tokenizer"):
        copy_companions(giver, tmp_path / "p", tokenizer_from=none)


# --- config.json --------------------------------------------------------------------------------


def test_the_dtype_is_set_where_one_is_said(tmp_path: Path) -> None:
    parts = {"text_config": {"dtype": "float16"}, "vision_config": {"depth": 2}}
    found, notes = copied(tmp_path, {**CONFIG, **parts, "dtype": None}, dtype="bfloat16")
    expected = {**CONFIG, **parts, "dtype": None, "torch_dtype": "bfloat16"}
    assert found == {**expected, "text_config": {"dtype": "bfloat16"}}
    assert list(found) == [*CONFIG, *parts, "dtype"]
    assert notes == [
        "config.json: torch_dtype set to bfloat16, was float32",
        "config.json: text_config.dtype set to bfloat16, was float16",
    ]


def test_custom_code_and_quantisation_are_noted(tmp_path: Path) -> None:
    extra = {"auto_map": {"AutoModel": "modeling_x.X"}, "quantization_config": {"bits": 4}}
    found, notes = copied(tmp_path, {**CONFIG, **extra})
    assert found == {**CONFIG, "auto_map": extra["auto_map"]}
    assert len(notes) == 2
    assert "modeling_x.X" in notes[0]
    assert "quantization_config removed" in notes[1]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none_is_an_error(tmp_path: Path, content: bytes) -> None:
    giver = folder(tmp_path / "a", {"config.json": content, "tokenizer.json": "{}"})
    with pytest.raises(MergeError, match=r"config\.json: (is not valid JSON|holds a list)"):
        copy_companions(giver, tmp_path / "o", dtype="bfloat16")
    assert not (tmp_path / "o").exists()


def test_lists_follow_the_layers_by_their_places(tmp_path: Path) -> None:
    config = {**CONFIG, "mlp_only_layers": [1], "max_window_layers": 2}
    found, notes = copied(tmp_path, config, layers=[0, 1, 2, 0, 1, 3])
    assert found == {
        **config,
        "num_hidden_layers": 6,
        "layer_types": ["sliding", "full", "sliding", "sliding", "full", "full"],
        "mlp_only_layers": [1, 4],
    }
    assert notes[0] == "config.json: num_hidden_layers set to 6, was 4"
    assert sum("follows the layers" in note for note in notes) == 2
    assert "max_window_layers kept as they are" in notes[-1]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
@pytest.mark.parametrize("layers", [1, 3, 9])
def test_the_number_alone_is_enough_for_lists_of_one_value(
    tmp_path: Path, key: str, layers: int
) -> None:
    config = {key: 4, "layer_types": ["full"] * 4, "eos_token_id": [1, 2, 3, 4]}
    found, _ = copied(tmp_path, config, layers=layers)
    assert found == {**config, key: layers, "layer_types": ["full"] * layers}


def test_the_same_layers_change_nothing(tmp_path: Path) -> None:
    assert copied(tmp_path, CONFIG, layers=4) == (CONFIG, [])
    assert copied(tmp_path, CONFIG, layers=[0, 1, 2, 3]) == (CONFIG, [])
    found, _ = copied(tmp_path, CONFIG, layers=[0, 0, 1, 1])
    assert found["layer_types"] == ["sliding", "sliding", "full", "full"]


def test_the_layers_of_the_language_model(tmp_path: Path) -> None:
    config = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 3}}
    found, notes = copied(tmp_path, config, layers=5)
    assert found["text_config"] == {"num_hidden_layers": 5}
    assert found["vision_config"] == {"num_hidden_layers": 2}
    assert notes == ["config.json: text_config.num_hidden_layers set to 5, was 3"]


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (CONFIG, 2, "layer_types has entries for single layers"),
        ({"n_layer": 2, "mlp_only_layers": [1]}, 3, "mlp_only_layers has entries"),
        ({"num_layers": 2, "attention_types": [[["global"], 2]]}, [0], "attention_types has"),
        ({"hidden_size": 2}, 3, "none of its configs say one"),
        ({"a_config": {"n_layer": 1}, "b_config": {"n_layer": 1}}, 3, "several of its configs"),
        ({"is_encoder_decoder": True, "num_layers": 2}, 3, "an encoder and a decoder"),
        (CONFIG, [3, 4], "is 4, but the slices take layer 4"),
    ],
)
def test_layers_that_the_config_cannot_say(
    tmp_path: Path, config: dict[str, Any], layers: Any, message: str
) -> None:
    with pytest.raises(MergeError, match=message):
        copied(tmp_path, config, layers=layers)
    assert not (tmp_path / "o").exists()
    with pytest.raises(MergeError, match=message):
        check_config(tmp_path / "a", layers=layers)
    check_config(tmp_path / "a")


@pytest.mark.parametrize(
    ("files", "library"),
    [
        ({"config.json": {"model_type": "llama"}}, "transformers"),
        ({"config.json": {"architecture": "resnet50"}}, "timm"),
        ({"config.json": {"model_type": "clip"}, "open_clip_config.json": {}}, "open_clip"),
        ({"config.json": {}}, None),
        ({}, None),
    ],
)
def test_the_library_that_opens_a_folder(
    tmp_path: Path, files: dict[str, Any], library: str | None
) -> None:
    assert library_of(folder(tmp_path / "a", files)) == library


# --- tokenizers ---------------------------------------------------------------------------------


def tokenizer(vocabulary: Any, **more: Any) -> dict[str, Any]:
    return {"model": {"vocab": vocabulary, "merges": more.pop("merges", [])}, **more}


def test_equal_vocabularies_agree_however_they_are_written(tmp_path: Path) -> None:
    folders = [
        folder(tmp_path / "a", {"tokenizer.json": tokenizer({"x": 0, "y": 1}, merges=["a b"])}),
        folder(
            tmp_path / "b", {"tokenizer.json": tokenizer({"y": 1, "x": 0}, merges=[["a", "b"]])}
        ),
        folder(
            tmp_path / "c",
            {
                "tokenizer.json": tokenizer(
                    {"x": 0}, merges=["a b"], added_tokens=[{"id": 1, "content": "y"}]
                )
            },
        ),
        folder(tmp_path / "d", {"vocab.txt": "x\ny\n"}),
        folder(tmp_path / "e", {"vocab.json": {"x": 0}, "added_tokens.json": {"y": 1}}),
    ]
    check = check_tokenizers(folders)
    assert check.agree
    assert check.notes == ()


def test_a_unigram_vocabulary_counts_places(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", {"tokenizer.json": tokenizer([["x", -1.0], ["y", -2.0]])})
    same = folder(tmp_path / "b", {"vocab.txt": "x\r\ny\r\n"})
    other = folder(tmp_path / "c", {"vocab.txt": "y\nx\n"})
    assert check_tokenizers([first, same]).agree
    assert not check_tokenizers([first, other]).agree


def test_differences_are_counted_and_named(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", {"vocab.json": {"x": 0, "y": 1, "z": 2}})
    other = folder(tmp_path / "b", {"vocab.json": {"x": 1, "y": 0, "w": 2}})
    (problem,) = check_tokenizers([first, other]).problems
    assert problem.startswith(f"{other / 'vocab.json'}: 2 tokens have another id ('x', 'y'), ")
    assert "1 tokens are missing ('z'), 1 tokens more ('w') than in" in problem
    assert str(first / "vocab.json") in problem


def test_other_merges_with_the_same_tokens_are_a_note(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", {"tokenizer.json": tokenizer({"x": 0}, merges=["a b"])})
    other = folder(tmp_path / "b", {"tokenizer.json": tokenizer({"x": 0}, merges=["b a"])})
    check = check_tokenizers([first, other])
    assert check.agree
    assert "cuts text in another way" in check.notes[0]


def test_files_of_sentencepiece_are_compared_by_their_bytes(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", {"tokenizer.model": b"\x0a1"})
    same = folder(tmp_path / "b", {"tokenizer.model": b"\x0a1"})
    other = folder(tmp_path / "c", {"tokenizer.model": b"\x0a2"})
    assert check_tokenizers([first, same]).agree
    (problem,) = check_tokenizers([first, same, other]).problems
    assert "cannot be compared token by token" in problem


def test_folders_without_a_tokenizer_do_not_count(tmp_path: Path) -> None:
    none = folder(tmp_path / "a", {})
    some = folder(tmp_path / "b", {"vocab.txt": "x"})
    other = folder(tmp_path / "c", {"vocab.txt": "y"})
    assert check_tokenizers([none, some, some]) == TokenizerCheck((), ())
    assert check_tokenizers([none, none]) == check_tokenizers([]) == TokenizerCheck((), ())
    (problem,) = check_tokenizers([none, some, none, other]).problems
    assert problem.startswith(f"{other / 'vocab.txt'}: 1 tokens are missing")


def test_equal_bytes_are_not_read_as_a_vocabulary_and_differ_once(tmp_path: Path) -> None:
    same = [folder(tmp_path / name, {"vocab.txt": b"\xff"}) for name in "ab"]
    assert check_tokenizers(same) == TokenizerCheck((), ())
    first = folder(tmp_path / "first", {"vocab.json": {"x": 0}})
    others = [folder(tmp_path / name, {"vocab.json": {"y": 0}}) for name in "cd"]
    (problem,) = check_tokenizers([first, *others]).problems
    assert problem.startswith(f"{others[0] / 'vocab.json'} and 1 more like it: ")


def test_a_tokenizer_that_is_to_be_copied_is_checked_beforehand(tmp_path: Path) -> None:
    check_tokenizer(folder(tmp_path / "a", {"vocab.txt": "x"}))
    none = folder(tmp_path / "b", {"config.json": CONFIG})
    with pytest.raises(MergeError, match=r"b: holds no tokenizer .* tokenizer_source"):
        check_tokenizer(none)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("vocab.json", b"[1]"),
        ("vocab.txt", b"\xff"),
    ],
)
def test_a_vocabulary_that_is_none_is_a_problem(tmp_path: Path, name: str, content: bytes) -> None:
    broken = folder(tmp_path / "a", {name: content})
    others = [folder(tmp_path / text, {"vocab.txt": text}) for text in "xy"]
    (problem,) = check_tokenizers([broken, *others]).problems
    assert problem.startswith(f"{broken / name}: is not the vocabulary that its name says")
