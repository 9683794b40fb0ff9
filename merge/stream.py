"""Read the same tensor from many checkpoints, apply a function, write: one pass, bounded memory.

Background threads read ahead, in the order of the plan, into a ring of bytes; the caller's thread
computes and writes. What is in flight is bounded by a byte budget and does not grow with the number
of checkpoints. A merge method is a function of the tensors of one name.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inputs.budget import format_bytes
from merge.checkpoints import Checkpoint, CheckpointWriter, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from merge.mixing import CHUNK

# A piece's reads need not be larger than this to run at the disk's speed, and smaller pieces
# stay in the cache between reading, computing and writing.
PIECE_BYTES = 8 * 2**20
TOGETHER_BYTES = 16 * 2**20
ARENA_BYTES = 64 * 2**20
ALIGNMENT_BYTES = 64
READERS = 2


@dataclass(frozen=True)
class Item:
    """One tensor to make: what it is, what it is made from, and how.

    `sources` are read in this order, each once. `elementwise`: the sources have the shape of the
    output and any slice of the flat output needs only the same slice of each source, so that a
    large tensor may be done in slices, each but the last of a multiple of `multiple` elements, and
    of `aligned` (a multiple of that) where the budget allows.
    `together`: the function needs all sources at once; otherwise each is valid only until the next
    is taken, and memory does not grow with their number. `workspace_bytes` is what the function
    allocates per element of the output, its result included. `finite`: a result with NaN or
    infinity is an error. Without `writes` the function only looks, and returns None.
    """

    output: TensorInfo
    sources: tuple[tuple[Checkpoint, str], ...]
    elementwise: bool = True
    together: bool = False
    workspace_bytes: int = 0
    finite: bool = True
    multiple: int = 1
    aligned: int = 1
    writes: bool = True


@dataclass(frozen=True)
class Piece:
    """The flat elements [start, stop) of an item's output: all of them, or one slice."""

    item: Item
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.item.output.numel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, and of the sources of an elementwise item; slices are flat."""
        return self.item.output.shape if self.whole else (self.stop - self.start,)


PieceFunction = Callable[[Piece, Iterator[Tensor]], Tensor | None]
Observer = Callable[[Checkpoint, str, int, Tensor], None]


@dataclass(frozen=True)
class Work:
    """A plan, the function that makes its pieces, and the metadata of the file they go into.

    `looks` are passes that write nothing and have to come before, in order.
    """

    items: list[Item]
    make: PieceFunction
    metadata: dict[str, str]
    looks: tuple[tuple[list[Item], PieceFunction], ...] = ()

    @property
    def outputs(self) -> list[TensorInfo]:
        return [item.output for item in self.items if item.writes]


@dataclass(frozen=True)
class Forecast:
    """What a pass over a plan takes: bytes read and written, the most bytes held, pieces."""

    bytes_read: int
    bytes_written: int
    held_bytes: int
    pieces: int


def forecast(plan: Sequence[Item], memory_budget: int) -> Forecast:
    """What `stream` will do with this plan; MergeError where it does not fit the budget."""
    pieces, arena_bytes, work_bytes = _cut(plan, memory_budget)
    return Forecast(
        bytes_read=sum(info.nbytes for item in plan for info in _source_infos(item)),
        bytes_written=sum(item.output.nbytes for item in plan if item.writes),
        held_bytes=arena_bytes + work_bytes,
        pieces=len(pieces),
    )


@dataclass(frozen=True)
class Streamed:
    """What a pass read and wrote, in bytes, how long it took, and in how many pieces."""

    bytes_read: int
    bytes_written: int
    seconds: float
    pieces: int


def stream(
    plan: Sequence[Item],
    function: PieceFunction,
    writer: CheckpointWriter | None,
    *,
    memory_budget: int,
    observe: Observer | None = None,
    progress: bool = True,
    title: str = "merging",
) -> Streamed:
    """Make every item of `plan` with `function(piece, tensors)` and write it, in order.

    `tensors` gives the piece's sources in the item's order, in their stored dtypes; the function
    returns the result in the output's dtype and the piece's shape (it may be one of the sources).
    A plan that writes nothing needs no writer.
    `memory_budget` bounds the bytes of sources, workspace and results that are held at once.
    `observe(checkpoint, name, start, tensor)` sees all that is read, in the reading threads: the
    flat elements of one tensor from `start` on, each tensor's slices in order.
    Raises MergeError where a tensor that cannot be sliced does not fit it, or a result is not
    finite; what the reader thread or the writer raises comes out here, and the thread is ended.
    """
    started = time.perf_counter()
    pieces, arena_bytes, _ = _cut(plan, memory_budget)
    total_bytes = sum(info.nbytes for item in plan for info in _source_infos(item))
    written_bytes = 0
    bar = tqdm(
        total=total_bytes, desc=title, unit="B", unit_scale=True, disable=not progress, leave=False
    )
    reads = (read for piece in pieces for read in _reads(piece))
    with bar, _Reader(reads, arena_bytes, observe) as reader:
        for piece in pieces:
            tensors = _tensors(piece, reader, bar)
            result = function(piece, tensors)
            if result is not None and writer is not None:
                if piece.item.finite:
                    _check_finite(piece, result)
                start = None if piece.whole else piece.start
                writer.write(piece.item.output.name, result, start=start)
                written_bytes += result.nbytes
            for _ in tensors:  # what the function did not ask for was read ahead all the same
                pass
    return Streamed(total_bytes, written_bytes, time.perf_counter() - started, len(pieces))


def tied_names(checkpoints: Iterable[Checkpoint]) -> dict[str, tuple[str, ...]]:
    """Name → the other names that share its storage in any of the checkpoints."""
    tied: dict[str, set[str]] = {}
    for checkpoint in checkpoints:
        for names in checkpoint.shared:
            for name in names:
                tied.setdefault(name, set()).update(names)
    return {name: tuple(sorted(others - {name})) for name, others in tied.items()}


def stored_name(checkpoint: Checkpoint, name: str, tied: Mapping[str, Sequence[str]]) -> str | None:
    """The name under which `checkpoint` holds `name`: itself, or a tied partner's; else None."""
    return next((n for n in (name, *tied.get(name, ())) if n in checkpoint.tensors), None)


