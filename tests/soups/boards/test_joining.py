from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soups.boards.folders import RunFolder, read_folders
from soups.boards.joining import Task, join
from soups.errors import SoupError
from tests.soups.boards.conftest import ROWS, WriteRun, examples_of, shares


def joined(*folders: Path) -> list[Task]:
    return join([one for one in read_folders(folders) if isinstance(one, RunFolder)])


def test_one_run_is_a_task(write_run: WriteRun):
    (task,) = joined(write_run())
    assert task.name == task.data == "digits"
    assert task.report == "from all, fraction 0.25"
    assert task.names == ("small",)
    assert [*task.table["learner"]] == ["mehl", "greedy", "best_single", "ensemble"]


def test_runs_of_one_task_are_one_table(write_run: WriteRun):
    worse = {row: right & (np.arange(len(right)) % 9 > 0) for row, right in shares().items()}
    (task,) = joined(write_run("a", right=worse), write_run("b"))
    assert task.names == ("a", "b")
    assert len(task.table) == 2 * len(ROWS)
    places = [*zip(task.table["run"], task.table["learner"], strict=True)]
    assert places[:3] == [("b", "mehl"), ("b", "greedy"), ("a", "mehl")]
    soups = task.table["kind"] == "soup"
    assert soups.tolist() == sorted(soups, reverse=True)
    assert task.table.loc[soups, "report_accuracy"].is_monotonic_decreasing


def test_other_data_and_another_split_are_other_tasks(write_run: WriteRun):
    first, other, third = joined(
        write_run("a"), write_run("b", path="data/pets"), write_run("c", report={"from": "test"})
    )
    assert (first.name, other.name, third.name) == ("digits-1", "pets", "digits-2")
    assert third.report == "from test"


def test_other_classes_are_another_task(write_run: WriteRun, tmp_path: Path):
    first, second = write_run("a"), write_run("b")
    with np.load(second / "examples.npz") as file:
        arrays = dict(file)
    arrays["classes"] = np.array([f"{name}s" for name in arrays["classes"]])
    np.savez(second / "examples.npz", **arrays)
    tasks = joined(first, second)
    assert len(tasks) == 2
    bare = write_run("c", lacks=("examples.npz",))
    assert [task.names for task in joined(first, bare)] == [("a", "c")]
    # It could be either.
    assert [task.names for task in joined(first, second, bare)] == [("a",), ("b",), ("c",)]


def test_runs_of_one_name_are_told_apart_by_their_folders(write_run: WriteRun):
    places = [write_run(f"{seed}/digits", name="digits") for seed in ("one", "two")]
    (task,) = joined(*places, write_run("other"))
    assert task.names == ("one/digits", "two/digits", "other")


def test_runs_that_would_have_one_name_are_refused(write_run: WriteRun):
    runs = [write_run("x/a", name="a"), write_run("y/a", name="a"), write_run("z", name="x/a")]
    with pytest.raises(SoupError, match=r"would have one name, x/a; rename"):
        joined(*runs)


def test_images_are_the_same_where_their_draw_is(write_run: WriteRun):
    (task,) = joined(write_run("a"), write_run("b"), write_run("c", split_seed=1))
    first, second, third = (run.images for run in task.runs)
    assert first == second != third


def test_files_of_tasks_have_names_of_their_own(write_run: WriteRun):
    """Else the table of one would be written over that of another."""
    paths = ("here/x", "there/x", "x-2")
    tasks = joined(*(write_run(f"run{k}", path=path) for k, path in enumerate(paths)))
    assert [task.name for task in tasks] == ["x-1", "x-3", "x-2"]


def test_runs_whose_data_changed_between_them_are_refused(write_run: WriteRun):
    """Their images are others by now: comparing them one by one would say something untrue."""
    a, b, c = write_run("a"), write_run("b", right=shares(239)), write_run("c")
    with pytest.raises(SoupError, match=r"/a, .*/b: .* other images \(240 and 239\) or labels"):
        joined(a, b)
    examples_of(shares(), seed=1).save(c / "examples.npz")
    with pytest.raises(SoupError, match="digits has changed, or was in another place"):
        joined(a, c)
