import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import soups.event_files
from fleet.recipes import Recipe
from fleet.train import evaluate
from inputs.data import LearningData, load_learning_data
from inputs.models import build_model
from merge.errors import MergeError
from soups.config import FinetuneConfig, LearnConfig, Range
from soups.curves import read_curves
from soups.errors import SoupError
from soups.ingredients import find_ingredients
from soups.recipe_search import sample_recipes
from soups.zoo import describe, left_out, load_weights, make_zoo
from soups.zoo_folder import ZooFolder, names_to_come

ROOT = Path(__file__).parents[2]

FACTORY = """
from torch import nn

def small(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(9 * width, num_classes),
    )
"""


def settings(folder: Path, **finetune) -> dict:
    (folder / "model.py").write_text(FACTORY)
    space = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}, "epochs": 2, "batch_size": 32}
    return {
        "name": "test",
        "device": "cpu",
        "model": {"source": "factory", "factory": "model.py:small"},
        "data": {
            "path": "digits",
            "size": 8,
            "channels": 1,
            "fit": {"from": "all", "count": 200},
            "tune": {"from": "all", "count": 60},
            "select": {"from": "all", "count": 60},
            "report": {"from": "all", "count": 60},
            "cache": str(folder / "cache"),
        },
        "zoo": {
            "path": str(folder / "zoo"),
            "finetune": {
                "base": {"lr": 0.01, "epochs": 2, "batch_size": 32},
                "ingredients": 3,
                "recipe": space,
                **finetune,
            },
        },
        "learners": {"uniform": {}},
    }


def changed(values: dict, **changes) -> dict:
    """A copy with `a__b=value` put at ["a"]["b"]."""
    copy = json.loads(json.dumps(values))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = copy
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return copy


def load(values: dict) -> tuple[LearnConfig, LearningData]:
    config = LearnConfig.model_validate(values)
    return config, load_learning_data(config.data, memory_budget=2**28)


