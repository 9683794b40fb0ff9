"""Several LoRA adapters merged into one, never by (Σ A)(Σ B)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from inputs.randomness import generator
from merge.adapters.adapter import WRAPPER, Adapter, Module
from merge.adapters.folder import NewModule, check_free, exact_targets, write_adapter
from merge.adapters.low_rank import Factors, compressed, stacked, truncated
from merge.checkpoints.envelopes import quoted
from merge.errors import MergeError
from merge.method import Method
from merge.part import Part
from merge.registry import find_method

BY_FACTORS = ("cat", "linear", "svd")
# Settings of the first adapter's config that say for which model it is.
KEPT = ("task_type", "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "revision")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def combine_adapters(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float],
    out: str | Path,
    rank: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> dict[str, Any]:
    """Merge the changes `D_k = s_k B_k A_k` of LoRA adapters into one adapter in the folder `out`.

    `cat`: `Σ w_k D_k` exactly, the factors side by side, of rank `Σ r_k`. `linear`: the same sum
    of the least rank, exact up to rounding, or its best approximation of `rank`. `svd`: the same,
    with the largest of the ranks as the default. Any other name is a merge method on differences
    to a base (`ties`, `dare_linear`, `dare_ties`, `knots`, …) with its `settings`: it merges the
    dense D_k of one module at a time, cut to `rank` (default: the largest of the ranks).

    A module that an adapter lacks counts as zero there; what adapters store whole is averaged by
    weight over those that have it. PEFT's own `linear` adds up the factors and so has the cross
    terms `B_i A_j` too. Returns a record, with each module's relative error of the cut.
    Raises MergeError where adapters do not fit each other, and for wrong settings.
    """
    folder = check_free(out)
    dense = _checked(adapters, method, weights, rank, settings)
    content = _content(adapters)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules: dict[str, NewModule] = {}
    for name in names:
        like = _common(adapters, name)
        terms = _terms(adapters, name)
        if dense is None:
            factors = _by_factors(method, terms, weights, rank)
        else:
            merged = _by_method(dense, terms, weights, like, settings, Part(name, seed=seed))
            most = _largest_rank(terms) if rank is None else rank
            factors = truncated(
                merged, rank=most, energy=None, generator=generator(seed, f"truncate/{name}")
            )
        modules[name] = NewModule(like.kind, like.window, factors)
    saved = _averaged(adapters, weights)
    write_adapter(folder, modules, saved, content, dtype=dtype)
    return _record(adapters, method, weights, settings, modules, saved)


Term = tuple[Float[Tensor, "out _rank"], Float[Tensor, "_rank in"]]
"""`s · B` and A of one adapter; of one that lacks the module there is None in its place."""


def _checked(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float],
    rank: int | None,
    settings: Mapping[str, Any],
) -> Method | None:
    """The merge method for dense changes, None for those by factors; MergeError on wrong input."""
    if not adapters or len(weights) != len(adapters):
        raise MergeError(
            f"{len(weights)} weights for {len(adapters)} adapters, wanted one weight for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise MergeError(f"the weights are {list(weights)}, wanted finite numbers")
    if rank is not None and (rank < 1 or method == "cat"):
        most = "none: 'cat' has the sum of the ranks, 'svd' cuts" if rank > 0 else "at least 1"
        raise MergeError(f"rank is {rank} for {method!r}, wanted {most}")
    biased = [
        f"{adapter.path}: {module.name}"
        for adapter in adapters
        for module in adapter.modules.values()
        if module.b_bias is not None
    ]
    if biased:
        raise MergeError(
            f"{biased[0]!r}: lora_B has a bias (lora_bias), which is not merged into an adapter; "
            "apply each adapter to the base and merge the models"
        )
    if method in BY_FACTORS:
        if settings:
            raise MergeError(f"{method}: has no settings, found {quoted(sorted(settings))}")
        return None
    found = find_method(method)
    problems = found.check_inputs(models=len(adapters), base=True)
    if found.base == "ignored" or found.statistics:
        problems.append("merges no differences to a base; use one that does, or 'linear'")
    if "weight" in settings:
        problems.append("the weights come as `weights`, not as a setting")
    if "weight" not in found.per_model and len(set(weights)) > 1:
        problems.append(f"has no weights, found {list(weights)}; give equal ones")
    if problems:
        raise MergeError(f"{method}: " + "; ".join(problems))
    return found


def _common(adapters: Sequence[Adapter], name: str) -> Module:
    """The module as the adapters have it that do; MergeError where they differ."""
    holders = [adapter for adapter in adapters if name in adapter.modules]
    first = holders[0].modules[name]
    for other in holders[1:]:
        module = other.modules[name]
        if (module.kind, module.rows, module.window) != (first.kind, first.rows, first.window):
            raise MergeError(
                f"{other.path}: {name!r} is for {module.describe}, in {holders[0].path} for "
                f"{first.describe}; merge adapters of the same base"
            )
    return first


def _terms(adapters: Sequence[Adapter], name: str) -> list[Term | None]:
    terms: list[Term | None] = []
    for adapter in adapters:
        if name in adapter.modules:
            b, a = adapter.factors(name, dtype=torch.float64)
            terms.append((b * adapter.modules[name].scaling, a))
        else:
            terms.append(None)
    return terms


def _largest_rank(terms: Sequence[Term | None]) -> int:
    return max(term[1].shape[0] for term in terms if term is not None)


def _by_factors(
    method: str, terms: Sequence[Term | None], weights: Sequence[float], rank: int | None
) -> Factors:
    whole = stacked([(*t, w) for t, w in zip(terms, weights, strict=True) if t is not None])
    if method == "cat":
        return whole
    if method == "svd" and rank is None:
        rank = _largest_rank(terms)
    return compressed(whole, rank)


def _by_method(
    method: Method,
    terms: Sequence[Term | None],
    weights: Sequence[float],
    like: Module,
    settings: Mapping[str, Any],
    part: Part,
) -> Float[Tensor, "out in"]:
    """The method on the dense changes of one module, against a base of zeros."""
    zero = torch.zeros(like.rows, math.prod(like.window))
    changes = [zero if term is None else term[0].float() @ term[1].float() for term in terms]
    weighted = {"weight": list(weights)} if "weight" in method.per_model else {}
    return method(zero, changes, part=part, **weighted, **settings)


def _averaged(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of each tensor that is stored whole, over those that store it."""
    saved: dict[str, Tensor] = {}
    for name in sorted({name for adapter in adapters for name in adapter.saved}):
        holders = [(a, w) for a, w in zip(adapters, weights, strict=True) if name in a.saved]
        infos = [a.checkpoint.tensors[a.saved[name]] for a, _ in holders]
        if len({info.shape for info in infos}) > 1:
            raise MergeError(
                f"{holders[0][0].path}: {name!r}, stored whole, is {list(infos[0].shape)}; in "
                f"others {quoted([str(list(info.shape)) for info in infos[1:]])}; merge adapters "
                "of the same task head and vocabulary"
            )
        total = math.fsum(weight for _, weight in holders)
        if total == 0:
            raise MergeError(
                f"{name!r} is stored whole by {holders[0][0].path} and averaged by weight; the "
                "weights sum to 0, wanted another sum"
            )
        tensors = [a.checkpoint.read(a.saved[name]) for a, _ in holders]
        mean = sum(
            tensor.double() * (weight / total)
            for tensor, (_, weight) in zip(tensors, holders, strict=True)
        )
        whole = tensors[0] if not tensors[0].is_floating_point() else torch.as_tensor(mean)
        stored = holders[0][0].saved[name]
        saved[stored if stored.startswith(WRAPPER) else WRAPPER + stored] = whole.to(
            tensors[0].dtype
        )
    return saved


