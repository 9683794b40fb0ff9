"""Hashes that do not depend on the container, and counts of what is not finite."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import Hasher, open_checkpoint, scan
from merge.checkpoints.scan import count_nonfinite


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.randn(50, 30),
        "half": torch.randn(7).bfloat16(),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(3),
        "empty": torch.empty(0),
    }


def test_the_same_weights_have_the_same_hash_in_any_container(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    wrapped["module.w"] = tensors["w"].t().contiguous().t()  # stored transposed
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = []
    for name in ("a.safetensors", "a.pt", "old.pt"):
        for chunk_bytes in (1, 100, 1 << 20):
            with open_checkpoint(tmp_path / name) as checkpoint:
                found.append(scan(checkpoint, chunk_bytes=chunk_bytes))
    assert all(scanned == found[0] for scanned in found)
    assert list(found[0].digests) == sorted(tensors)
    assert found[0].nonfinite == {}
    assert found[0].digests["w"] == hashlib.sha256(tensors["w"].numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_any_difference_changes_the_hash(tmp_path: Path, change: str) -> None:
    first = {"a": torch.zeros(6), "b": torch.ones(2)}
    second = dict(first)
    if change == "value":
        second["a"] = torch.tensor([0.0, 0, 0, 0, 0, -0.0])
    elif change == "name":
        second["c"] = second.pop("b")
    elif change == "shape":
        second["a"] = torch.zeros(2, 3)
    else:
        second["a"] = torch.zeros(6, dtype=torch.int32)
    save_file(first, tmp_path / "1")
    save_file(second, tmp_path / "2")
    with open_checkpoint(tmp_path / "1") as one, open_checkpoint(tmp_path / "2") as two:
        assert scan(one).sha256 != scan(two).sha256
        assert scan(one).sha256 == scan(one).sha256


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e5m2,
        torch.complex64,
    ],
)
def test_nonfinite_values_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 500)
    values[[0, 99, 100, 499]] = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.nan])
    tensors = {"bad": values.to(dtype), "good": torch.ones(9), "whole": torch.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert scan(checkpoint, chunk_bytes=256).nonfinite == {"bad": 4}


def test_large_finite_values_are_finite() -> None:
    assert count_nonfinite(torch.full((1000,), torch.finfo(torch.float32).max)) == 0
    assert count_nonfinite(torch.full((1000,), 65504.0, dtype=torch.float16)) == 0
    assert count_nonfinite(torch.full((10,), 2**62)) == 0


def test_the_hash_of_what_was_read_anyway_is_that_of_the_scan(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.randn(3, 4).half(), "c": torch.tensor(7)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        hasher = Hasher(checkpoint)
        hasher.observe("a", 0, checkpoint.read("a", start=0, stop=300))
        hasher.observe("a", 700, checkpoint.read("a", start=700, stop=1000))  # too early
        hasher.observe("a", 300, checkpoint.read("a", start=300, stop=600))
        hasher.observe("a", 0, checkpoint.read("a", start=0, stop=300))  # again
        hasher.observe("c", 0, checkpoint.read("c"))
        assert hasher.sha256() == scan(checkpoint).sha256
