"""Bearer tokens: which variant a token opens, from a file that holds no token."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import yaml

from fleet.errors import FleetError

__all__ = ["TokenFile", "Tokens"]

_HASH = re.compile(r"[0-9a-f]{64}")
_REMEDY = 'the hash of a token: printf %s "$TOKEN" | sha256sum'
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where libyaml is there


class Tokens:
    """Variant name → SHA-256 of the one token that opens it.

    The time of a look-up tells nothing of the hashes: they are compared under a key that is drawn
    anew in each process, so that how far two of them agree says nothing of the tokens.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._variants = {self._keyed(digest): name for name, digest in hashes.items()}

    def __len__(self) -> int:
        return len(self._variants)

    def opens(self, token: str) -> str | None:
        """The variant that `token` opens, or None."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        return self._variants.get(self._keyed(digest))

    def _keyed(self, digest: str) -> bytes:
        return hmac.digest(self._key, digest.encode(), "sha256")


class TokenFile:
    """A YAML file of lines `variant: SHA-256 of its token in hex`, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[tuple[int, int, int], Tokens] | None = None

    def tokens(self) -> Tokens:
        """The tokens as the file has them now.

        Raises FleetError with every problem found, and without repeating what may be a token;
        OSError where there is no file.
        """
        found = self._path.stat()
        seen = found.st_mtime_ns, found.st_size, found.st_ino
        if self._read is None or self._read[0] != seen:
            self._read = seen, Tokens(_hashes(self._path))
        return self._read[1]


def _hashes(path: Path) -> dict[str, str]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise FleetError(f"{path}: is not a text file in UTF-8 ({error.reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise FleetError(f"{path}{place}: is not YAML; wanted lines `variant: SHA-256`") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise FleetError(f"{path}: holds no tokens; wanted lines `variant: SHA-256`; {_REMEDY}")
    problems: list[str] = []
    hashes: dict[str, str] = {}
    owners: dict[str, str] = {}
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{where}: wanted `variant: SHA-256`")
            continue
        name, digest = key.value, value.value
        if name in hashes:
            problems.append(f"{where}: {name!r} is there twice; a variant has one token")
        elif not isinstance(digest, str) or not _HASH.fullmatch(digest):
            problems.append(f"{where}: {name!r}: found no SHA-256 (64 digits of 0-9a-f); {_REMEDY}")
        elif digest in owners:
            problems.append(
                f"{where}: {name!r} has the token of {owners[digest]!r}; a token opens one "
                "variant: make another"
            )
        else:
            hashes[name] = digest
            owners[digest] = name
    if problems:
        raise FleetError("\n".join(problems))
    return hashes
