"""One thing that there is to say of a folder of checkpoints; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NAMES_SHOWN = 6

Level = Literal["wrong", "odd", "note"]


@dataclass(frozen=True)
class Finding:
    """What was found of `members`, and what to do about it.

    `wrong`: no soup can be made with these as they are. `odd`: it can, and may be the worse for
    it. `note`: nothing is amiss.
    """

    kind: str
    level: Level
    members: tuple[str, ...]
    text: str
    remedy: str = ""


def listed(names: Sequence[str], most: int = NAMES_SHOWN) -> str:
    """The names with commas between them; of many the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