def make(folder: Path, values: dict, *, fresh: bool = False) -> pd.DataFrame:
    config, data = load(values)
    return make_zoo(config, data, root=folder, fresh=fresh, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("made")
    values = settings(folder)
    return folder, values, make(folder, values)


def test_writes_base_ingredients_and_a_table(made):
    folder, values, table = made
    files = {file.name for file in (folder / "zoo").iterdir()}
    names = ["00", "01", "02"]
    tables = {"zoo.csv", "zoo.json", "curves.parquet", "curves.png", "curves.svg"}
    assert files == {f"{n}.safetensors" for n in [*names, "base"]} | tables
    read = pd.read_csv(folder / "zoo/zoo.csv", dtype={"name": str})
    assert read["name"].tolist() == table["name"].tolist() == names
    assert set(Recipe.model_fields) < set(read.columns)
    config, data = load(values)
    assert config.zoo.finetune is not None
    for row, recipe in zip(
        read.to_dict("records"), sample_recipes(config.zoo.finetune), strict=True
    ):
        assert row["lr"] == pytest.approx(recipe.lr)
        assert (row["seed"], row["trained_epochs"]) == (recipe.seed, 2)
        model = build_model(config.model, classes=10, channels=1, root=folder)
        load_weights(model, str(folder / "zoo" / row["file"]))
        accuracy, loss = evaluate(model, data.tune)
        assert row["tune_accuracy"] == pytest.approx(accuracy)
        assert row["tune_loss"] == pytest.approx(loss, rel=1e-4)
    text = describe(read)
    assert "lr" in text.splitlines()[0]
    assert "momentum" not in text


def test_ingredients_start_from_the_base(made, tmp_path: Path):
    folder, values, _ = made
    tiny = changed(values, zoo__path=str(tmp_path / "z"), zoo__finetune__ingredients=1)
    tiny["zoo"]["finetune"]["recipe"] = {"lr": 1e-9, "batch_size": 32, "epochs": 1}
    tiny["zoo"]["base"] = str(folder / "zoo/base.safetensors")
    make(folder, tiny)
    base = load_file(folder / "zoo/base.safetensors")
    weights = load_file(tmp_path / "z/00.safetensors")
    assert not (tmp_path / "z/base.safetensors").exists()
    for name in ("0.weight", "5.weight", "5.bias"):
        torch.testing.assert_close(weights[name], base[name], rtol=0, atol=1e-6)


def test_a_finished_zoo_is_left_as_it_is(made):
    folder, values, _ = made
    before = {file: file.stat().st_mtime_ns for file in (folder / "zoo").glob("*.safetensors")}
    again = make(folder, changed(values, data__select__count=20, name="other", seed=3))
    assert again["name"].tolist() == ["00", "01", "02"]
    assert before == {file: file.stat().st_mtime_ns for file in before}


def assert_same_weights(folder: Path, other: Path, names: list[str]) -> None:
    """Up to rounding, which depends on who trains together; no two of them pass for each other."""
    for mine, theirs in itertools.product(names, names):
        pair = (load_file(at / f"{n}.safetensors") for at, n in ((folder, mine), (other, theirs)))
        expected = nullcontext() if mine == theirs else pytest.raises(AssertionError)
        with expected:
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_the_same_command_gives_the_same_bytes(made, tmp_path: Path):
    folder, values, _ = made
    make(folder, changed(values, zoo__path=str(tmp_path / "zoo")))
    assert contents(tmp_path / "zoo") == contents(folder / "zoo")


def test_goes_on_with_what_is_missing_and_may_grow(made, tmp_path: Path):
    folder, values, _ = made
    zoo = tmp_path / "zoo"
    grown = changed(values, zoo__path=str(zoo), zoo__finetune__ingredients=2)
    make(folder, grown)
    (zoo / "01.safetensors").unlink()
    before = {file: file.stat() for file in zoo.glob("*.safetensors")}
    table = make(folder, changed(grown, zoo__finetune__ingredients=3))
    assert table["name"].tolist() == ["00", "01", "02"]
    assert {file.name for file in before} == {"base.safetensors", "00.safetensors"}
    for file, status in before.items():
        now = file.stat()
        assert (now.st_mtime_ns, now.st_ino) == (status.st_mtime_ns, status.st_ino)
    assert_same_weights(zoo, folder / "zoo", ["base", "00", "01", "02"])
    with pytest.raises(SoupError, match=r"holds 02.safetensors.*raise zoo.finetune.ingredients"):
        make(folder, grown)


def test_one_after_another_gives_the_same_zoo(made, tmp_path: Path):
    folder, values, table = made
    alone = changed(
        values,
        zoo__path=str(tmp_path / "zoo"),
        zoo__finetune__joint=False,
        zoo__finetune__save_every=3.5,
    )
    found = make(folder, alone)
    assert found["name"].tolist() == table["name"].tolist()
    assert found["tune_loss"].tolist() == pytest.approx(table["tune_loss"].tolist(), rel=1e-3)
    assert_same_weights(tmp_path / "zoo", folder / "zoo", ["base", "00", "01", "02"])
    # How it was made is not part of what it is.
    assert make(folder, changed(alone, zoo__finetune__joint=True))["name"].tolist() == [
        "00",
        "01",
        "02",
    ]


def test_curves_have_every_model_from_its_first_epoch_to_its_last(made):
    folder, _, table = made
    curves = read_curves(folder / "zoo/curves.parquet")
    assert set(curves["name"]) == {"base", "00", "01", "02"}
    for name, own in curves.groupby("name"):
        assert own["step"].is_monotonic_increasing
        assert own["state"].tolist() == ["training"] * (len(own) - 1) + ["done"]
        assert own["step"].iloc[-1] == 2 * (200 // 32)
        assert {1.0, 2.0} <= {*own["trained_epochs"]}
        if name != "base":
            row = table.set_index("name").loc[name]
            assert own["tune_accuracy"].iloc[-1] == row["tune_accuracy"]


def test_a_killed_zoo_goes_on_to_the_same_bytes(tmp_path: Path):
    values = settings(tmp_path, checkpoints_every=8, ingredients=3, save_every=2e-4)
    values["zoo"]["finetune"]["recipe"] |= {"epochs": [10, 16], "batch_size": [16, 32]}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "soups.finetune", str(config), "--quiet"]
    table, snapshot = tmp_path / "zoo/zoo.csv", tmp_path / "zoo/training.safetensors"
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | threads) as process:
        while process.poll() is None and not (
            snapshot.exists() and table.exists() and "_e8," in table.read_text()
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert snapshot.exists()
    checked, data = load(values)
    assert checked.zoo.finetune is not None
    found, base = find_ingredients(checked.zoo)
    assert base == str(tmp_path / "zoo/base.safetensors")
    assert {Path(path).stem for path in found} <= {*names_to_come(checked.zoo)}
    table = make_zoo(checked, data, root=tmp_path, progress=False)
    assert not snapshot.exists()
    whole = changed(values, zoo__path=str(tmp_path / "whole"))
    assert make(tmp_path, whole)["name"].tolist() == table["name"].tolist()
    assert table["name"].tolist() == names_to_come(checked.zoo)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")
    curves, expected = (
        read_curves(tmp_path / zoo / "curves.parquet").drop(columns="seconds")
        for zoo in ("zoo", "whole")
    )
    by = ["name", "step"]
    pd.testing.assert_frame_equal(
        curves.sort_values(by, ignore_index=True), expected.sort_values(by, ignore_index=True)
    )


def test_other_settings_for_the_same_folder_are_refused(made):
    folder, values, _ = made
    before = contents(folder / "zoo")
    other = changed(values, zoo__finetune__base__lr=0.02, model__kwargs={"width": 5})
    with pytest.raises(SoupError) as error:
        make(folder, other)
    message = str(error.value)
    assert "finetune.base.lr: 0.01 → 0.02" in message
    assert "model.kwargs" in message
    assert "5" in message
    assert "zoo.path=" in message
    assert "--fresh" in message
    with pytest.raises(SoupError, match=r"images\.fit: 200 images.*data\.fit\.count: 200 → 150"):
        make(folder, changed(values, data__fit__count=150))
    assert contents(folder / "zoo") == before


def test_fresh_removes_what_was_made_here_and_nothing_else(tmp_path: Path):
    values = settings(tmp_path, ingredients=2)
    make(tmp_path, values)
    (tmp_path / "zoo/notes.txt").write_text("mine")
    old = contents(tmp_path / "zoo")
    make(tmp_path, changed(values, zoo__finetune__seed=1, zoo__finetune__ingredients=1), fresh=True)
    new = contents(tmp_path / "zoo")
    assert set(new) == {"base.safetensors", "00.safetensors"}
    assert new["base.safetensors"] == old["base.safetensors"]
    assert new["00.safetensors"] != old["00.safetensors"]
    assert (tmp_path / "zoo/notes.txt").read_text() == "mine"


def test_fresh_removes_what_no_row_tells_of(tmp_path: Path):
    values = settings(tmp_path, ingredients=4)
    make(tmp_path, values)
    zoo = tmp_path / "zoo"
    record = json.loads((zoo / "zoo.json").read_text())
    # As if killed in the middle: files are there before their rows.
    record["ingredients"] = record["ingredients"][:1]
    (zoo / "zoo.json").write_text(json.dumps(record))
    (zoo / "training.safetensors").write_bytes(b"half")
    (zoo / "tensorboard/00").mkdir(parents=True)
    (zoo / "tensorboard/00/events.out.tfevents.1").write_bytes(b"")
    make(tmp_path, changed(values, zoo__finetune__ingredients=1), fresh=True)
    assert {file.name for file in zoo.iterdir()} == {
        *("base.safetensors", "00.safetensors"),
        *("zoo.csv", "zoo.json", "curves.parquet", "curves.png", "curves.svg"),
    }


def diverging(folder: Path, lrs: list[float]) -> dict:
    values = settings(folder, search="grid")
    del values["zoo"]["finetune"]["ingredients"]
    recipe = {"optimizer": "sgd", "lr": lrs, "batch_size": 32, "epochs": 1}
    values["zoo"]["finetune"]["recipe"] = recipe
    return values


def test_who_fails_is_left_out_and_the_others_go_on(tmp_path: Path):
    values = diverging(tmp_path, [0.01, 1e30, 0.02])
    table = make(tmp_path, values)
    zoo = tmp_path / "zoo"
    assert table["name"].tolist() == ["00", "02"]
    assert set(contents(zoo)) == {f"{n}.safetensors" for n in ("base", "00", "02")}
    left = json.loads((zoo / "zoo.json").read_text())["left"]
    assert left == left_out(zoo)
    assert set(left) == {"01"}
    assert "not finite" in left["01"]
    assert "1e+30" in left["01"]
    text = describe(table, left)
    assert text.splitlines()[-1] == f"01 left out: {left['01']}"
    curves = read_curves(zoo / "curves.parquet")
    assert curves.loc[curves["name"] == "01", "state"].tolist()[-1] == "failed"
    # It is not tried again, and no report and no sweep waits for it.
    before = (zoo / "curves.parquet").stat().st_mtime_ns
    make(tmp_path, values)
    assert (zoo / "curves.parquet").stat().st_mtime_ns == before
    config, _ = load(values)
    assert names_to_come(config.zoo) == ["00", "02"]
    # The others are as if it had not been there.
    alone = diverging(tmp_path, [0.01, 0.02])
    make(tmp_path, changed(alone, zoo__path=str(tmp_path / "without")))
    assert contents(tmp_path / "without")["base.safetensors"] == contents(zoo)["base.safetensors"]
    assert_same_weights(tmp_path / "without", zoo, ["base", "00"])


def test_a_zoo_of_failures_names_each(tmp_path: Path):
    values = diverging(tmp_path, [1e30, 2e30])
    for _ in range(2):
        with pytest.raises(SoupError, match=r"zoo: there is no ingredient.*--fresh") as error:
            make(tmp_path, values)
        for part in ("00: the loss is not finite", "01: the loss is not finite", "2e+30"):
            assert part in str(error.value)
    base = changed(values, zoo__path=str(tmp_path / "other"))
    base["zoo"]["finetune"]["base"] |= {"optimizer": "sgd", "lr": 1e30}
    with pytest.raises(SoupError, match=r"other: base: the loss is not finite"):
        make(tmp_path, base)


def test_halving_stops_the_worst_and_is_part_of_what_the_zoo_is(tmp_path: Path):
    values = settings(tmp_path, ingredients=6, halving={"first_epochs": 1, "factor": 2})
    values["zoo"]["finetune"]["recipe"] |= {"lr": [1e-6, 1e-2], "epochs": 3}
    table = make(tmp_path, values)
    left = left_out(tmp_path / "zoo")
    assert {*table["name"], *left} == {f"{i:02d}" for i in range(6)}
    assert left
    assert all("epoch 1" in reason or "epoch 2" in reason for reason in left.values())
    config, _ = load(values)
    assert config.zoo.finetune is not None
    recipes = sample_recipes(config.zoo.finetune)
    assert {recipes[int(name)].lr for name in left} == {1e-6}
    with pytest.raises(SoupError, match=r"finetune\.halving"):
        make(tmp_path, changed(values, zoo__finetune__halving=None))


@pytest.mark.parametrize(
    ("halving", "minutes"),
    [(None, 1e-6), (None, 10.0), ({"first_epochs": 1, "factor": 2}, 1e-6)],
    ids=["with snapshots", "before the first snapshot", "with halving"],
)
def test_killed_whenever_a_model_ends_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halving: dict | None, minutes: float
):
    values = settings(tmp_path, halving=halving, save_every=minutes)
    values["zoo"]["finetune"]["recipe"] |= {"epochs": [1, 2, 3], "batch_size": [16, 32]}
    whole = changed(values, zoo__path=str(tmp_path / "whole"))
    expected = make(tmp_path, whole)

    add_row = ZooFolder.add_row

    def add_and_die(folder: ZooFolder, row: dict, order: list[str]) -> None:
        new = row["name"] not in folder.rows
        add_row(folder, row, order)
        if new:
            raise InterruptedError

    monkeypatch.setattr(ZooFolder, "add_row", add_and_die)
    for _ in range(len(expected)):
        with pytest.raises(InterruptedError):
            make(tmp_path, values)
    make(tmp_path, values)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")
    assert left_out(tmp_path / "zoo") == left_out(tmp_path / "whole")