def _tensors(piece: Piece, reader: _Reader, bar: tqdm) -> Iterator[Tensor]:
    for _ in range(_read_count(piece.item)):
        for tensor in reader.take():
            bar.update(tensor.nbytes)
            yield tensor


def _check_finite(piece: Piece, result: Tensor) -> None:
    if not result.is_floating_point() or not result.numel():
        return
    # Minimum and maximum carry NaN and infinity, without a mask; in chunks as in `combine`.
    extremes = [torch.stack(torch.aminmax(part)) for part in result.reshape(-1).split(CHUNK)]
    if not torch.isfinite(torch.stack(extremes)).all():
        paths = ", ".join(dict.fromkeys(checkpoint.path for checkpoint, _ in piece.item.sources))
        raise MergeError(
            f"{piece.item.output.name!r}: the result has non-finite values, wanted finite ones in "
            f"{dtype_name(piece.item.output.dtype)}; look for NaN or infinity in {paths} "
            "(python -m merge inspect counts them), for weights that are too large, or skip the "
            "tensor"
        )


def _source_infos(item: Item) -> list[TensorInfo]:
    infos = []
    for checkpoint, name in item.sources:
        info = checkpoint.tensors.get(name)
        if info is None:
            raise MergeError(
                f"{checkpoint.path}: {name!r} is missing, wanted for {item.output.name!r}; merge "
                "checkpoints of the same model, or skip the tensor"
            )
        if item.elementwise and info.shape != item.output.shape:
            raise MergeError(
                f"{checkpoint.path}: {name!r} is {list(info.shape)}, wanted "
                f"{list(item.output.shape)}; merge checkpoints of the same model, or skip the "
                "tensor"
            )
        infos.append(info)
    return infos


