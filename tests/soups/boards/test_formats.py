from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from soups.boards.folders import RunFolder, read_folders
from soups.boards.formats import latex, markdown, write_formats
from soups.boards.joining import Task, join
from tests.soups.boards.conftest import ROWS, WriteRun


def task_of(*folders: Path) -> Task:
    (task,) = join([one for one in read_folders(folders) if isinstance(one, RunFolder)])
    return task


def test_csv_and_parquet_have_every_column_in_full(write_run: WriteRun, tmp_path: Path):
    folder = write_run()
    files = write_formats(task_of(folder), tmp_path / "out" / "leaderboard_digits", about=[])
    assert [file.name for file in files] == [
        f"leaderboard_digits.{kind}" for kind in ("csv", "md", "tex", "parquet")
    ]
    with (folder / "leaderboard.csv").open(newline="") as file:
        own = {line["learner"]: line for line in csv.DictReader(file)}
    with files[0].open(newline="") as file:
        joined = [*csv.DictReader(file)]
    assert [line["learner"] for line in joined] == [*ROWS]
    for line in joined:
        assert line.pop("run") == "small"
        for name, cell in own[line["learner"]].items():
            assert line[name] == cell or float(line[name]) == float(cell)
    parquet = pd.read_parquet(files[3])
    assert [*parquet["learner"]] == [*ROWS]
    assert parquet["report_accuracy"][0] == float(own["mehl"]["report_accuracy"])


def test_markdown_is_to_be_read(write_run: WriteRun):
    text = markdown(task_of(write_run()), ["Use <b>mehl</b>."])
    lines = text.splitlines()
    assert lines[0] == "# digits"
    assert lines[2] == "Use &lt;b>mehl&lt;/b>."
    header = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert header == [
        *("learner", "report % [95%]", "vs best_single [95%]"),
        *("ingredients", "seconds", "memory"),
    ]
    cells = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert cells[:2] == ["mehl", "90.00 [86.00, 94.00]"]
    assert cells[2].startswith("+20.00 [+1")
    assert cells[3:] == ["4/5", "12", "900 MiB"]
    assert lines[-1].startswith("| ensemble (no soup) ")


def test_several_runs_have_a_column_for_them(write_run: WriteRun):
    text = markdown(task_of(write_run("a"), write_run("b")), [])
    assert text.splitlines()[4].startswith("| run ")


@pytest.mark.parametrize("name", ["a|b", "c_d & 50% {x} \\y", "<script>"])
def test_names_are_escaped(write_run: WriteRun, name: str):
    task = task_of(write_run(renamed={"mehl": name}))
    line = markdown(task, []).splitlines()[6]
    assert line.replace("\\|", "").count("|") == 7
    assert "<script>" not in line
    row = next(line for line in latex(task).splitlines() if "900 MiB" in line)
    assert row.replace("\\&", "").count("&") == 5
    assert "_" not in row.replace("\\_", "")
    assert "%" not in row.replace("\\%", "")


def test_latex_is_a_booktabs_table(write_run: WriteRun):
    text = latex(task_of(write_run()))
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "\\begin{tabular}{lrrrrr}"):
        assert text.count(rule) == 1
    assert "vs best\\_single [95\\%]" in text
    assert text.isascii()
