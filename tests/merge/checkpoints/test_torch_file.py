"""Files of torch.save: every layout reads as torch reads it, no lie gets through, nothing runs."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from merge.checkpoints import open_checkpoint
from merge.errors import MergeError

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def state_dict() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    return {
        "fp64": torch.randn(3, dtype=torch.float64),
        "fp32": torch.randn(2, 3, 4),
        "fp16": torch.randn(5).half(),
        "bf16": torch.randn(7).bfloat16(),
        "int64": torch.arange(6).reshape(2, 3),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "strided": base[3:50:7],
        "window": base.reshape(6, 10)[1:5, 2:9],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "offset": base[7:12],
        "one_row": torch.randn(4, 1, 3).transpose(0, 1),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zip_format", [True, False])
def test_reads_what_torch_wrote(tmp_path: Path, protocol: int, zip_format: bool) -> None:
    tensors, path = state_dict(), tmp_path / "a.pt"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == sorted(tensors)
        assert any("old format" in note for note in checkpoint.notes) is not zip_format
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), name
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
            if tensor.numel() > 2:
                part = checkpoint.read(name, start=1, stop=tensor.numel() - 1)
                assert torch.equal(part, tensor.reshape(-1)[1:-1])
            wide = checkpoint.read(name, out=torch.empty(tensor.numel(), dtype=torch.float64))
            assert torch.equal(wide, tensor.reshape(-1).double())


def test_tied_names_are_known_from_the_header(tmp_path: Path) -> None:
    weight, other = torch.randn(4, 4), torch.arange(10)
    torch.save(
        {
            "head.weight": weight,
            "embed.weight": weight,
            "turned": weight.t(),
            "first": other[:5],
            "second": other[5:],
        },
        tmp_path / "a.pt",
    )
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.shared == (("embed.weight", "head.weight"),)
        assert checkpoint.read("second").tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zip_format", [True, False])
def test_what_training_files_hold_is_ignored_and_noted(
    tmp_path: Path, protocol: int, zip_format: bool
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    marked = torch.randn(2)
    vars(marked)["marked"] = True  # saved by torch.save as a tensor with attributes
    training = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/runs"), seed=None),
        "path": pathlib.PureWindowsPath("C:/runs"),
        "best": np.float64(0.5),
        "scores": np.arange(4.0),
        "object_array": np.array([{"a": 1}], dtype=object),
        "numpy_rng": np.random.get_state(),
        "python_rng": random.getstate(),
        "torch_rng": torch.get_rng_state(),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "milestones": collections.Counter([3, 3, 5]),
        "extra": collections.defaultdict(list, {"a": [1]}),
        "kinds": {1, 2.5, "x", b"y", (1, 2), frozenset({3}), 1j, None},
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "large": 1 << 200,
        ("tuple", 1): "key",
        "bytes": bytearray(b"abc"),
    }
    state = model.state_dict() | {"marked": marked}
    torch.save(
        {"state_dict": state, **training},
        tmp_path / "a.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zip_format,
    )
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        assert torch.equal(checkpoint.read("marked"), marked)
        assert any("18: 'args', 'path'" in note for note in checkpoint.notes), checkpoint.notes


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (os.system, "touch {}", f"{os.name}.system"),
        (eval, "open('{}', 'w')", "builtins.eval"),
        (exec, "open('{}', 'w')", "builtins.exec"),
        (getattr, "{}", "builtins.getattr"),
        (torch.load, "{}", "torch.serialization.load"),
    ],
)
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, function: Any, argument: str, named: str, zip_format: bool
) -> None:
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    content = {"weight": torch.zeros(2), "x": Runs(function, argument.format(mark))}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(MergeError, match=f"wants to run {named}") as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("model", [Net(), torch.nn.Linear(2, 2)])
def test_a_whole_module_is_refused_with_the_lines_that_convert_it(
    tmp_path: Path, model: torch.nn.Module, zip_format: bool
) -> None:
    torch.save(model, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(MergeError, match=type(model).__name__) as raised:
        open_checkpoint(tmp_path / "a.pt")
    assert "weights_only=False" in str(raised.value)
    assert "torch.save(model.state_dict()" in str(raised.value)


def test_other_things_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(str(path))
    with pytest.raises(MergeError, match="TorchScript"):
        open_checkpoint(path)
    torch.save({"w": torch.eye(3).to_sparse()}, path)
    with pytest.raises(MergeError, match="not a plain strided one"):
        open_checkpoint(path)
    torch.save({"w": torch.zeros(1).expand(1000)}, path)
    with pytest.raises(MergeError, match="expanded view"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps({"w": [1, 2]}))
    with pytest.raises(MergeError, match=r"not one that torch\.save wrote"):
        open_checkpoint(path)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(MergeError, match=r"no <name>/data.pkl"):
        open_checkpoint(tmp_path / "a.npz")


def rewrite(path: Path, change: Any, *, method: int = zipfile.ZIP_STORED) -> None:
    """Write the zip file at `path` again with `change(records)`, a dict from name to bytes."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(64.0), "b": torch.ones(8)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("size", [0, 252, 260, 1024])
