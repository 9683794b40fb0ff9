"""Reads: whole, slices, casts, threads; and that nothing piles up in memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint
from merge.checkpoints.tensors import STAGING_BYTES
from merge.errors import MergeError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_file(
        {
            "w": torch.randn(6, 7, generator=generator),
            "half": torch.randn(11, generator=generator).bfloat16(),
        },
        path,
    )
    return path


def test_slices_are_flat_and_put_together_the_tensor(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.read("w")
        parts = [checkpoint.read("w", start=at, stop=min(at + 5, 42)) for at in range(0, 42, 5)]
        assert torch.equal(torch.cat(parts), whole.reshape(-1))
        assert checkpoint.read("w", start=40).shape == (2,)
        assert checkpoint.read("w", stop=42).shape == (42,)
        assert checkpoint.read("w", start=42).shape == (0,)


def test_out_is_filled_in_place_whatever_its_shape(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        out = torch.full((3, 14), 9.0)
        assert checkpoint.read("w", out=out) is out
        assert torch.equal(out.reshape(6, 7), checkpoint.read("w"))
        arena = torch.zeros(10)
        checkpoint.read("w", out=arena[2:5], start=1, stop=4)
        assert torch.equal(arena[2:5], checkpoint.read("w").reshape(-1)[1:4])
        assert arena[:2].tolist() + arena[5:].tolist() == [0.0] * 7
        parameter = torch.nn.Parameter(torch.zeros(6, 7))
        checkpoint.read("w", out=parameter)
        assert torch.equal(parameter, checkpoint.read("w"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_out_of_another_dtype_is_cast(path: Path, dtype: torch.dtype) -> None:
    with open_checkpoint(path) as checkpoint:
        out = checkpoint.read("half", out=torch.empty(11, dtype=dtype))
        assert torch.equal(out, checkpoint.read("half").to(dtype))


def test_a_cast_goes_through_several_staging_buffers(tmp_path: Path) -> None:
    count = STAGING_BYTES // 4 * 2 + 3
    values = torch.arange(count, dtype=torch.int32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        out = checkpoint.read("a", out=torch.empty(count - 1, dtype=torch.float64), start=1)
    assert torch.equal(out, values[1:].double())


def test_wrong_requests_say_what_was_wanted(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(MergeError, match="no tensor 'hlf'; the nearest name is 'half'"):
            checkpoint.read("hlf")
        with pytest.raises(MergeError, match=r"has 42 elements, \[3, 43\) is outside"):
            checkpoint.read("w", start=3, stop=43)
        with pytest.raises(MergeError, match="outside"):
            checkpoint.read("w", start=5, stop=3)
        with pytest.raises(MergeError, match="wanted a contiguous one with 42 elements"):
            checkpoint.read("w", out=torch.empty(41))
        with pytest.raises(MergeError, match="contiguous"):
            checkpoint.read("w", out=torch.empty(7, 6).t())


def test_a_file_that_shrinks_is_said_so(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(MergeError, match="10 bytes are missing"):
            checkpoint.read("half")


def test_a_file_that_is_replaced_is_read_as_it_was(path: Path, tmp_path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        before = checkpoint.read("w")
        save_file({"w": torch.zeros(6, 7)}, tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert torch.equal(checkpoint.read("w"), before)


def test_threads_read_the_same(path: Path) -> None:
    with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(8) as pool:
        want = checkpoint.read("w").double()
        checkpoint.prefetch()
        checkpoint.prefetch(["half"])

        def read(_: int) -> bool:
            return torch.equal(checkpoint.read("w", out=torch.empty(6, 7).double()), want)

        assert all(pool.map(read, range(200)))


def test_closed_is_closed(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("w")


MEMORY = """
import sys, torch
from merge.checkpoints import open_checkpoint, scan

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

for file in ("a.safetensors", "a.pt"):
    with open_checkpoint(sys.argv[1] + "/" + file) as checkpoint:
        out = torch.empty(1 << 20, dtype=torch.float64)
        checkpoint.read("00", out=out)
        scan(checkpoint, chunk_bytes=1 << 20)
        before = resident()
        for name in checkpoint.tensors:
            checkpoint.read(name, out=out)
        scan(checkpoint, chunk_bytes=1 << 20)
        assert resident() - before < 2 << 20, resident() - before
        assert peak() - before < 8 << 20, peak() - before
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_one_tensor_at_a_time_never_grows(tmp_path: Path) -> None:
    tensors = {f"{index:02}": torch.full((1 << 20,), 1.0 * index) for index in range(24)}  # 96 MiB
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
