"""Aligned checkpoints: read like any other, whole and in slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge.align import (
    align_checkpoints,
    aligned_checkpoint,
    apply_permutations,
    derive_groups,
    identity,
    random_permutations,
)
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.errors import MergeError

EXAMPLE = torch.randn(2, 1, 8, 8)


class Wide(nn.Module):
    """Rows of 6 KB, short rows, and vectors."""

    def __init__(self, width: int = 1536) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 6)
        self.third = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(x).flatten(1)).relu()
        return self.third(self.second(x).relu())


def model(seed: int = 0, width: int = 1536) -> Wide:
    torch.manual_seed(seed)
    return Wide(width)


def saved(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return open_checkpoint(str(path))


@pytest.fixture
def aligned(tmp_path):
    """A checkpoint, with its units moved at random, and what that should be."""
    net = model()
    groups = derive_groups(net, EXAMPLE)
    moved = random_permutations(groups, torch.Generator().manual_seed(1))
    checkpoint = saved(tmp_path / "one.safetensors", net.state_dict())
    yield aligned_checkpoint(checkpoint, moved), apply_permutations(moved, net.state_dict())
    checkpoint.close()


def test_whole_tensors(aligned):
    checkpoint, expected = aligned
    assert isinstance(checkpoint, Checkpoint)
    assert list(checkpoint.tensors) == sorted(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
    assert not torch.equal(checkpoint.read("second.weight"), model().second.weight)
    moved = checkpoint.permutations.moved
    assert 1500 < moved <= 1542
    assert checkpoint.notes[-1] == f"aligned: {moved} units moved in 2 permutation groups"


def test_every_kind_of_slice(aligned):
    checkpoint, expected = aligned
    for name, tensor in expected.items():
        flat, row = tensor.flatten(), max(tensor.numel() // max(len(tensor.shape), 1), 1)
        bounds = {0, 1, row - 1, row, row + 1, 2 * row + 7, flat.numel() - 1, flat.numel()}
        inside = sorted(b for b in bounds if 0 <= b <= flat.numel())
        for start in inside:
            for stop in (b for b in inside if b >= start):
                found = checkpoint.read(name, start=start, stop=stop)
                assert torch.equal(found, flat[start:stop])


def test_a_slice_of_long_rows_reads_only_these(aligned, monkeypatch):
    checkpoint, expected = aligned
    read = []
    source = checkpoint._checkpoint
    original = source.read

    def watch(name, *, out=None, start=0, stop=None):
        read.append((start, stop))
        return original(name, out=out, start=start, stop=stop)

    monkeypatch.setattr(source, "read", watch)
    found = checkpoint.read("second.weight", start=1536 * 2 + 5, stop=1536 * 4)
    assert torch.equal(found, expected["second.weight"].flatten()[1536 * 2 + 5 : 1536 * 4])
    assert len(read) == 2
    assert all(stop - start == 1536 for start, stop in read)


def test_into_given_memory(aligned):
    checkpoint, expected = aligned
    out = torch.empty(6, 1536, dtype=torch.float64)
    assert checkpoint.read("second.weight", out=out) is out
    assert torch.equal(out, expected["second.weight"].double())
    part = torch.empty(1000, dtype=torch.bfloat16)
    checkpoint.read("first.bias", out=part, start=500, stop=1500)
    assert torch.equal(part, expected["first.bias"][500:1500].bfloat16())


def test_wrong_reads_are_refused_as_ever(aligned):
    checkpoint, _ = aligned
    with pytest.raises(MergeError, match=r"'first.bias' has 1536 elements, \[0, 1537\) is outside"):
        checkpoint.read("first.bias", stop=1537)
    with pytest.raises(MergeError, match="wanted a contiguous one with 1536 elements"):
        checkpoint.read("first.bias", out=torch.empty(3))
    with pytest.raises(MergeError, match=r"has no tensor 'first.bia'"):
        checkpoint.read("first.bia")


def test_another_shape_is_found_before_reading(tmp_path):
    groups = derive_groups(model(), EXAMPLE)
    state = model().state_dict() | {"first.bias": torch.zeros(7)}
    with (
        saved(tmp_path / "x.safetensors", state) as checkpoint,
        pytest.raises(MergeError, match=r"x.safetensors: 'first.bias' is \[7\].* has \[1536\]"),
    ):
        aligned_checkpoint(checkpoint, identity(groups))


@pytest.mark.parametrize("reference", [0, 2, -1, "mean"])
def test_permuted_copies_are_brought_together(tmp_path, reference):
    net = model()
    groups = derive_groups(net, EXAMPLE)
    states = [
        apply_permutations(
            random_permutations(groups, torch.Generator().manual_seed(seed)), net.state_dict()
        )
        for seed in range(3)
    ]
    checkpoints = [saved(tmp_path / f"{k}.safetensors", s) for k, s in enumerate(states)]
    aligned = align_checkpoints(net, EXAMPLE, checkpoints, reference=reference)
    kept = 0 if reference == "mean" else reference
    assert aligned[kept] is checkpoints[kept]
    for name in net.state_dict():
        tensors = [checkpoint.read(name) for checkpoint in aligned]
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    for k, checkpoint in enumerate(checkpoints):
        checkpoint.close()
        file = load_file(tmp_path / f"{k}.safetensors")
        assert all(torch.equal(file[name], tensor) for name, tensor in states[k].items())


def test_the_mean_of_many_is_nearer_than_the_first(tmp_path):
    """MergeMany: the summed squared distance to the mean is at most that of matching to one."""
    checkpoints = [
        saved(tmp_path / f"{seed}.safetensors", model(seed, 20).state_dict()) for seed in range(4)
    ]

    def spread(reference) -> float:
        aligned = align_checkpoints(model(0, 20), EXAMPLE, checkpoints, reference=reference)
        total = 0.0
        for name in ("first.weight", "first.bias", "second.weight", "third.weight"):
            stack = torch.stack([checkpoint.read(name).double() for checkpoint in aligned])
            total += float((stack - stack.mean(0)).square().sum())
        return total

    assert spread("mean") <= spread(0)


def test_bad_checkpoints_are_named(tmp_path):
    good = saved(tmp_path / "good.safetensors", model().state_dict())
    state = dict(model().state_dict())
    del state["third.weight"]
    short = saved(tmp_path / "short.safetensors", state)
    with pytest.raises(MergeError, match=r"short.safetensors: 'third.weight' is missing"):
        align_checkpoints(model(), EXAMPLE, [good, short])
    with pytest.raises(MergeError, match="reference 2 is not one of the 2 checkpoints"):
        align_checkpoints(model(), EXAMPLE, [good, good], reference=2)
    with pytest.raises(MergeError, match="found no checkpoints"):
        align_checkpoints(model(), EXAMPLE, [])


def test_a_tied_tensor_under_its_other_name(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    net, tokens = Tied(), torch.arange(6).view(2, 3)
    groups = derive_groups(net, tokens)
    weight = net.embed.weight.detach()
    moved = apply_permutations(
        random_permutations(groups, torch.Generator().manual_seed(0)), {"head.weight": weight}
    )
    first = saved(tmp_path / "a.safetensors", {"embed.weight": weight})
    second = saved(tmp_path / "b.safetensors", moved)
    aligned = align_checkpoints(net, tokens, [first, second])
    assert torch.equal(aligned[1].read("head.weight"), weight)
