"""Round trips with the safetensors library, and headers that lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge.checkpoints import Checkpoint, open_checkpoint
from merge.errors import MergeError

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensors_of_many_kinds() -> dict[str, torch.Tensor]:
    return {
        "fp64": torch.randn(3, dtype=torch.float64),
        "fp32": torch.randn(2, 3, 4),
        "fp16": torch.randn(5).half(),
        "bf16": torch.randn(7).bfloat16(),
        "float8": torch.randn(9).to(torch.float8_e4m3fn),
        "int64": torch.arange(6).reshape(2, 3),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "int8": torch.tensor([-3, 4], dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = tensors_of_many_kinds()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == sorted(tensors)
        assert checkpoint.files == (tmp_path / "a.safetensors",)
        assert checkpoint.notes == ()
        assert checkpoint.shared == ()
        for name, tensor in tensors.items():
            info, read = checkpoint.tensors[name], checkpoint.read(name)
            assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert (info.numel, info.nbytes) == (tensor.numel(), tensor.nbytes)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), as_bytes(tensor))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"", b"", "not valid JSON"),
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"{\xff}", b"", "not valid JSON"),
        (b"{" + b'"a":{' * 50_000, b"", "nested too deep"),
        (b'{"a":NaN}', b"", "NaN"),
        (b'{"a":1,"a":2}', b"", "appears twice"),
        (b'{"\\ud800":1}', b"", "not valid JSON"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"a": 3}, b"", "not an object"),
        ({"a": {"dtype": "F32", "shape": []}}, b"", "not an object"),
        ({"a": entry([1], [0, 4], "F31")}, b"1234", "'F31'"),
        ({"a": entry([1], [0, 4], ["F32"])}, b"1234", "dtype"),
        ({"a": entry([-1], [0, 4])}, b"1234", "non-negative"),
        ({"a": entry([1.0], [0, 4])}, b"1234", "non-negative"),
        ({"a": entry([True], [0, 4])}, b"1234", "non-negative"),
        ({"a": entry("1", [0, 4])}, b"1234", "non-negative"),
        ({"a": entry([1] * 65, [0, 4])}, b"1234", "65 dimensions"),
        ({"a": entry([2**40, 2**40, 0], [0, 0])}, b"", "63 bits"),
        ({"a": entry([2**40], [0, 2**42])}, b"1234", "truncated"),
        ({"a": entry([2], [0, 4])}, b"1234", "span 4 bytes"),
        ({"a": entry([1], [4, 0])}, b"1234", "span -4"),
        ({"a": entry([1], [0, 4, 8])}, b"1234", "data_offsets"),
        ({"a": entry([1], [-4, 0])}, b"1234", "data_offsets"),
        ({"a": entry([1], [4, 8])}, b"12345678", "leaves a hole"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234", "overlaps"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [3, 7])}, b"1234567", "overlaps"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [5, 9])}, b"123456789", "leaves a hole"),
        ({"a": entry([1], [0, 4])}, b"12345", "too long"),
        ({"a": entry([1], [0, 4])}, b"123", "truncated"),
        ({}, b"", "no tensors"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(MergeError, match=says) as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("length", [3, 2**30, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused_without_reading(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":1}')
    with pytest.raises(MergeError, match="header"):
        open_checkpoint(path)


def test_a_header_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(MergeError, match="at most 100000000 are read"):
        open_checkpoint(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(MergeError, match="at most 20 are read"):
        open_checkpoint(path, memory_budget=20)


def read_all(checkpoint: Checkpoint) -> None:
    with checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
sizes = st.integers(-2, 9) | st.integers(2**31 - 2, 2**64 + 2)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "f32"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | json_values,
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=4), near_entries | json_values, max_size=4),
    data=st.binary(max_size=40),
)
def test_any_header_reads_or_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, data)
    try:
        checkpoint = open_checkpoint(path)
    except MergeError:
        return
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == len(data)
    read_all(checkpoint)


@FUZZ
@given(data=st.data())
def test_a_truncated_or_flipped_file_reads_or_is_refused(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.arange(4), "c": torch.tensor(True)}, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:cut])
        with pytest.raises(MergeError):
            open_checkpoint(path)
        return
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except MergeError:
        return
    assert sum(info.nbytes for info in checkpoint.tensors.values()) <= len(content)
    read_all(checkpoint)
