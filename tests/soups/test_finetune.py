import _thread
import os
import pty
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from inputs.config import load_config
from soups.config import LearnConfig
from soups.curves import read_curves
from soups.finetune import app
from soups.ingredients import find_ingredients

ROOT = Path(__file__).parents[2]


MODEL = """
from torch import nn

def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""

CONFIG = """
name: test
device: cpu
model: {source: factory, factory: "model.py:small"}
data:
  path: digits
  size: 8
  channels: 1
  fit: {from: all, count: 200}
  tune: {from: all, count: 60}
  select: {from: all, count: 60}
  report: {from: all, count: 60}
zoo:
  finetune:
    base: {lr: 0.01, epochs: 2, batch_size: 32}
    ingredients: 3
    recipe: {lr: {low: 1.0e-3, high: 1.0e-2, log: true}, epochs: 2, batch_size: 32}
learners: {uniform: {}}
"""


def settings(folder: Path, **finetune) -> dict:
    (folder / "model.py").write_text(MODEL)
    values = yaml.safe_load(CONFIG)
    values["data"]["cache"] = str(folder / "cache")
    values["zoo"]["path"] = str(folder / "zoo")
    values["zoo"]["finetune"] |= finetune
    return values


def write(folder: Path, values: dict) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def finetune(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def test_makes_the_zoo_and_shows_its_table(tmp_path: Path):
    config = write(tmp_path, settings(tmp_path))
    result = finetune(config, "zoo.finetune.ingredients=2")
    assert result.exit_code == 0, result.output
    assert "tune_accuracy" in result.stdout
    assert f"2 ingredients in {tmp_path / 'zoo'}" in result.stdout
    assert (tmp_path / "zoo/01.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zoo.finetune.recipe.lrr=1", "did you mean `lr`"),
        ("zoo.finetune.recipe.lr=-1", "greater than 0"),
        ("zoo.finetune.base.batch_size=1000", "the fit split has 200 images"),
        ("zoo.finetune.recipe.batch_size=1000", "00 (number 1): the fit split has 200 images"),
        ("zoo.finetune.recipe.frozen=[nothing]", "frozen: 'nothing' matches no parameter"),
        ("zoo.finetune.recipe.frozen=['*']", "every parameter is frozen"),
        ("zoo.finetune.halving={factor: 1}", "zoo.finetune.halving.factor"),
        ("zoo.finetune.save_every=0", "zoo.finetune.save_every"),
        ("zoo.finetune.base.ema_decay=1", "zoo.finetune.base.ema_decay"),
        ("memory_budget=1KiB", "memory_budget"),
        ("zoo.finetune=null", "zoo.finetune is not set"),
        ("device=gpu0", "'gpu0' cannot be used here"),
        ("model.factory=nowhere.py:small", "nowhere.py"),
        ("data.fit.count=100000", "overlapping"),
    ],
)
def test_a_mistake_is_one_paragraph_and_changes_nothing(
    tmp_path: Path, override: str, message: str
):
    result = finetune(write(tmp_path, settings(tmp_path)), override)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list((tmp_path / "zoo").glob("*.safetensors"))
    # What is mended then is no other zoo.
    assert finetune(write(tmp_path, settings(tmp_path, base={"epochs": 1}))).exit_code == 0


def test_a_diverging_recipe_keeps_what_was_finished(tmp_path: Path):
    values = settings(tmp_path, search="grid")
    del values["zoo"]["finetune"]["ingredients"]
    recipe = {"optimizer": "sgd", "lr": [0.01, 1e30], "batch_size": 32, "epochs": 1}
    values["zoo"]["finetune"]["recipe"] = recipe
    result = finetune(write(tmp_path, values))
    assert result.exit_code == 0, result.output
    assert "\n01 left out: the loss is not finite at step" in result.stdout
    assert f"1 ingredient in {tmp_path / 'zoo'}" in result.stdout
    assert {f.name for f in (tmp_path / "zoo").glob("*.safetensors")} == {
        "base.safetensors",
        "00.safetensors",
    }


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere"
)
def test_an_unwritable_folder(tmp_path: Path):
    values = settings(tmp_path)
    (tmp_path / "zoo").mkdir(mode=0o500)
    result = finetune(write(tmp_path, values))
    assert result.exit_code == 2
    assert "Permission denied" in result.stderr


def test_a_file_in_the_place_of_the_zoo(tmp_path: Path):
    values = settings(tmp_path)
    (tmp_path / "zoo").write_text("a file")
    result = finetune(write(tmp_path, values))
    assert result.exit_code == 2
    assert "is a file; give the zoo a folder" in result.stderr
    assert (tmp_path / "zoo").read_text() == "a file"


def test_ctrl_c_saves_what_is_under_way(tmp_path: Path):
    values = settings(tmp_path, save_every=0.01)
    values["zoo"]["finetune"]["recipe"]["epochs"] = 4_000
    record, snapshot = tmp_path / "zoo/zoo.json", tmp_path / "zoo/training.safetensors"
    saved: list[int] = []

    def interrupt() -> None:
        until = time.monotonic() + 60
        while not (record.exists() and "under_way" in record.read_text() and snapshot.exists()):
            assert time.monotonic() < until
            time.sleep(0.01)
        saved.append(snapshot.stat().st_mtime_ns)
        _thread.interrupt_main()

    config = write(tmp_path, values)
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = finetune(config)
    thread.join()
    assert result.exit_code == 130, result.output
    assert "Interrupted; what was finished is kept" in result.stderr
    assert "Traceback" not in result.output
    assert snapshot.stat().st_mtime_ns > saved[0]
    found = {file.name for file in (tmp_path / "zoo").iterdir()}
    assert found == {
        *("base.safetensors", "training.safetensors"),
        *("zoo.csv", "zoo.json", "curves.parquet", "curves.png", "curves.svg"),
    }
    before = read_curves(tmp_path / "zoo/curves.parquet")
    assert set(before["name"]) == {"base", "00", "01", "02"}
    # Without `finetune` the folder is a zoo like any other, and the snapshot none of it.
    config = load_config(config, ["zoo.finetune=null"], LearnConfig)
    assert find_ingredients(config.zoo) == ([], str(tmp_path / "zoo/base.safetensors"))


def test_a_terminal_shows_a_table_and_others_lines(tmp_path: Path):
    config = write(tmp_path, settings(tmp_path, ingredients=2))
    command = [sys.executable, "-m", "soups.finetune", config]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    plain = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert "00 done: epoch 2, step 12" in plain.stderr
    assert "train at once" in plain.stderr
    assert "\x1b[" not in plain.stderr + plain.stdout
    ours, theirs = pty.openpty()
    env |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [*command, "--fresh"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed: so Linux tells it
            pass
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    for part in ("model", "tune %", "waiting", "24/24 steps"):
        assert part in text


@pytest.mark.parametrize("wrong", [["--help"], ["config.yaml", "zoo.pth=x"]])
def test_help_and_config_errors_come_at_once(tmp_path: Path, wrong: list[str]):
    write(tmp_path, settings(tmp_path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "soups.finetune", *wrong],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == (0 if wrong == ["--help"] else 2)
    assert ("Usage" if wrong == ["--help"] else "zoo.pth") in result.stdout + result.stderr
    # Processor time: other work on the machine does not make this fail.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
