"""Which rows of the sources make fit, tune, select and report: seeded and disjoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from inputs.config import SplitConfig
from inputs.errors import InputError
from inputs.randomness import generator

__all__ = ["take_splits"]


# These make the zoo: they come first, and do not move when *select* is drawn anew.
_FIRST = ("fit", "tune")


def take_splits(
    splits: Mapping[str, SplitConfig],
    sizes: Mapping[str, int],
    seed: int,
    select_seed: int | None = None,
) -> dict[str, Int[Tensor, " rows"]]:
    """The rows of each split whose source is in `sizes` (source → number of rows).

    Each source's rows are permuted once, by `seed` and the source's name; the splits take theirs
    one after another, *fit* and *tune* first, so that they are disjoint. A fraction is of the whole
    source, rounded down. With a `select_seed`, what *fit* and *tune* leave of the source of
    *select* is permuted again by it before the others take theirs; other sources stay as they are,
    so that a *report* from a source of its own has the same images in the same order.

    Raises InputError with all overlapping and empty splits.
    """
    rows: dict[str, Tensor] = {}
    problems: list[str] = []
    for source, size in sizes.items():
        takers = {
            name: splits[name]
            for name in sorted(splits, key=lambda name: name not in _FIRST)
            if splits[name].source == source
        }
        counts = {name: _count(split, size) for name, split in takers.items()}
        asked = sum(
            split.fraction * size if split.fraction is not None else counts[name]
            for name, split in takers.items()
        )
        if asked > size * (1 + 1e-9):
            shares = ", ".join(f"{name} {_share(split)}" for name, split in takers.items())
            problems.append(
                f"data: overlapping splits: {source!r} has {size} images, and {shares} ask for "
                f"{round(asked)}; give counts or fractions that fit in it together"
            )
            continue
        order = torch.randperm(size, generator=generator(seed, source))
        if select_seed is not None and "select" in takers:
            taken = sum(counts[name] for name in takers if name in _FIRST)
            left = order[taken:]
            again = torch.randperm(len(left), generator=generator(select_seed, f"select/{source}"))
            order = torch.cat([order[:taken], left[again]])
        start = 0
        for name, count in counts.items():
            if count == 0:
                problems.append(
                    f"data.{name}: no image: {_share(takers[name])} of the {size} images of "
                    f"{source!r} is none; ask for more"
                )
            rows[name] = order[start : start + count]
            start += count
    if problems:
        raise InputError("\n".join(problems))
    return rows


def _count(split: SplitConfig, size: int) -> int:
    if split.count is not None:
        return split.count
    if split.fraction is not None:
        # 0.29 * 100 is 28.999…: what a person wrote as a whole number stays one.
        return int(split.fraction * size + 1e-6)
    return size


def _share(split: SplitConfig) -> str:
    if split.count is not None:
        return f"count {split.count}"
    return f"fraction {split.fraction}" if split.fraction is not None else "all"
