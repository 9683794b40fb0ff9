"""The rows that learners mix: a centre, a block of deltas, and the one model that they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import Segment, delta_dot, mix, row_norms
from merge.checkpoints import Checkpoint


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies in the flat vectors, and its group."""

    name: str
    start: int
    stop: int
    group: int


class Mixture:
    """One model with the weights `centre + Σ_b coefficients[b, g] · rows[b]`, group by group.

    The model's parameters become views of one flat fp32 vector. Memory beside the model:
    `capacity + 1` times its weights, whatever the number of ingredients. The gradient in the
    coefficients is one backward through the one model, then a dot product per row and group,
    taken as soon as each parameter's gradient is there, so gradients are never all alive.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[str]],
        capacity: int,
        stored: Callable[[Checkpoint, str], str] = lambda checkpoint, name: name,
    ):
        group_of = {name: g for g, names in enumerate(groups.values()) for name in names}
        self.model = model
        self.groups = len(groups)
        self._stored = stored
        self._slots: list[_Slot] = []
        mixed = [(n, p) for n, p in model.named_parameters() if n in group_of]
        start = 0
        for name, parameter in mixed:
            stop = start + parameter.numel()
            self._slots.append(_Slot(name, start, stop, group_of[name]))
            start = stop
        device = mixed[0][1].device
        # What is mixed needs a gradient, even where the model has frozen it; nothing else does.
        self._asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in group_of)
        self.weights = torch.empty(start, device=device)
        for slot, (_, parameter) in zip(self._slots, mixed, strict=True):
            view = self.weights[slot.start : slot.stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
        self.centre = torch.empty_like(self.weights)
        self._rows = torch.empty(capacity, start, device=device)
        self._block = 0
        self._segments = _merge_neighbours(self._slots)
        self._dots = torch.zeros(0, self.groups, device=device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._dot_hook(slot))
            for slot, (_, parameter) in zip(self._slots, mixed, strict=True)
        ]

    @property
    def rows(self) -> Float[Tensor, "block weights"]:
        """The deltas of the block in memory."""
        return self._rows[: self._block]

    def start_at_mean(self, ingredients: Sequence[Checkpoint]) -> None:
        """Put the centre at the mean of `ingredients`, read one after another."""
        row = self._rows[0]
        for seen, ingredient in enumerate(ingredients):
            for following in ingredients[seen + 1 : seen + 2]:
                following.prefetch()
            self._read(ingredient, self.centre if seen == 0 else row)
            if seen:
                self.centre.add_(row.sub_(self.centre), alpha=1 / (seen + 1))
        self._block = 0

    def load_block(self, ingredients: Sequence[Checkpoint]) -> None:
        """Read a block of ingredients as rows `w_k − centre`."""
        self._block = len(ingredients)
        for row, ingredient in zip(self.rows, ingredients, strict=True):
            self._read(ingredient, row)
            row.sub_(self.centre)

    def row_norms(self) -> Float[Tensor, "block groups"]:
        """The Euclidean length of each row in each group."""
        return row_norms(self.rows, self._segments, self.groups)

    @torch.no_grad()
    def apply(self, coefficients: Float[Tensor, "block groups"]) -> None:
        """Give the model the weights `centre + Σ_b coefficients[b, g] · rows[b]`."""
        mix(self.centre, self.rows, coefficients, self._segments, out=self.weights)

    def gradient(self, loss: Float[Tensor, ""]) -> Float[Tensor, "block groups"]:
        """∂loss/∂coefficients at the weights last applied; frees the graph and every gradient."""
        self._dots = torch.zeros(self._block, self.groups, device=self.weights.device)
        loss.backward()
        return self._dots

    def displacement(self) -> Float[Tensor, " groups"]:
        """How far the weights last applied are from the centre, per group."""
        squares = torch.zeros(self.groups, device=self.weights.device)
        # Tensor by tensor: the difference of all weights would be one more set of them.
        for slot in self._slots:
            moved = self.weights[slot.start : slot.stop] - self.centre[slot.start : slot.stop]
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
        self._rows = self._rows.new_empty(0, 0)
        self.centre = self.centre.new_empty(0)
        self._block = 0

    def __enter__(self) -> Mixture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, ingredient: Checkpoint, row: Float[Tensor, " weights"]) -> None:
        for slot in self._slots:
            stored = self._stored(ingredient, slot.name)
            ingredient.read(stored, out=row[slot.start : slot.stop])

    def _dot_hook(self, slot: _Slot):
        def dot(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            deltas = self.rows[:, slot.start : slot.stop]
            self._dots[:, slot.group] += delta_dot(deltas, parameter.grad.flatten())
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


def _merge_neighbours(slots: Sequence[_Slot]) -> list[Segment]:
    segments: list[Segment] = []
    for slot in slots:
        if segments and segments[-1].group == slot.group:
            segments[-1] = segments[-1]._replace(stop=slot.stop)
        else:
            segments.append(Segment(slot.start, slot.stop, slot.group))
    return segments
