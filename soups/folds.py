"""Folds of *select* for cross-fitting, each with its share of every class."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Int
from torch import Tensor

from soups.errors import SoupError

LEAST_FOLDS = 2
# By which all rows of a run draw the same folds.
STREAM = "out_of_fold"

log = logging.getLogger(__name__)


def split_folds(
    labels: Int[Tensor, " rows"], count: int, stream: torch.Generator
) -> list[Int[Tensor, " held_out"]]:
    """The rows of each of `count` folds, ascending; every row is in exactly one.

    The images of one class after another, each in random order, are dealt to the folds in turn, so
    that the folds' sizes, and how many of a class they have, differ by at most one.
    Raises SoupError where there are fewer rows than folds, or fewer folds than one.
    """
    if not 1 <= count <= len(labels):
        raise SoupError(
            f"folds: found {count} for {len(labels)} images; wanted at least one, and no more than "
            "there are images: lower the number of folds, or give select more images"
        )
    order = torch.randperm(len(labels), generator=stream)
    dealt = order[labels[order].argsort(stable=True)]
    return [dealt[fold::count].sort().values for fold in range(count)]


def fold_count(labels: Int[Tensor, " rows"], wanted: int, *, where: str) -> int:
    """How many folds: `wanted`, or fewer, but at least two, where classes have too few images.

    With no more folds than the rarest class has images, every fold has one of that class, and none
    is learned without it. A class of a single image is missing either way: it counts for nothing.
    What is not as wanted is logged, after `where`, which names the setting.
    Raises SoupError where there are fewer than two images.
    """
    if len(labels) < LEAST_FOLDS:
        raise SoupError(
            f"{where}: cross-fitting needs at least {LEAST_FOLDS} images, and select has "
            f"{len(labels)}; give select more images"
        )
    counts = torch.bincount(labels)
    several = counts[counts > 1]
    rarest = int(several.min()) if len(several) else len(labels)
    count = max(LEAST_FOLDS, min(wanted, rarest, len(labels)))
    if count < wanted:
        if len(several):
            why = f"class {int((counts == rarest).nonzero()[0])} has {rarest} images in select"
        else:
            why = f"select has {len(labels)} images"
        log.warning("%s: %d folds instead of %d, since %s", where, count, wanted, why)
    single = (counts == 1).nonzero().flatten().tolist()
    if single:
        log.warning(
            "%s: %d classes have one image in select (%s): the fold that holds it out is learned "
            "without its class",
            where,
            len(single),
            ", ".join(map(str, single[:10])) + (" …" if len(single) > 10 else ""),
        )
    return count
