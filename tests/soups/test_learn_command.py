"""`python -m soups.learn` from end to end: what it leaves behind, and what it says to bad input."""

import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import soups.learners.mehl
import soups.learners.selection
from inputs.data import ImageSet, load_report_data
from soups import pipeline, report_door
from soups.errors import SoupError
from soups.learn import app
from tests.soups.conftest import make_config, open_session

ROOT = Path(__file__).parents[2]
QUICK = {
    "best_single": {},
    "uniform": {},
    "mehl_layerwise": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
}
# What a run rewrites whatever happens: the lock's process id and the hashes of what it read.
BOOKKEEPING = ("work/lock", "work/scans.json")


def write_config(kitchen: Path, folder: Path, **changes) -> Path:
    """A config file in `folder`, whose results and zoo are there too."""
    zoo = {"path": folder / "zoo"}
    config = make_config(kitchen, **{"output": folder / "results", "zoo": zoo} | changes)
    values = config.model_dump(mode="json", by_alias=True)
    values["model"]["factory"] = f"{kitchen / 'net.py'}:build"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def copy_zoo(kitchen: Path, folder: Path, count: int = 3) -> Path:
    """The first ingredients alone: no base, and no record of who made them."""
    zoo = folder / "zoo"
    zoo.mkdir(parents=True)
    for k in range(count):
        shutil.copy2(kitchen / "zoo" / f"{k:02d}.safetensors", zoo)
    return zoo


def learn(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [str(config), *arguments, "--quiet"])


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not str(file).endswith(BOOKKEEPING)
    }


