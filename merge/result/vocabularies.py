"""Whether tokenizers give the same tokens the same rows of the embeddings; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge.errors import MergeError

# The files that say which token has which id; of the first kind that is there.
READABLE = ("tokenizer.json", "vocab.json", "vocab.txt")
OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tekken.json")
LIMIT_BYTES = 128 << 20
SHOWN = 3


@dataclass(frozen=True)
class TokenizerCheck:
    """What was found: `problems` make rows of the embeddings differ in meaning, `notes` do not."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def agree(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Tokenizer:
    """The file with the ids of the tokens, and how many more have its bytes."""

    file: Path
    copies: int = 0

    @cached_property
    def vocabulary(self) -> _Vocabulary:
        return _parse(self.file)

    def __str__(self) -> str:
        return f"{self.file} and {self.copies} more like it" if self.copies else str(self.file)


@dataclass(frozen=True)
class _Vocabulary:
    """The ids of the tokens, None where the file cannot be read here; `rest` is how text is cut."""

    ids: dict[str, int] | None
    rest: Any = None


def check_tokenizers(folders: Sequence[Path]) -> TokenizerCheck:
    """Compare each folder's vocabulary with that of the first one that has a tokenizer.

    Equal bytes agree at once; else each token must have the same id in both. A file of
    sentencepiece is compared by its bytes alone. A vocabulary that is not what its name says is a
    problem where there is another to compare it with; folders without a tokenizer do not count.
    """
    found = _distinct(folders)
    problems: dict[str, None] = {}  # ordered sets
    notes: dict[str, None] = {}
    for other in found[1:]:
        try:
            problem, note = _compare(found[0], other)
        except MergeError as error:
            problem, note = str(error), ""
        problems |= {problem: None} if problem else {}
        notes |= {note: None} if note else {}
    return TokenizerCheck(tuple(problems), tuple(notes))


def _distinct(folders: Sequence[Path]) -> list[_Tokenizer]:
    """The tokenizers of the folders that have one, in order; of the same bytes the first."""
    found: dict[tuple[bytes, ...], list[Path]] = {}
    for folder in folders:
        file = next((folder / n for n in (*READABLE, *OPAQUE) if (folder / n).is_file()), None)
        if file is not None:
            added = _added_tokens(file)
            digests = tuple(_digest(one) for one in (file, added) if one is not None)
            found.setdefault(digests, []).append(file)
    return [_Tokenizer(files[0], len(files) - 1) for files in found.values()]


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _compare(first: _Tokenizer, other: _Tokenizer) -> tuple[str, str]:
    """The problem and the note of two vocabularies, empty where there is none."""
    ours, theirs = first.vocabulary, other.vocabulary
    if ours.ids is None or theirs.ids is None:
        return (
            f"{other}: differs from {first}, and the two cannot be compared token by token; check "
            "that they mean the same, and say which one the result has with tokenizer_source"
        ), ""
    if ours.ids == theirs.ids:
        same = ours.rest is None or theirs.rest is None or ours.rest == theirs.rest
        note = f"{other}: has the tokens of {first}, but cuts text in another way"
        return "", "" if same else note
    moved = [t for t, place in ours.ids.items() if theirs.ids.get(t, place) != place]
    missing = [token for token in ours.ids if token not in theirs.ids]
    more = [token for token in theirs.ids if token not in ours.ids]
    counts = [
        f"{len(tokens)} tokens {what} ({', '.join(map(repr, tokens[:SHOWN]))})"
        for tokens, what in ((moved, "have another id"), (missing, "are missing"), (more, "more"))
        if tokens
    ]
    return (
        f"{other}: {', '.join(counts)} than in {first}, so that rows of the embeddings stand for "
        "other tokens; merge models of one tokenizer, or say which one the result has with "
        "tokenizer_source"
    ), ""


def _added_tokens(file: Path) -> Path | None:
    """The file with more tokens, for vocabularies that do not have them all."""
    added = file.with_name("added_tokens.json")
    counts = file.name in READABLE and file.name != "tokenizer.json"
    return added if counts and added.is_file() else None


def _parse(file: Path) -> _Vocabulary:
    if file.name in OPAQUE:
        return _Vocabulary(None)
    content, rest = _content(file), None
    try:
        if file.name == "vocab.txt":
            # Not splitlines: characters that it takes for ends of lines are tokens.
            lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
            ids = {token: place for place, token in enumerate(lines)}
        elif file.name == "vocab.json":
            ids = _checked(json.loads(content))
        else:
            ids, rest = _of_tokenizer_json(json.loads(content))
        added = _added_tokens(file)
        if added is not None:
            ids = ids | _checked(json.loads(_content(added)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MergeError(
            f"{file}: is not the vocabulary that its name says ({type(error).__name__}: {error}), "
            "and was not compared with those of other models; get or write it again"
        ) from error
    return _Vocabulary(ids, rest)


def _content(file: Path) -> bytes:
    size = file.stat().st_size
    if size > LIMIT_BYTES:
        raise MergeError(f"{file}: has {size} bytes, at most {LIMIT_BYTES} are read")
    return file.read_bytes()


def _of_tokenizer_json(content: dict[str, Any]) -> tuple[dict[str, int], Any]:
    model = dict(content["model"])
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, list):  # unigram: [token, score], the place is the id
        vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
    added = {one["content"]: one["id"] for one in content.get("added_tokens") or []}
    # Older files have "a b" for ["a", "b"].
    merges = model.pop("merges", None) or []
    model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in merges]
    rest = [model, *(content.get(key) for key in ("normalizer", "pre_tokenizer"))]
    return _checked(vocabulary) | _checked(added), rest


def _checked(ids: Any) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(place) is int for place in ids.values()):
        raise ValueError("wanted an id for each token")
    return ids
