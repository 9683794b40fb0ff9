"""Merge methods on plain tensors, for notebooks and tests: all of a tensor at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from merge.errors import MergeError
from merge.gram import gram_matrix
from merge.measuring import new_measure, show
from merge.method import Method, MethodSettings
from merge.mixing import compute_dtype
from merge.part import Part


def merge_tensors(
    method: Method,
    base: Shaped[Tensor, ...] | None,
    tensors: Sequence[Shaped[Tensor, ...]],
    *,
    statistics: Sequence[Shaped[Tensor, ...]] | None,
    part: Part | None,
    settings: Mapping[str, Any],
) -> Shaped[Tensor, ...]:
    """`method` on tensors of one name, in fp32 (fp64 where one is), in their promoted dtype."""
    problems = method.check_inputs(models=len(tensors), base=base is not None)
    if base is not None and method.base == "ignored":
        problems.append("takes no base; leave it out, or give it as one of the tensors")
    sources = [*tensors, *([base] if base is not None else [])]
    problems += [
        f"tensor {k} is {source.dtype} {list(source.shape)}, the first is {list(sources[0].shape)};"
        " wanted floating point and one shape"
        for k, source in enumerate(sources)
        if source.shape != sources[0].shape or not source.is_floating_point()
    ]
    if method.statistics and (statistics is None or len(statistics) not in (0, len(tensors))):
        problems.append(
            f"wanted statistics ({method.statistics}), one for each tensor, or [] where there are "
            "none of it"
        )
    if problems:
        raise MergeError(f"{method.name}: " + "; ".join(problems))
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    compute = compute_dtype(dtype)
    base = None if base is None else base.detach().to(compute).contiguous()
    tensors = [tensor.detach().to(compute).contiguous() for tensor in tensors]
    per_model = method.settings_of(settings, len(tensors))
    part = part or Part()
    extras = measure_whole(method, base, tensors, per_model, part)
    if method.statistics:
        extras["statistics"] = tuple(one.detach().to(compute) for one in statistics or ()) or None
    if method.takes_part:
        extras["part"] = part
    if method.depth:
        extras["depth"] = part.depth
    function = method.load(method.function)
    return function(base, tensors, **method.arguments(per_model), **extras).to(dtype)


def measure_whole(
    method: Method,
    base: Float[Tensor, ...] | None,
    tensors: Sequence[Float[Tensor, ...]],
    settings: Sequence[MethodSettings],
    part: Part,
) -> dict[str, Any]:
    """What the function wants to know of the whole tensors: `measured`, `gram`."""
    extras: dict[str, Any] = {}
    if method.measure is not None:
        assert base is not None
        acts_on = method.acts_on_with(settings[0])
        measures = [
            new_measure(method, settings, k, numel=tensor.numel(), part=part)
            for k, tensor in enumerate(tensors)
        ]
        for measure, tensor in zip(measures, tensors, strict=True):
            for see in measure.passes:
                show(see, base, tensor, tensor.shape, acts_on, dtype=tensor.dtype)
        extras["measured"] = tuple(measure.result() for measure in measures)
    if method.gram is not None:
        wanted = method.gram_with(settings[0])
        extras["gram"] = None if wanted is None else gram_matrix(wanted, base, tensors)
    return extras
