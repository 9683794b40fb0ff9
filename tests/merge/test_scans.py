"""Scans of many checkpoints: what the cache saves, and when it does not count."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint, scan
from merge.errors import MergeError
from merge.scans import scan_all


def make(path: Path, value: float) -> Path:
    save_file({"a": torch.full((50,), value), "b": torch.ones(3)}, path)
    return path


def test_the_scans_are_those_of_each_checkpoint_in_order(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{k}.safetensors", float(k)) for k in range(5)]
    checkpoints = [open_checkpoint(path) for path in paths]
    assert scan_all(checkpoints, progress=False) == tuple(scan(c) for c in checkpoints)
    assert scan_all([], progress=False) == ()


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    path, cache = make(tmp_path / "0.safetensors", 1.0), tmp_path / "cache" / "scans.json"
    with open_checkpoint(path) as checkpoint:
        (first,) = scan_all([checkpoint], cache=cache, progress=False)
    with open_checkpoint(path) as checkpoint:
        pass
    # A closed checkpoint cannot be read: what comes now comes from the cache.
    assert scan_all([checkpoint], cache=cache, progress=False) == (first,)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path, cache = make(tmp_path / "0.safetensors", 1.0), tmp_path / "scans.json"
    with open_checkpoint(path) as checkpoint:
        (first,) = scan_all([checkpoint], cache=cache, progress=False)
    make(path, 2.0)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    with open_checkpoint(path) as checkpoint:
        (second,) = scan_all([checkpoint], cache=cache, progress=False)
        assert second == scan(checkpoint)
    assert second != first
    assert len(json.loads(cache.read_text())) == 1


def test_averaged_weights_of_the_same_file_are_not_confused(tmp_path: Path) -> None:
    path, cache = tmp_path / "both.pt", tmp_path / "scans.json"
    torch.save({"state_dict": {"w": torch.ones(2)}, "state_dict_ema": {"w": torch.zeros(2)}}, path)
    with open_checkpoint(path) as plain, open_checkpoint(path, ema=True) as averaged:
        a, b = scan_all([plain, averaged], cache=cache, progress=False)
        assert a.sha256 != b.sha256
        assert scan_all([averaged, plain], cache=cache, progress=False) == (b, a)


@pytest.mark.parametrize("text", ["", "[]", '{"x": {}}', '{"x": {"scan": {}, "stamp": []}}'])
def test_a_cache_that_is_broken_is_reported_and_made_again(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = make(tmp_path / "0.safetensors", 1.0), tmp_path / "scans.json"
    cache.write_text(text)
    with open_checkpoint(path) as checkpoint, caplog.at_level(logging.WARNING):
        assert scan_all([checkpoint], cache=cache, progress=False) == (scan(checkpoint),)
    assert "not a cache of scans" in caplog.text
    assert len(json.loads(cache.read_text())) == 1


def test_what_was_finished_is_kept_when_another_fails(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{k}.safetensors", float(k)) for k in range(4)]
    checkpoints = [open_checkpoint(path) for path in paths]
    with open(paths[3], "r+b") as file:
        file.truncate(200)
    cache = tmp_path / "scans.json"
    with pytest.raises(MergeError, match=r"3.safetensors: ends at byte"):
        scan_all(checkpoints, cache=cache, progress=False)
    assert len(json.loads(cache.read_text())) >= 2
