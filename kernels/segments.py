"""Runs of flat weights: which group a weight belongs to, and which scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kernels.errors import KernelError


class Segment(NamedTuple):
    """The flat weights [start, stop), which belong to one group."""

    start: int
    stop: int
    group: int


def fine_segments(segments: Sequence[Segment], longest: int) -> list[Segment]:
    """The same weights in the same groups, in segments of at most `longest` weights.

    Rows have one scale per segment: the shorter the segments, the less 4 and 1 bit lose.
    """
    if longest < 1:
        raise KernelError(f"longest: found {longest}, wanted at least 1 weight in a segment")
    return [
        Segment(start, min(start + longest, stop), group)
        for first, stop, group in segments
        for start in range(first, stop, longest)
    ]


def runs(segments: Sequence[Segment], weights: int, groups: int) -> list[Segment]:
    """`segments` in order, without empty ones, neighbours of one group as one.

    Raises KernelError where they overlap, leave the `weights` or name a group that is not there.
    """
    joined: list[Segment] = []
    for start, stop, group in sorted(segments):
        if not (0 <= start <= stop <= weights and 0 <= group < groups):
            raise KernelError(
                f"segments: found Segment({start}, {stop}, {group}), wanted 0 <= start <= stop <= "
                f"{weights} (the weights) and 0 <= group < {groups} (the groups)"
            )
        if joined and start < joined[-1].stop and stop > start:
            raise KernelError(
                f"segments: found Segment({start}, {stop}, {group}) over {joined[-1]}; wanted "
                "every weight in at most one segment"
            )
        if joined and joined[-1].stop == start and joined[-1].group == group:
            joined[-1] = Segment(joined[-1].start, stop, group)
        elif stop > start:
            joined.append(Segment(start, stop, group))
    return joined
