"""JSON as untrusted headers and indexes need it: UTF-8, no key twice, no NaN."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from merge.errors import MergeError


def parse_json(data: bytes | bytearray, where: str) -> Any:
    """The value in `data`; MergeError, beginning with `where`, for anything that is not JSON."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise MergeError(f"{where}: is nested too deep to be a checkpoint's JSON") from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError, giant integers
        raise MergeError(
            f"{where}: is not valid JSON ({error}); the file is corrupt: get or write it again"
        ) from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        key.encode("utf-8")  # a lone surrogate is no tensor name
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
