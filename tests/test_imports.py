"""The house rules on imports: down only, in no circle, and no torch where a command line starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "soups": {"fleet", "merge", "inputs", "kernels"},
    "fleet": {"merge", "inputs", "kernels"},
    "merge": {"inputs", "kernels"},
    "inputs": set(),
    "kernels": set(),
}
TORCH_FREE = (
    "inputs.budget",
    "inputs.command",
    "inputs.config",
    "inputs.errors",
    "inputs.figures",
    "merge.__main__",
    "merge.documentation",
    "merge.errors",
    "merge.method",
    "merge.planning.config",
    "merge.planning.layers",
    "merge.planning.parameters",
    "merge.registry",
    "merge.result.card",
    "merge.result.companions",
    "merge.result.output",
    "fleet.errors",
    "fleet.recipes",
    "fleet.storage.config",
    "fleet.storage.disk",
    "fleet.storage.manifest",
    "fleet.storage.patterns",
    "fleet.storage.records",
    "fleet.storage.references",
    "fleet.storage.state",
    "fleet.store",
    "fleet.serve",
    "fleet.server.batching",
    "fleet.server.bodies",
    "fleet.server.connections",
    "fleet.server.limits",
    "fleet.server.listening",
    "fleet.server.metrics",
    "fleet.server.refusals",
    "fleet.server.served",
    "fleet.server.tokens",
    "fleet.training.halving",
    "soups.boards.columns",
    "soups.boards.page",
    "soups.caption",
    "soups.checks",
    "soups.config",
    "soups.diversity",
    "soups.errors",
    "soups.event_files",
    "soups.examples",
    "soups.finetune",
    "soups.hierarchy",
    "soups.leaderboard",
    "soups.learn",
    "soups.learners.registry",
    "soups.plots",
    "soups.plots.agreement",
    "soups.plots.calibration",
    "soups.plots.counts",
    "soups.plots.effects",
    "soups.plots.generalising",
    "soups.plots.landscape",
    "soups.plots.learned",
    "soups.plots.ranking",
    "soups.plots.reading",
    "soups.plots.sweeps",
    "soups.plots.training",
    "soups.plots.writing",
    "soups.readings",
    "soups.record",
    "soups.registered",
    "soups.reports.registry",
    "soups.reports.tables",
    "soups.second_order.evidence",
    "soups.second_order.softmax_regression",
    "soups.rows",
    "soups.significance",
    "soups.statistics",
    "soups.sweeps.caption",
    "soups.sweeps.cells",
    "soups.sweeps.sweep",
    "soups.sweeps.tables",
    "soups.sweeps.workers",
    "soups.tables",
    "soups.variance",
    "soups.watch",
)


@dataclass(frozen=True)
class Import:
    """One import of `target`: at once, or only when a function runs or a type is checked."""

    module: str
    target: str
    line: int
    at_once: bool


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def import_nodes(
    node: ast.AST, at_once: bool = True
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                yield from import_nodes(ast.Module([statement], []), False)
            yield from import_nodes(ast.Module(child.orelse, []), at_once)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_nodes(child, at_once and not later)


def imports_of(file: Path, root: Path, modules: set[str]) -> Iterator[Import]:
    """The imports of our own packages, each resolved to the module that it loads."""
    module = module_name(file, root)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node, at_once in import_nodes(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else source for name in names]
        for target in dict.fromkeys(targets):
            if target.partition(".")[0] in BELOW:
                yield Import(module, target, node.lineno, at_once)


def all_imports(root: Path) -> list[Import]:
    files = [file for package in BELOW for file in sorted((root / package).rglob("*.py"))]
    modules = {module_name(file, root) for file in files}
    return [found for file in files for found in imports_of(file, root, modules)]


def wrong_directions(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        package, target = found.module.partition(".")[0], found.target.partition(".")[0]
        if target not in BELOW[package] | {package}:
            allowed = ", ".join(sorted(BELOW[package])) or "none of ours"
            wrong.append(
                f"{found.module}:{found.line} imports {found.target}; {package} may import "
                f"{allowed}"
            )
    return wrong


def circle(imports: list[Import]) -> list[str]:
    """The modules of a circle of imports that run at once, first and last the same; else empty."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if found.at_once:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_down():
    found = all_imports(ROOT)
    assert found, "no imports were found: is this the repository?"
    assert wrong_directions(found) == []


def test_imports_run_in_no_circle():
    assert circle(all_imports(ROOT)) == []


def write(root: Path, files: dict[str, str]) -> list[Import]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return all_imports(root)


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("merge/a.py", "import soups.learn", True),
        ("merge/a.py", "from fleet import train", True),
        ("inputs/a.py", "from kernels.ops import linear", True),
        ("kernels/a.py", "from inputs import budget", True),
        ("inputs/a.py", "def f():\n    import merge", True),
        ("inputs/a.py", "if TYPE_CHECKING:\n    from merge.coefficients import combine", True),
        ("merge/deep/a.py", "try:\n    from fleet.train import train\nexcept E:\n    pass", True),
        ("soups/a.py", "import inputs, kernels.ops, merge, fleet.train, torch", False),
        ("merge/deep/a.py", "from ..errors import MergeError\nfrom . import b", False),
        ("merge/a.py", "import soupspoon", False),
    ],
)
def test_directions_that_are_found(tmp_path, file, text, wrong):
    assert bool(wrong_directions(write(tmp_path, {file: text}))) == wrong


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("from soups.b import x", "from soups.a import y", True),
        ("from soups import b", "from . import a", True),
        ("import soups.b", "class C:\n    from soups.a import y", True),
        ("from soups import b", "def f():\n    from soups import a", False),
        ("from soups import b", "if TYPE_CHECKING:\n    from soups import a", False),
        ("from soups import b", "if not x:\n    from soups import a", True),
        ("from soups import b", "import merge.a", False),
    ],
)
def test_circles_that_are_found(tmp_path, first, second, expected):
    found = write(tmp_path, {"soups/a.py": first, "soups/b.py": second})
    assert bool(circle(found)) == expected


def test_command_lines_start_without_torch():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [h for h in ('torch', 'matplotlib', 'pandas', 'timm') if h in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    command = [sys.executable, "-c", code, *TORCH_FREE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
