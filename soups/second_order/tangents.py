"""Derivatives of each image's logits in directions of weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fleet.modes import refuse_training
from soups.errors import SoupError
from soups.second_order.weight_uses import REMEDY, Use, WeightUses
from soups.sources import Flat, Sources, parted_by

MEMORY = 256 << 20
CLASSES_AT_ONCE = 64
CHECKED_ROWS = 2
TOLERANCE = 1e-2
Profiles = Mapping[str, Sequence[float]]


def logit_derivatives(
    model: nn.Module,
    directions: Mapping[str, Float[Tensor, "directions ..."]],
    images: Shaped[Tensor, "rows ..."],
    *,
    profiles: Profiles | None = None,
    memory: int = MEMORY,
) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes directions profiles"]]:
    """The logits, and their exact derivatives at the model's present weights.

    `derivatives[i, c, d, r] = Σ_t profiles[t][r] · ⟨∂ logits[i, c] / ∂ w_t, directions[t][d]⟩`

    over the parameters and buffers w_t that have directions; without `profiles` there is one, of
    ones. The model is in evaluation mode.

    What is computed from weights alone is followed forward; where it meets what depends on the
    image, its change (a layer's output for every direction) is multiplied with the gradient of each
    logit there. So the cost is that of one forward pass, of one backward pass through the
    activations for each class, and of about one forward pass for each direction, however many the
    profiles: one per group of tensors costs the same as one. Forward mode through the whole
    network takes 2.4 to 4.5 times as long with 16 directions and 3 profiles (small ConvNeXt, ViT,
    ResNet on a CPU), and has no rule for fused attention.

    Images are taken in batches that need about `memory` bytes. On the first two the derivatives are
    compared with those of plain autograd.

    Raises SoupError for names and shapes that the model does not have, for operations whose
    derivatives are not known (and names them), and where the comparison fails; FleetError for a
    model in train mode.
    """
    refuse_training(model)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    scales = _scales(weights, directions, profiles)
    if not len(images):
        raise SoupError("logit derivatives: found no images; wanted at least one")
    point = _Point(model, weights)
    probe = images[:CHECKED_ROWS]
    _check(point, directions, scales, probe)
    row_bytes = point.row_bytes(directions, scales, probe)
    parts = [
        point.derivatives(directions, scales, batch)
        for batch in images.split(max(1, memory // row_bytes))
    ]
    logits, derivatives = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(derivatives)


def ingredient_directions(sources: Sources, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Ingredient − mean of all, for the chosen ones: name → [chosen, *shape].

    Memory for as many models, and for as many again while they are made.
    """
    count = len(sources.checkpoints)
    mean = np.zeros((1, count, 1))
    mean[:, : sources.ingredients] = 1 / sources.ingredients
    alone = np.eye(count)[list(chosen), :, None]
    found: dict[str, Tensor] = {}
    for names in parted_by(lambda name: sources.dtypes[name], sources.parameters):
        group_of = [0] * len(names)
        rows = sources.mix(names, alone, group_of, rounded=False)
        rows -= sources.mix(names, mean, group_of, rounded=False)
        found |= Flat(names, sources.parameters).views(rows)
    return {name: found[name].to(sources.parameters[name].dtype) for name in sources.parameters}


class _Point:
    """The model at its present weights."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def record(
        self, directions: Mapping[str, Tensor], images: Tensor
    ) -> tuple[Float[Tensor, "rows classes"], list[Use]]:
        """The logits with their graph, and each use of the weights."""
        recorder = WeightUses(self.weights, directions)

        def of_row(image: Tensor) -> Tensor:
            with recorder:
                return self.model(image[None])[0]

        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                logits = vmap(of_row)(images.detach().requires_grad_())
            except RuntimeError as error:
                what = str(error).partition("\n")[0]
                raise SoupError(
                    f"{type(self.model).__name__} cannot be followed image by image ({what}); "
                    f"{REMEDY}"
                ) from error
        return logits, recorder.uses

    def row_bytes(
        self, directions: Mapping[str, Tensor], scales: Mapping[str, Tensor], images: Tensor
    ) -> int:
        """About what one image takes: activations, their gradients for each class, and one layer's
        outputs in all directions; with the result."""
        logits, uses = self.record(directions, images)
        per_edge = {_key(use.edge): use.outputs for use in uses}
        count = len(next(iter(directions.values())))
        largest = max(per_edge.values(), default=0)
        result = 2 * logits.shape[1] * count * len(next(iter(scales.values())))
        classes = min(logits.shape[1], CLASSES_AT_ONCE)
        numbers = (classes + 4) * sum(per_edge.values()) + (classes + 2 * count) * largest + result
        return max(1, numbers * logits.element_size())

    def derivatives(
        self, directions: Mapping[str, Tensor], scales: Mapping[str, Tensor], images: Tensor
    ) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes directions profiles"]]:
        logits, uses = self.record(directions, images)
        (rows, classes), count = logits.shape, len(next(iter(directions.values())))
        profiles = len(next(iter(scales.values())))
        found = logits.new_zeros(rows, classes, count, profiles)
        at_edge: dict[tuple[int, int], list[Use]] = {}
        for use in uses:
            at_edge.setdefault(_key(use.edge), []).append(use)
        edges = [first.edge for first, *_ in at_edge.values()]
        for start in range(0, classes, CLASSES_AT_ONCE):
            some = slice(start, start + CLASSES_AT_ONCE)
            cotangents = _cotangents(logits[:, some], edges)
            with torch.no_grad():
                for run in at_edge.values():
                    own = [of_class.pop() for of_class in cotangents]
                    if any(part is None for part in own):
                        continue  # the logits do not depend on it
                    stacked = torch.stack([part.movedim(run[0].row_axis, 0) for part in own])
                    for use in run:
                        for name, tangents in use.along.items():
                            moved = use.times(stacked, tangents)
                            for r in scales[name].nonzero()[:, 0].tolist():
                                found[:, some, :, r].add_(moved, alpha=scales[name][r].item())
        return logits.detach(), found


def _cotangents(
    logits: Float[Tensor, "rows classes"], edges: Sequence[GradientEdge]
) -> list[list[Tensor]]:
    """For each class the gradients of its logits at each edge; the last edge first."""
    if not edges:
        return [[] for _ in range(logits.shape[1])]
    return [
        list(torch.autograd.grad(of_class.sum(), edges, retain_graph=True, allow_unused=True))[::-1]
        for of_class in logits.unbind(1)
    ]


def _key(edge: GradientEdge) -> tuple[int, int]:
    return id(edge.node), edge.output_nr


def _check(
    point: _Point,
    directions: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    images: Tensor,
) -> None:
    """SoupError where autograd, over a batch, finds another derivative of a sum of logits."""
    parameters = {n for n, t in point.model.named_parameters() if n in directions}
    own = {n: directions[n] for n in directions if n in parameters}
    if not own:
        return
    logits, found = point.derivatives(own, scales, images)
    with torch.enable_grad():
        leaves = {n: point.weights[n].detach().requires_grad_() for n in own}
        plain = functional_call(point.model, leaves, (images,))
        factors = torch.linspace(1, 2, plain.shape[1], device=plain.device, dtype=plain.dtype)
        total = (plain * factors).sum()
        gradients = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
    if not torch.allclose(
        plain, logits, rtol=TOLERANCE, atol=TOLERANCE * logits.abs().max().item()
    ):
        raise SoupError(
            f"{type(point.model).__name__}: an image's logits depend on the other images of its "
            f"batch, so that there are no derivatives of its own; {REMEDY}"
        )
    wanted = torch.zeros(found.shape[2:], dtype=torch.float64)
    size = torch.zeros(found.shape[2:], dtype=torch.float64)
    for (name, rows), gradient in zip(own.items(), gradients, strict=True):
        if gradient is not None:
            part = (rows.flatten(1) @ gradient.flatten()).double().cpu()
            wanted += part[:, None] * scales[name]
            size += (part[:, None] * scales[name]).abs()
    summed = torch.einsum("rckp,c->kp", found, factors).double().cpu()
    error = (summed - wanted).abs() / (size + 1e-3 * size.max() + 1e-30)
    if not error.max() < TOLERANCE:
        d, r = divmod(int(error.argmax()), error.shape[1])
        raise SoupError(
            f"{type(point.model).__name__}: the derivative in direction {d}, profile {r} is "
            f"{summed[d, r]:.6g}, and {wanted[d, r]:.6g} by autograd: the model uses weights in a "
            f"way that is not seen here (such as a custom autograd function); {REMEDY}"
        )


def _scales(
    weights: Mapping[str, Tensor], directions: Mapping[str, Tensor], profiles: Profiles | None
) -> dict[str, Tensor]:
    """The profiles as float64 vectors, by name."""
    if not directions:
        raise SoupError("directions: found none; wanted [directions, *shape] for some weights")
    counts = {len(rows) for rows in directions.values()}
    for name, rows in directions.items():
        if name not in weights:
            raise SoupError(f"directions: the model has no weights {name!r}")
        if rows.shape[1:] != weights[name].shape or not len(rows):
            raise SoupError(
                f"directions: {name!r} is {list(rows.shape)}; wanted [directions, "
                f"*{list(weights[name].shape)}], as in the model, with at least one direction"
            )
    if len(counts) > 1:
        raise SoupError(
            f"directions: found {sorted(counts)} of them for different tensors; wanted one number"
        )
    given = {n: [1.0] if profiles is None else list(profiles.get(n, ())) for n in directions}
    fewest = min(given, key=lambda name: len(given[name]))
    most = max(map(len, given.values()))
    if not given[fewest] or len(given[fewest]) < most:
        raise SoupError(
            f"profiles: {fewest!r} has {len(given[fewest])} of {most}; wanted as many for each of "
            "the tensors that have directions, at least one"
        )
    return {name: torch.tensor(scale, dtype=torch.float64) for name, scale in given.items()}
