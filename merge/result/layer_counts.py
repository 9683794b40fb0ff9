"""The number of layers in a config.json, and its lists with an entry per layer; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from merge.errors import MergeError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LANGUAGE = ("text_config", "llm_config", "language_config")
# Lists of the places of layers, rather than of one value per layer.
PLACES = ("mlp_only_layers", "cross_attention_layers", "attn_layer_indices")
# A list of the right length under another name (eos_token_id, image_mean) is none of the layers'.
PER_LAYER = re.compile(r"layer|block|heads|size|type|pattern|multiplier")
# Numbers that mean some layers by their place; a result with other layers may want others.
SPEAKS_OF_LAYERS = re.compile(r"layer|first_k_dense|_interval$|_period$|_pattern$|_freq$|_step$")

Json = dict[str, Any]


def set_layers(config: Json, layers: int | Sequence[int], where: str) -> list[str]:
    """Change `config` to that many layers, and the lists with an entry per layer; returns notes.

    With the places of the layers in the giver, lists follow them; with a number alone, only lists
    whose entries are all alike can. Raises MergeError, which names the key, where that is not
    enough, and where the config has no number of layers.
    """
    part, prefix = _part_with_layers(config, where)
    keys = [key for key in COUNTS if _is_count(part.get(key))]
    old = part[keys[0]]
    places = None if isinstance(layers, int) else list(layers)
    new = layers if isinstance(layers, int) else len(layers)
    if places is not None and any(not 0 <= place < old for place in places):
        raise MergeError(
            f"{where}: {prefix}{keys[0]} is {old}, but the slices take layer {max(places)}; "
            "correct layer_range"
        )
    if new == old and (places is None or places == list(range(old))):
        return []
    notes = []
    for key in keys:
        if part[key] == old and new != old:
            part[key] = new
            notes.append(f"config.json: {prefix}{key} set to {new}, was {old}")
    for key, value in part.items():
        if not isinstance(value, list) or not value:
            continue
        if key == "attention_types":
            raise _cannot_follow(where, prefix + key, value, "it is run-length coded")
        if key in PLACES:
            part[key] = _moved(value, places, where, prefix + key)
        elif len(value) == old and PER_LAYER.search(key):
            part[key] = _followed(value, new, places, where, prefix + key)
        if part[key] != value:
            notes.append(f"config.json: {prefix}{key} follows the layers")
    left = [
        f"{prefix}{key}"
        for key, value in part.items()
        if _is_count(value) and key not in COUNTS and SPEAKS_OF_LAYERS.search(key)
    ]
    if left:
        notes.append(
            f"config.json: {', '.join(left)} kept as they are; check them, since the layers changed"
        )
    return notes


def _part_with_layers(config: Json, where: str) -> tuple[Json, str]:
    """The config that has the number of layers, and how its keys are called from the top."""
    if config.get("is_encoder_decoder"):
        raise MergeError(
            f"{where}: is of an encoder and a decoder, which have layers of their own; slices work "
            "on models with one stack of layers"
        )
    parts = {"": config}
    parts |= {f"{k}.": v for k, v in config.items() if k.endswith("_config") and type(v) is dict}
    found = [p for p, part in parts.items() if any(_is_count(part.get(key)) for key in COUNTS)]
    named = [prefix for prefix in found if prefix in {"", *(f"{name}." for name in LANGUAGE)}]
    chosen = named[:1] or found
    if len(chosen) != 1:
        raise MergeError(
            f"{where}: the number of layers has changed, and "
            f"{'several' if chosen else 'none'} of its configs say one ({', '.join(chosen)}); "
            f"wanted one of {', '.join(COUNTS)} at the top or in {LANGUAGE[0]}; leave slices out"
        )
    return parts[chosen[0]], chosen[0]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _followed(value: list, new: int, places: list[int] | None, where: str, key: str) -> list:
    """The entries of the layers that are in the result."""
    if places is not None:
        return [value[place] for place in places]
    if any(one != value[0] for one in value):
        raise _cannot_follow(where, key, value, "the places of the layers are not known")
    return [value[0]] * new


def _moved(value: list, places: list[int] | None, where: str, key: str) -> list[int]:
    """Where the layers that the list names are in the result."""
    if places is None:
        raise _cannot_follow(where, key, value, "the places of the layers are not known")
    return [new for new, old in enumerate(places) if old in value]


def _cannot_follow(where: str, key: str, value: list, reason: str) -> MergeError:
    return MergeError(
        f"{where}: {key} has entries for single layers ({json.dumps(value)[:80]}), and cannot "
        f"follow the changed layers, since {reason}; keep all layers, or take the key out of the "
        "config and write it by hand"
    )