@pytest.fixture(scope="module")
def finished(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo of three and the results of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    copy_zoo(kitchen, folder)
    result = learn(write_config(kitchen, folder, learners=QUICK))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def again(kitchen: Path, finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with a config that is its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return write_config(kitchen, tmp_path, learners=QUICK)


# --- what a run leaves behind --------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(kitchen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run with every kind of row, and the zoo that it found."""
    folder = tmp_path_factory.mktemp("whole")
    learners = {
        **QUICK,
        "greedy": {},
        "wise_ft": {},
        "plus": {"type": "learned_layerwise", "epochs": 1, "batch_size": 64},
    }
    data = make_config(kitchen).data.model_dump(by_alias=True) | {"shifts": {"noise": [1, 3]}}
    config = write_config(
        kitchen,
        folder,
        learners=learners,
        data=data,
        zoo={"path": kitchen / "zoo"},
        references={"lrs": [1e-3]},
        seed=7,
    )
    result = learn(config)
    assert result.exit_code == 0, result.output
    assert "predicted peak" in result.stdout
    assert "ensemble_greedy" in result.stdout
    page = folder / "results" / "small" / "leaderboard.html"
    assert result.stdout.splitlines()[-1] == f"Open {page} in a browser."
    assert "plus" in page.read_text()
    return folder / "results" / "small"


def test_the_leaderboard_has_all_rows(whole: Path):
    table = pd.read_csv(whole / "leaderboard.csv")
    rows = {*QUICK, "greedy", "wise_ft", "plus"}
    references = {"ensemble_all", "ensemble_greedy", "best_single+select", "uniform+select"}
    assert set(table["learner"]) == rows | references
    text = (whole / "leaderboard.md").read_text()
    assert all(row in text for row in rows | references)
    for row in rows:
        assert (whole / "coefficients" / f"{row}.json").is_file()
        assert (whole / "soups" / f"{row}.safetensors").is_file()
        picture = (whole / "pictures" / f"coefficients_{row}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    for picture in ("leaderboard.png", "overfitting.png", "costs.png"):
        assert (whole / "pictures" / picture).read_bytes().startswith(b"\x89PNG")


def test_rows_are_compared_with_the_first_best_single_and_the_first_greedy(whole: Path):
    table = pd.read_csv(whole / "leaderboard.csv").set_index("learner")
    for name in ("best_single", "greedy"):
        differences = table["report_accuracy"] - table.loc[name, "report_accuracy"]
        assert np.isnan(table.loc[name, f"vs_{name}"])
        found = table[f"vs_{name}"].drop(name)
        assert found.to_numpy() == pytest.approx(differences.drop(name).to_numpy(), abs=1e-12)
        assert (table[f"vs_{name}_p_holm"] >= table[f"vs_{name}_p"]).drop(name).all()
    best = table[table["kind"] == "soup"]["report_accuracy"].idxmax()
    assert table.loc[best, "tied_with_best"] in (True, "True")
    learners = {"mine": {"type": "greedy"}, "other": {"type": "greedy"}, "uniform": {}}
    config = make_config(Path(), learners=learners)
    assert pipeline.baseline_rows(config.learners) == ["mine"]


def test_the_predictions_say_for_each_image_who_was_right(whole: Path):
    table = pd.read_csv(whole / "leaderboard.csv").set_index("learner")
    with np.load(whole / "predictions.npz") as predictions:
        assert len(predictions.files) == len(table) * 4
        for row in table.index:
            names = [name for name in predictions.files if name.startswith(f"{row}/")]
            sets = {name.partition("/")[2] for name in names}
            assert sets == {"select", "report", "report_noise_1", "report_noise_3"}
            right = predictions[f"{row}/report"]
            assert right.shape == (449,)
            assert right.dtype == bool
            columns = [c for c in table.columns if "report" in c and "accuracy" in c]
            assert any(abs(table.loc[row, c] - right.mean()) < 1e-9 for c in columns)


def test_the_record_says_what_was_run_and_on_what(whole: Path):
    record = json.loads((whole / "run.json").read_text())
    assert record["seed"] == record["config"]["seed"] == 7
    assert record["config"]["learners"]["plus"]["epochs"] == 1
    assert record["config"]["data"]["fit"]["from"] == "all"
    assert {"python", "torch", "numpy"} <= record["versions"].keys()
    assert {"commit", "device", "warnings", "plan", "midpoints"} <= record.keys()
    assert record["tensors"]["1.num_batches_tracked"] == "int64 values are not mixed"
    assert set(record["checkpoints"]) == {f"{k:02d}" for k in range(5)}
    assert len(record["ingredients"]["select_accuracy"]) == 5
    assert record["learners"]["mehl_layerwise"]["record"]["blocks"] == 3
    assert "largest_coefficient" in record["learners"]["mehl_layerwise"]["record"]
    assert set(record["out_of_fold"]) == set(record["learners"])
    assert record["out_of_fold"]["greedy"].keys() >= {"accuracy", "loss", "folds", "seconds"}


def test_a_soup_scores_what_its_row_says(whole: Path, kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    from soups.zoo import load_weights

    table = pd.read_csv(whole / "leaderboard.csv").set_index("learner")
    columns = [c for c in table.columns if "select" in c and "accuracy" in c]
    for row in ("uniform", "mehl_layerwise", "wise_ft"):
        load_weights(session.model, str(whole / "soups" / f"{row}.safetensors"))
        assert table.loc[row, columns[0]] == pytest.approx(session.accuracy(), abs=1e-12)


# --- report ---------------------------------------------------------------------------------------


def test_report_is_read_when_all_learning_is_over(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments, **settings):
        raise RuntimeError("report was read")

    monkeypatch.setattr(report_door, "load_report_data", refuse)
    copy_zoo(kitchen, tmp_path)
    config = write_config(kitchen, tmp_path, learners=QUICK, references={"lrs": [1e-3]})
    result = learn(config)
    assert result.exit_code == 1
    assert str(result.exception) == "report was read"
    results = tmp_path / "results" / "small"
    steps = json.loads((results / "work" / "steps.json").read_text())
    learned = {*QUICK, "best_single+select", "uniform+select"}
    assert {f"learn/{row}" for row in learned} <= steps.keys()
    assert {f.stem for f in (results / "soups").iterdir()} == {*QUICK}
    assert not (results / "leaderboard.csv").exists()


def test_no_image_of_report_can_be_reached_from_what_learners_get(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    report = load_report_data(make_config(kitchen).data, memory_budget=2**30)["report"]
    hidden = set(report._rows.tolist())
    seen, waiting, found = set(), [session], []
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | type(os)):
            continue
        seen.add(id(thing))
        if isinstance(thing, ImageSet):
            found.append(thing)
        # Functions lead to their module, and by it to the whole program.
        waiting += gc.get_referents(thing) if not callable(thing) else list(_own(thing))
    assert {images.name for images in found} == {"fit", "select"}
    for images in found:
        assert not hidden & set(images._rows.tolist())


def _own(thing: object):
    return vars(thing).values() if hasattr(thing, "__dict__") else ()


# --- finished steps -------------------------------------------------------------------------------


def with_folds(*rows: str) -> list[str]:
    """What is learned for these rows: each, then each without one fold in turn."""
    return [*rows, *(f"{row}/fold_{fold}" for row in rows for fold in range(2))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows that were learned, in order."""
    rows: list[str] = []

    def counted(original):
        def learn(session, settings):
            rows.append(session.row)
            return original(session, settings)

        return learn

    for module, name in (
        (soups.learners.selection, "best_single"),
        (soups.learners.selection, "uniform"),
        (soups.learners.mehl, "mehl"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return rows


def stamps(folder: Path) -> dict[str, int]:
    files = [*folder.glob("coefficients/*"), *folder.glob("soups/*")]
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_a_finished_step_is_not_run_again(again: Path, calls: list[str]):
    results = again.parent / "results" / "small"
    before, written = digest(results), stamps(results)
    result = learn(again)
    assert result.exit_code == 0, result.output
    assert calls == []
    assert stamps(results) == written
    after = digest(results)
    assert {n for n in after if after[n] != before.get(n)} <= {"run.json", "leaderboard.html"}
    record = json.loads((results / "run.json").read_text())
    assert {"learners", "ingredients", "cooked", "plan"} <= record.keys()


def test_another_setting_runs_that_row_alone(again: Path, calls: list[str]):
    results = again.parent / "results" / "small"
    written = stamps(results)
    assert learn(again, "learners.mehl_layerwise.lr=0.02").exit_code == 0
    assert calls == with_folds("mehl_layerwise")
    changed = {name for name, stamp in stamps(results).items() if stamp != written[name]}
    assert changed == {"mehl_layerwise.json", "mehl_layerwise.safetensors"}


def test_a_new_row_leaves_the_others_alone(again: Path, calls: list[str]):
    assert learn(again, "learners.more={type: mehl, batch_size: 64}").exit_code == 0
    assert calls == with_folds("more")


def test_another_seed_runs_all_rows(again: Path, calls: list[str]):
    assert learn(again, "seed=1").exit_code == 0
    assert calls == with_folds(*QUICK)


def test_a_lost_soup_is_cooked_again(again: Path, calls: list[str]):
    soup = again.parent / "results" / "small" / "soups" / "uniform.safetensors"
    content = soup.read_bytes()
    soup.unlink()
    assert learn(again).exit_code == 0
    assert calls == []
    assert soup.read_bytes() == content


def test_fresh_starts_over_and_gives_the_same_bytes(again: Path, calls: list[str]):
    results = again.parent / "results" / "small"
    own = results / "notes.txt"
    own.write_text("mine")
    before = digest(results)
    assert learn(again, "--fresh").exit_code == 0
    assert calls == with_folds(*QUICK)
    after = digest(results)
    same = [n for n in before if n.startswith(("coefficients/", "soups/"))]
    assert len(same) == 2 * len(QUICK)
    assert all(before[name] == after[name] for name in same)
    assert own.read_text() == "mine"


# --- bad input ------------------------------------------------------------------------------------


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def truncate(zoo: Path) -> None:
    file = zoo / "01.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_two(zoo: Path) -> None:
    truncate(zoo)
    (zoo / "02.safetensors").write_bytes(b"")


def lie(zoo: Path, edit: Callable[[dict], None]) -> None:
    file = zoo / "01.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def lie_about_a_size(zoo: Path) -> None:
    lie(zoo, lambda header: header["0.weight"].update(shape=[12, 1, 3, 4000]))


def lie_about_an_offset(zoo: Path) -> None:
    def edit(header: dict) -> None:
        header["9.bias"]["data_offsets"] = [0, 40]

    lie(zoo, edit)


def point_outside(zoo: Path) -> None:
    (zoo / "01.safetensors").unlink()
    names = load_file(zoo / "00.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../00.safetensors")}
    (zoo / "01").mkdir()
    (zoo / "01" / "model.safetensors.index.json").write_text(json.dumps(index))


class Evil:
    """A pickle of it wants to make a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def want_to_run_code(zoo: Path) -> None:
    content = {"state_dict": load_file(zoo / "01.safetensors"), "x": Evil(zoo / "it_ran")}
    (zoo / "01.safetensors").unlink()
    torch.save(content, zoo / "01.pt")


def pickle_a_module(zoo: Path) -> None:
    (zoo / "01.safetensors").unlink()
    torch.save(torch.nn.Linear(2, 2), zoo / "01.pt")


def other_classes(zoo: Path) -> None:
    def edit(tensors: dict) -> None:
        tensors |= {"9.weight": tensors["9.weight"][:7], "9.bias": tensors["9.bias"][:7]}

    change(zoo / "01.safetensors", edit)


def nan_weights(zoo: Path) -> None:
    change(zoo / "01.safetensors", lambda tensors: tensors["0.weight"][0].fill_(float("nan")))


def negative_variance(zoo: Path) -> None:
    change(zoo / "01.safetensors", lambda tensors: tensors["1.running_var"][:2].fill_(-1.0))


def three_problems(zoo: Path) -> None:
    nan_weights(zoo)
    change(zoo / "02.safetensors", lambda tensors: tensors.pop("1.bias"))
    change(zoo / "00.safetensors", lambda tensors: tensors.update({"9.bias": torch.zeros(7)}))


def keep(count: int) -> Callable[[Path], None]:
    def remove(zoo: Path) -> None:
        for file in sorted(zoo.iterdir())[count:]:
            file.unlink()

    return remove


def as_it_is(zoo: Path) -> None:
    pass


OTHER_SELECT = "data.select={from: all, fraction: null, count: 20}"
BAD = {
    "a key": (
        as_it_is,
        ["learners.mehl_layerwise.outer_epoch=3"],
        ["learners.mehl_layerwise.outer_epoch", "unknown key", "did you mean 'outer_epochs'"],
    ),
    "a key at the top": (as_it_is, ["seeed=3"], ["seeed", "did you mean 'seed'"]),
    "a learner": (
        as_it_is,
        ["learners.mehl_layrwise={}"],
        ["learners.mehl_layrwise", "did you mean 'mehl_layerwise'"],
    ),
    "several keys": (
        as_it_is,
        ["seeed=3", "data.fit.fration=0.2"],
        ["did you mean 'seed'", "\n  override 'seeed=3'"],
    ),
    "no zoo": (shutil.rmtree, [], ["zoo.path: there is no folder", "zoo.finetune"]),
    "a missing checkpoint": (
        as_it_is,
        ["zoo.ingredients=[00.safetensors, 07.safetensors]"],
        ["07.safetensors: does not exist", "wanted a file"],
    ),
    "a missing base": (
        as_it_is,
        ["zoo.base=no/base.pt"],
        ["no/base.pt: does not exist"],
    ),
    "a truncated checkpoint": (
        truncate,
        [],
        ["01.safetensors: is truncated", "describes 8960 bytes, the file has 8860", "again"],
    ),
    "two broken checkpoints": (
        truncate_two,
        [],
        ["01.safetensors: is truncated", "02.safetensors: is empty", "\n  "],
    ),
    "an empty checkpoint": (
        lambda zoo: (zoo / "01.safetensors").write_bytes(b""),
        [],
        ["01.safetensors: is empty; get or write it again"],
    ),
    "a corrupt checkpoint": (
        lambda zoo: (zoo / "01.safetensors").write_bytes(b"\7" * 5000),
        [],
        ["01.safetensors: says its header has", "but only 4992 follow"],
    ),
    "a size that is a lie": (
        lie_about_a_size,
        [],
        ["01.safetensors: '0.weight'", "span 432 bytes", "corrupt"],
    ),
    "an offset that is a lie": (
        lie_about_an_offset,
        [],
        ["01.safetensors: '9.bias' overlaps", "corrupt"],
    ),
    "an index that points outside": (
        point_outside,
        [],
        ["01/model.safetensors.index.json: lists '../00.safetensors'", "beside the index"],
    ),
    "a pickle that wants to run code": (
        want_to_run_code,
        [],
        ["01.pt: wants to run", "system", "nothing of it was run"],
    ),
    "a pickled module": (
        pickle_a_module,
        [],
        ["01.pt", "weights_only=False", "\n  torch.save(model.state_dict()"],
    ),
    "other classes": (
        other_classes,
        [],
        ["01.safetensors: '9.bias' is [7], the model has [10]", "skip: ['9.*']"],
    ),
    "NaN weights": (
        nan_weights,
        [],
        ["01.safetensors", "NaN or infinite: '0.weight' has 9 of 108", "leave this checkpoint"],
    ),
    "a variance that is not positive": (
        negative_variance,
        [],
        ["01.safetensors: 2 of 12 variances in '1.running_var'", "the first is -1", "skip:"],
    ),
    "three problems": (
        three_problems,
        [],
        ["3 problems", "\n  - ", "02.safetensors", "'1.bias' is missing", "01.safetensors", "NaN"],
    ),
    "no ingredient": (keep(0), [], ["found 0 ingredients", "at least two", "zoo.ingredients"]),
    "one ingredient": (keep(1), [], ["found 1 ingredient;", "at least two"]),
    "a select smaller than a batch": (
        as_it_is,
        [OTHER_SELECT],
        ["learners.mehl_layerwise.batch_size: 64 is more than the 20 images of select", "lower"],
    ),
    "overlapping splits": (
        as_it_is,
        ["data.select.fraction=0.9"],
        ["overlapping splits", "select fraction 0.9", "1797 images", "give counts or fractions"],
    ),
    "no base for wise_ft": (
        as_it_is,
        ["learners.wise_ft={}"],
        ["learners.wise_ft", "the base is not known", "zoo.base"],
    ),
    "a budget that is none": (as_it_is, ["memory_budget=lots"], ["memory_budget", "'lots'"]),
    "a budget too small for one model": (
        as_it_is,
        ["memory_budget=1MiB"],
        ["memory_budget: 1.00 MiB is too small", "raise the budget"],
    ),
    "a device that is not there": (as_it_is, ["device=cuda:77"], ["device: 'cuda:77'", "use auto"]),
    "another model": (
        as_it_is,
        ["model.kwargs.width=13"],
        ["'0.weight' is [12, 1, 3, 3], the model has [13, 1, 3, 3]", "and 2 more checkpoints"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(again: Path, case: str):
    damage, overrides, messages = BAD[case]
    folder = again.parent
    damage(folder / "zoo")
    before = digest(folder)
    result = learn(again, *overrides)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert "\n\n" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert digest(folder) == before


@pytest.mark.parametrize("case", ["a learner", "a truncated checkpoint", "one ingredient"])
def test_debug_shows_the_traceback(again: Path, case: str):
    damage, overrides, messages = BAD[case]
    damage(again.parent / "zoo")
    result = CliRunner().invoke(app, [str(again), *overrides, "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert messages[0] in result.stderr.rpartition("error: ")[2]


@pytest.mark.parametrize("output", ["a_file", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written(kitchen: Path, tmp_path: Path, output: str):
    copy_zoo(kitchen, tmp_path)
    (tmp_path / "a_file").write_text("mine")
    config = write_config(kitchen, tmp_path)
    before = digest(tmp_path)
    result = learn(config, f"output={Path(tmp_path, output)}")
    assert result.exit_code == 2
    assert f"{Path(tmp_path, output, 'small')}: cannot write there" in result.stderr
    assert "set `output` to another one" in result.stderr
    assert digest(tmp_path) == before


def test_a_run_in_the_same_folder_is_refused(again: Path):
    folder = again.parent / "results" / "small"
    with pipeline.locked(folder):
        before = digest(again.parent)
        result = learn(again)
        assert result.exit_code == 2
        assert f"another run (process {os.getpid()})" in result.stderr
        assert digest(again.parent) == before


def test_nothing_is_trained_before_the_config_is_known_to_work(kitchen: Path, tmp_path: Path):
    zoo = make_config(kitchen).zoo.model_dump(mode="json") | {"path": tmp_path / "zoo"}
    config = write_config(kitchen, tmp_path, zoo=zoo, learners=QUICK)
    for override in ("memory_budget=1MiB", OTHER_SELECT):
        assert learn(config, override).exit_code == 2
        assert not (tmp_path / "zoo").exists()


# --- at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [["--help"], ["config.yaml", "zoo.pth=x"]])
def test_help_and_config_errors_come_at_once(kitchen: Path, tmp_path: Path, wrong: list[str]):
    write_config(kitchen, tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "soups.learn", *wrong],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == (0 if wrong == ["--help"] else 2)
    if wrong == ["--help"]:
        assert "Usage: python -m soups.learn" in result.stdout
        assert "CONFIG" in result.stdout
    else:
        assert "zoo.pth: unknown key; did you mean 'path'?" in result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "pydantic" in imported
    assert not {"torch", "numpy", "pandas"} & imported
    # Processor time: other work on the machine does not make this fail.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0


# --- interrupted and killed -----------------------------------------------------------------------

LONG = {
    "best_single": {},
    "mehl_layerwise": {"outer_epochs": 2, "batch_size": 32, "block_size": 2},
}


def coefficients(results: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in results.glob("small/coefficients/*.json")}


def wait_for(pattern: str, folder: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_ctrl_c_in_the_middle_of_learning(kitchen: Path, tmp_path: Path):
    zoo = {"path": kitchen / "zoo"}
    config = write_config(
        kitchen, tmp_path, zoo=zoo, learners=LONG, references=NO_REFERENCES, out_of_fold=0
    )
    assert learn(config, f"output={tmp_path / 'whole'}").exit_code == 0

    def interrupt() -> None:
        wait_for("results/small/work/learn/mehl_layerwise/progress.safetensors", tmp_path)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = learn(config)
    thread.join()
    assert result.exit_code == 130, result.output
    assert "Interrupted; what was finished is kept; run the same command" in result.stderr
    assert "Traceback" not in result.output
    assert set(coefficients(tmp_path / "results")) == {"best_single.json"}
    assert learn(config).exit_code == 0
    assert coefficients(tmp_path / "results") == coefficients(tmp_path / "whole")


NO_REFERENCES = {"ensembles": False, "finetuned": False}
MOMENTS = (
    "",  # while torch is imported
    "zoo/01.safetensors",
    "results/small/coefficients/best_single.json",
    "results/small/work/learn/mehl_layerwise/progress.safetensors",
    "results/small/work/evaluate/*",
)


def test_rows_that_will_not_fit_are_refused_before_the_zoo_is_made(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    zoo = {"path": tmp_path / "zoo", "finetune": make_config(kitchen).zoo.finetune}
    learners = {"uniform": {}, "mehl": {}, "learned": {}}
    config = make_config(kitchen, output=tmp_path / "results", zoo=zoo, learners=learners)
    monkeypatch.setattr(pipeline, "measure_activations", lambda *_: 1 << 50)
    with pytest.raises(SoupError, match=r"too small: mehl needs .*; learned needs .*") as error:
        pipeline.run(config, root=kitchen, fresh=False, progress=False, say=print)
    assert "uniform" not in str(error.value)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_many_moments_it_goes_on_to_the_same_bits(
    kitchen: Path, tmp_path: Path, how: signal.Signals
):
    finetune = make_config(kitchen).zoo.finetune
    zoo = {"path": tmp_path / "zoo", "finetune": finetune}
    config = write_config(kitchen, tmp_path, zoo=zoo, learners=LONG)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "soups.learn", str(config), "--quiet"]
    for moment in MOMENTS:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if moment:
            wait_for(moment, tmp_path, process)
        else:
            time.sleep(1.0)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said, moment
        if process.returncode == -signal.SIGINT:
            assert not moment  # before its imports were done
            assert not said
        elif how == signal.SIGINT:
            assert process.returncode == 130, (moment, said)
            assert "Interrupted; what was finished is kept" in said
        else:
            assert process.returncode == -signal.SIGKILL, (moment, said)
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    unbroken = write_config(
        kitchen, tmp_path, output=tmp_path / "whole", zoo={"path": kitchen / "zoo"}, learners=LONG
    )
    assert learn(unbroken).exit_code == 0
    assert coefficients(tmp_path / "results") == coefficients(tmp_path / "whole")
    soups = [sorted((tmp_path / run / "small/soups").iterdir()) for run in ("results", "whole")]
    assert [f.name for f in soups[0]] == [f.name for f in soups[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*soups, strict=True))