def test_what_is_removed_while_a_snapshot_knows_it_as_finished_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = settings(tmp_path, ingredients=2, save_every=1e-6)
    values["zoo"]["finetune"].update(search="grid", recipe={"epochs": [1, 3], "batch_size": 32})
    add_row = ZooFolder.add_row

    def die_at_the_last(folder: ZooFolder, row: dict, order: list[str]) -> None:
        if row["name"] == "01":
            raise InterruptedError
        add_row(folder, row, order)

    with monkeypatch.context() as patch:
        patch.setattr(ZooFolder, "add_row", die_at_the_last)
        with pytest.raises(InterruptedError):
            make(tmp_path, values)
    first = tmp_path / "zoo/00.safetensors"
    before = load_file(first)
    first.unlink()
    assert make(tmp_path, values)["name"].tolist() == ["00", "01"]
    torch.testing.assert_close(load_file(first), before, rtol=1e-3, atol=1e-4)


def test_a_run_that_ends_early_is_finished(tmp_path: Path):
    values = settings(tmp_path, ingredients=2, checkpoints_every=3)
    values["zoo"]["finetune"]["recipe"] |= {"lr": 1e-9, "epochs": 8, "patience": 1}
    table = make(tmp_path, values)
    assert table["name"].tolist() == ["00", "01"]
    before = contents(tmp_path / "zoo")
    (tmp_path / "zoo/zoo.csv").unlink()
    assert make(tmp_path, values)["name"].tolist() == ["00", "01"]
    assert contents(tmp_path / "zoo") == before