def test_a_storage_that_lies_about_its_size_is_refused(zipped: Path, size: int) -> None:
    rewrite(zipped, lambda records: records.update({"a/data/0": bytes(size)}))
    with pytest.raises(
        MergeError, match=rf"claims 256 bytes for storage '0', its record has {size}"
    ):
        open_checkpoint(zipped)


def test_a_zip_that_is_not_as_torch_writes_it_is_refused(zipped: Path) -> None:
    whole = zipped.read_bytes()
    rewrite(zipped, lambda records: records.pop("a/data/1"))
    with pytest.raises(MergeError, match="no record for storage '1'"):
        open_checkpoint(zipped)
    zipped.write_bytes(whole)
    rewrite(zipped, lambda records: records.update({"a/byteorder": b"big"}))
    with pytest.raises(MergeError, match="byte order is 'big'"):
        open_checkpoint(zipped)
    zipped.write_bytes(whole)
    rewrite(zipped, lambda records: None, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(MergeError, match="is compressed"):
        open_checkpoint(zipped)
    zipped.write_bytes(whole)
    rewrite(zipped, lambda records: records.update({"b/data.pkl": b""}))
    with pytest.raises(MergeError, match=r"data\.pkl"):
        open_checkpoint(zipped)
    zipped.write_bytes(whole)
    with pytest.raises(MergeError, match=r"read whole has .* limit 50"):
        open_checkpoint(zipped, memory_budget=50)


def test_records_that_lie_over_each_other_are_refused(zipped: Path) -> None:
    content = bytearray(zipped.read_bytes())
    second = content.rindex(b"a/data/1") - 46  # the record's entry in the central directory
    first = content.rindex(b"a/data/0") - 46
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    zipped.write_bytes(content)
    with pytest.raises(MergeError, match="over another record"):
        open_checkpoint(zipped)


def pickled_view(
    offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...], numel: int = 8
) -> bytes:
    """The data.pkl of {'w': view}, of any view at all into storage '0'."""

    class Storage:
        pass

    class View:
        def __reduce__(self) -> Any:
            rest = (False, collections.OrderedDict())
            return _rebuild_tensor_v2, (Storage(), offset, shape, stride, *rest)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"w": View()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (9,), (1,)),
        (1, (8,), (1,)),
        (0, (2, 2), (7, 1)),
        (0, (2,), (2**62,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, (2**40,), (0,)),
        (0, (2**62, 4), (0, 0)),
        (2**62, (1,), (1,)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(
    zipped: Path, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]
) -> None:
    def change(records: dict[str, bytes]) -> None:
        records["a/data.pkl"] = pickled_view(offset, shape, stride)
        records["a/data/0"] = bytes(32)

    rewrite(zipped, change)
    with pytest.raises(MergeError):
        open_checkpoint(zipped)


@FUZZ
@given(
    offset=st.integers(-1, 9),
    view=st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 5)), max_size=3),
)
def test_any_view_reads_as_torch_reads_it_or_is_refused(
    tmp_path: Path, offset: int, view: list[tuple[int, int]]
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(8.0)}, path)
    shape, stride = tuple(size for size, _ in view), tuple(step for _, step in view)
    rewrite(path, lambda r: r.update({"a/data.pkl": pickled_view(offset, shape, stride)}))
    try:
        checkpoint = open_checkpoint(path)
    except MergeError:
        return
    with checkpoint:
        assert torch.equal(
            checkpoint.read("w"), torch.arange(8.0).as_strided(shape, stride, offset)
        )


@FUZZ
@given(data=st.data(), zip_format=st.booleans())
def test_a_truncated_or_flipped_file_reads_or_is_refused(
    tmp_path: Path, data: Any, zip_format: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save(
        {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)},
        path,
        _use_new_zipfile_serialization=zip_format,
    )
    content = bytearray(path.read_bytes())
    # Old files name storages by address: their length differs from run to run.
    place = st.integers(0, 10**6).map(lambda place: place % len(content))
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(place)])
        with pytest.raises(MergeError):
            open_checkpoint(path)
        return
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(place)] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except MergeError:
        return
    with checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_a_legacy_storage_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    count = len(content) - 6 * 4 - 8
    assert struct.unpack_from("<q", content, count) == (6,)
    struct.pack_into("<q", content, count, 7)
    path.write_bytes(content)
    with pytest.raises(MergeError, match=r"claims 6 elements for storage .* has 7"):
        open_checkpoint(path)
