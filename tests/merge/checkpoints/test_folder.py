"""Folders: shards, one file among others, and indexes that point elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint
from merge.errors import MergeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "soup"
    folder.mkdir()
    save_file({"model.a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"model.b": torch.ones(3)}, folder / "model-2.safetensors")
    index(folder, {"model.a": "model-1.safetensors", "model.b": "model-2.safetensors"})
    return folder


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_are_one_checkpoint(folder: Path, name: str) -> None:
    with open_checkpoint(folder / name) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.home == checkpoint.files[0].parent
        assert [path.name for path in checkpoint.files] == [
            "model-1.safetensors",
            "model-2.safetensors",
        ]
        assert checkpoint.read("b").tolist() == [1.0] * 3
        assert checkpoint.notes == ("stripped the prefix 'model.' of every name",)


def test_any_index_name_and_torch_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x-1.bin")
    torch.save({"b": torch.ones(2), "c": torch.ones(1)}, tmp_path / "x-2.bin")
    index(tmp_path, {"a": "x-1.bin", "b": "x-2.bin"}, "pytorch_model.bin.index.json")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.notes == ("ignored in 'x-2.bin', not listed there by the index: 1: 'c'",)
    save_file({"z": torch.zeros(1)}, tmp_path / "y-1.safetensors")
    index(tmp_path, {"z": "y-1.safetensors"}, "other.safetensors.index.json")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["z"]
        assert checkpoint.notes == (
            "'other.safetensors.index.json' read, not 2: 'x-1.bin', 'x-2.bin'",
        )


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\\b", "a\0b"],
)
def test_an_index_that_points_outside_is_refused(folder: Path, name: str) -> None:
    save_file({"a": torch.zeros(2)}, folder.parent / "out.safetensors")
    index(folder, {"a": name})
    with pytest.raises(MergeError, match="wanted the plain name of a file beside the index"):
        open_checkpoint(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "out.safetensors"
    save_file({"a": torch.zeros(2)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    index(folder, {"a": "link.safetensors"})
    with pytest.raises(MergeError, match="is a link to"):
        open_checkpoint(folder)
    (folder / "link.safetensors").unlink()
    (folder / "link.safetensors").symlink_to("model-1.safetensors")
    index(folder, {"model.a": "link.safetensors"})
    open_checkpoint(folder).close()


def test_links_within_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    with open_checkpoint(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
    (snapshot / "model-2.safetensors").unlink()
    save_file({"model.b": torch.zeros(2)}, tmp_path / "out.safetensors")
    (snapshot / "model-2.safetensors").symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(MergeError, match="is a link to"):
        open_checkpoint(snapshot)


def test_an_index_that_does_not_fit_its_shards_is_refused(folder: Path) -> None:
    index(folder, {"model.a": "model-2.safetensors"})
    with pytest.raises(MergeError, match="which it does not"):
        open_checkpoint(folder)
    index(folder, {"model.a": "model-3.safetensors"})
    with pytest.raises(MergeError, match=r"'model-3\.safetensors', which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(MergeError, match=r"index\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["x.safetensors", "x.pt", "x.th", "pytorch_model.bin", "open_clip_pytorch_model.bin"]
)
def test_the_one_file_of_a_folder_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    if name.startswith(("pytorch", "open_clip")):
        torch.save({"lr": 1}, tmp_path / "training_args.bin")
    save = save_file if name.endswith(".safetensors") else torch.save
    save({"a": torch.ones(2)}, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 1]
        assert checkpoint.files == (tmp_path / name,)
        assert len(checkpoint.notes) == ("model.bin" in name)


def test_safetensors_come_before_torch_files_and_it_is_noted(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 1]
        assert checkpoint.notes == ("'model.safetensors' read, not 1: 'pytorch_model.bin'",)


def test_several_files_without_an_index_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MergeError, match=r"2: 'a\.safetensors', 'b\.safetensors'"):
        open_checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    with pytest.raises(MergeError, match=r"without a checkpoint; it holds 1: 'README\.md'"):
        open_checkpoint(tmp_path)
