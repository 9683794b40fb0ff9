"""Rows of the table are evaluated together, each remembered by itself."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import soups.entries
from inputs.data import load_report_data
from soups.evaluate import predict
from soups.examples import ReportExamples
from soups.pipeline import run
from soups.rows import load_predictions
from soups.zoo import load_weights
from tests.soups.conftest import load_checkpoint, make_config, open_session

LEARNERS = {
    "uniform": {},
    "greedy": {},
    "learned": {"epochs": 1, "batch_size": 64, "weight_decay": 0.1},
}


def learn(kitchen: Path, folder: Path) -> Path:
    config = make_config(kitchen, output=folder, learners=LEARNERS, references={"lrs": [1e-3]})
    run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    return folder / "small"


@pytest.fixture(scope="module")
def results(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(kitchen, tmp_path_factory.mktemp("entries"))


def test_rows_are_right_where_their_models_one_by_one_are(kitchen: Path, results: Path, tmp_path):
    session = open_session(kitchen, tmp_path)
    report = load_report_data(make_config(kitchen).data, memory_budget=2**30)["report"]
    found = load_predictions(results / "predictions.npz")

    def logits() -> torch.Tensor:
        return predict(session.model, report, batch_size=512)

    def agrees(row: str, wanted: torch.Tensor) -> None:
        top = wanted.topk(2).values
        clear = (top[:, 0] - top[:, 1] > 1e-4).numpy()
        right = (wanted.argmax(1) == report.labels).numpy()
        assert np.array_equal(found[row]["report"][clear], right[clear]), row

    files = {row: results / "soups" / f"{row}.safetensors" for row in LEARNERS}
    for start in ("best_single", "uniform"):
        row = f"{start}+select"
        files[row] = results / "work" / "learn" / row / "model.safetensors"
    for row, file in files.items():
        load_weights(session.model, str(file))
        agrees(row, logits())
    alone = []
    for checkpoint in session.zoo.checkpoints:
        load_checkpoint(session, checkpoint)
        alone.append(logits())
    agrees("ensemble_all", torch.stack(alone).mean(0))
    assert len(found) == len(files) + 2


def test_the_examples_are_the_rows_predictions_on_report(kitchen: Path, results: Path):
    report = load_report_data(make_config(kitchen).data, memory_budget=2**30)["report"]
    right = load_predictions(results / "predictions.npz")
    found = ReportExamples.load(results / "examples.npz")
    assert found.classes == report.classes
    assert np.array_equal(found.labels, report.labels.numpy())
    assert [*found.rows] == [*right]
    table = pd.read_csv(results / "leaderboard.csv").set_index("learner")
    for row, outcomes in found.rows.items():
        assert np.array_equal(found.right(row), right[row]["report"])
        assert outcomes.nll.mean(dtype=float) == pytest.approx(table.loc[row, "report_loss"])
        # Where a row is right, its loss is that of its confidence.
        sure = outcomes.confidence[found.right(row)]
        assert np.exp(-outcomes.nll[found.right(row)]) == pytest.approx(sure, rel=1e-5)
    rows = np.stack([found.right(row) for row in found.rows])
    assert np.array_equal(found.indices, np.flatnonzero(rows.any(0) & ~rows.all(0)))
    pixels = report.pixels(torch.from_numpy(found.indices))
    assert np.array_equal(found.thumbnails, pixels.numpy())


def test_a_row_that_is_lost_is_evaluated_again_alone(
    kitchen: Path, results: Path, monkeypatch: pytest.MonkeyPatch
):
    finished = []

    def finish(this, entry, *rest, original=soups.entries._finish):
        finished.append(entry.row)
        original(this, entry, *rest)

    monkeypatch.setattr(soups.entries, "_finish", finish)
    before = load_predictions(results / "predictions.npz")
    for row in ("learned", "ensemble_greedy"):
        (results / "work" / "evaluate" / row / "predictions.npz").unlink()
    learn(kitchen, results.parent)
    assert finished == ["learned", "ensemble_greedy"]
    after = load_predictions(results / "predictions.npz")
    for row, sets in before.items():
        assert all(np.array_equal(after[row][name], right) for name, right in sets.items())


def test_rows_of_finished_chunks_are_remembered(kitchen: Path, tmp_path, monkeypatch):
    """Killed in the middle of the table, a run goes on with the rows that are left."""
    finished = []

    class KilledError(Exception):
        pass

    def finish(this, entry, *rest, original=soups.entries._finish):
        if len(finished) == 2:
            raise KilledError
        finished.append(entry.row)
        original(this, entry, *rest)

    monkeypatch.setattr(soups.entries, "_finish", finish)
    with pytest.raises(KilledError):
        learn(kitchen, tmp_path)
    steps = json.loads((tmp_path / "small" / "work" / "steps.json").read_text())
    assert [name for name in steps if name.startswith("evaluate/")] == [
        f"evaluate/{row}" for row in finished
    ]
    monkeypatch.undo()
    assert (learn(kitchen, tmp_path) / "leaderboard.csv").exists()


def test_a_row_of_compressed_ingredients_says_what_was_lost():
    record = {"precision": "int4", "originals_minus_compressed": 0.0123}
    (note,) = soups.entries._notes(record)
    assert note.startswith("learned on int4 rows: -1.23 points on select with them")
    assert soups.entries._notes({"precision": "fp32"}) == ()
