"""Sweeps: what they plan, what they refuse before any work, and what is left of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from inputs.config import read_config
from inputs.errors import InputError
from soups.config import LearnConfig
from soups.learn import app
from soups.pipeline import run
from soups.rows import load_predictions
from soups.sweeps.cells import _seconds_before, check_cells, make_zoos
from soups.sweeps.sweep import Sweep, is_sweep, plan_sweep
from tests.soups.conftest import make_config

AXES = {
    "zoo": {"small": {"zoo": {"path": "zoo"}, "model": {"kwargs": {"width": 12}}}},
    "split": {"keys": ["seed", "data.select_seed"], "values": [0, 1]},
    "images": {"keys": "data.select.count", "values": [100, 300]},
}
LEARNERS = {
    "uniform": {},
    "greedy": {},
    "mehl": {"inner_epochs": 1, "batch_size": 64, "block_size": 5},
}


def write_sweep(kitchen: Path, folder: Path, axes: Any = None, **changes) -> Path:
    """A sweep over the small zoo of `kitchen`, with its results in `folder`."""
    values = make_config(kitchen).model_dump(mode="json", by_alias=True)
    values["model"]["factory"] = f"{kitchen / 'net.py'}:build"
    values["data"]["select"] = {"from": "all", "count": 300}
    values |= {"output": str(folder / "results"), "learners": LEARNERS, "out_of_fold": 0}
    del values["pictures"]
    # The zoo is there: it is not made.
    values["zoo"] = {"path": str(kitchen / "zoo")}
    axes = json.loads(json.dumps(axes or AXES))
    if "small" in axes.get("zoo", {}):
        axes["zoo"]["small"]["zoo"]["path"] = str(kitchen / "zoo")
    values["sweep"] = {"axes": axes} | changes.pop("sweep", {})
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def learn(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [str(config), *arguments, "--quiet"])


def plan(kitchen: Path, folder: Path, *overrides: str, **changes) -> Sweep:
    return plan_sweep(read_config(write_sweep(kitchen, folder, **changes), overrides))


def refused(kitchen: Path, folder: Path, *overrides: str, **changes) -> str:
    with pytest.raises(InputError) as caught:
        plan(kitchen, folder, *overrides, **changes)
    return str(caught.value)


# --- what is planned -----------------------------------------------------------------------------


def test_every_combination_is_a_run_in_a_folder_of_its_own(kitchen: Path, tmp_path: Path):
    sweep = plan(kitchen, tmp_path)
    assert sweep.folder == tmp_path / "results" / "small"
    assert [cell.name for cell in sweep.cells] == [
        "small/0/100",
        "small/0/300",
        "small/1/100",
        "small/1/300",
    ]
    last = sweep.cells[-1]
    assert last.labels == {"zoo": "small", "split": "1", "images": "300"}
    assert last.folder == sweep.folder / "runs" / "small" / "1" / "300"
    config = last.config
    assert (config.seed, config.data.select_seed, config.data.select.count) == (1, 1, 300)
    assert config.model.kwargs == {"width": 12}
    # A nested mapping sets the keys inside it, and leaves the others.
    assert config.model.source == "factory"
    # The rest is the file's, but for pictures of each run.
    assert list(config.learners) == list(LEARNERS)
    assert not config.pictures
    assert plan(kitchen, tmp_path, "pictures=true").cells[0].config.pictures


def test_labels_may_be_written_as_numbers(kitchen: Path, tmp_path: Path):
    path = write_sweep(kitchen, tmp_path, {"images": {"100": {"data.select.count": 100}}})
    path.write_text(path.read_text().replace("'100':", "100:"))
    (cell,) = plan_sweep(read_config(path, [])).cells
    assert cell.labels == {"images": "100"}
    assert cell.config.data.select.count == 100


def test_an_override_comes_before_the_axes(kitchen: Path, tmp_path: Path):
    sweep = plan(kitchen, tmp_path, "sweep.axes.split.values=[4]", "device=cpu")
    assert {cell.labels["split"] for cell in sweep.cells} == {"4"}
    assert {cell.config.device for cell in sweep.cells} == {"cpu"}


def test_a_config_without_axes_is_one_run(kitchen: Path, tmp_path: Path):
    path = write_sweep(kitchen, tmp_path)
    assert is_sweep(read_config(path, []))
    values = yaml.safe_load(path.read_text())
    del values["sweep"]
    path.write_text(yaml.safe_dump(values))
    assert not is_sweep(read_config(path, []))
    with pytest.raises(ValueError, match=r"only `python -m soups\.learn` can"):
        LearnConfig.model_validate(values | {"sweep": {}})


# --- what is refused before any work -------------------------------------------------------------


def test_a_bad_value_is_told_with_its_axis_and_once(kitchen: Path, tmp_path: Path):
    axes = AXES | {"images": {"keys": "data.select.count", "values": [0, 100, 1.5]}}
    text = refused(kitchen, tmp_path, axes=axes)
    found = [line for line in text.splitlines() if "data.select.count" in line]
    assert len(found) == 2
    assert "sweep.axes.images (0): data.select.count: found 0; wanted" in found[0]
    assert "sweep.axes.images (1.5)" in found[1]


def test_a_mistake_in_the_file_is_told_as_the_file_s(kitchen: Path, tmp_path: Path):
    text = refused(kitchen, tmp_path, "seeed=1", learners={"uniformm": {}, "greedy": {}})
    assert text.count("learners.uniformm") == 1
    assert f"{tmp_path / 'sweep.yaml'}: learners.uniformm" in text
    assert "override 'seeed=1': seeed: unknown key; did you mean 'seed'?" in text


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"images": {"key": "seed", "values": [1]}}, "wanted `keys`"),
        ({"images": {"keys": [], "values": [1]}}, "wanted `keys`"),
        ({"images": {"keys": "seed", "values": 3}}, "`values`: wanted a list"),
        ({"images": {"keys": "seed", "values": [1, 1]}}, "one value twice"),
        ({"images": {"keys": "zoo", "values": [{"path": "x"}]}}, "cannot be the name of a folder"),
        ({"images": {"keys": "seed", "values": []}}, "at least 1"),
        ({"images": {"keys": "zoo.path", "values": ["a/b"]}}, "cannot be the name of a folder"),
        ({"a": {"keys": "seed", "values": [1]}, "b": {"keys": "seed", "values": [2]}}, "both set"),
        (
            {"a": {"x": {"zoo": {"path": "p"}}}, "b": {"keys": "zoo.path.y", "values": [2]}},
            "axes a and b both set `zoo.path.y`",
        ),
        ({"a": {"keys": "name", "values": ["x"]}}, "sets `name`, which a sweep does itself"),
        ({}, "sweep.axes"),
    ],
)
def test_axes_that_make_no_sense(kitchen: Path, tmp_path: Path, axes: dict, said: str):
    path = write_sweep(kitchen, tmp_path)
    values = yaml.safe_load(path.read_text())
    values["sweep"]["axes"] = axes
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        plan_sweep(read_config(path, []))
    assert said in str(caught.value)


def test_names_that_are_not_there(kitchen: Path, tmp_path: Path):
    text = refused(kitchen, tmp_path, sweep={"compare": ["gredy"]})
    assert text.count("there is no learner 'gredy'; the learners are uniform, greedy, mehl") == 1
    text = refused(kitchen, tmp_path, sweep={"repeats": "splits"})
    assert "there is no axis 'splits'; did you mean 'split'?" in text
    text = refused(kitchen, tmp_path, "sweep.workrs=2")
    assert "did you mean 'workers'?" in text


def test_an_override_that_an_axis_would_undo(kitchen: Path, tmp_path: Path):
    text = refused(kitchen, tmp_path, "data.select.count=5", "seed=3")
    assert "override 'data.select.count=5': the axis images sets `data.select.count`" in text
    assert "override 'seed=3': the axis split sets `seed`" in text


def test_an_interpolated_place_would_split_the_sweep(kitchen: Path, tmp_path: Path):
    places = {"name": "soup_${seed}", "output": "of_${data.select.count}"}
    text = refused(kitchen, tmp_path, **places)
    assert "name: found soup_0, soup_1 for different runs; wanted one for all" in text
    assert "output: found of_100, of_300 for different runs" in text
    assert plan(kitchen, tmp_path, name="soup_${device}").folder.name == "soup_auto"


def test_what_only_the_images_and_the_zoo_tell_stops_all_runs(kitchen: Path, tmp_path: Path):
    axes = AXES | {
        "images": {"keys": "data.select.count", "values": [20, 100, 1000]},
        "ingredients": {"keys": "zoo.subset", "values": [3, 6]},
    }
    result = learn(write_sweep(kitchen, tmp_path, axes=axes))
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "small/0/20/3" in text
    assert "learners.mehl.batch_size: 64 is more than the 20 images" in text
    assert "overlapping splits" in text
    assert "zoo.subset: 6 is more than the 5 ingredients" in text
    assert not (tmp_path / "results" / "small" / "runs").exists()


# --- what is run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of four runs."""
    folder = tmp_path_factory.mktemp("sweep")
    result = learn(write_sweep(kitchen, folder, sweep={"workers": 2}))
    assert result.exit_code == 0, result.output
    assert "4 runs: 1 zoo × 2 split × 2 images" in result.stdout
    assert "points [95%]" in result.stdout
    return folder


