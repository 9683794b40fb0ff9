"""Notebooks are tests: nbmake runs each from its first cell to its last.

`python -m pytest notebooks/ --overwrite` also keeps what they show, but for what differs from run
to run: progress bars, what is said on stderr, times.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
BAR = "application/vnd.jupyter.widget-view+json"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Notebooks take long: `make check` leaves them out."""
    item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Have the kernel, which is a process of its own, import this tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield
    if item.config.getoption("overwrite"):
        keep_what_stays(item.path)


def keep_what_stays(path: Path) -> None:
    """Take out of a notebook what would be another the next time that it is run."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and BAR not in output.get("data", {})
            ]
    nbformat.write(notebook, path)
