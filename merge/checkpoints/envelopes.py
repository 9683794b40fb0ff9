"""Training files wrap their weights: find the state dict inside, and strip common prefixes."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from merge.checkpoints.pickles import PickledTensor
from merge.errors import MergeError

ENVELOPES = ("state_dict", "model_state_dict", "model")
EMA_ENVELOPES = ("state_dict_ema", "model_ema", "ema")
WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and torch.compile put before every name."""
PREFIXES = (*WRAPPERS, "model.")

T = TypeVar("T")


def unwrap(root: Any, *, ema: bool, where: str) -> tuple[dict[str, PickledTensor], list[str]]:
    """The state dict inside `root`, the root of a torch file, and notes on what was done.

    Goes through the usual envelopes, also one in another; with `ema` through that of the averaged
    weights. Raises MergeError where there are no tensors, or no averaged weights.
    """
    notes: list[str] = []
    level, depth, want_ema = root, 0, ema
    while isinstance(level, dict):
        averages = [key for key in EMA_ENVELOPES if _holds_weights(level.get(key))]
        plain = [key for key in ENVELOPES if _holds_weights(level.get(key))]
        chosen = averages if want_ema and averages else plain
        if not chosen or depth == 4:
            break
        if averages and not ema:
            notes.append(f"averaged weights are there too ({quoted(averages)}), not taken")
        ignored = [key for key in level if key != chosen[0] and key not in averages]
        notes.append(f"weights taken from '{chosen[0]}'")
        if ignored:
            notes.append(f"ignored beside it: {quoted(ignored)}")
        want_ema &= chosen is not averages
        level, depth = level[chosen[0]], depth + 1

    found = level if isinstance(level, dict) else {}
    if want_ema:
        raise MergeError(
            f"{where}: has no averaged weights ({', '.join(EMA_ENVELOPES)}), it holds "
            f"{_contents(root)}; set ema to false or use another file"
        )
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, PickledTensor)
    }
    if not tensors:
        raise MergeError(
            f"{where}: no weights found: it holds {_contents(root)}; wanted a state dict, or one "
            f"under {', '.join(ENVELOPES)} (with ema: under {', '.join(EMA_ENVELOPES)})"
        )
    if "n_averaged" in tensors and all(
        n.startswith("module.") or n == "n_averaged" for n in tensors
    ):
        del tensors["n_averaged"]  # the counter of torch's AveragedModel, which wraps a module
    ignored = [name for name in found if name not in tensors]
    if ignored:
        notes.append(f"ignored, no weights with a name: {quoted(ignored)}")
    return tensors, notes


def strip_prefixes(
    stored: Mapping[str, T], known: Collection[str] = (), prefixes: Collection[str] = PREFIXES
) -> tuple[dict[str, T], list[str]]:
    """`stored` without those of `prefixes` that all its names share, and a note if there were any.

    Where the model's names are `known`, no more is stripped than finds most of them: a model may
    itself have all of its tensors below `model.`.
    """
    names = dict(stored)
    choices = [("", names)]
    while names:
        shared = [
            prefix
            for prefix in prefixes
            if all(name.startswith(prefix) and name != prefix for name in names)
        ]
        if not shared:
            break
        names = {name.removeprefix(shared[0]): value for name, value in names.items()}
        choices.append((choices[-1][0] + shared[0], names))
    model = set(known)
    # Where no name is known, all of it is stripped: of equals the last.
    stripped, names = max(reversed(choices), key=lambda choice: len(model & choice[1].keys()))
    return names, [f"stripped the prefix '{stripped}' of every name"] if stripped else []


def quoted(names: Collection[object]) -> str:
    """`3: 'epoch', 'args', 'optimizer'`: how many names there are, and the first ones."""
    first = ", ".join(reprlib.repr(name) if isinstance(name, str) else "…" for name in [*names][:8])
    return f"{len(names)}: {first}{', …' if len(names) > 8 else ''}"


def _holds_weights(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, dict) or depth > 3:
        return False
    return any(isinstance(leaf, PickledTensor) for leaf in value.values()) or any(
        _holds_weights(value.get(key), depth + 1) for key in ENVELOPES + EMA_ENVELOPES
    )


def _contents(root: Any) -> str:
    if isinstance(root, dict):
        return quoted(root) if root else "an empty dict"
    kinds = {PickledTensor: "one bare tensor", list: "a list", tuple: "a tuple"}
    return kinds.get(type(root), "no dict")
