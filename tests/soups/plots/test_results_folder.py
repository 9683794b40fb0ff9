"""Every picture from the folder of a real run: what is drawn, what is written, what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from soups import pipeline, plots
from soups.curves import CURVES_FILE
from soups.errors import SoupError
from tests.soups.conftest import make_config
from tests.soups.plots.page import check_labels

REPORTS = {
    "leave_one_out": {"of": "uniform"},
    "shapley": {"permutations": 8},
    "line": {"between": [["base", "uniform"], ["best_single", "uniform"]], "points": 5},
    "plane": {"through": ["base", "best_single", "uniform"], "resolution": 4},
    "subsets": {"orders": 3},
    "deltas": {},
}
LEARNERS = {
    "best_single": {},
    "uniform": {},
    "greedy": {},
    "layers": {"type": "learned_layerwise", "batch_size": 64, "epochs": 1},
}
OF_A_RUN = {
    "leaderboard": plots.leaderboard,
    "costs": plots.costs,
    "overfitting": plots.overfitting,
    "reliability": plots.reliability,
    "coefficients": plots.coefficients,
}
OF_REPORTS = {
    "leave_one_out": plots.leave_one_out,
    "shapley": plots.shapley,
    "line": plots.lines,
    "plane": plots.plane,
    "subsets": plots.subsets,
    "deltas": plots.deltas,
}


@pytest.fixture(scope="session")
def results(kitchen, tmp_path_factory) -> Path:
    """The folder of a finished run of the small zoo."""
    output = tmp_path_factory.mktemp("drawn")
    learners = {name: {"type": name} | own for name, own in LEARNERS.items()}
    references = {"ensembles": True, "finetuned": False}
    config = make_config(
        kitchen, output=output, learners=learners, reports=REPORTS, references=references
    )
    pipeline.run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    return output / "small"


@pytest.mark.parametrize("name", [*OF_A_RUN, *OF_REPORTS])
def test_a_results_folder_is_all_that_a_picture_needs(name, results, tmp_path):
    """And what is drawn from it is what the run has drawn, bit for bit."""
    figure = (OF_A_RUN | OF_REPORTS)[name](results)
    png, svg = plots.save_figure(figure, tmp_path / f"{name}.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().startswith("<?xml")
    folder = results / ("pictures" if name in OF_A_RUN else f"reports/{name}")
    if name != "coefficients":
        for file in (png, svg):
            assert file.read_bytes() == (folder / file.name).read_bytes()
    check_labels(figure)
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            said = axes.get_title(loc="left") + axes.get_xlabel() + axes.get_ylabel()
            assert said, "an axes without any label"


def test_a_run_draws_all_its_pictures(results):
    """By `write_pictures`, which draws them again where they are missing."""
    kinds = {file.name.partition(".")[0] for file in (results / "pictures").iterdir()}
    assert kinds == {
        *("leaderboard", "costs", "overfitting", "reliability"),
        *(f"coefficients_{row}" for row in LEARNERS),
    }


def test_the_soups_of_all_are_those_of_the_leaderboard(results):
    """At the right end of the left panel, and at the left end of the right one."""
    rows = pd.read_csv(results / "leaderboard.csv").set_index("learner")["report_accuracy"]
    for axes, place in zip(plots.subsets(results).axes, (-1, 0), strict=True):
        ends = {line.get_label(): line.get_ydata()[place] for line in axes.lines}
        for learner in ("uniform", "greedy", "best_single"):
            assert ends[learner] == pytest.approx(100 * rows[learner])


def test_the_errors_of_the_diagrams_are_those_of_the_leaderboard(results):
    rows = pd.read_csv(results / "leaderboard.csv").set_index("learner")["report_ece"]
    panels = plots.reliability(results).axes
    assert [axes.get_title(loc="left") for axes in panels] == [*rows.index]
    for axes, error in zip(panels, rows, strict=True):
        assert axes.get_title(loc="right") == f"{100 * error:.1f}%"
    (one,) = plots.reliability(results, ["greedy"]).axes
    assert one.get_title(loc="left") == "greedy"


def test_the_first_of_the_leaderboard_is_drawn_where_no_learner_is_named(results):
    first = pd.read_csv(results / "leaderboard.csv")["learner"][0]
    for learner in (None, "layers"):
        title = plots.coefficients(results, learner).axes[0].get_title(loc="left")
        assert title.startswith(learner or first)


def test_the_curves_of_a_zoo(kitchen, tmp_path):
    loss, accuracy = plots.curves(kitchen / "zoo").axes
    assert len(loss.lines) >= 5
    assert "accuracy" in accuracy.get_title(loc="left")
    with pytest.raises(SoupError, match=rf"{CURVES_FILE}: is not there.*soups.finetune"):
        plots.curves(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("leaderboard", "leaderboard.csv"),
        ("costs", "leaderboard.csv"),
        ("overfitting", "leaderboard.csv"),
        ("reliability", "examples.npz"),
        ("coefficients", "coefficients/LEARNER.json"),
        *((name, "run.json") for name in OF_REPORTS),
    ],
)
def test_what_is_missing_is_named_with_what_makes_it(name, missing, tmp_path):
    with pytest.raises(SoupError) as error:
        (OF_A_RUN | OF_REPORTS)[name](tmp_path)
    assert str(tmp_path / missing) in str(error.value)
    assert "python -m soups.learn" in str(error.value)


def test_a_report_that_was_not_asked_for_is_named_with_the_lines_that_ask(results, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    record = json.loads((folder / "run.json").read_text())
    del record["config"]["reports"]["plane"]
    record["config"]["reports"]["again"] = record["config"]["reports"]["line"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SoupError, match=r"plane: \{through.*under `reports:` in the config"):
        plots.plane(folder)
    with pytest.raises(SoupError, match=r"2 reports of type 'line'; say which.*'line', 'again'"):
        plots.lines(folder)
    with pytest.raises(SoupError, match=r"again\.csv: is not there"):
        plots.lines(folder, "again")
    with pytest.raises(SoupError, match="did you mean 'subsets'"):
        plots.subsets(folder, "subset")
    with pytest.raises(SoupError, match="did you mean 'greedy'"):
        plots.coefficients(folder, "gredy")
    with pytest.raises(SoupError, match="did you mean 'greedy'"):
        plots.reliability(folder, "gredy")


@pytest.mark.parametrize("file", ["leaderboard.csv", "run.json", "examples.npz"])
def test_another_file_in_the_place_of_one_of_a_run(file, results, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    (folder / file).write_bytes(b"\x00\xff nothing of the kind")
    draw = {"run.json": plots.shapley, "examples.npz": plots.reliability}.get(
        file, plots.leaderboard
    )
    with pytest.raises(SoupError, match=file.replace(".", r"\.")):
        draw(folder)


def test_a_table_that_was_cut_off(results, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(results, folder)
    path = folder / "leaderboard.csv"
    path.write_text(path.read_text()[:-60])
    with pytest.raises(SoupError, match=r"leaderboard\.csv: .*was cut off.*soups\.learn"):
        plots.leaderboard(folder)


def test_the_names_of_a_table_stay_as_they_are(results):
    """An ingredient that is called 00 is not 0."""
    (left, _) = plots.shapley(results).axes
    names = {label.get_text() for label in left.get_yticklabels()}
    assert names == {f"{k:02d}" for k in range(5)}


def test_deltas_are_of_what_learners_mix(results):
    tables = results / "reports" / "deltas"
    cosines = pd.read_csv(tables / "deltas_cosine.csv", dtype={"model": str})
    assert cosines["model"].tolist() == [f"{k:02d}" for k in range(5)]
    assert np.diagonal(cosines.drop(columns="model")).tolist() == pytest.approx([1.0] * 5)
    counted = pd.read_csv(tables / "deltas_layers.csv")["elements"].sum()
    soup = json.loads((results / "coefficients" / "uniform.json").read_text())
    assert not any("running" in name for name in soup["groups"][0]["tensors"])
    assert counted == 12 * 9 + 12 * 12 * 9 + 4 * 12 + 48 * 10 + 10


def test_pictures_import_matplotlib_when_they_are_drawn_and_leave_pyplot_alone(results):
    code = (
        "import sys; from soups import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.leaderboard(sys.argv[1])\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(results)], check=True)