def _content(adapters: Sequence[Adapter]) -> dict[str, Any]:
    first = adapters[0]
    content = {key: first.content[key] for key in KEPT if key in first.content}
    same = all(
        adapter.modules.keys() == first.modules.keys() and _targets(adapter) == _targets(first)
        for adapter in adapters
    )
    names = sorted({name for adapter in adapters for name in adapter.modules})
    content.update(_targets(first) if same else exact_targets(names))
    kept = {module for adapter in adapters for module in adapter.config.modules_to_save or ()}
    both = [name for name in names if any(name.endswith(module) for module in kept)]
    if both:
        raise MergeError(
            f"{quoted(both)}: some adapters store these modules whole (modules_to_save), others "
            "have LoRA on them; apply each adapter to the base and merge the models"
        )
    biases = {adapter.config.bias for adapter in adapters} - {"none"}
    content["modules_to_save"] = sorted(kept) or None
    content["bias"] = "all" if "all" in biases else "lora_only" if biases else "none"
    return content


def _targets(adapter: Adapter) -> dict[str, Any]:
    targets = {key: adapter.content[key] for key in TARGETS if key in adapter.content}
    if isinstance(targets.get("target_modules"), list):  # a set: PEFT writes it in any order
        targets["target_modules"] = sorted(targets["target_modules"])
    return targets


def _record(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float],
    settings: Mapping[str, Any],
    modules: Mapping[str, NewModule],
    saved: Mapping[str, Tensor],
) -> dict[str, Any]:
    bases = sorted({str(adapter.config.base_model_name_or_path) for adapter in adapters})
    notes = [f"{adapter.path}: {note}" for adapter in adapters for note in adapter.notes]
    if len(bases) > 1:
        notes.append(f"the adapters name different bases: {quoted(bases)}")
    return {
        "method": method,
        "settings": dict(settings),
        "adapters": [
            {"path": adapter.path, "weight": weight}
            for adapter, weight in zip(adapters, weights, strict=True)
        ],
        "modules": {
            name: {
                "rank": module.factors.rank,
                "relative_error": module.factors.relative_error,
                "zero_in": [a.path for a in adapters if name not in a.modules],
            }
            for name, module in modules.items()
        },
        "averaged": sorted(saved),
        "notes": notes,
    }
