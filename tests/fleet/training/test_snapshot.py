"""What a snapshot holds, and that a trainer that is killed goes on from it to the same bytes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.train import JointTrainer
from fleet.training.halving import Halving
from fleet.training.snapshot import load, save
from tests.fleet.training.plain_loop import (
    ConvNet,
    Kept,
    Mlp,
    Watching,
    joint,
    same,
    some_data,
)

DATA = some_data(fit=50, tune=20)


def dropping() -> nn.Module:
    return Mlp(dropout=0.3)


def dropping_conv() -> nn.Module:
    return ConvNet(dropout=0.3)


SHORT = {"batch_size": 20, "epochs": 2, "lr": 0.02}
MAKES = [dropping, dropping, dropping_conv, dropping, dropping, dropping_conv]
RECIPES = [
    Recipe(**SHORT, seed=0, ema_decay=0.6, mixup=0.3),
    Recipe(**SHORT, seed=1, optimizer="sgd", head_epochs=1, swa_start=0.4),
    Recipe(**SHORT, seed=2, keep="best", patience=1, noise=0.2),
    Recipe(**{**SHORT, "batch_size": 16}, seed=3, drop_last=False, flip=True, shift=1),
    Recipe(**SHORT, seed=4, optimizer="sgd", sam_rho=0.1, clip_norm=0.5),
    Recipe(**{**SHORT, "lr": 1e30}, seed=5, optimizer="sgd"),
]


class Killed(BaseException):
    """As sudden as SIGKILL: nothing is saved after it."""


def known(results: list) -> list[tuple]:
    """Results without the time that they took."""
    return [(r.index, r.epochs, str(r.tune_accuracy), str(r.tune_loss), r.state, r.reason)
            for r in results]  # fmt: skip


def timeless(curves: list) -> list[tuple]:
    return [(p.name, p.phase, p.epoch, p.step, str(p.loss), p.lr, str(p.grad_norm),
             p.tune_accuracy, str(p.tune_loss), p.state) for p in curves]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted():
    kept = Kept()
    trainer = JointTrainer(MAKES, RECIPES, DATA, kept)
    results = trainer.run()
    assert [result.state for result in results] == ["done"] * 5 + ["failed"]
    return kept.last, known(results), timeless(trainer.curves)


def until_done(path: Path, moments: list[int], **settings):
    """Killed when so many more steps were made, again and again, then left alone."""
    kept = Kept()
    for moment in [*moments, None]:

        def kill(steps: int, moment: int | None = moment) -> None:
            if moment is not None and steps >= moment:
                raise Killed

        trainer = JointTrainer(
            MAKES, RECIPES, DATA, kept, snapshot=path, watch=Watching(kill), **settings
        )
        try:
            results = trainer.run()
        except Killed:
            continue
        return kept.last, known(results), timeless(trainer.curves)
    raise AssertionError("not done")


@pytest.mark.parametrize("moment", [1, 9, 18])
def test_killed_once(uninterrupted, tmp_path: Path, moment: int):
    path = tmp_path / "training.safetensors"
    weights, results, curves = until_done(path, [moment], snapshot_steps=1)
    assert all(same(weights[index], uninterrupted[0][index]) for index in uninterrupted[0])
    assert results == uninterrupted[1]
    assert sorted(curves, key=str) == sorted(uninterrupted[2], key=str)
    assert not path.exists()


def test_killed_again_and_again(uninterrupted, tmp_path: Path):
    weights, results, curves = until_done(
        tmp_path / "training.safetensors", [7, 7, 2, 9, 7], snapshot_steps=1
    )
    assert all(same(weights[index], uninterrupted[0][index]) for index in uninterrupted[0])
    assert results == uninterrupted[1]
    assert sorted(curves, key=str) == sorted(uninterrupted[2], key=str)


@pytest.mark.parametrize("steps", [3, 100])
def test_steps_since_the_snapshot_are_made_again(uninterrupted, tmp_path: Path, steps: int):
    weights, results, _ = until_done(tmp_path / "training.safetensors", [16], snapshot_steps=steps)
    assert all(same(weights[index], uninterrupted[0][index]) for index in uninterrupted[0])
    assert results == uninterrupted[1]


@pytest.mark.parametrize("settings", [{"at_once": 2}, {"at_once": 1}], ids=["two", "one"])
def test_with_models_that_wait(tmp_path: Path, settings: dict):
    kept = Kept()
    expected = known(JointTrainer(MAKES, RECIPES, DATA, kept, **settings).run())
    weights, results, _ = until_done(
        tmp_path / "training.safetensors", [9, 3], snapshot_steps=1, **settings
    )
    assert all(same(weights[index], kept.last[index]) for index in kept.last)
    assert results == expected


def test_halving_goes_on_with_the_scores_of_before(tmp_path: Path):
    recipes = [Recipe(**{**SHORT, "epochs": 3}, seed=s) for s in range(5)]
    halving = Halving(factor=2, at_once=2)
    expected_weights, expected = joint(dropping, recipes, DATA, halving=halving)
    assert {"done", "stopped"} == {result.state for result in expected}
    path, kept = tmp_path / "training.safetensors", Kept()

    def run(moment: int | None) -> list:
        def kill(steps: int) -> None:
            if moment is not None and steps >= moment:
                raise Killed

        return JointTrainer(
            [dropping] * 5, recipes, DATA, kept, halving=halving, snapshot=path,
            snapshot_steps=1, watch=Watching(kill),
        ).run()  # fmt: skip

    for moment in (7, 9):
        with pytest.raises(Killed):
            run(moment)
    assert known(run(None)) == known(expected)
    assert all(same(kept.last[index], expected_weights[index]) for index in expected_weights)


def conv() -> nn.Module:
    """Computed alone at batches of 128, with others at batches of 4."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def test_who_was_first_does_not_matter_after_a_restart(tmp_path: Path):
    """The first model of a kind is done before the rest, which have larger batches."""
    data = some_data(fit=128, tune=20, side=8)
    recipes = [Recipe(lr=0.01, batch_size=4, epochs=1)]
    recipes += [Recipe(lr=0.01, batch_size=128, epochs=34, seed=s) for s in (1, 2)]
    expected, _ = joint(conv, recipes, data)
    path, kept = tmp_path / "training.safetensors", Kept()

    def kill(steps: int) -> None:
        if steps >= 3 * 33:
            raise Killed

    settings = {"snapshot": path, "snapshot_steps": 1}
    with pytest.raises(Killed):
        JointTrainer([conv] * 3, recipes, data, kept, watch=Watching(kill), **settings).run()
    assert load(path).record["results"].keys() == {"model 0"}
    JointTrainer([conv] * 3, recipes, data, kept, **settings).run()
    assert all(same(kept.last[index], expected[index]) for index in expected)


