from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from soups.boards.folders import RunFolder, read_folders
from soups.boards.joining import Task, join
from soups.boards.standing import images_needed, standing
from soups.statistics import paired_difference_interval
from tests.soups.boards.conftest import WriteRun


def task_of(*folders: Path) -> Task:
    (task,) = join([one for one in read_folders(folders) if isinstance(one, RunFolder)])
    return task


def rows(**wrong: range) -> dict[str, np.ndarray]:
    """Rows of 400 images that are right but on these."""
    found = {}
    for row, images in wrong.items():
        found[row] = np.ones(400, dtype=bool)
        found[row][[*images]] = False
    return found


def said(write_run: WriteRun, **wrong: range) -> tuple[list[str], dict[str, str]]:
    task = task_of(write_run(right=rows(**wrong)))
    found = standing(task)
    assert found is not None
    return [*found.sentences], {row: found.of("small", row) for row in wrong}


def test_a_sure_gain_and_one_best(write_run: WriteRun):
    sentences, marks = said(
        write_run, mehl=range(10), greedy=range(60), best_single=range(100), ensemble=range(1)
    )
    assert sentences[0].startswith("Use mehl: 97.50% on report, +22.50 [+18.")
    assert sentences[0].endswith("points over best_single.")
    assert sentences[1] == "400 report images tell mehl from every other soup."
    assert marks == {"mehl": "best", "greedy": "", "best_single": "", "ensemble": ""}


def test_a_sure_gain_that_two_share(write_run: WriteRun):
    sentences, marks = said(write_run, mehl=range(20), greedy=range(22), best_single=range(90))
    assert sentences[0].startswith("Use mehl, or one of the 1 tied with it: 95.00%")
    assert sentences[1] == (
        "greedy is tied with mehl: 400 report images do not tell the two apart. The quickest is "
        "greedy."
    )
    assert marks["greedy"] == "tied"


def test_a_gain_that_may_be_nothing(write_run: WriteRun):
    sentences, marks = said(
        write_run, mehl=range(20), greedy=range(4, 26), best_single=range(10, 34)
    )
    assert sentences[0].startswith(
        "Use mehl, or one of the 2 tied with it: 95.00% on report, +1.00 ["
    )
    assert sentences[0].endswith(
        "] points over best_single, which may be nothing: it matters little here."
    )
    assert "greedy and best_single are tied with mehl" in sentences[1]
    assert "four times in five, would take about " in sentences[2]
    assert set(marks.values()) == {"best", "tied"}


def test_the_baseline_is_the_best(write_run: WriteRun):
    sentences, marks = said(write_run, best_single=range(5), mehl=range(80))
    assert (
        sentences[0]
        == "Keep best_single: its 98.75% on report is the highest accuracy of all soups."
    )
    assert marks == {"best_single": "best", "mehl": ""}


def test_without_examples_the_table_s_own_ties_count(write_run: WriteRun):
    bare = task_of(write_run(lacks=("examples.npz",)))
    found = standing(bare)
    assert found is not None
    assert found.tied is None
    assert not any("tied" in sentence for sentence in found.sentences)
    ties = bare.table.assign(tied_with_best=["True", "True", "False", ""])
    found = standing(dataclasses.replace(bare, table=ties))
    assert found is not None
    assert found.tied == {("small", "greedy")}


def test_a_task_without_a_soup(write_run: WriteRun):
    task = task_of(write_run())
    table = task.table.assign(kind="reference")
    assert standing(dataclasses.replace(task, table=table)) is None


def test_rows_of_several_runs_are_named_with_their_run(write_run: WriteRun):
    right = rows(mehl=range(10), best_single=range(100))
    better = rows(mehl=range(8), best_single=range(100))
    found = standing(task_of(write_run("a", right=right), write_run("b", right=better)))
    assert found is not None
    assert found.sentences[0].startswith("Use mehl of b, or one of the 1 tied with it: 98.00%")
    assert found.tied == {("a", "mehl")}


def test_rows_on_other_images_are_not_tied(write_run: WriteRun):
    right = rows(mehl=range(10), best_single=range(100))
    found = standing(
        task_of(write_run("a", right=right), write_run("b", right=right, split_seed=5))
    )
    assert found is not None
    assert found.best == ("a", "mehl")
    assert found.tied == frozenset()


def test_as_many_images_as_are_needed_find_the_gain():
    """Of drawn experiments of that size about four in five have an interval above none."""
    rng = np.random.default_rng(0)
    wins, losses = 0.05, 0.03

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        kind = rng.choice(3, count, p=[wins, losses, 1 - wins - losses])
        return kind != 1, kind != 0

    low, high = paired_difference_interval(*draw(100_000), seed=0)
    wanted = images_needed(100_000, wins - losses, (high - low) / 2)
    found = [paired_difference_interval(*draw(wanted), seed=k).low > 0 for k in range(300)]
    assert 0.73 < np.mean(found) < 0.87
    assert wanted == pytest.approx(1560, rel=0.05)


def test_a_gain_that_the_number_of_rows_explains_is_not_sure(write_run: WriteRun):
    """Of many rows the best is ahead by luck, and its own interval does not know how many."""
    task = task_of(write_run(right=rows(mehl=range(20), greedy=range(22), best_single=range(90))))
    for p, end in ((0.04, "over best_single."), (0.06, "it matters little here.")):
        found = standing(
            dataclasses.replace(task, table=task.table.assign(vs_best_single_p_holm=p))
        )
        assert found is not None
        assert found.sentences[0].endswith(end)
