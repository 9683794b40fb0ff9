"""Reading ahead, slicing within the budget, and what happens when something goes wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.checkpoints import Checkpoint, CheckpointWriter, open_checkpoint
from merge.errors import MergeError
from merge.stream import Item, Piece, stored_name, stream, tied_names


def zoo(folder: Path, count: int, shapes: dict[str, tuple[int, ...]]) -> list[Checkpoint]:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        save_file(tensors, folder / f"{k}.safetensors")
    return [open_checkpoint(folder / f"{k}.safetensors") for k in range(count)]


def items(checkpoints: list[Checkpoint], **settings: object) -> list[Item]:
    return [
        Item(info, tuple((c, name) for c in checkpoints), workspace_bytes=8, **settings)  # type: ignore[arg-type]
        for name, info in checkpoints[0].tensors.items()
    ]


def add(piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
    total = torch.zeros(piece.shape)
    for tensor in tensors:
        assert tensor.shape == piece.shape
        total += tensor
    return total


def add_together(piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
    held = list(tensors)
    return torch.stack(held).sum(0) if held else torch.zeros(piece.shape)


def written(plan: list[Item], function, out: Path, memory_budget: int) -> dict[str, Tensor]:
    with CheckpointWriter(out, [item.output for item in plan]) as writer:
        stream(plan, function, writer, memory_budget=memory_budget, progress=False)
    assert not running_readers()
    return load_file(out)


def running_readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "merge-reader"]


SHAPES = {"a": (7, 5), "b": (), "c": (0, 3), "d": (1001,), "e": (1,)}


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5).map(
        lambda found: {f"t{i}": shape for i, shape in enumerate(found)}
    ),
    count=st.integers(1, 4),
    memory_budget=st.integers(400, 3000),
    together=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_budget_gives_the_bits_of_the_largest(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[int, ...]],
    count: int,
    memory_budget: int,
    together: bool,
) -> None:
    folder = tmp_path_factory.mktemp("zoo")
    checkpoints = zoo(folder, count, shapes)
    plan = items(checkpoints, together=together)
    function = add_together if together else add
    small = written(plan, function, folder / "small.safetensors", memory_budget)
    large = written(plan, function, folder / "large.safetensors", 2**30)
    for name in shapes:
        oracle = sum(c.read(name).double() for c in checkpoints)
        torch.testing.assert_close(large[name].double(), oracle, rtol=1e-6, atol=1e-6)
        assert torch.equal(small[name], large[name])


def test_a_small_budget_cuts_and_a_large_one_does_not(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 3, SHAPES))
    seen: list[int] = []

    def note(piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
        seen.append(piece.stop - piece.start)
        return add(piece, tensors)

    written(plan, note, tmp_path / "out.safetensors", 1600)
    assert max(seen) == 1600 // 16  # two reads of 4 bytes and 8 of workspace per element
    assert sum(seen) == sum(math.prod(shape) for shape in SHAPES.values())
    seen.clear()
    written(plan, note, tmp_path / "out.safetensors", 2**30)
    assert seen == [35, 1, 0, 1001, 1]


def test_what_is_held_at_once_stays_within_the_budget(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 9, {"a": (100_000,), "b": (3,)}))
    addresses: set[int] = set()

    def watch(piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
        total = torch.zeros(piece.shape)
        for tensor in tensors:
            addresses.update((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
            total += tensor
        return total

    written(plan, watch, tmp_path / "out.safetensors", 100_000)
    assert max(addresses) - min(addresses) <= 100_000


def test_a_function_may_stop_early_and_return_a_source(tmp_path: Path) -> None:
    checkpoints = zoo(tmp_path, 3, SHAPES)
    result = written(
        items(checkpoints), lambda _, tensors: next(tensors), tmp_path / "out.safetensors", 2000
    )
    for name, tensor in result.items():
        assert torch.equal(tensor, checkpoints[0].read(name))


def test_whole_tensors_of_many_sizes_go_round_the_ring(tmp_path: Path) -> None:
    shapes = {f"t{i:03}": ((i * 37) % 301, 3) for i in range(120)}
    checkpoints = zoo(tmp_path, 3, shapes)
    plan = items(checkpoints, elementwise=False, together=True)
    needed = 3 * (300 * 3 * 4 + 64) + 8 * 900
    result = written(plan, add_together, tmp_path / "out.safetensors", needed)
    for name in shapes:
        assert torch.equal(result[name], torch.stack([c.read(name) for c in checkpoints]).sum(0))


def test_a_tensor_that_must_be_whole_and_does_not_fit_is_named(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 2, {"big": (1000,), "small": (2,)}), elementwise=False)
    with pytest.raises(MergeError, match=r"'big' \[1000\].*9\.77 KiB, wanted at least 11\.8 KiB"):
        written(plan, add, tmp_path / "out.safetensors", 10_000)
    assert not (tmp_path / "out.safetensors").exists()
    written(plan, add, tmp_path / "out.safetensors", 12_032)


def test_a_budget_below_one_element_is_refused(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 2, {"a": (10,)}))
    with pytest.raises(MergeError, match=r"'a'.*15 bytes, wanted at least 16"):
        written(plan, add, tmp_path / "out.safetensors", 15)
    written(plan, add, tmp_path / "out.safetensors", 16)


def test_missing_names_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    (a,) = zoo(tmp_path / "a", 1, {"x": (2, 3), "y": (4,)})
    (b,) = zoo(tmp_path / "b", 1, {"x": (3, 2)})
    with pytest.raises(MergeError, match=r"b/0.safetensors: 'x' is \[3, 2\], wanted \[2, 3\]"):
        written(
            [Item(a.tensors["x"], ((a, "x"), (b, "x")))], add, tmp_path / "out.safetensors", 9999
        )
    with pytest.raises(MergeError, match=r"b/0.safetensors: 'y' is missing"):
        written(
            [Item(a.tensors["y"], ((a, "y"), (b, "y")))], add, tmp_path / "out.safetensors", 9999
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_result_that_is_not_finite_stops_the_run(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    tensors = {"fine": torch.ones(5, dtype=dtype), "wrong": torch.ones(50, dtype=dtype)}
    tensors["wrong"][37] = bad
    save_file(tensors, tmp_path / "in.safetensors")
    checkpoint = open_checkpoint(tmp_path / "in.safetensors")
    plan = [Item(info, ((checkpoint, n),)) for n, info in checkpoint.tensors.items()]
    out = tmp_path / "out.safetensors"
    with pytest.raises(MergeError, match=r"'wrong': the result has non-finite values.*in.safetens"):
        written(plan, lambda _, found: next(found), out, 2**20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]
    plan = [Item(info, ((checkpoint, n),), finite=False) for n, info in checkpoint.tensors.items()]
    assert written(plan, lambda _, found: next(found), out, 2**20)["wrong"][37].isnan() == (
        bad != bad
    )


@pytest.mark.parametrize("error", [RuntimeError("in the function"), KeyboardInterrupt()])
def test_an_exception_in_the_function_ends_the_thread(tmp_path: Path, error: BaseException) -> None:
    plan = items(zoo(tmp_path, 3, {f"t{i}": (1000,) for i in range(20)}))
    out = tmp_path / "out.safetensors"

    def fail(piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
        if piece.item.output.name == "t3":
            next(tensors)
            raise error
        return add(piece, tensors)

    with pytest.raises(type(error)), CheckpointWriter(out, [i.output for i in plan]) as writer:
        stream(plan, fail, writer, memory_budget=30_000, progress=False)
    assert not running_readers()
    assert not out.exists()


def test_an_exception_in_the_reader_thread_comes_out_in_the_caller(tmp_path: Path) -> None:
    checkpoints = zoo(tmp_path, 2, {"a": (100_000,), "b": (100_000,)})
    plan = items(checkpoints)
    with open(tmp_path / "1.safetensors", "r+b") as file:
        file.truncate(500_000)  # after it was opened: 'b' ends too early
    out = tmp_path / "out.safetensors"
    with pytest.raises(MergeError, match=r"1.safetensors: ends at byte"):
        written(plan, add, out, 2**20)
    assert not running_readers()
    assert not out.exists()


def test_an_exception_in_the_writer_ends_the_thread(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 3, {"a": (1000,)}))
    with pytest.raises(MergeError, match="announced"):
        written(plan, lambda _, t: next(t).double(), tmp_path / "out.safetensors", 2**20)
    assert not running_readers()


def test_the_record_counts_what_was_read_and_written(tmp_path: Path) -> None:
    plan = items(zoo(tmp_path, 3, SHAPES))
    with CheckpointWriter(tmp_path / "out.safetensors", [i.output for i in plan]) as writer:
        streamed = stream(plan, add, writer, memory_budget=1600, progress=False)
    nbytes = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert (streamed.bytes_read, streamed.bytes_written) == (3 * nbytes, nbytes)
    assert streamed.seconds > 0
    assert streamed.pieces > len(SHAPES)


def test_an_empty_plan_writes_nothing(tmp_path: Path) -> None:
    assert written([], add, tmp_path / "out.safetensors", 100) == {}


def test_a_tied_name_is_found_under_its_partner(tmp_path: Path) -> None:
    weight = torch.randn(4, 2)
    torch.save({"embed": weight, "head": weight, "other": torch.ones(1)}, tmp_path / "tied.pt")
    save_file({"embed": weight, "other": torch.ones(1)}, tmp_path / "one.safetensors")
    both = open_checkpoint(tmp_path / "tied.pt")
    one = open_checkpoint(tmp_path / "one.safetensors")
    tied = tied_names([both, one])
    assert tied == {"embed": ("head",), "head": ("embed",)}
    assert stored_name(one, "head", tied) == "embed"
    assert stored_name(both, "head", tied) == "head"
    assert stored_name(one, "nothing", tied) is None
