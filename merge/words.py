"""Words for reports: lists of names that stay short, and globs for a config; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

NAMES_SHOWN = 4


def listed(names: Sequence[str], most: int = NAMES_SHOWN) -> str:
    """The names in quotes: `most` of them, then how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def globs_of(names: Sequence[str], *, but: Iterable[str] = ()) -> str:
    """Globs for the layers of these names, as they would stand in a config.

    Where a glob would match one of `but` that is in another layer, the name itself stands for it.
    """
    others = {one: _layer(one) for one in but}
    layers = {_layer(name) for name in names}
    wide = {
        layer
        for layer in layers
        if any(own != layer and fnmatchcase(one, layer) for one, own in others.items())
    }
    globs = dict.fromkeys(name if _layer(name) in wide else _layer(name) for name in names)
    more = ", ..." if len(globs) > NAMES_SHOWN else ""
    return "[" + ", ".join(map(repr, list(globs)[:NAMES_SHOWN])) + more + "]"


def _layer(name: str) -> str:
    """The glob of a name's layer; the name of one that is in none."""
    return f"{name.rpartition('.')[0]}.*" if "." in name else name


def files_of(paths: Sequence[str]) -> str:
    """The first of the checkpoints, and how many more there are."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more checkpoints"


def are(names: Sequence[str]) -> str:
    """`is` or `are`, after so many names."""
    return "is" if len(names) == 1 else "are"


def them(names: Sequence[str]) -> str:
    """`it` or `them`, for so many names."""
    return "it" if len(names) == 1 else "them"
