"""Sentences from the docstrings of Python's standard library, and which module each is from."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inputs.errors import InputError

__all__ = ["DOMAINS", "SPLITS", "Sentence", "Split", "read_corpus"]

Split = Literal["fit", "tune", "select", "report"]

# Some of these are not in every version of Python; those that are not there are left out.
DOMAINS: Mapping[str, tuple[str, ...]] = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "queue", "subprocess", "threading"),
    "debugging": ("bdb", "doctest", "inspect", "logging", "pdb", "pydoc", "traceback", "unittest"),
    "files": ("_pyio", "os", "pathlib", "shutil", "tarfile", "tempfile", "zipfile"),
    "formats": ("configparser", "csv", "email", "html", "json", "mailbox", "plistlib", "xml"),
    "interfaces": ("argparse", "cmd", "curses", "optparse", "tkinter", "turtle"),
    "language": ("ast", "collections", "ctypes", "enum", "functools", "importlib", "typing"),
    "mathematics": ("_pydecimal", "datetime", "fractions", "random", "statistics"),
    "networking": (
        "ftplib",
        "http",
        "imaplib",
        "ipaddress",
        "smtplib",
        "socket",
        "socketserver",
        "ssl",
        "urllib",
        "wsgiref",
        "xmlrpc",
    ),
    "text": ("codecs", "difflib", "encodings", "locale", "re", "string", "textwrap"),
}
# What share of the sentences each split gets.
SPLITS: Mapping[Split, float] = {"fit": 0.7, "tune": 0.1, "select": 0.1, "report": 0.1}
# A label with fewer sentences is no label.
AT_LEAST = 60
FEWEST_WORDS, MOST_WORDS = 5, 60

_WORD = re.compile(r"[^\W\d_]+|\d+")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")


@dataclass(frozen=True)
class Sentence:
    """A sentence, the top-level module it is from, that module's domain, and its split."""

    text: str
    module: str
    domain: str
    split: Split


def read_corpus(
    library: Path | None = None,
    domains: Mapping[str, Sequence[str]] = DOMAINS,
    *,
    at_least: int = AT_LEAST,
) -> list[Sentence]:
    """The sentences of modules with `at_least` so many, each once, in the order of the files.

    Files of `library` (default: this Python's) are parsed, never imported or run. Sentences with
    the same words are one; one that several modules have is left out. The split is a hash of the
    words, so that it is the same on every machine and for every selection of modules.

    Raises InputError for a library without source files, and for a file that is not Python.
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    domain_of = {module: domain for domain, modules in domains.items() for module in modules}
    modules_of: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for module in sorted(domain_of):
        for file in _files(library, module):
            for text in _sentences(file):
                words = _WORD.findall(text.lower())
                if FEWEST_WORDS <= len(words) <= MOST_WORDS:
                    key = " ".join(words)
                    texts.setdefault(key, text)
                    modules_of.setdefault(key, set()).add(module)
    if not texts:
        raise InputError(
            f"{library}: no docstrings of {', '.join(sorted(domain_of))}; wanted the folder of "
            "Python's standard library with its .py files"
        )
    found = {key: module for key, (module, *others) in modules_of.items() if not others}
    counts = Counter(found.values())
    return [
        Sentence(texts[key], module, domain_of[module], _split(key))
        for key, module in found.items()
        if counts[module] >= at_least
    ]


def _files(library: Path, module: str) -> list[Path]:
    """A module's source files, without its tests."""
    file, folder = library / f"{module}.py", library / module
    if file.is_file():
        return [file]
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not {"test", "tests"} & set(path.relative_to(folder).parts[:-1])
    ]


def _sentences(file: Path) -> Iterator[str]:
    """The sentences of a file's docstrings, doctests left out."""
    try:
        with tokenize.open(file) as source:
            tree = ast.parse(source.read(), str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not Python {_version()}: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in _PARAGRAPHS.split(ast.get_docstring(node) or ""):
                if ">>>" not in paragraph:
                    yield from _BETWEEN_SENTENCES.split(" ".join(paragraph.split()))


def _version() -> str:
    return sysconfig.get_python_version()


def _split(key: str) -> Split:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return "report"
