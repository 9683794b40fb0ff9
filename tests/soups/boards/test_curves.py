from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from soups.boards.curves import LONGEST_LINE, curves_of
from soups.boards.folders import read_run
from soups.curves import TYPES
from tests.soups.boards.conftest import WriteRun


def write_curves(zoo: Path, points: dict[str, int]) -> None:
    """Curves of these models, with so many points; every second one was scored on *tune*."""
    lines = [
        {
            **dict.fromkeys(TYPES, 0),
            "name": name,
            "phase": "fit",
            "state": "training",
            "trained_epochs": k / 10,
            "tune_accuracy": 0.5 + k / 1000 if k % 2 else None,
        }
        for name, count in points.items()
        for k in range(count)
    ]
    zoo.mkdir()
    pd.DataFrame(lines).astype(TYPES).to_parquet(zoo / "curves.parquet")


def change_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["config"]["zoo"] = {"path": "my-zoo"}
    (folder / "run.json").write_text(json.dumps(record | changes))


def test_the_training_of_the_run_s_own_ingredients(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_run()
    change_record(folder, checkpoints={"00": {}, "01": {}}, learners={})
    write_curves(tmp_path / "my-zoo", {"base": 4, "00": 6, "01": 400, "02": 4})
    run = read_run(folder)
    assert [*curves_of(run)] == []  # the zoo is not where the command runs
    monkeypatch.chdir(tmp_path)
    (curves,) = curves_of(run)
    assert [line.name for line in curves.lines] == ["00", "01"]
    assert curves.lines[0].points == ((0.1, 0.501), (0.3, 0.503), (0.5, 0.505))
    assert len(curves.lines[1].points) <= LONGEST_LINE
    assert curves.percent


def test_what_learners_have_tried(write_run: WriteRun):
    folder = write_run()
    passes = [{"score": k, "loss": 1 / (1 + k), "accuracy": 0.5} for k in range(3)]
    change_record(folder, learners={"cmaes": {"record": {"curve": passes}}, "greedy": {}})
    (curves,) = curves_of(read_run(folder))
    assert curves.title == "cmaes: its search"
    assert curves.lines[0].points == ((1.0, 1.0), (2.0, 0.5), (3.0, pytest.approx(1 / 3)))
    assert not curves.percent


@pytest.mark.parametrize("noted", [[], [0.3, 0.2], [{"step": 1}], {"loss": [1, 2]}, "none"])
def test_what_a_learner_notes_in_its_own_way_is_no_curve(write_run: WriteRun, noted):
    folder = write_run()
    change_record(folder, learners={"mine": {"record": {"curve": noted}}})
    assert [*curves_of(read_run(folder))] == []
