"""What soups are mixed from: ingredients and base, held in memory or read in slices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from kernels import Segment
from kernels.ops import mix
from merge.mixing import compute_dtype
from soups.ingredients import Zoo

# Weights of all sources and all candidates that are worked on at a time: small enough for the
# last-level cache, large enough for full disk speed.
SLICE_BYTES = 4 << 20


class Sources:
    """What soups are mixed from: the ingredients, and then the base where it is known.

    A soup is the first ingredient plus the weighted differences of the others from it, in fp32
    (fp64 for tensors that are stored so), whatever other soups are mixed with it; where all that it
    is made of are the very same tensor, it is that tensor. The sources are held in memory or read
    again for each chunk of candidates, in slices; the bits are the same. From a soup that is kept
    they differ by rounding.
    """

    def __init__(self, zoo: Zoo, model: nn.Module, names: Sequence[str]) -> None:
        self.ingredients = len(zoo.checkpoints)
        self.checkpoints = [*zoo.checkpoints, *([zoo.base] if zoo.base is not None else [])]
        self.device = next(model.parameters()).device
        # Without their memory, which a mixture takes over.
        self.parameters = {n: model.get_parameter(n).detach().to("meta") for n in names}
        self._stored = {n: [zoo.stored(source, n) for source in self.checkpoints] for n in names}
        self.dtypes = {
            name: self.checkpoints[0].tensors[stored[0]].dtype
            for name, stored in self._stored.items()
        }
        scans = [s for s in (*zoo.preflight.scans, zoo.preflight.base_scan) if s is not None]
        self._digests = {
            name: [scan.digests[n] for scan, n in zip(scans, stored, strict=True)]
            for name, stored in self._stored.items()
        }
        # Name → all sources side by side, and where the tensor begins there.
        self._held: dict[str, tuple[Float[Tensor, "sources weights"], int]] = {}
        self._soup: _Soup | None = None

    @property
    def nbytes(self) -> int:
        """What all sources take in memory."""
        return len(self.checkpoints) * self.soup_nbytes

    @property
    def soup_nbytes(self) -> int:
        """What one source, or the soup that is kept, takes in memory."""
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        return sum(size * compute_dtype(self.dtypes[name]).itemsize for name, size in sizes.items())

    @property
    def in_memory(self) -> int:
        """Bytes that are held and kept now."""
        return bool(self._held) * self.nbytes + bool(self._soup) * self.soup_nbytes

    @property
    def held(self) -> bool:
        """Whether the sources are in memory."""
        return bool(self._held)

    def hold(self) -> None:
        """Read all sources into memory; each is read once."""
        self._soup = None
        everyone = range(len(self.checkpoints))
        held = {}
        for names in self._by_dtype():
            flat = Flat(names, self.parameters)
            rows = self._read(flat, everyone, 0, flat.numel)
            held |= {name: (rows, start) for name, start in flat.starts.items()}
        self._held = held

    def keep(self, weights: Float64[np.ndarray, " sources"]) -> None:
        """Keep this mix of the sources in memory, where they themselves are not.

        Candidates that hold its sources in its proportions are then mixed from it, so that those
        sources need not be read again: a soup that grows or moves along a line is read once.
        """
        if self._held or (self._soup is not None and np.array_equal(weights, self._soup.weights)):
            return
        kept = {}
        for names in self._by_dtype():
            columns = weights[None, :, None]
            mixed = self.mix(names, columns, [0] * len(names), rounded=False)
            kept |= Flat(names, self.parameters).parts(mixed)
        self._soup = _Soup(weights, kept)

    def release(self) -> None:
        """Give the memory back."""
        self._held, self._soup = {}, None

    def same(self, name: str, used: Sequence[int]) -> bool:
        """Whether these sources hold the very same tensor, by the hashes of the zoo's files."""
        return len({self._digests[name][s] for s in used}) == 1

    def mix(
        self,
        names: Sequence[str],
        columns: Float64[np.ndarray, "models sources groups"],
        group_of: Sequence[int],
        *,
        rounded: bool = True,
        out: Float[Tensor, "models weights"] | None = None,
    ) -> Float[Tensor, "models weights"]:
        """Tensors of one dtype, side by side, in each model: `rounded` as they are stored.

        `group_of` is the column of each. `out` receives them.
        """
        flat = Flat(names, self.parameters)
        stored = self.dtypes[names[0]]
        compute = compute_dtype(stored)
        dtype = self.parameters[names[0]].dtype if rounded else compute
        if out is None:
            out = torch.empty(len(columns), flat.numel, dtype=dtype, device=self.device)
        plain = self._plain(names, columns, group_of)
        used, columns = self._with_soup(columns)
        coefficients = torch.from_numpy(columns[:, used[1:]]).to(self.device, compute)
        step = max(1, SLICE_BYTES // (compute.itemsize * (len(used) + len(columns))))
        for start in range(0, flat.numel, step):
            stop = min(start + step, flat.numel)
            self._prefetch(flat, used, stop, min(stop + step, flat.numel))
            mixed = rows = self._read(flat, used, start, stop)
            if len(used) > 1:
                segments = [
                    Segment(piece.at, piece.at + piece.stop - piece.start, group_of[piece.tensor])
                    for piece in flat.pieces(start, stop)
                ]
                mixed = mix(rows[0], rows[1:] - rows[0], coefficients, segments)
                for piece in flat.pieces(start, stop):
                    part = slice(piece.at, piece.at + piece.stop - piece.start)
                    for m, source in plain.get(piece.tensor, ()):
                        if source in used:  # else it is the kept soup's, and mixed without loss
                            mixed[m, part] = rows[used.index(source), part]
            out[:, start:stop] = mixed.to(stored) if rounded else mixed
        return out

    def _plain(
        self,
        names: Sequence[str],
        columns: Float64[np.ndarray, "models sources groups"],
        group_of: Sequence[int],
    ) -> dict[int, list[tuple[int, int]]]:
        """Tensor → the models, each with a source, in which it is that source's, unmixed."""
        members = [[np.flatnonzero(c).tolist() for c in own] for own in columns.swapaxes(1, 2)]
        return {
            tensor: [
                (m, own[group_of[tensor]][0])
                for m, own in enumerate(members)
                if self.same(name, own[group_of[tensor]])
            ]
            for tensor, name in enumerate(names)
        }

    def _with_soup(
        self, columns: Float64[np.ndarray, "models sources groups"]
    ) -> tuple[list[int], Float64[np.ndarray, "models columns groups"]]:
        """The sources that are used; with the kept soup as one more in place of its own."""
        found = np.flatnonzero(columns.any(axis=(0, 2))).tolist()
        mixed = (np.count_nonzero(columns, axis=1) > 1).any()
        # The differences are from the first ingredient, whatever else is mixed.
        all_read = sorted({0, *found}) if mixed else found
        if self._soup is None or not self._soup.members <= set(found):
            return all_read, columns
        members = sorted(self._soup.members)
        part = self._soup.weights[members][None, :, None]
        times = columns[:, members[:1]] / part[:, :1]
        if not np.allclose(columns[:, members], times * part, rtol=1e-12, atol=0):
            return all_read, columns
        others = [s for s in found if s not in self._soup.members]
        return [len(self.checkpoints), *others], np.concatenate([columns, times], axis=1)

    def _read(
        self, flat: Flat, used: Sequence[int], start: int, stop: int
    ) -> Float[Tensor, "used weights"]:
        """The flat weights [start, stop) in these sources; memory of its own."""
        if self._held:
            return torch.cat([r[list(used)] for r in self._held_parts(flat, start, stop)], dim=1)
        dtype = compute_dtype(self.dtypes[flat.names[0]])
        rows = torch.empty(len(used), stop - start, dtype=dtype, device=self.device)
        for piece in flat.pieces(start, stop):
            name = flat.names[piece.tensor]
            part = rows[:, piece.at : piece.at + piece.stop - piece.start]
            for row, s in zip(part, used, strict=True):
                if s == len(self.checkpoints) and self._soup is not None:
                    row.copy_(self._soup.tensors[name][0, piece.start : piece.stop])
                else:
                    stored = self._stored[name][s]
                    self.checkpoints[s].read(stored, out=row, start=piece.start, stop=piece.stop)
        return rows

    def _held_parts(self, flat: Flat, start: int, stop: int) -> list[Float[Tensor, "sources _"]]:
        """The same in all sources, as views of what is held; neighbours in one."""
        runs: list[tuple[Tensor, int, int]] = []
        for piece in flat.pieces(start, stop):
            rows, first = self._held[flat.names[piece.tensor]]
            begin, end = first + piece.start, first + piece.stop
            if runs and runs[-1][2] == begin:
                runs[-1] = (rows, runs[-1][1], end)
            else:
                runs.append((rows, begin, end))
        return [rows[:, begin:end] for rows, begin, end in runs]

    def _prefetch(self, flat: Flat, used: Sequence[int], start: int, stop: int) -> None:
        if self._held:
            return
        for piece in flat.pieces(start, stop):
            for s in used:
                if s < len(self.checkpoints):
                    self.checkpoints[s].prefetch([self._stored[flat.names[piece.tensor]][s]])

    def _by_dtype(self) -> list[list[str]]:
        return parted_by(lambda name: compute_dtype(self.dtypes[name]), self.dtypes)


class Piece(NamedTuple):
    """The elements [start, stop) of a tensor, which lie from `at` on in a slice."""

    tensor: int
    at: int
    start: int
    stop: int


class Flat:
    """Tensors side by side, as one vector of weights."""

    def __init__(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        self.names = names
        self._shapes = [tensors[name].shape for name in names]
        self._ends = list(accumulate(shape.numel() for shape in self._shapes))
        self.numel = self._ends[-1]
        self.starts = dict(zip(names, [0, *self._ends], strict=False))

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What of which tensor lies in [start, stop)."""
        for tensor in range(bisect_right(self._ends, start), len(self.names)):
            first = self._ends[tensor] - self._shapes[tensor].numel()
            if first >= stop:
                return
            begin, end = max(start, first), min(stop, self._ends[tensor])
            if begin < end:
                yield Piece(tensor, begin - start, begin - first, end - first)

    def parts(self, weights: Shaped[Tensor, "rows weights"]) -> dict[str, Tensor]:
        """Name → its part of the weights [rows, numel]."""
        sizes = [shape.numel() for shape in self._shapes]
        return dict(zip(self.names, weights.split(sizes, dim=1), strict=True))

    def views(self, weights: Shaped[Tensor, "models weights"]) -> dict[str, Tensor]:
        """Name → its part of the weights, in its shape [models, ...]."""
        return {
            name: part.view(len(weights), *shape)
            for (name, part), shape in zip(self.parts(weights).items(), self._shapes, strict=True)
        }


@dataclass(frozen=True)
class _Soup:
    """A mix of sources that is kept in memory, by name [1, weights]."""

    weights: Float64[np.ndarray, " sources"]
    tensors: dict[str, Tensor]

    @property
    def members(self) -> set[int]:
        return set(np.flatnonzero(self.weights).tolist())


def parted_by(key: Callable[[str], Hashable], names: Iterable[str]) -> list[list[str]]:
    """The names in order, in parts that agree in the key."""
    parts: dict[Hashable, list[str]] = {}
    for name in names:
        parts.setdefault(key(name), []).append(name)
    return list(parts.values())
