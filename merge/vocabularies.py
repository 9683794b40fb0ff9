"""Whether tokenizers give the same tokens the same rows of the embeddings; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
class _Vocabulary:
    """The ids of the tokens, None where the file cannot be read here; `rest` is how text is cut."""

    file: Path
    content: bytes
    ids: dict[str, int] | None
    rest: Any = None


def check_tokenizers(folders: Sequence[Path]) -> TokenizerCheck:
    """Compare each folder's vocabulary with that of the first one that has a tokenizer.

    Equal bytes agree at once; else each token must have the same id in both. A file of
    sentencepiece is compared by its bytes alone. Raises MergeError for a vocabulary that is not
    what its name says.
    """
    problems: list[str] = []
    notes: list[str] = []
    first: _Vocabulary | None = None
    for folder in folders:
        found = _read(folder)
        if found is None:
            notes.append(f"{folder}: has no tokenizer")
        elif first is None:
            first = found
        else:
            problem, note = _compare(first, found)
            problems += [problem] if problem else []
            notes += [note] if note else []
    return TokenizerCheck(tuple(problems), tuple(notes))


def _compare(first: _Vocabulary, other: _Vocabulary) -> tuple[str, str]:
    """The problem and the note of two vocabularies, empty where there is none."""
    if first.content == other.content:
        return "", ""
    if first.ids is None or other.ids is None:
        return (
            f"{other.file}: differs from {first.file}, and the two cannot be compared token by "
            "token; if they mean the same, say so with tokenizer_source"
        ), ""
    if first.ids == other.ids:
        same = first.rest is None or other.rest is None or first.rest == other.rest
        note = f"{other.file}: has the tokens of {first.file}, but cuts text in another way"
        return "", "" if same else note
    moved = [t for t, place in first.ids.items() if other.ids.get(t, place) != place]
    missing = [token for token in first.ids if token not in other.ids]
    more = [token for token in other.ids if token not in first.ids]
    counts = [
        f"{len(tokens)} tokens {what} ({', '.join(map(repr, tokens[:SHOWN]))})"
        for tokens, what in ((moved, "have another id"), (missing, "are missing"), (more, "more"))
        if tokens
    ]
    return (
        f"{other.file}: {', '.join(counts)} than in {first.file}, so that rows of the embeddings "
        "stand for other tokens; merge models of one tokenizer, or say which one the result has "
        "with tokenizer_source"
    ), ""


def _read(folder: Path) -> _Vocabulary | None:
    file = next((folder / n for n in (*READABLE, *OPAQUE) if (folder / n).is_file()), None)
    if file is None:
        return None
    content = _content(file)
    if file.name in OPAQUE:
        return _Vocabulary(file, content, None)
    try:
        if file.name == "vocab.txt":
            # Not splitlines: characters that it takes for ends of lines are tokens.
            lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
            ids, rest = {token: place for place, token in enumerate(lines)}, None
        elif file.name == "vocab.json":
            ids, rest = _checked(json.loads(content)), None
        else:
            ids, rest = _of_tokenizer_json(json.loads(content))
        added = folder / "added_tokens.json"
        if file.name != "tokenizer.json" and added.is_file():
            extra = _content(added)
            ids, content = ids | _checked(json.loads(extra)), content + extra
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MergeError(
            f"{file}: is not the vocabulary that its name says ({type(error).__name__}: {error}); "
            "get or write it again"
        ) from error
    return _Vocabulary(file, content, ids, rest)


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