def test_what_a_watch_is_told_after_a_restart(tmp_path: Path):
    path, watching = tmp_path / "training.safetensors", Watching()

    def kill(steps: int) -> None:
        if steps >= 11:
            raise Killed

    first = Watching(kill)
    with pytest.raises(Killed):
        JointTrainer(MAKES, RECIPES, DATA, snapshot=path, snapshot_steps=1, watch=first).run()
    assert first.ended == 1
    assert first.done_before == 0
    trainer = JointTrainer(MAKES, RECIPES, DATA, snapshot=path, watch=watching)
    trainer.run()
    assert watching.names == [f"model {i}" for i in range(6)]
    assert watching.total == first.total
    assert 0 < watching.done_before <= first.steps
    assert watching.done_before + watching.steps == watching.total
    assert timeless(trainer.curves)[-len(watching.points) :] == timeless(watching.points)
    assert len(trainer.curves) > len(watching.points)


def interrupted_file(folder: Path, recipes=None, makes=None, names=None, after: int = 3) -> Path:
    path = folder / "training.safetensors"

    def kill(steps: int) -> None:
        if steps >= after:
            raise Killed

    with pytest.raises(Killed):
        JointTrainer(
            makes or [dropping] * 2, recipes or RECIPES[:2], DATA, snapshot=path,
            snapshot_steps=1, watch=Watching(kill), names=names,
        ).run()  # fmt: skip
    return path


def test_another_recipe_is_refused(tmp_path: Path):
    path = interrupted_file(tmp_path)
    before = path.read_bytes()
    recipes = [RECIPES[0], RECIPES[1].model_copy(update={"lr": 0.5, "seed": 7})]
    with pytest.raises(FleetError, match=r"training\.safetensors: model 1 .*lr, seed.*remove"):
        JointTrainer([dropping] * 2, recipes, DATA, snapshot=path).run()
    assert path.read_bytes() == before