def test_the_tables_have_every_run(finished: Path):
    folder = finished / "results" / "small"
    runs = pd.read_csv(folder / "runs.csv")
    assert len(runs) == 4 * len(LEARNERS)
    assert set(runs["learner"]) == set(LEARNERS)
    places = runs[["zoo", "split", "images"]].drop_duplicates()
    assert len(places) == 4
    for _, row in runs.iterrows():
        place = folder / "runs" / row["zoo"] / str(row["split"]) / str(row["images"])
        table = pd.read_csv(place / "leaderboard.csv").set_index("learner")
        assert table.loc[row["learner"], "report_accuracy"] == row["report_accuracy"]
        assert not (place / "pictures").exists()
        assert not (place / "leaderboard.html").exists()
        assert not (place / "soups").exists()
    found = pd.read_csv(folder / "comparisons.csv")
    # Two learners against greedy: over all, for each number of images.
    assert len(found) == 2 * 3
    assert (folder / "pictures" / "comparisons_greedy.png").read_bytes().startswith(b"\x89PNG")
    assert "greedy" in (folder / "leaderboard.html").read_text()
    text = (folder / "comparisons.md").read_text()
    assert "Report accuracy minus that of greedy" in text
    record = json.loads((folder / "run.json").read_text())
    assert record["runs"] == 4
    assert record["failed"] == {}
    assert record["seconds_of_runs"] > 0


