"""The door: kinds are told from bytes, and what is no checkpoint is said so."""

import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint
from merge.errors import MergeError


def test_the_bytes_decide_not_the_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "a")
    for name in ("a.pt", "a.safetensors", "a"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.read("a").tolist() == [1]
            assert checkpoint.path == str(tmp_path / name)


def test_a_header_as_long_as_a_pickle_opcode_is_still_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for padding in range(200):
        save_file({"a": torch.ones(1)}, path, metadata={"x": "y" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    open_checkpoint(path).close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
        (b"PK\x03\x04", "truncated or corrupt zip"),
        (b"PK\x03\x04" + b"x" * 1000, "truncated or corrupt zip"),
        (b"\x80\x02", "pickle is corrupt"),
        (b"\x80", "pickle is corrupt"),
        (b"x", "is no checkpoint"),
        (b"\0" * 100, "is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(MergeError, match=says) as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value)


def test_an_old_tar_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(tmp_path / "a.pt", "w") as tar:
        tar.add(tmp_path / "storages", "storages")
    with pytest.raises(MergeError, match="tar archive"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "07.safetensors").touch()
    with pytest.raises(MergeError, match=r"the nearest name there is '07\.safetensors'"):
        open_checkpoint(tmp_path / "zoo" / "7.safetensors")
    with pytest.raises(MergeError, match="nor does its folder"):
        open_checkpoint(tmp_path / "zo" / "07.safetensors")
    with pytest.raises(MergeError, match="does not exist; wanted a file, a folder, or an id"):
        open_checkpoint(tmp_path / "zoo" / "something else")


def test_a_missing_relative_path_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "07").mkdir()
    with pytest.raises(MergeError, match="the nearest name there is '07'"):
        open_checkpoint("zoo/7")
    with pytest.raises(MergeError, match="nor does its folder"):
        open_checkpoint("nowhere/07.pt")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(MergeError, match="not a regular file"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK\x03\x04 and no more")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    errors = []
    for _ in range(20):
        with pytest.raises(MergeError) as raised:
            open_checkpoint(path)
        errors.append(raised)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before


def test_a_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="revision"):
        open_checkpoint(tmp_path, revision="main")


def test_hub_ids_come_from_the_local_cache_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.ones(1)}, repository / "blobs" / "x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/x")
    for revision in (None, "main"):
        with open_checkpoint("org/name", revision=revision) as checkpoint:
            assert checkpoint.path == "org/name"
            assert list(checkpoint.tensors) == ["a"]
    with pytest.raises(MergeError, match=r"^org/other: there is no such local path, and it could"):
        open_checkpoint("org/other")
    with pytest.raises(MergeError, match="could not be fetched"):
        open_checkpoint("org/a..b")  # no id for the Hub, as its own library says
