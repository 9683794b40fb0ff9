from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from soups.boards.folders import RunFolder, SweepFolder, read_folders, read_run
from soups.errors import SoupError
from soups.rows import save_predictions
from tests.soups.boards.conftest import IMAGES, ROWS, WriteRun, shares


def test_a_run_has_what_it_has_kept(write_run: WriteRun):
    run = read_run(write_run())
    assert run.name == "small"
    assert [*run.table["learner"]] == [*ROWS]
    assert run.report_count == IMAGES
    assert {*run.coefficients} == {"mehl", "greedy"}
    for row, right in shares().items():
        assert (run.right[row] == right).all()


def test_a_run_without_examples_has_its_predictions_or_nothing(write_run: WriteRun):
    folder = write_run(lacks=("examples.npz", "coefficients"))
    bare = read_run(folder)
    assert (bare.right, bare.examples, bare.coefficients, bare.report_count) == ({}, None, {}, None)
    sets = {row: {"report": own, "select": own[:5]} for row, own in shares().items()}
    save_predictions(folder / "predictions.npz", sets)
    run = read_run(folder)
    assert run.examples is None
    assert run.right["mehl"].sum() == shares()["mehl"].sum()


def test_names_stay_texts_and_empty_cells_are_no_numbers(write_run: WriteRun):
    folder = write_run(renamed={"mehl": "007", "greedy": "nan"})
    table = read_run(folder).table
    assert [*table["learner"]] == ["007", "nan", "best_single", "ensemble"]
    assert table["vs_best_single"].isna().tolist() == [False, False, True, False]


def test_a_table_of_an_earlier_version_names_its_baseline(write_run: WriteRun):
    folder = write_run()
    table = pd.read_csv(folder / "leaderboard.csv", dtype=str)
    values = table["vs_best_single"].astype(float)
    old = table.drop(columns=[name for name in table if name.startswith("vs_")])
    old["baseline"] = "best_single"
    for end in ("", "_low", "_high"):
        old[f"difference{end}"] = table[f"vs_best_single{end}"].fillna("0")
    old.to_csv(folder / "leaderboard.csv", index=False)
    found = read_run(folder).table
    assert "difference" not in found
    assert found["vs_best_single"].tolist() == pytest.approx(values.tolist(), nan_ok=True)


def test_folders_are_found_one_level_down(write_run: WriteRun, write_sweep, tmp_path: Path):
    write_run("b")
    write_run("a")
    write_sweep()
    (tmp_path / "pictures").mkdir()
    found = read_folders([tmp_path])
    assert [type(one) for one in found] == [RunFolder, RunFolder, SweepFolder]
    assert [one.folder.name for one in found] == ["a", "b", "sweep"]


def test_the_keys_of_a_sweep_stay_texts(write_sweep: Callable[[], Path]):
    (sweep,) = read_folders([write_sweep()])
    assert isinstance(sweep, SweepFolder)
    assert sweep.keys == ("images",)
    assert {*sweep.comparisons["images"]} == {"all", "250"}
    assert sweep.runs is not None
    assert {*sweep.runs["images"]} == {"250", "1000"}
    (sweep.folder / "runs.csv").unlink()
    (alone,) = read_folders([sweep.folder])
    assert isinstance(alone, SweepFolder)
    assert alone.runs is None


def refused(*folders: Path) -> str:
    with pytest.raises(SoupError) as error:
        read_folders(folders)
    return str(error.value)


def test_a_folder_without_a_run(tmp_path: Path):
    assert "is no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "leaderboard.csv").write_text("learner\n")
    said = refused(tmp_path)
    assert said.startswith(f"{tmp_path}: found no run")
    assert "run.json" in said


def test_a_folder_that_is_given_twice(write_run: WriteRun, tmp_path: Path):
    folder = write_run()
    assert "given twice" in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a table"),
        ("learner,kind,report_accuracy\n", "has no rows"),
        ("learner,kind\na,soup\n", "there is no column report_accuracy"),
        ("learner,kind,report_accuracy\na,soup,0.5,7\n", "more cells than the header"),
        ("learner,kind,report_accuracy\na,soup,0.5\nb,soup,0.5,7\n", "not a table"),
        ("learner,kind,report_accuracy\na,soup,high\n", "report_accuracy has 'high'"),
        ("learner,kind,report_accuracy\na,soup,0.5\nb,soup,\n", "report_accuracy has ''"),
        (
            "learner,kind,report_accuracy,notes\na,soup,0.5,\nb,soup,0.",
            "line 3 has 3 cells and the header 4",
        ),
        ("learner,kind,report_accuracy,seconds\na,soup,0.5,soon\n", "seconds has 'soon'"),
        ("learner,kind,report_accuracy\na,soup,96.5\n", "not between 0 and 1"),
        ("learner,kind,report_accuracy\na,soup,0.5\na,soup,0.6\n", "are there twice: a"),
        ("learner,kind,report_accuracy\na,stew,0.5\n", "found kind 'stew'"),
        ("learner,kind,report_accuracy\n\x00a,soup,0.5\n\xff", None),
    ],
)
def test_a_broken_table(write_run: WriteRun, text: str, said: str | None):
    folder = write_run()
    (folder / "leaderboard.csv").write_bytes(text.encode("latin-1"))
    found = refused(folder)
    assert found.startswith(f"{folder / 'leaderboard.csv'}: ")
    assert "python -m soups.learn" in found
    assert said is None or said in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: "{", "Invalid JSON"),
        (lambda record: json.dumps([record]), "the file"),
        (lambda record: json.dumps(record | {"config": {}}), "config.name"),
        (lambda record: json.dumps({"seed": 1}), "config: Field required"),
    ],
)
def test_a_broken_record(write_run: WriteRun, change: Callable, said: str):
    folder = write_run()
    path = folder / "run.json"
    path.write_text(change(json.loads(path.read_text())))
    found = refused(folder)
    assert found.startswith(f"{path}: not the record of a run")
    assert said in found


def test_broken_examples_and_coefficients_are_named(write_run: WriteRun):
    folder = write_run()
    (folder / "examples.npz").write_bytes(b"PK no")
    assert refused(folder).startswith(f"{folder / 'examples.npz'}: ")
    folder = write_run("other")
    (folder / "coefficients" / "mehl.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape("mehl.json: not a coefficients file")):
        read_run(folder)


def test_a_broken_sweep(write_sweep: Callable[[], Path]):
    folder = write_sweep()
    path = folder / "comparisons.csv"
    path.write_text(path.read_text().replace("0.4,", "much,"))
    assert "mean_points has 'much'" in refused(folder)
    path.write_text("baseline,learner\na,b\n")
    assert "there is no column runs" in refused(folder)