def test_a_run_of_a_sweep_is_an_ordinary_run(kitchen: Path, finished: Path, tmp_path: Path):
    sweep = plan_sweep(read_config(finished / "sweep.yaml", []))
    cell = sweep.cells[1]
    alone = cell.config.model_copy(update={"output": tmp_path})
    torch.set_num_threads(1)
    run(alone, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    ours = load_predictions(cell.folder / "predictions.npz")
    theirs = load_predictions(tmp_path / alone.name / "predictions.npz")
    assert ours.keys() == theirs.keys()
    for learner, sets in ours.items():
        for name, right in sets.items():
            assert np.array_equal(right, theirs[learner][name])
    for learner in LEARNERS:
        file = Path("coefficients") / f"{learner}.json"
        expected = (tmp_path / alone.name / file).read_bytes()
        assert (cell.folder / file).read_bytes() == expected


def test_splits_differ_and_share_their_report(finished: Path):
    runs = finished / "results" / "small" / "runs" / "small"
    selects = [json.loads((runs / s / "100" / "run.json").read_text()) for s in "01"]
    accuracies = [record["ingredients"]["select_accuracy"] for record in selects]
    assert accuracies[0] != accuracies[1]


@pytest.fixture
def again(kitchen: Path, finished: Path, tmp_path: Path) -> Path:
    """The config of a copy of the finished sweep's results."""
    shutil.copytree(finished / "results", tmp_path / "results")
    return write_sweep(kitchen, tmp_path)


def test_finished_runs_are_taken_and_new_ones_run(again: Path, tmp_path: Path):
    folder = tmp_path / "results" / "small"
    cells = {c: c.stat().st_mtime_ns for c in folder.glob("runs/*/*/*/work/cell.json")}
    before = {name: (folder / name).read_bytes() for name in ("runs.csv", "comparisons.csv")}
    result = learn(again)
    assert result.exit_code == 0, result.output
    assert "4 are finished" in result.stdout
    assert "small/0/100, small/0/300" in result.stdout
    assert {c: c.stat().st_mtime_ns for c in cells} == cells
    assert {name: (folder / name).read_bytes() for name in before} == before
    shutil.rmtree(folder / "runs" / "small" / "1" / "300")
    result = learn(again, "sweep.axes.images.values=[300]")
    assert result.exit_code == 0, result.output
    assert "1 are finished" in result.stdout
    assert len(pd.read_csv(folder / "runs.csv")) == 2 * len(LEARNERS)


def test_a_fresh_start_that_is_stopped_leaves_nothing_finished(
    again: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell = tmp_path / "results" / "small" / "runs" / "small" / "0" / "100"
    one = ("sweep.axes.split.values=[0]", "sweep.axes.images.values=[100]")
    # What is refused before any work takes nothing away.
    assert learn(again, *one, "learners.mehl.batch_size=200", "--fresh").exit_code == 2
    assert (cell / "work" / "cell.json").exists()

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("soups.sweeps.sweep._run", stopped)
        assert learn(again, *one, "--fresh").exit_code == 130
    assert not (cell / "work" / "cell.json").exists()
    assert not (cell / "work" / "steps.json").exists()
    assert not [*cell.glob("coefficients/*.json")]
    result = learn(again, *one)
    assert result.exit_code == 0, result.output
    assert "are finished" not in result.stdout


def test_soups_that_are_kept_later_are_cooked(again: Path, tmp_path: Path):
    cell = tmp_path / "results" / "small" / "runs" / "small" / "0" / "100"
    record = json.loads((cell / "work" / "cell.json").read_text())
    one = ("sweep.axes.split.values=[0]", "sweep.axes.images.values=[100]")
    result = learn(again, *one, "sweep.keep_soups=true")
    assert result.exit_code == 0, result.output
    assert "are finished" not in result.stdout
    assert {file.stem for file in (cell / "soups").iterdir()} == set(LEARNERS)
    # What the run took before is among its seconds.
    now = json.loads((cell / "work" / "cell.json").read_text())
    assert now["made_from"] == record["made_from"]
    assert now["seconds"] > record["seconds"]
    assert not (cell / "work" / "started.json").exists()
    assert "1 are finished" in learn(again, *one, "sweep.keep_soups=true").stdout


def test_a_stopped_run_counts_the_seconds_up_to_its_last_step(tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "started.json").write_text('{"made_from": "a", "seconds": 5.0, "started": 1000.0}')
    assert _seconds_before(tmp_path, "a") == 5.0
    (work / "steps.json").write_text("{}")
    os.utime(work / "steps.json", (1007.0, 1007.0))
    assert _seconds_before(tmp_path, "a") == pytest.approx(12.0)
    assert _seconds_before(tmp_path, "b") == 0.0


def test_other_images_or_another_model_are_another_run(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    factory = tmp_path / "net.py"
    factory.write_text((kitchen / "net.py").read_text())
    values = plan(kitchen, tmp_path, f"model.factory={factory}:build").cells
    configs = [cell.config for cell in values]
    problems, images = check_cells(configs)
    assert not problems
    assert set(images[0]) == {"fit", "tune", "select", "report"}
    before = make_zoos(configs, images, kitchen, False)
    assert len(set(before)) == 4
    assert make_zoos(configs, images, kitchen, False) == before
    for split in ("select", "report"):
        changed = [images[0] | {split: "others"}, *images[1:]]
        after = make_zoos(configs, changed, kitchen, False)
        assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, True, True]
    factory.write_text(factory.read_text() + "# other code\n")
    assert not set(make_zoos(configs, images, kitchen, False)) & set(before)
    # Runs of the same images share one load of them.
    loads: list[LearnConfig] = []

    def load(config: LearnConfig) -> tuple[int, dict[str, str]]:
        loads.append(config)
        return 300, {}

    monkeypatch.setattr("soups.sweeps.cells._load_images", load)
    check_cells(configs * 3)
    assert len(loads) == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(again: Path, tmp_path: Path):
    folder = tmp_path / "results" / "small"
    for images in ("100", "300"):
        (folder / "runs" / "small" / "1" / images / "work" / "cell.json").unlink()
    (folder / "runs" / "small" / "1" / "100" / "work" / "steps.json").write_text("not JSON")
    result = learn(again)
    assert result.exit_code == 2
    assert "1 of 4 runs failed" in result.output
    assert "small/1/100: " in result.output
    assert "not the record of a run" in result.output
    assert len(pd.read_csv(folder / "runs.csv")) == 3 * len(LEARNERS)
    record = json.loads((folder / "run.json").read_text())
    assert list(record["failed"]) == ["small/1/100"]


@pytest.mark.slow
def test_zoos_are_made_first_and_once(kitchen: Path, tmp_path: Path):
    finetune = make_config(kitchen).zoo.finetune
    assert finetune is not None
    made = finetune.model_copy(update={"ingredients": 2}).model_dump(mode="json")
    made["base"]["epochs"] = made["recipe"]["epochs"] = 1
    axes = {
        "zoo": {
            name: {"zoo": {"path": str(tmp_path / name), "finetune": made | {"seed": seed}}}
            for seed, name in enumerate("ab")
        },
        "split": {"keys": "data.select_seed", "values": [0, 1]},
    }
    sweep = {"workers": 2, "keep_soups": True, "compare": ["uniform"]}
    learners = {"uniform": {}, "best_single": {}}
    path = write_sweep(kitchen, tmp_path, axes=axes, sweep=sweep, learners=learners)
    result = learn(path)
    assert result.exit_code == 0, result.output
    zoos = [json.loads((tmp_path / name / "zoo.json").read_text()) for name in "ab"]
    assert [len(zoo["ingredients"]) for zoo in zoos] == [2, 2]
    assert zoos[0]["ingredients"] != zoos[1]["ingredients"]
    folder = tmp_path / "results" / "small"
    assert len([*folder.glob("runs/*/*/soups/uniform.safetensors")]) == 4
    found = pd.read_csv(folder / "comparisons.csv")
    assert found["zoo"].tolist() == ["a", "b", "all"]
    assert found["runs"].tolist() == [2, 2, 4]
    # Zoos that have changed are other zoos: their runs are not taken.
    for file in (tmp_path / "a").glob("*.safetensors"):
        os.utime(file, (0, 0))
    result = learn(path)
    assert result.exit_code == 0, result.output
    assert "2 are finished" in result.stdout


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_next_run_goes_on(kitchen: Path, tmp_path: Path):
    axes = {"split": {"keys": "data.select_seed", "values": list(range(12))}}
    path = write_sweep(kitchen, tmp_path, axes=axes, sweep={"workers": 2})
    folder = tmp_path / "results" / "small"
    process = subprocess.Popen(
        [sys.executable, "-m", "soups.learn", str(path), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not [*folder.glob("runs/*/work/cell.json")] and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().startswith("Interrupted; what was finished is kept")
    assert "\n" not in said.strip()
    # multiprocessing's own helper ends when it sees that we have.
    while _is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(process.pid)
    done = len([*folder.glob("runs/*/work/cell.json")])
    assert 1 <= done < 12
    result = learn(path)
    assert result.exit_code == 0, result.output
    assert f"{done} are finished" in result.stdout


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
