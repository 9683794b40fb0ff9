import os
import signal
import threading
from pathlib import Path

import pytest

from fleet.recipes import Recipe
from fleet.train import JointTrainer
from fleet.training.interrupts import Interrupts
from tests.fleet.training.plain_loop import Kept, Mlp, Watching, joint, same, some_data

DATA = some_data(fit=40, tune=20)
RECIPES = [
    Recipe(lr=0.02, batch_size=20, epochs=4, seed=0, ema_decay=0.5),
    Recipe(lr=0.02, batch_size=20, epochs=2, seed=1, head_epochs=1),
    Recipe(lr=0.02, batch_size=8, epochs=2, seed=2, optimizer="sgd", keep="best"),
]
STEPS = 8 + 6 + 10


def make() -> Mlp:
    return Mlp(dropout=0.3)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.asked
        press()
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before


def test_gives_the_former_handler_back_when_something_fails():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_nested_ones_are_asked_from_within():
    with Interrupts() as outer:
        with Interrupts() as inner:
            press()
        assert (outer.asked, inner.asked) == (False, True)
        press()
        assert outer.asked


def test_elsewhere_than_in_the_main_thread_it_changes_nothing():
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interrupts() as interrupts:
            found.append((interrupts.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            press()
        assert not interrupts.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted():
    return joint(make, RECIPES, DATA)[0]


class Pressed:
    """Presses Ctrl-C once, after so many steps."""

    def __init__(self, moment: int) -> None:
        self.moment, self.pressed_at = moment, 0

    def __call__(self, steps: int) -> None:
        if steps >= self.moment and not self.pressed_at:
            self.pressed_at = steps
            press()


@pytest.mark.parametrize("moment", [1, 8, 19, STEPS])
def test_ctrl_c_saves_and_training_goes_on(uninterrupted, tmp_path: Path, moment: int):
    path, kept = tmp_path / "training.safetensors", Kept()
    pressed = Pressed(moment)
    first = Watching(pressed)
    with pytest.raises(KeyboardInterrupt):
        JointTrainer([make] * 3, RECIPES, DATA, kept, snapshot=path, watch=first).run()
    assert first.ended == 1
    assert first.steps - pressed.pressed_at < 6, "it goes on for long"
    assert path.exists()
    rest = Watching()
    results = JointTrainer([make] * 3, RECIPES, DATA, kept, snapshot=path, watch=rest).run()
    assert [result.state for result in results] == ["done"] * 3
    assert (rest.total, rest.done_before) == (STEPS, first.steps)
    assert rest.steps == STEPS - first.steps, "a step was lost or made twice"
    assert all(same(kept.last[index], uninterrupted[index]) for index in range(3))
    assert not path.exists()


def test_ctrl_c_again_and_again(uninterrupted, tmp_path: Path):
    path, kept, presses = tmp_path / "training.safetensors", Kept(), 0
    while True:
        trainer = JointTrainer(
            [make] * 3, RECIPES, DATA, kept, snapshot=path, watch=Watching(Pressed(1))
        )
        try:
            trainer.run()
        except KeyboardInterrupt:
            presses += 1
            if path.exists():
                continue
        break
    assert presses >= 8
    assert all(same(kept.last[index], uninterrupted[index]) for index in range(3))


def test_ctrl_c_while_models_are_built(uninterrupted, tmp_path: Path):
    path, kept, built = tmp_path / "training.safetensors", Kept(), []

    def pressing() -> Mlp:
        built.append(len(built))
        if len(built) == 2:
            press()
        return make()

    with pytest.raises(KeyboardInterrupt):
        JointTrainer([pressing] * 3, RECIPES, DATA, kept, snapshot=path).run()
    assert path.exists()
    JointTrainer([make] * 3, RECIPES, DATA, kept, snapshot=path).run()
    assert all(same(kept.last[index], uninterrupted[index]) for index in range(3))


def test_ctrl_c_without_a_snapshot_file():
    before = signal.getsignal(signal.SIGINT)
    watching = Watching(Pressed(3))
    with pytest.raises(KeyboardInterrupt):
        JointTrainer([make] * 3, RECIPES, DATA, watch=watching).run()
    assert watching.ended == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_keyboard_interrupt_from_elsewhere_leaves_the_last_snapshot(
    uninterrupted, tmp_path: Path
):
    path, kept = tmp_path / "training.safetensors", Kept()

    def stop(steps: int) -> None:
        if steps >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        JointTrainer(
            [make] * 3, RECIPES, DATA, kept, snapshot=path, snapshot_steps=2, watch=Watching(stop)
        ).run()
    JointTrainer([make] * 3, RECIPES, DATA, kept, snapshot=path).run()
    assert all(same(kept.last[index], uninterrupted[index]) for index in range(3))
