"""What the kept notebooks are to be; that they run, nbmake tests (notebooks/conftest.py)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 1_000_000
OURS = {"soups", "fleet", "merge", "inputs", "kernels"}
# What README.md and docs/ show.
PUBLIC = OURS | {"soups.plots", "soups.statistics", "soups.significance"}
NOT_OURS = {"tests", "benchmarks", "conftest"}
# Paths that begin at the root of one machine.
ABSOLUTE = re.compile(r"(?<![\w./<])/(?:home|root|Users|tmp|var|opt|usr|mnt|work)\b|\b[A-Z]:\\")
REMEDY = "run `make notebooks`"

of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_all_notebooks_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in text] == []


@of_each
def test_it_was_run_from_the_first_cell_to_the_last(path: Path) -> None:
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), REMEDY


@of_each
def test_outputs_are_kept_but_for_what_differs_from_run_to_run(path: Path) -> None:
    notebook = read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds, REMEDY
    assert not [kind for kind in kinds if "widget" in kind], REMEDY
    assert not [output for output in outputs if output.get("name") == "stderr"], REMEDY
    assert not [output for output in outputs if output.output_type == "error"]
    assert "widgets" not in notebook.metadata, REMEDY
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata], REMEDY
    assert path.stat().st_size < MOST_BYTES


@of_each
def test_it_names_no_place_of_one_machine(path: Path) -> None:
    found = [
        text[max(0, match.start() - 40) : match.end() + 40]
        for text in texts(read(path))
        for match in ABSOLUTE.finditer(text)
    ]
    assert found == []


@of_each
def test_it_uses_public_names_only(path: Path) -> None:
    private = [
        f"{module}.{name}"
        for module, name in imported(read(path))
        if any(part.startswith("_") for part in f"{module}.{name}".split("."))
        or module.partition(".")[0] in NOT_OURS
        or (module.partition(".")[0] in OURS and not is_public(module, name))
    ]
    assert private == []


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def texts(notebook: NotebookNode) -> Iterator[str]:
    """What a person reads in it: cells, and what they show as text."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (
                shown
                for kind, shown in output.get("data", {}).items()
                if not kind.startswith("image/")
            )


def imported(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Module and name of every import; no name where the module itself is imported.

    Attributes that begin with an underscore are among them.
    """
    for cell in notebook.cells:
        if cell.cell_type != "code" or cell.source.startswith("%%"):
            continue
        plain = re.sub(r"^[ \t]*[%!].*$", "", cell.source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                yield ast.unparse(node.value), node.attr


def is_public(module: str, name: str) -> bool:
    if f"{module}.{name}" in PUBLIC:
        return True
    return module in PUBLIC and (not name or name in dir(import_module(module)))