def test_a_zoo_from_before_a_setting_was_known_is_still_itself(made, tmp_path: Path):
    folder, values, table = made
    old = tmp_path / "zoo"
    shutil.copytree(folder / "zoo", old)
    record = json.loads((old / "zoo.json").read_text())
    for own in (record["finetune"], record["finetune"]["base"], *record["ingredients"]):
        for later in ("halving", "ema_decay", "beta1", "frozen"):
            own.pop(later, None)
    for later in ("left", "runs", "under_way"):
        record.pop(later, None)
    (old / "zoo.json").write_text(json.dumps(record))
    found = make(folder, changed(values, zoo__path=str(old)))
    pd.testing.assert_frame_equal(found, table)
    assert "lr" in describe(found)


def test_tensorboard_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    values = settings(tmp_path, tensorboard=True, ingredients=1)
    make(tmp_path, values)
    runs = {file.parent.name for file in (tmp_path / "zoo/tensorboard").rglob("events.out.*")}
    assert runs == {"base", "00"}
    monkeypatch.setattr(soups.event_files, "find_spec", lambda name: None)
    make(tmp_path, values)  # what is finished needs no event files
    before = contents(tmp_path / "zoo")
    with pytest.raises(SoupError, match=r"pip install 'model-soups-toolkit\[tensorboard\]'"):
        make(tmp_path, values, fresh=True)
    assert contents(tmp_path / "zoo") == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_other_checkpoints_is_refused(tmp_path: Path, fresh: bool):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    save_file({"w": torch.zeros(1)}, zoo / "00.safetensors")
    with pytest.raises(SoupError, match=r"zoo: holds 00\.safetensors, which this zoo would not"):
        make(tmp_path, settings(tmp_path), fresh=fresh)
    assert [file.name for file in zoo.iterdir()] == ["00.safetensors"]


