"""What would probably work on a folder of checkpoints: learners and merge methods by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from inputs.budget import format_bytes
from merge.method import Method
from merge.registry import FAMILIES
from soups.learners.registry import LEARNERS

Verdict = Literal["would work", "worth a try", "not as it is"]

# Deltas of fine-tunes on one task share a direction; beyond this, averages keep most of them.
ALIKE, ORTHOGONAL = 0.3, 0.15


@dataclass(frozen=True)
class Facts:
    """What advice follows from: `ingredients` are those that can be mixed, without the base.

    `nbytes` is the size of one, `cosine` the mean of their deltas to the base, `connected` whether
    these share a basin, where that was measured.
    """

    ingredients: int
    base: str | None
    nbytes: int
    cosine: float | None = None
    connected: bool | None = None


@dataclass(frozen=True)
class Advice:
    """`learner`s or merge `method`s of which the same can be said."""

    of: Literal["learner", "method"]
    names: tuple[str, ...]
    verdict: Verdict
    why: str


def advise(facts: Facts) -> list[Advice]:
    """What to try, for the checkpoints that can be mixed; nothing where there are not two."""
    if facts.ingredients < 2:
        return []
    return [advice for advice in (*_learners(facts), *_methods(facts)) if advice.names]


def _learners(facts: Facts) -> Iterator[Advice]:
    hill = facts.connected is False
    yield Advice(
        "learner",
        ("best_single", "greedy"),
        "would work",
        "greedy leaves out what does not help, also across a barrier; every other learner must "
        "beat these two",
    )
    yield Advice(
        "learner",
        ("uniform",),
        "not as it is" if hill else "would work",
        "a mean of all is on the barrier between basins; mix those of one basin"
        if hill
        else "learns nothing, so that it cannot overfit; a bad ingredient pulls it down",
    )
    yield Advice(
        "learner",
        ("pooled", "pooled_newton"),
        "worth a try" if hill else "would work",
        "few numbers for each ingredient, chosen by cross-fitting: the least risk with some "
        "hundred images of select",
    )
    held = format_bytes(facts.ingredients * facts.nbytes)
    yield Advice(
        "learner",
        ("mehl", "mehl_layerwise", "learned", "learned_layerwise"),
        "worth a try",
        "a coefficient for each layer wants some thousand images of select; learned* hold all "
        f"ingredients in memory ({held}), mehl* a block of them",
    )
    if facts.base is None:
        yield Advice(
            "learner",
            ("wise_ft",),
            "not as it is",
            "is the line from the base to a soup, and the base is not known: name it with zoo.base",
        )
    else:
        yield Advice(
            "learner",
            ("wise_ft",),
            "would work",
            f"the line from {facts.base} to a soup, where images unlike select matter",
        )
    named = {"best_single", "greedy", "uniform", "pooled", "pooled_newton", "wise_ft"}
    named |= {"mehl", "mehl_layerwise", "learned", "learned_layerwise"}
    yield Advice(
        "learner",
        tuple(name for name in LEARNERS if name not in named),
        "worth a try",
        "need scores alone: for a metric without a gradient (accuracy, worst_class)",
    )


def _methods(facts: Facts) -> Iterator[Advice]:
    methods = [method for family in FAMILIES.values() for method in family]
    fitting = [m for m in methods if not _wrong_count(m, facts.ingredients)]
    free = [m.name for m in fitting if m.base != "required" and not m.statistics]
    on_deltas = [m.name for m in fitting if m.base == "required" and not m.statistics]
    with_data = [m.name for m in fitting if m.statistics]
    others = [m.name for m in methods if _wrong_count(m, facts.ingredients)]
    if facts.connected is False:
        why = "are on the barrier between basins; merge those of one basin, or give `align:`"
        yield Advice("method", tuple(free), "not as it is", why)
    else:
        yield Advice("method", tuple(free), "would work", "need no base")
    if facts.base is None:
        why = "work on differences to a base, which is not known: name it with base_model"
        yield Advice("method", tuple(on_deltas), "not as it is", why)
    else:
        yield Advice("method", tuple(on_deltas), *_of_deltas(facts))
    why = "gather statistics first, on the model and the images that `statistics:` names"
    yield Advice("method", tuple(with_data), "worth a try", why)
    why = f"take another number of models than {facts.ingredients}"
    yield Advice("method", tuple(others), "not as it is", why)


def _wrong_count(method: Method, models: int) -> bool:
    least, most = method.models
    return models < least or (most is not None and models > most)


def _of_deltas(facts: Facts) -> tuple[Verdict, str]:
    cosine = facts.cosine
    if cosine is None or cosine != cosine:
        return "worth a try", f"on differences to {facts.base}"
    if cosine >= ALIKE:
        return "worth a try", (
            f"deltas point the same way (mean cosine {cosine:.2f}), so that an average keeps most "
            "of them; made for fine-tunes on different tasks"
        )
    if cosine <= ORTHOGONAL:
        return "would work", (
            f"deltas are nearly orthogonal (mean cosine {cosine:.2f}), so their sum keeps what "
            "each has learned"
        )
    return "worth a try", f"deltas agree in part (mean cosine {cosine:.2f})"