def test_another_recipe_of_a_model_that_is_done_is_refused(tmp_path: Path):
    recipes = [Recipe(lr=0.01, batch_size=16, epochs=epochs) for epochs in (1, 8)]
    path = interrupted_file(tmp_path, recipes, after=3 * (len(DATA.fit) // 16))
    assert load(path).record["results"].keys() == {"model 0"}
    recipes[0] = recipes[0].model_copy(update={"weight_decay": 0.3})
    with pytest.raises(FleetError, match=r"training\.safetensors: model 0 .*weight_decay.*remove"):
        JointTrainer([dropping] * 2, recipes, DATA, snapshot=path).run()


def test_another_model_is_refused(tmp_path: Path):
    path = interrupted_file(tmp_path)
    for make in (lambda: Mlp(dropout=0.3, width=20), ConvNet):
        with pytest.raises(FleetError, match=r"training\.safetensors: model 0 .*remove"):
            JointTrainer([make] * 2, RECIPES[:2], DATA, snapshot=path).run()


def test_names_may_hold_any_character(tmp_path: Path):
    names = ["a:b", "a/b:c d"]
    expected, _ = joint(dropping, RECIPES[:2], DATA, names=names)
    path, kept = interrupted_file(tmp_path, names=names), Kept()
    JointTrainer([dropping] * 2, RECIPES[:2], DATA, kept, names=names, snapshot=path).run()
    assert all(same(kept.last[index], expected[index]) for index in expected)


def test_a_model_that_was_not_there_before_joins(tmp_path: Path):
    path, kept = interrupted_file(tmp_path), Kept()
    results = JointTrainer([dropping] * 3, RECIPES[:2] + RECIPES[3:4], DATA, kept, snapshot=path)
    assert [result.state for result in results.run()] == ["done"] * 3


def test_a_snapshot_is_what_was_saved(tmp_path: Path):
    path = tmp_path / "deep" / "file.safetensors"
    tensors = {
        "one": {"a/b.c": torch.randn(2, 3), "scalar": torch.tensor(3), "none": torch.zeros(0, 4)},
        "two": {"half": torch.randn(5).bfloat16(), "bits": torch.tensor([True, False])},
        "empty": {},
    }
    record = {"number": 0.1 + 0.2, "nothing": None, "nan": float("nan"), "text": "é:/"}
    save(path, record, tensors)
    found = load(path)
    assert found.record["number"] == record["number"]
    assert found.record["text"] == "é:/"
    assert found.record["nan"] != found.record["nan"]
    for model in ("one", "two"):
        assert found.tensors[model].keys() == tensors[model].keys()
        for name, tensor in tensors[model].items():
            assert found.tensors[model][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[model][name], tensor)


def test_strided_tensors_and_replacing(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    save(path, {}, {"m": {"w": torch.zeros(4)}})
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save(path, {}, {"m": {"w": weight, "t": weight[0, 0].T}})
    assert torch.equal(load(path).tensors["m"]["w"], weight)
    assert torch.equal(load(path).tensors["m"]["t"], weight[0, 0].T)
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_a_killed_save_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    save(path, {"round": 1}, {"m": {"w": torch.zeros(4)}})

    class Bad(dict):
        def items(self):
            yield "w", torch.ones(4)
            yield "v", None

    with pytest.raises(Exception):  # noqa: B017, PT011
        save(path, {"round": 2}, {"m": Bad()})
    assert load(path).record["round"] == 1


def test_files_that_are_no_snapshot(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FleetError, match=r"file\.safetensors: is a checkpoint, but no snapshot"):
        load(path)
    save_file({"record": torch.tensor(list(b"{not json"), dtype=torch.uint8)}, path)
    with pytest.raises(FleetError, match=r"file\.safetensors: its record is no JSON"):
        load(path)
    old = json.dumps({"version": 0}).encode()
    save_file({"record": torch.tensor(list(old), dtype=torch.uint8)}, path)
    with pytest.raises(FleetError, match=r"is of version 0, wanted 1; remove the file"):
        load(path)
    path.write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        load(path)


NURSERY = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from fleet.train import JointTrainer
    from tests.fleet.training import test_snapshot as tests

    root = Path(sys.argv[1])

    def child(folder):
        # Forked, since to start python anew would take longer than to train.
        pid = os.fork()
        if pid:
            return pid
        folder.mkdir(exist_ok=True)

        def keep(model, result, final):
            if final:
                written = folder / f"{result.index}.writing"
                save_file(model.state_dict(), written)
                written.rename(folder / f"{result.index}.safetensors")

        trainer = JointTrainer(
            tests.MAKES, tests.RECIPES, tests.DATA, keep,
            snapshot=folder / "training.safetensors", snapshot_steps=1,
        )
        try:
            trainer.run()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def trained(folder):
        assert os.waitstatus_to_exitcode(os.waitpid(child(folder), 0)[1]) == 0
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    began = time.monotonic()
    expected = trained(root / "whole")
    seconds = time.monotonic() - began
    assert list(expected) == [f"{index}.safetensors" for index in range(5)]
    draws, kills = random.Random(int(sys.argv[2])), 0
    while kills < 10:
        folder = root / f"{kills}"
        pid = child(folder)
        time.sleep(draws.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        kills += 1
        assert trained(folder) == expected, kills
    print("the same bytes", kills, "times")
"""


@pytest.mark.slow
def test_killed_by_the_system_at_random_moments(tmp_path: Path):
    script = tmp_path / "nursery.py"
    script.write_text(textwrap.dedent(NURSERY))
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"], cwd=root, capture_output=True,
        text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "the same bytes 10 times" in run.stdout
