import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fleet.recipes import Recipe
from fleet.train import evaluate
from inputs.data import LearningData, load_learning_data
from inputs.models import build_model
from merge.errors import MergeError
from soups.config import FinetuneConfig, LearnConfig, Range
from soups.errors import SoupError
from soups.zoo import describe, load_weights, make_zoo, sample_recipes

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
    assert files == {f"{n}.safetensors" for n in [*names, "base"]} | {"zoo.csv", "zoo.json"}
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


def test_goes_on_with_what_is_missing_and_may_grow(made, tmp_path: Path):
    folder, values, _ = made
    grown = changed(values, zoo__path=str(tmp_path / "zoo"), zoo__finetune__ingredients=2)
    make(folder, grown)
    (tmp_path / "zoo/01.safetensors").unlink()
    _config, _ = load(grown)
    table = make(folder, changed(grown, zoo__finetune__ingredients=3))
    assert table["name"].tolist() == ["00", "01", "02"]
    assert contents(tmp_path / "zoo") == contents(folder / "zoo")
    with pytest.raises(SoupError, match=r"holds 02.safetensors.*raise zoo.finetune.ingredients"):
        make(folder, grown)


def test_a_killed_zoo_goes_on_to_the_same_bytes(tmp_path: Path):
    values = settings(tmp_path, checkpoints_every=8, ingredients=4)
    values["zoo"]["finetune"]["recipe"]["epochs"] = 12
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "soups.finetune", str(config), "--quiet"]
    table = tmp_path / "zoo/zoo.csv"
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | threads) as process:
        while process.poll() is None and not (table.exists() and "\n00," in table.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    checked, data = load(values)
    kept = (tmp_path / "zoo/00.safetensors").stat().st_mtime_ns
    make_zoo(checked, data, root=tmp_path, progress=False)
    assert (tmp_path / "zoo/00.safetensors").stat().st_mtime_ns == kept
    whole = changed(values, zoo__path=str(tmp_path / "whole"))
    assert make(tmp_path, whole)["name"].tolist() == [
        name for i in range(4) for name in (f"0{i}_e8", f"0{i}")
    ]
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")


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


def test_a_grid_is_the_product_in_order():
    values = {"search": "grid", "recipe": {"lr": [0.1, 0.2], "seed": 4, "shift": [0, 1, 2]}}
    grid = FinetuneConfig.model_validate(values)
    assert grid.ingredients == 6
    found = [(r.lr, r.shift, r.seed) for r in sample_recipes(grid)]
    assert found == [(lr, shift, 4) for lr in (0.1, 0.2) for shift in (0, 1, 2)]
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
    ):
        assert part in message
    for wrong, part in (
        ({"recipe": {"lr": [1, 2]}, "ingredients": 3}, "the grid has 2 combinations"),
        ({"recipe": {"lr": {"low": 1, "high": 2}}}, "lr: a grid takes values and lists"),
    ):
        with pytest.raises(ValidationError, match=part):
            FinetuneConfig.model_validate({"search": "grid", **wrong})
