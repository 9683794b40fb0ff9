"""docs/methods.md is what the registry says, and says all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from merge import documentation
from merge.documentation import methods_markdown, methods_text, reference
from merge.errors import MergeError
from merge.method import Method, MethodSettings, per_model
from merge.registry import FAMILIES, METHODS

ROOT = Path(__file__).parent.parent.parent


class Knobs(MethodSettings):
    """`density` is the share that stays."""

    density: float = per_model(1.0, gt=0, le=1)
    lambda_: float = Field(1.0, alias="lambda")
    count: int = Field(ge=0)
    limit: Annotated[float, Field(lt=3)] | None = None
    kind: Literal["sum", "count"] | None = "sum"
    rescale: bool = False


KNOBBED = Method(
    name="knobbed",
    summary="Turns knobs.",
    formula="W = |b| + Σ τ_k",
    paper="https://example.org/knobs/",
    settings=Knobs,
    function="nowhere:nothing",
    models=(2, 3),
    acts_on="tensors",
    draws=True,
    others="Vectors are averaged.",
    departs="The paper turns them left.",
    laws=frozenset({"order"}),
)


@pytest.fixture
def knobbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "Knobs", (KNOBBED,))
    monkeypatch.setitem(METHODS, "knobbed", KNOBBED)


def test_the_committed_file_is_the_generated_one() -> None:
    committed = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert committed == methods_markdown(), (
        "write it again: python -m merge.documentation > docs/methods.md"
    )


def test_every_method_has_a_row_with_all_its_cells() -> None:
    rows = [line for line in methods_markdown().splitlines() if line.startswith("| `")]
    assert [re.match(r"\| `(\w+)` ", row)[1] for row in rows] == list(METHODS)  # type: ignore[index]
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == len(documentation.COLUMNS)
        assert all(cell.strip() for cell in cells)
        assert "](https://" in cells[-1]


@pytest.mark.usefixtures("knobbed")
def test_a_row_says_defaults_bounds_needs_and_remarks() -> None:
    text = methods_markdown()
    row = next(line for line in text.splitlines() if line.startswith("| `knobbed`"))
    assert row == (
        "| `knobbed` | `W = \\|b\\| + Σ τ_k` | `density` = 1, in (0, 1], per model"
        "<br>`lambda` = 1<br>`count` required, ≥ 0<br>`limit` = none, < 3"
        "<br>`kind` = sum, one of sum, count, none<br>`rescale` = false"
        " | required | 2 to 3 | whole tensors | order"
        " | [example.org](https://example.org/knobs/) |"
    )
    remarks = text.partition("- **`knobbed`**: Turns knobs.")[2]
    for remark in (
        "*where:* `density` is the share that stays.",
        "*others:* Vectors are averaged.",
        "*departs:* The paper turns them left.",
        "*random:* ",
    ):
        assert remark in remarks


@pytest.mark.usefixtures("knobbed")
def test_the_terminal_shows_one_method_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    text = methods_text("knobbed")
    assert all(len(line) <= 50 for line in text.splitlines())
    words = " ".join(text.split())
    for found in ("W = |b| + Σ τ_k", "2 to 3", "density = 1, in (0, 1], per model", "lambda = 1"):
        assert found in words
    assert "The paper turns them left." in words


def test_the_terminal_lists_every_method_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = methods_text().splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert [line.split()[0] for line in lines if re.match(r"  \w", line)] == list(METHODS)


def test_a_typo_gets_the_nearest_name() -> None:
    with pytest.raises(MergeError, match="found 'liner'; did you mean 'linear'"):
        methods_text("liner")


def test_papers_are_arxiv_ids_or_addresses() -> None:
    assert reference("2306.01708") == "https://arxiv.org/abs/2306.01708"
    assert reference("https://example.org/a") == "https://example.org/a"


@pytest.mark.parametrize("module", ["merge.documentation", "merge.result.companions"])
def test_no_torch_is_imported(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
