"""Where checkpoints lie to each other in weight space, and which one is the base of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from merge.checkpoints import Checkpoint
from merge.inspection.inspection import inspect_models

# Below this cosine of their weight matrices two checkpoints are not of one base: independent
# trainings are near 0, fine-tunes of one base above 0.6 also where they were trained for long.
APART = 0.5
# Of the median distance of two checkpoints, what is nearer is nearly the same.
NEAR = 0.1
# The base has nothing of its own, so that what is of its own in the next must be so many times as
# much (in squares) before geometry alone names it.
CLEARLY = 2.0

Matrix = Float64[np.ndarray, "models models"]


@dataclass(frozen=True)
class Geometry:
    """Inner products of the weights about their mean, and cosines of the weight matrices.

    `likeness` is that of the weights themselves, in tensors of two and more axes: biases and the
    weights of norm layers are alike in all networks.
    """

    gram: Matrix
    likeness: Matrix

    @property
    def distances(self) -> Matrix:
        """The Euclidean distance of each two, over all shared weights."""
        squares = np.diagonal(self.gram)
        apart = squares[:, None] + squares - 2 * self.gram
        np.fill_diagonal(apart, 0.0)
        return np.sqrt(np.maximum(apart, 0.0))

    def cosines(self, origin: int, members: Sequence[int]) -> Matrix:
        """Cosines of the deltas of `members` to `origin`; NaN where one has not moved."""
        gram = self._about(origin, members)
        norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(gram / np.outer(norms, norms), -1, 1)

    def own_part(self, one: int, others: Sequence[int]) -> float:
        """The squared distance of a checkpoint from the nearest mixture of the others.

        `min ‖w − Σ a_k w_k‖²` over Σ a_k = 1: what of it is in no other. The base is in all.
        """
        gram = self._about(one, others)
        # Copies of each other make it singular; the least ridge chooses between them.
        gram += 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
        inverse = float(np.linalg.lstsq(gram, np.ones(len(gram)))[0].sum())
        # Beside numbers that are very much larger, rounding leaves nothing of it.
        return 1 / inverse if inverse > 0 else 0.0

    def _about(self, origin: int, members: Sequence[int]) -> Matrix:
        chosen = list(members)
        gram = self.gram[np.ix_(chosen, chosen)]
        cross = self.gram[chosen, origin]
        return gram - cross[:, None] - cross + self.gram[origin, origin]


def measure(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    tensors: Sequence[str],
    *,
    memory_budget: int,
    progress: bool,
) -> Geometry:
    """Compare these tensors of the checkpoints: each is read once, in slices.

    Raises MergeError where the budget is too small.
    """
    infos = checkpoints[0].tensors
    count = len(checkpoints)
    gram = np.zeros((count, count))
    likeness = np.zeros((count, count))
    for is_matrix in (True, False):
        own = [name for name in tensors if (len(infos[name].shape) > 1) == is_matrix]
        if not own:
            continue
        found = inspect_models(
            checkpoints, names=names, only=own, memory_budget=memory_budget, progress=progress
        )
        part = found.gram.sum(axis=0)
        gram += part
        if is_matrix or not likeness.any():
            norms = np.array([max(model.norm, 1e-30) for model in found.models])
            squares = np.diagonal(part)
            apart = squares[:, None] + squares - 2 * part
            sums = norms[:, None] ** 2 + norms**2
            likeness = np.clip((sums - apart) / (2 * np.outer(norms, norms)), -1, 1)
    return Geometry(gram, likeness)


def families(geometry: Geometry) -> Int64[np.ndarray, " models"]:
    """Checkpoints that come from one initialisation, by number; the largest family is 0.

    Clusters by average linkage, cut where weights have a mean cosine below APART.
    """
    count = len(geometry.likeness)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    apart = np.maximum((1 - geometry.likeness + (1 - geometry.likeness).T) / 2, 0.0)
    np.fill_diagonal(apart, 0.0)
    links = hierarchy.linkage(squareform(apart, checks=False), method="average")
    labels = hierarchy.fcluster(links, 1 - APART, criterion="distance")
    sizes = {label: int((labels == label).sum()) for label in labels}
    largest_first = sorted(
        sizes, key=lambda label: (-sizes[label], int(np.argmax(labels == label)))
    )
    return np.array([largest_first.index(label) for label in labels], dtype=np.int64)


def near_copies(geometry: Geometry) -> list[tuple[int, int]]:
    """Pairs that are nearly the same: far nearer to each other than checkpoints are as a rule."""
    distances = geometry.distances
    first, second = np.triu_indices(len(distances), 1)
    apart = distances[first, second]
    usual = np.median(apart[apart > 0]) if (apart > 0).any() else 0.0
    close = (apart < NEAR * usual) & (apart > 0)
    return [(int(a), int(b)) for a, b in zip(first[close], second[close], strict=True)]


@dataclass(frozen=True)
class BaseGuess:
    """The checkpoint that is probably the base, how sure that is, and what speaks for it.

    `mean_cosine` is that of the others' deltas to it. Where geometry cannot tell, `rivals` are
    those that could be it as well.
    """

    place: int
    sure: Literal["sure", "likely", "perhaps"]
    reasons: tuple[str, ...]
    mean_cosine: float
    rivals: tuple[int, ...] = ()


def guess_base(
    geometry: Geometry,
    names: Sequence[str],
    steps: Sequence[int | None],
    shared: Int64[np.ndarray, "models models"],
) -> BaseGuess | None:
    """The base among checkpoints of one family; None where there are fewer than three.

    Evidence, the strongest first: it is called `base`; its norm layers have counted the fewest
    training steps (`steps`, where known); it shares unchanged tensors with more of the others than
    any (`shared`, counts of tensors that are equal in two); and the geometry: what it has of its
    own, and how orthogonal the others' deltas to it are. A base that all fine-tunes left in one
    direction, and one that hardly moved, cannot be told apart by geometry alone.
    """
    count = len(names)
    if count < 3:
        return None
    own = np.array(
        [geometry.own_part(k, [j for j in range(count) if j != k]) for k in range(count)]
    )
    by_geometry = np.argsort(own)
    first, second = int(by_geometry[0]), int(by_geometry[1])
    ratio = own[second] / max(own[first], 1e-30)
    called = next((k for k, name in enumerate(names) if name == "base"), None)
    fewest = _alone(np.array([-np.inf if s is None else -s for s in steps], dtype=float))
    reaches = _alone((shared - np.diag(np.diagonal(shared))).sum(axis=1).astype(float))
    place = next((k for k in (called, fewest, reaches) if k is not None), first)
    reasons = []
    if place == called:
        reasons.append("by its name")
    if place == fewest:
        reasons.append(f"its norm layers have counted the fewest steps ({steps[place]:,})")
    if place == reaches:
        reasons.append("it shares unchanged tensors with more of the others than any")
    if place == first and ratio >= CLEARLY:
        reasons.append(
            "nothing in it is its own: the nearest mixture of the others is "
            f"{ratio:.3g} times nearer, in squares, than for the next"
        )
    elif place == first and not reasons:
        reasons.append("a little nearer to a mixture of the others than any")
    known = place in (called, fewest)
    clear = place == first and ratio >= CLEARLY
    sure = "sure" if known else "likely" if clear or place == reaches else "perhaps"
    close = [int(k) for k in by_geometry if own[k] < CLEARLY * own[first] and k != place]
    others = [k for k in range(count) if k != place]
    cosines = geometry.cosines(place, others)[~np.eye(count - 1, dtype=bool)]
    mean = float(np.nanmean(cosines)) if np.isfinite(cosines).any() else float("nan")
    return BaseGuess(place, sure, tuple(reasons), mean, () if known else tuple(close))


def _alone(values: Float64[np.ndarray, " models"]) -> int | None:
    """The place of the largest value, where it is larger than all others and finite."""
    order = np.argsort(-values)
    best, next_best = values[order[0]], values[order[1]]
    return (
        int(order[0]) if np.isfinite(best) and np.isfinite(next_best) and best > next_best else None
    )


def odd_lengths(
    lengths: Float64[np.ndarray, " models"], times: float = 4.0
) -> Bool[np.ndarray, " models"]:
    """Which deltas are `times` as long as the median, or shorter by that."""
    usual = np.median(lengths)
    return (lengths > times * usual) | (lengths < usual / times)
