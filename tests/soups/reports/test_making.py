"""Reports in a run: what is written, what is remembered, and that *report* is not read for them."""

import csv
import itertools
import json
import math

import numpy as np
import pytest

from soups import pipeline, report_door
from soups.learners.registry import Uniform
from soups.reports.material import Material
from soups.reports.registry import Shapley
from soups.reports.shapley import shapley
from soups.session import Session
from tests.soups.conftest import make_config, open_session

REPORTS = {
    "leave_one_out": {"of": "uniform"},
    "shapley": {"permutations": 8},
    "line": {"between": [["base", "uniform"]], "points": 3, "margin": 0.0},
    "map": {"type": "plane", "through": ["base", "00", "uniform"], "resolution": 2},
}
QUICK = {"learners": {"uniform": {}, "best_single": {}}, "reports": REPORTS}
FILES = {
    *(f"leave_one_out/leave_one_out.{end}" for end in ("csv", "md", "png", "svg")),
    *(f"shapley/shapley.{end}" for end in ("csv", "md", "png", "svg")),
    *(f"line/line.{end}" for end in ("csv", "png", "svg")),
    *(f"map/map{end}" for end in (".csv", "_points.csv", ".png", ".svg")),
}


def written(folder) -> set[str]:
    """The files below `reports`."""
    reports = folder / "reports"
    return {str(f.relative_to(reports)) for f in reports.rglob("*") if f.is_file()}


def run(kitchen, folder, **changes):
    config = make_config(kitchen, output=folder, **{**QUICK, **changes})
    pipeline.run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    return folder / "small"


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The rows for which candidates are evaluated, one entry for each pass."""
    rows = []
    evaluate = Session.evaluate

    def counted(session, *arguments):
        rows.append(session.row)
        return evaluate(session, *arguments)

    monkeypatch.setattr(Session, "evaluate", counted)
    return rows


def of_reports(passes):
    return [row for row in passes if row.startswith("report/")]


def test_reports_are_written_once_and_made_again_where_their_inputs_change(
    kitchen, tmp_path, monkeypatch, passes
):
    loaded = []
    load, make = report_door.load_report_data, pipeline.make_reports
    monkeypatch.setattr(
        report_door, "load_report_data", lambda *a, **k: loaded.append("report") or load(*a, **k)
    )
    monkeypatch.setattr(pipeline, "make_reports", lambda *a: loaded.append("reports") or make(*a))
    folder = run(kitchen, tmp_path)
    assert loaded == ["reports", "report"]
    assert written(folder) == FILES
    # One pass for each; five ingredients have few enough subsets for exact values.
    assert of_reports(passes) == [f"report/{row}" for row in REPORTS]
    record = json.loads((folder / "run.json").read_text())
    assert record["reports"]["shapley"]["record"]["exact"]
    assert record["reports"]["shapley"]["record"]["soups"] == 32
    assert record["reports"]["leave_one_out"]["forward_passes"] == 6
    assert any("norm_buffers is `uniform`" in warning for warning in record["warnings"])
    before = {name: (folder / "reports" / name).read_bytes() for name in FILES}

    passes.clear()
    run(kitchen, tmp_path)
    assert of_reports(passes) == []

    # A new learner is on the plane; the others do not know it. What is lost is made again.
    (folder / "reports" / "shapley" / "shapley.md").unlink()
    learners = {**QUICK["learners"], "greedy": {}}
    finer = {**REPORTS, "line": {**REPORTS["line"], "points": 5}}
    run(kitchen, tmp_path, learners=learners, reports=finer)
    assert of_reports(passes) == ["report/shapley", "report/line", "report/map"]
    for name in FILES:
        if name.startswith(("shapley", "leave_one_out")):
            assert (folder / "reports" / name).read_bytes() == before[name]

    # What is no more in the config goes, and what a row wrote as another type; other files stay.
    (folder / "reports" / "map" / "mine.txt").write_text("mine")
    run(kitchen, tmp_path, reports={"line": {"type": "leave_one_out"}})
    wanted = {f"line/line.{end}" for end in ("csv", "md", "png", "svg")} | {"map/mine.txt"}
    assert written(folder) == wanted
    assert {path.name for path in (folder / "reports").iterdir()} == {"line", "map"}


@pytest.mark.parametrize("empty", ["base", "chance"])
def test_exact_shapley_values_on_a_real_zoo(kitchen, tmp_path, empty):
    """They sum to the gain, and follow from each subset's own soup."""
    files = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in (0, 1, 0)]
    zoo = {"path": kitchen / "zoo", "ingredients": files}
    zoo["base"] = str(kitchen / "zoo" / "base.safetensors")
    session = open_session(kitchen, tmp_path, zoo=zoo)
    session.begin("report/shapley", tmp_path)
    shapley(Material(session, {}), Shapley(empty=empty), tmp_path / "shapley")
    labels = session.select.labels

    def value(members) -> float:
        if not members and empty == "chance":
            return (labels.bincount().max() / len(labels)).item()
        matrix = np.zeros((3, 1))
        matrix[list(members)] = 1 / max(len(members), 1)
        groups = session.whole_model()
        session.load(session.coefficients(groups, matrix, Uniform(), with_base=not members))
        return session.accuracy()

    wanted = np.zeros(3)
    for order in itertools.permutations(range(3)):
        for place, player in enumerate(order):
            wanted[player] += value(order[: place + 1]) - value(order[:place])
    wanted /= math.factorial(3)
    rows = list(csv.DictReader((tmp_path / "shapley.csv").read_text().splitlines()))
    found = [float(row["accuracy"]) for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert sum(found) == pytest.approx(value(range(3)) - value(()), abs=1e-6)
    # The first and the last are the same checkpoint.
    assert found[0] == pytest.approx(found[2], abs=1e-12)
