"""The rows that learners mix: a centre, a block of deltas, and the one model that they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from kernels import KernelError, Rows, Segment, delta_dot, fine_segments, mix, row_norms
from merge.checkpoints import Checkpoint
from soups.errors import SoupError
from soups.learners.registry import Precision

BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "sign": 1}

# Weights of one tensor and one row that share an fp32 scale, 1/64 bit a weight. On a zoo of small
# ResNets runs of 128 round 28%, 12%, 1% closer (int8, int4, sign), for a scale of 1/4 bit.
RUN = 2048

# Where several codes share a byte, parameters begin at a multiple of this many weights.
ALIGNMENT = 8

# Weights that are read and rounded at a time.
PIECE = 1 << 20


def row_bytes(weights: int, precision: Precision) -> int:
    """The memory of one row: its codes, and for the integer codes a scale per run."""
    scales = 0 if precision in ("fp32", "bf16") else 4 * -(-weights // RUN)
    return -(-weights * BITS[precision] // 8) + scales


@dataclass(frozen=True)
class _Piece:
    """The weights [start, stop) of the flat vectors: all or a part of one parameter.

    `offset` is where the piece begins in its parameter.
    """

    name: str
    start: int
    stop: int
    group: int
    offset: int = 0

    @property
    def flat(self) -> slice:
        """The piece in the flat vectors."""
        return slice(self.start, self.stop)

    @property
    def own(self) -> slice:
        """The piece in its flattened parameter."""
        return slice(self.offset, self.offset + self.stop - self.start)

    def split(self, longest: int) -> Iterator[_Piece]:
        """The piece in pieces of at most `longest` weights."""
        for start in range(self.start, self.stop, longest):
            stop = min(start + longest, self.stop)
            yield replace(self, start=start, stop=stop, offset=self.offset + start - self.start)


class Mixture:
    """One model with the weights `centre + Σ_b coefficients[b, g] · rows[b]`, group by group.

    The model's parameters become views of one flat fp32 vector. Memory beside the model: the
    centre, as large as it, and `capacity` rows, whatever the number of ingredients. The gradient in
    the coefficients is one backward through the one model, then a dot product per row and group,
    taken as soon as each parameter's gradient is there, so gradients are never all alive.

    Rows of another precision than fp32 are rounded while they are read, a piece at a time. What is
    mixed, its gradient and its lengths are those of the rounded rows; `apply_originals` mixes what
    was read.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[str]],
        capacity: int,
        stored: Callable[[Checkpoint, str], str] = lambda checkpoint, name: name,
        precision: Precision = "fp32",
    ):
        group_of = {name: g for g, names in enumerate(groups.values()) for name in names}
        self.model = model
        self.groups = len(groups)
        self.rounded = precision != "fp32"
        self._stored = stored
        mixed = [(n, p) for n, p in model.named_parameters() if n in group_of]
        self._slots = _lay_out(mixed, group_of, ALIGNMENT if self.rounded else 1)
        device = mixed[0][1].device
        # What is mixed needs a gradient, even where the model has frozen it; nothing else does.
        self._asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in group_of)
        segments = _segments(self._slots, self.rounded)
        self.weights = torch.zeros(segments[-1].stop, device=device)
        for slot, (_, parameter) in zip(self._slots, mixed, strict=True):
            view = self.weights[slot.flat].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
        self.centre = torch.zeros_like(self.weights)
        self._held = Rows.empty(capacity, len(self.weights), precision, segments, device)
        self.rows = self._held[:0]
        self._pieces = [piece for slot in self._slots for piece in self._split(slot)]
        self._parts: dict[_Piece, Rows] = {}
        self._errors = torch.zeros(self.groups, device=device)
        self._dots = torch.zeros(0, self.groups, device=device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._dot_hook(slot))
            for slot, (_, parameter) in zip(self._slots, mixed, strict=True)
        ]

    @property
    def row_bytes(self) -> int:
        """The memory of all rows that there is room for."""
        return self._held.nbytes

    def start_at_mean(self, ingredients: Sequence[Checkpoint]) -> None:
        """Put the centre at the mean of `ingredients`, read one after another."""
        for seen, ingredient in enumerate(_in_turn(ingredients)):
            for piece, values in self._read(ingredient):
                centre = self.centre[piece.flat]
                if seen:
                    centre.add_(values.sub_(centre), alpha=1 / (seen + 1))
                else:
                    centre.copy_(values)

    def load_block(
        self,
        ingredients: Sequence[Checkpoint],
        origin: Float[Tensor, " weights"] | None = None,
    ) -> None:
        """Read a block of ingredients as rows `w_k − origin`, rounded to the precision.

        The origin is the centre unless it is given.
        """
        origin = self.centre if origin is None else origin
        self._take_rows(len(ingredients))
        squares = torch.zeros(2, self.groups, dtype=torch.float64)
        for k, ingredient in enumerate(_in_turn(ingredients)):
            in_place = None if self.rounded else self.rows.codes[k]
            for piece, values in self._read(ingredient, in_place):
                values.sub_(origin[piece.flat])
                if self.rounded:
                    squares[:, piece.group] += self._round(k, piece, values, ingredient)
        lost, whole = squares
        self._errors = torch.where(whole > 0, lost / whole, 0.0).sqrt().float()

    def row_errors(self) -> Float[Tensor, " groups"]:
        """`√(Σ_b ‖rounded − row‖² / Σ_b ‖row‖²)` of the block in memory; 0 where rows are fp32."""
        return self._errors

    def row_norms(self) -> Float[Tensor, "block groups"]:
        """The Euclidean length of each row in each group, of the rounded rows where they are."""
        return row_norms(self.rows, self.rows.groups, self.groups)

    @torch.no_grad()
    def apply(self, coefficients: Float[Tensor, "block groups"]) -> None:
        """Give the model the weights `centre + Σ_b coefficients[b, g] · rows[b]`."""
        mix(self.centre, self.rows, coefficients[None], self.rows.groups, out=self.weights[None])

    @torch.no_grad()
    def apply_originals(
        self, ingredients: Sequence[Checkpoint], coefficients: Float[Tensor, "block groups"]
    ) -> None:
        """The same with the block's ingredients as they are, not rounded, each read once more."""
        self.weights.copy_(self.centre)
        for own, ingredient in zip(coefficients, _in_turn(ingredients), strict=True):
            for piece, values in self._read(ingredient):
                values.sub_(self.centre[piece.flat]).mul_(own[piece.group])
                self.weights[piece.flat].add_(values)

    def gradient(self, loss: Float[Tensor, ""]) -> Float[Tensor, "block groups"]:
        """∂loss/∂coefficients at the weights last applied; frees the graph and every gradient."""
        self._dots = torch.zeros(len(self.rows), self.groups, device=self.weights.device)
        loss.backward()
        return self._dots

    def displacement(self) -> Float[Tensor, " groups"]:
        """How far the weights last applied are from the centre, per group."""
        squares = torch.zeros(self.groups, device=self.weights.device)
        # Tensor by tensor: the difference of all weights would be one more set of them.
        for slot in self._slots:
            moved = self.weights[slot.flat] - self.centre[slot.flat]
            squares[slot.group] += torch.linalg.vector_norm(moved) ** 2
        return squares.sqrt()

    def fold(self) -> None:
        """Make the weights last applied the new centre."""
        self.centre.copy_(self.weights)

    def close(self) -> None:
        """Take the hooks off and free the rows; the model keeps its weights."""
        for hook in self._hooks:
            hook.remove()
        for parameter, asked in self._asked.items():
            parameter.requires_grad_(asked)
        self._held = self.rows = Rows.empty(0, 0, "fp32")
        self._parts = {}
        self.centre = self.centre.new_empty(0)

    def __enter__(self) -> Mixture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_rows(self, count: int) -> None:
        """Use `count` of the rows that there is room for; have the part of each piece at hand."""
        if len(self.rows) != count or not self._parts:
            self.rows = self._held if len(self._held) == count else self._held[:count]
            self._parts = {piece: self.rows.part(piece.start, piece.stop) for piece in self._pieces}

    def _split(self, slot: _Piece) -> Iterator[_Piece]:
        """What is read and multiplied at a time: where nothing is rounded all of a parameter."""
        return slot.split(PIECE) if self.rounded else iter((slot,))

    def _read(
        self, ingredient: Checkpoint, into: Float[Tensor, " weights"] | None = None
    ) -> Iterator[tuple[_Piece, Float[Tensor, " piece"]]]:
        """The ingredient piece by piece; without `into`, each one is gone when the next is read."""
        longest = max(piece.stop - piece.start for piece in self._pieces)
        scratch = torch.empty(longest if into is None else 0, device=self.weights.device)
        for piece in self._pieces:
            values = scratch[: piece.stop - piece.start] if into is None else into[piece.flat]
            stored = self._stored(ingredient, piece.name)
            ingredient.read(stored, out=values, start=piece.own.start, stop=piece.own.stop)
            yield piece, values

    def _round(
        self, k: int, piece: _Piece, values: Float[Tensor, " piece"], ingredient: Checkpoint
    ) -> Float64[Tensor, " lost_and_whole"]:
        """Store `values` in row k; `‖rounded − values‖²` and `‖values‖²`."""
        part = self._parts[piece]
        try:
            part.write(k, values)
        except KernelError as error:
            raise SoupError(
                f"{ingredient.path}: '{piece.name}' cannot be rounded: {error}"
            ) from error
        lost = part.unpack(k).sub_(values)
        return torch.stack([_square_length(lost), _square_length(values)])

    def _dot(self, part: Rows, gradient: Float[Tensor, " piece"]) -> Float[Tensor, " block"]:
        """`Σ_w part[b, w] · gradient[w]`."""
        if not self.rounded:
            # The same product; for a small tensor it takes less time than the operation's checks.
            return part.codes @ gradient
        return delta_dot(part, gradient[None], [Segment(0, len(gradient), 0)])[0, :, 0]

    def _dot_hook(self, slot: _Piece):
        pieces = list(self._split(slot))

        def dot(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            gradient = parameter.grad.flatten()
            for piece in pieces:
                self._dots[:, slot.group] += self._dot(self._parts[piece], gradient[piece.own])
            parameter.grad = None

        return dot


def fold_coefficients(
    matrix: np.ndarray, block: Sequence[int], coefficients: Float[Tensor, "block groups"]
) -> np.ndarray:
    """The coefficients over the originals after `c ← c + Σ_b a[b, g] (w_b − c)`, in float64.

    Columns keep their sum: each update moves weight from the centre to the block.
    """
    moved = coefficients.detach().double().cpu().numpy()
    folded = matrix * (1.0 - moved.sum(axis=0))
    folded[list(block)] += moved
    return folded


def _lay_out(
    mixed: Sequence[tuple[str, nn.Parameter]], group_of: Mapping[str, int], alignment: int
) -> list[_Piece]:
    """A place in the flat vectors for each parameter, beginning at a multiple of `alignment`."""
    slots: list[_Piece] = []
    end = 0
    for name, parameter in mixed:
        start = -(-end // alignment) * alignment
        end = start + parameter.numel()
        slots.append(_Piece(name, start, end, group_of[name]))
    return slots


def _segments(slots: Sequence[_Piece], rounded: bool) -> list[Segment]:
    """The groups of the weights; where they are rounded each run, and each gap, has its scale."""
    segments: list[Segment] = []
    for slot in slots:
        end = segments[-1].stop if segments else 0
        if end < slot.start:
            segments.append(Segment(end, slot.start, segments[-1].group))
        own = Segment(slot.start, slot.stop, slot.group)
        segments += fine_segments([own], RUN) if rounded else [own]
    return segments


def _in_turn(ingredients: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """One after another; while one is read the kernel fetches the next."""
    for number, ingredient in enumerate(ingredients):
        for following in ingredients[number + 1 : number + 2]:
            following.prefetch()
        yield ingredient


def _square_length(values: Float[Tensor, " piece"]) -> Float64[Tensor, ""]:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square().cpu()
