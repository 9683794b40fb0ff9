"""`python -m soups.leaderboard`: what it writes, and what it says to bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from soups.leaderboard import app
from tests.soups.boards.conftest import WriteRun

FORMATS = ("csv", "md", "tex", "parquet")
ROOT = Path(__file__).parents[3]


def leaderboard(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_tables_and_a_page(write_run: WriteRun, tmp_path: Path):
    out = tmp_path / "out"
    result = leaderboard(write_run("a"), write_run("b", path="data/pets"), "--out", out)
    assert result.exit_code == 0, result.output
    names = {f"leaderboard_{t}.{k}" for t in ("digits", "pets") for k in FORMATS}
    assert {path.name for path in out.iterdir()} == {*names, "leaderboard.html"}
    lines = result.stdout.splitlines()
    assert lines[0].startswith("digits: Use mehl")
    assert lines[-1] == f"Open {out / 'leaderboard.html'} in a browser."


def test_quoted_rows_when_asked(write_run: WriteRun, tmp_path: Path):
    folder = write_run()
    for options, there in (((), False), (("--published",), True)):
        assert leaderboard(folder, "--out", tmp_path, "--quiet", *options).exit_code == 0
        assert ("81.62" in (tmp_path / "leaderboard.html").read_text()) == there


def test_quiet_says_nothing(write_run: WriteRun, tmp_path: Path):
    result = leaderboard(write_run(), "--out", tmp_path, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_mistake_is_one_paragraph_and_writes_nothing(tmp_path: Path, write_run: WriteRun):
    folder = write_run()
    (folder / "leaderboard.csv").write_text("learner,kind\n")
    out = tmp_path / "out"
    for wrong in (folder, tmp_path / "nowhere"):
        result = leaderboard(wrong, "--out", out)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {wrong}")
        assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, write_run: WriteRun):
    place = tmp_path / "file"
    place.write_text("mine")
    result = leaderboard(write_run(), "--out", place)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {place}: cannot write there")
    assert "--out" in result.stderr
    assert place.read_text() == "mine"


def test_it_needs_a_folder():
    assert leaderboard().exit_code == 2


def test_help_comes_without_pandas_and_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from soups.leaderboard import app; "
        "CliRunner().invoke(app, ['--help']); print({'torch', 'pandas'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("folder", ["digits", "cifar10", "generalisation", "ablation"])
def test_the_results_in_this_repository(folder: str, tmp_path: Path):
    result = leaderboard(ROOT / "results" / folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "leaderboard.html").stat().st_size < 3_000_000