def test_a_base_of_another_model_is_refused(made, tmp_path: Path):
    folder, values, _ = made
    save_file(
        {"0.weight": torch.zeros(2, 1, 3, 3), "extra": torch.zeros(1)}, tmp_path / "b.safetensors"
    )
    other = changed(values, zoo__path=str(tmp_path / "zoo"))
    other["zoo"]["base"] = str(tmp_path / "b.safetensors")
    with pytest.raises(MergeError) as error:
        make(folder, other)
    message = str(error.value)
    assert "'0.weight' is [2, 1, 3, 3], the model has [4, 1, 3, 3]" in message
    assert "'5.bias' is missing" in message
    assert "'extra' is not in the model" in message


def test_a_broken_record_is_refused(made, tmp_path: Path):
    folder, values, _ = made
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/zoo.json").write_text("{")
    with pytest.raises(SoupError, match=r"zoo\.json is not the record of a zoo"):
        make(folder, changed(values, zoo__path=str(tmp_path / "zoo")))


def test_random_recipes_do_not_depend_on_their_number():
    space = {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "epochs": {"low": 2, "high": 5},
        "noise": {"low": 0.1, "high": 0.3},
        "mixup": [0.0, 0.2],
        "flip": True,
    }
    few, many = (
        sample_recipes(FinetuneConfig.model_validate({"recipe": space, "ingredients": n}))
        for n in (3, 400)
    )
    assert many[:3] == few
    assert {r.epochs for r in many} == {2, 3, 4, 5}
    assert {r.mixup for r in many} == {0.0, 0.2}
    assert all(r.flip and 1e-4 <= r.lr <= 1e-1 and 0.1 <= r.noise <= 0.3 for r in many)
    assert 0.4 < sum(r.lr < 10**-2.5 for r in many) / 400 < 0.6
    assert len({r.seed for r in many}) == 400
    # One field's choices do not move another's.
    other = FinetuneConfig.model_validate({"recipe": space | {"mixup": 0.5}, "ingredients": 3})
    assert [r.lr for r in sample_recipes(other)] == [r.lr for r in few]
    assert FinetuneConfig.model_validate({"recipe": space}).recipe["epochs"] == Range(low=2, high=5)


def test_values_that_cannot_be_together_name_their_ingredients():
    recipe = {"ema_decay": [None, 0.9], "swa_start": [None, 0.5]}
    finetune = FinetuneConfig.model_validate({"search": "grid", "recipe": recipe})
    with pytest.raises(SoupError) as error:
        sample_recipes(finetune)
    assert str(error.value).startswith("zoo.finetune.recipe: ingredient 03: ema_decay is 0.9")
    assert "\n" not in str(error.value)


def test_whole_numbers_are_drawn_where_none_is_possible():
    space = {"patience": {"low": 1, "high": 3}, "clip_norm": {"low": 1, "high": 3}}
    finetune = FinetuneConfig.model_validate({"recipe": space, "ingredients": 50})
    recipes = sample_recipes(finetune)
    assert {r.patience for r in recipes} == {1, 2, 3}
    assert len({r.clip_norm for r in recipes}) == 50


def test_a_grid_is_the_product_in_order():
    values = {"search": "grid", "recipe": {"lr": [0.1, 0.2], "seed": 4, "shift": [0, 1, 2]}}
    grid = FinetuneConfig.model_validate(values)
    assert grid.ingredients == 6
    found = [(r.lr, r.shift, r.seed) for r in sample_recipes(grid)]
    assert found == [(lr, shift, 4) for lr in (0.1, 0.2) for shift in (0, 1, 2)]
    frozen = {"search": "grid", "recipe": {"lr": [0.1, 0.2], "frozen": ["0.*", "1.*"]}}
    one = FinetuneConfig.model_validate(frozen)
    assert one.ingredients == 2
    assert [r.frozen for r in sample_recipes(one)] == [("0.*", "1.*")] * 2
    frozen["recipe"]["frozen"] = [[], ["0.*"]]
    two = FinetuneConfig.model_validate(frozen)
    assert [r.frozen for r in sample_recipes(two)] == [(), ("0.*",), (), ("0.*",)]
    cut = FinetuneConfig.model_validate(values | {"ingredients": 4})
    assert sample_recipes(cut) == sample_recipes(grid)[:4]


def test_every_problem_of_a_space_is_named():
    space = {
        "lrr": 1,
        "lr": [0.1, -1],
        "keep": "bset",
        "flip": {"low": 0, "high": 1},
        "noise": {"low": 2, "high": 1},
        "mixup": {"low": 0, "high": 1, "log": True},
        "epochs": {"low": 1},
        "shift": [],
        "frozen": [["a"], 1],
        "ema_decay": 1.5,
    }
    with pytest.raises(ValidationError) as error:
        FinetuneConfig.model_validate({"recipe": space})
    message = str(error.value)
    for part in (
        "`lrr` is not a field of a recipe; did you mean `lr`?",
        "lr: Input should be greater than 0, found -1",
        "keep: Input should be 'last' or 'best', found 'bset'",
        "flip: a range is for numbers",
        "noise: low is 2, above high, 1",
        "mixup: low is 0; a log scale needs a low above 0",
        "epochs.high: Field required",
        "shift: the list is empty",
        "frozen: Input should be a valid tuple, found 1",
        "ema_decay: Input should be less than 1, found 1.5",
    ):
        assert part in message
    for wrong, part in (
        ({"recipe": {"lr": [1, 2]}, "ingredients": 3}, "the grid has 2 combinations"),
        ({"recipe": {"lr": {"low": 1, "high": 2}}}, "lr: a grid takes values and lists"),
    ):
        with pytest.raises(ValidationError, match=part):
            FinetuneConfig.model_validate({"search": "grid", **wrong})