# --- cutting the plan into pieces ---------------------------------------------------------------


def _cut(plan: Sequence[Item], memory_budget: int) -> tuple[list[Piece], int, int]:
    """The pieces in order, the bytes of the ring, those of workspace; both fit the budget."""
    whole_read = whole_work = 0  # the largest read, and workspace, of an item that is not sliced
    for item in plan:
        if item.elementwise:
            continue
        read = _span(item, [_aligned(info.nbytes) for info in _source_infos(item)])
        work = item.workspace_bytes * item.output.numel
        whole_read, whole_work = max(whole_read, read), max(whole_work, work)
        if whole_read + whole_work > memory_budget:
            raise MergeError(
                f"{item.output.name!r} {list(item.output.shape)} from {len(item.sources)} "
                f"checkpoints has to be merged whole: memory_budget is "
                f"{format_bytes(memory_budget)}, wanted at least "
                f"{format_bytes(whole_read + whole_work)}; raise memory_budget, or give the "
                "tensor a method that works element by element"
            )
    pieces: list[Piece] = []
    largest_read, largest_work = whole_read, whole_work
    for item in plan:
        numel = step = item.output.numel
        infos = _source_infos(item)
        if item.elementwise and numel:
            read = _span(item, [info.dtype.itemsize for info in infos])
            step = min(numel, _step(item, read, memory_budget, whole_read, whole_work))
            largest_read = max(
                largest_read, _span(item, [_aligned(i.dtype.itemsize * step) for i in infos])
            )
            largest_work = max(largest_work, item.workspace_bytes * step)
        starts = range(0, numel, step) if numel else (0,)
        pieces += [Piece(item, start, min(start + step, numel)) for start in starts]
    arena_bytes = min(memory_budget - largest_work, max(ARENA_BYTES, 2 * largest_read))
    return pieces, max(arena_bytes, largest_read), largest_work


