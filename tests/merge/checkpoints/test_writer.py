"""What is written reads back with the safetensors library, in the same bytes, or not at all."""

import json
import os
import re
import struct
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint
from merge.checkpoints.safetensors_file import DTYPES
from merge.errors import MergeError


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    order: Iterable[str] | None = None,
    metadata: dict[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    writer = CheckpointWriter(
        path, infos_of(tensors), metadata=metadata, max_shard_bytes=max_shard_bytes
    )
    with writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 4, generator=generator),
        "turned": torch.randn(5, 2, generator=generator).t(),
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        'ünïcode "quoted"': torch.ones(1, dtype=torch.float64),
    }


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def test_the_library_reads_it(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "new" / "a.safetensors"
    write(path, tensors, metadata={"format": "pt", "a": "b"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
    with open_checkpoint(path) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_the_same_tensors_give_the_same_bytes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, tensors, metadata={"x": "1", "y": "2"})
    backwards = dict(reversed(tensors.items()))
    write(second, backwards, order=tensors, metadata={"y": "2", "x": "1"})
    content = first.read_bytes()
    assert content == second.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", *sorted(tensors)]
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kinds=st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_any_tensors_read_back(
    tmp_path: Path, kinds: dict[str, tuple[torch.dtype, list[int]]], data: st.DataObject
) -> None:
    tensors = {}
    for seed, (name, (dtype, shape)) in enumerate(kinds.items()):
        generator = torch.Generator().manual_seed(seed)
        numel = torch.Size(shape).numel()
        raw = torch.randint(0, 2, (numel * dtype.itemsize,), generator=generator)
        tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    path = tmp_path / "a.safetensors"
    write(path, tensors, order=data.draw(st.permutations(list(tensors))))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        bits, wanted = (t.reshape(-1).view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(bits, wanted)


def test_parts_and_threads_write_the_same_bytes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path / "whole", tensors)
    jobs = []
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        jobs += [(name, flat[at : at + 3], at) for at in range(0, max(len(flat), 1), 3)]
    writer = CheckpointWriter(tmp_path / "parts", infos_of(tensors))
    with writer, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(writer.write, n, part, start=at) for n, part, at in jobs]:
            done.result()
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [1, 60, 10_000])
def test_shards(tmp_path: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    folder = tmp_path / "soup"
    write(folder, tensors, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert shards == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert (count == 1) is (max_shard_bytes == 10_000)
    assert sorted(os.listdir(folder)) == sorted([*shards, "model.safetensors.index.json"])
    loaded = {name: t for shard in shards for name, t in load_file(folder / shard).items()}
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    for shard in shards:
        held = load_file(folder / shard)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_shard_bytes
    with open_checkpoint(folder) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(folder, tensors, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("max_shard_bytes", [None, 60])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    error: type[BaseException],
    max_shard_bytes: int | None,
) -> None:
    path = tmp_path / "soup"
    write(path, tensors, max_shard_bytes=max_shard_bytes)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail() -> None:
        writer = CheckpointWriter(path, infos_of(tensors), max_shard_bytes=max_shard_bytes)
        with writer:
            writer.write("w", torch.zeros(3, 4))
            raise error

    with pytest.raises(error):
        fail()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_missing_tensors_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    infos = [TensorInfo("a", (4,), torch.float32), TensorInfo("none", (0,), torch.float32)]

    def write_half() -> None:
        writer = CheckpointWriter(tmp_path / "a", infos)
        with writer:
            writer.write("a", torch.zeros(2), start=0)

    with pytest.raises(MergeError, match="2 tensors were announced and not written: a, none"):
        write_half()
    assert os.listdir(tmp_path) == []


def test_writes_that_do_not_match_are_refused(tmp_path: Path) -> None:
    info = TensorInfo("a", (2, 3), torch.float32)
    writer = CheckpointWriter(tmp_path / "a", [info])
    with writer:
        with pytest.raises(MergeError, match="'b' is written, but was not announced"):
            writer.write("b", torch.zeros(2))
        with pytest.raises(MergeError, match="announced was"):
            writer.write("a", torch.zeros(3, 2))
        with pytest.raises(MergeError, match="announced was"):
            writer.write("a", torch.zeros(2, 3).double())
        with pytest.raises(MergeError, match="announced was"):
            writer.write("a", torch.zeros(3), start=4)
        with pytest.raises(MergeError, match="announced was"):
            writer.write("a", torch.zeros(3), start=-1)
        writer.write("a", torch.zeros(3), start=0)
        with pytest.raises(MergeError, match="twice"):
            writer.write("a", torch.zeros(2, 3))
        writer.write("a", torch.ones(3), start=3)
    assert load_file(tmp_path / "a")["a"].tolist() == [[0.0] * 3, [1.0] * 3]


def test_what_cannot_be_held_is_refused_at_once(tmp_path: Path) -> None:
    info = TensorInfo("a", (2,), torch.float32)
    path = tmp_path / "a"
    with pytest.raises(MergeError, match="'a' is taken"):
        CheckpointWriter(path, [info, info])
    with pytest.raises(MergeError, match="'__metadata__' is taken"):
        CheckpointWriter(path, [TensorInfo("__metadata__", (2,), torch.float32)])
    with pytest.raises(MergeError, match="complex128, which safetensors cannot hold"):
        CheckpointWriter(path, [TensorInfo("a", (2,), torch.complex128)])
    with pytest.raises(MergeError, match="wanted a positive number"):
        CheckpointWriter(path, [info], max_shard_bytes=0)
    with pytest.raises(MergeError, match="is a folder"), CheckpointWriter(tmp_path, [info]):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs posix_fallocate and RLIMIT_FSIZE")
def test_a_disk_without_room_is_found_before_the_work(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path / "a", [TensorInfo("a", (1 << 20,), torch.float32)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "a"))):
            writer.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