def _step(item: Item, read: int, memory_budget: int, whole_read: int, whole_work: int) -> int:
    """Elements per piece: two reads (one in use, one under way) and the workspace fit."""
    work = item.workspace_bytes
    limits = [
        (TOGETHER_BYTES if item.together else PIECE_BYTES) // max(read, 1),
        memory_budget // max(2 * read + work, 1),
        (memory_budget - whole_work) // max(read, 1),
        (memory_budget - whole_read) // max(work, 1),
    ]
    if min(limits[1:]) < 1:
        needed = max(2 * read + work, whole_work + read, whole_read + work)
        raise MergeError(
            f"{item.output.name!r} from {len(item.sources)} checkpoints: memory_budget is "
            f"{memory_budget} bytes, wanted at least {needed} to merge one element at a time; "
            "raise memory_budget"
        )
    step, room = min(limits), min(limits[1:])
    unit = item.aligned if item.multiple < item.aligned <= room else item.multiple
    if unit > 1:
        step = max(step // unit, 1) * unit
        if step > room:
            raise MergeError(
                f"{item.output.name!r} {list(item.output.shape)} from {len(item.sources)} "
                f"checkpoints is merged {item.multiple} elements (a row) at a time: memory_budget "
                f"is {memory_budget} bytes, which holds {room}; raise memory_budget"
            )
    return max(step, 1)


def _span(item: Item, sizes: Sequence[int]) -> int:
    """Bytes of one read: of all sources where they are held together, else of the largest."""
    return sum(sizes) if item.together else max(sizes, default=0)


def _read_count(item: Item) -> int:
    return min(1, len(item.sources)) if item.together else len(item.sources)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


# --- reading ahead ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """One tensor, or the flat elements [start, stop) of it, to be read."""

    checkpoint: Checkpoint
    info: TensorInfo
    start: int
    stop: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape if self.stop is None else (self.stop - self.start,)

    @property
    def nbytes(self) -> int:
        if self.stop is None:
            return self.info.nbytes
        return (self.stop - self.start) * self.info.dtype.itemsize

    def into(self, block: Tensor) -> Tensor:
        """The tensor, read into the bytes of `block`."""
        out = block[: self.nbytes].view(self.info.dtype).view(self.shape)
        self.checkpoint.read(self.info.name, out=out, start=self.start, stop=self.stop)
        return out


def _reads(piece: Piece) -> Iterator[list[_Request]]:
    """The piece's reads; the tensors of one read are valid together."""
    cut = piece.item.elementwise and not piece.whole
    requests = [
        _Request(
            checkpoint,
            checkpoint.tensors[name],
            piece.start if cut else 0,
            piece.stop if cut else None,
        )
        for checkpoint, name in piece.item.sources
    ]
    if piece.item.together:
        yield from [requests] if requests else []
    else:
        yield from ([request] for request in requests)


class _Reader:
    """Threads that do the reads in order, as far ahead as a ring of `arena_bytes` has room.

    Blocks are given out and come back in the same order, so the ring never fragments; a read
    whose block does not fit before the ring's end starts at its beginning.
    """

    def __init__(
        self, reads: Iterator[list[_Request]], arena_bytes: int, observe: Observer | None
    ) -> None:
        self._reads = reads
        self._observe = observe
        self._arena = torch.empty(arena_bytes, dtype=torch.uint8)
        self._blocks: deque[tuple[int, int]] = deque()  # [start, end) in flight, oldest first
        self._ready: deque[list[Tensor] | BaseException] = deque()
        self._holding = False
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="merge-reader", daemon=True)

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def take(self) -> list[Tensor]:
        """The tensors of the next read; those of the one before are no longer valid."""
        with self._changed:
            if self._holding:
                self._blocks.popleft()
                self._holding = False
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            tensors = self._ready.popleft()
            if isinstance(tensors, BaseException):
                raise tensors
            self._holding = True
            return tensors

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(READERS, thread_name_prefix="merge-read") as readers:
                for requests in self._reads:
                    offset = self._reserve(sum(_aligned(request.nbytes) for request in requests))
                    if offset is None:
                        return
                    blocks = []
                    for request in requests:
                        blocks.append(self._arena[offset:])
                        offset += _aligned(request.nbytes)
                    self._hand_over(list(readers.map(self._read, requests, blocks)))
        except BaseException as error:  # raised again in take(), in the caller's thread
            self._hand_over(error)

    def _read(self, request: _Request, block: Tensor) -> Tensor:
        tensor = request.into(block)
        if self._observe is not None:
            self._observe(request.checkpoint, request.info.name, request.start, tensor)
        return tensor

    def _hand_over(self, result: list[Tensor] | BaseException) -> None:
        with self._changed:
            self._ready.append(result)
            self._changed.notify_all()

    def _reserve(self, nbytes: int) -> int | None:
        """The start of a free block, once there is one; None when the reading has been stopped."""
        nbytes = max(nbytes, ALIGNMENT_BYTES if self._arena.numel() else 0)
        with self._changed:
            while not self._stopped:
                start = self._free(nbytes)
                if start is not None:
                    self._blocks.append((start, start + nbytes))
                    return start
                self._changed.wait()
            return None

    def _free(self, nbytes: int) -> int | None:
        size = self._arena.numel()
        if not self._blocks:
            return 0
        oldest, newest = self._blocks[0], self._blocks[-1]
        if newest[0] < oldest[0]:  # wrapped: free between the newest and the oldest
            return newest[1] if oldest[0] - newest[1] >= nbytes else None
        if size - newest[1] >= nbytes:
            return newest[1]
        return 0 if oldest[0] >= nbytes else None
