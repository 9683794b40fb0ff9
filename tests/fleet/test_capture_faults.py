"""What recording has to refuse, and what a kind of call is."""

import logging

import numpy as np
import pytest
import torch

from fleet.capture.trace import CaptureError
from fleet.errors import FleetError
from fleet.group import Group
from tests.fleet.test_group_state import group_of, loop, near, numbers

VIEWED = [
    lambda self, x: (h := self.lin(x).relu() + 1.5) * h,
    lambda self, x: (h := self.lin(x).relu() + 1.5) + h,
    lambda self, x: self.lin(x.view(2, 3, 4)).view(2, -1),
]
ON_DATA = [
    lambda self, x: self.lin(x) * (1.0 if torch.equal(x, x.abs()) else 2.0),
    lambda self, x: self.lin(x) * x.sum().tolist(),
    lambda self, x: self.lin(torch.from_numpy(np.tanh(x.numpy()))),
    lambda self, x: self.lin(x) * x[x > 0].shape[0],
    lambda self, x: self.lin(x) * len(x.nonzero()),
]


@pytest.mark.parametrize("forward", VIEWED)
def test_models_that_are_replayed(forward, caplog):
    models, group = group_of(forward)
    with torch.no_grad():
        for seed in range(4):
            x = numbers(6, 4, seed=seed)
            near(group(x), loop(models, x))
    assert not caplog.records
    (captured,) = group._captured.values()
    assert captured._replay is not None


def test_writing_into_a_view_that_had_to_be_copied():
    def forward(self, x):
        h = self.lin(x.view(2, 3, 4))
        h.view(2, -1).mul_(2)
        return h

    models, group = group_of(forward)
    with torch.no_grad():
        for seed in range(4):
            x = numbers(6, 4, seed=seed)
            near(group(x), loop(models, x))


@pytest.mark.parametrize("forward", ON_DATA)
def test_numbers_from_data_are_not_recorded(forward, caplog):
    models, group = group_of(forward)
    with torch.no_grad():
        for seed in range(5):
            x = numbers(6, 4, seed=seed)
            x = x.abs() if seed % 2 else x
            near(group(x), loop(models, x))
    assert ["not captured" in record.message for record in caplog.records] == [True]


def test_recording_writes_nothing():
    def forward(self, x):
        x.add_(1)
        return self.lin(x)

    models, group = group_of(forward)
    x = numbers(2, 4)
    with torch.no_grad():
        for count in range(1, 5):
            near(group(x), loop(models, numbers(2, 4) + count - 1))
    near(x, numbers(2, 4) + 4)


def test_a_first_replay_that_fails_leaves_the_model_running(monkeypatch, caplog):
    def fails(self, arguments):
        raise ValueError("no such thing")

    models, group = group_of(lambda self, x: self.lin(x))
    monkeypatch.setattr("fleet.capture.replay.Replay.__call__", fails)
    x = numbers(2, 4)
    with torch.no_grad():
        for _ in range(4):
            near(group(x), loop(models, x))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "not captured: replaying failed: no such thing" in caplog.records[0].message


def test_a_later_replay_that_cannot_be_recorded_again(monkeypatch, caplog):
    def fails(self, arguments):
        raise CaptureError("no CUDA graph")

    models, group = group_of(lambda self, x: self.lin(x))
    x = numbers(2, 4)
    with torch.no_grad():
        for _ in range(3):
            group(x)
        monkeypatch.setattr("fleet.capture.replay.Replay.__call__", fails)
        for _ in range(2):
            near(group(x), loop(models, x))
    assert "not captured any more: no CUDA graph" in caplog.records[0].message
    assert len(caplog.records) == 1


def test_weights_that_do_not_fit_are_prepared_anew_later(monkeypatch):
    models, group = group_of(lambda self, x: x @ self.lin.weight.exp().T)
    x = numbers(2, 4)
    with torch.no_grad():
        for _ in range(3):
            group(x)
        (captured,) = group._captured.values()
        captured.release()
        with monkeypatch.context() as patch:
            patch.setattr("fleet.capture.replay._new_bytes", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                group(x)
        assert captured._replay._held is None  # pyright: ignore
        near(group(x), loop(models, x))


def test_kinds_of_call():
    models, group = group_of(lambda self, x, setting: self.lin(x) * kinds[repr(setting)])
    kinds = {"True": 1, "1": 2, "1.0": 3, "0.0": 4, "-0.0": 5}
    x = numbers(2, 4)
    with torch.no_grad():
        for setting in (True, 1, 1.0, 0.0, -0.0) * 3:
            wanted = torch.stack([model.lin(x) * kinds[repr(setting)] for model in models])
            near(group(x, setting), wanted)


class Box:
    def __init__(self, value):
        self.value = value


def test_objects_that_are_not_known():
    models, group = group_of(lambda self, x, box: self.lin(x) * box.value)
    box, x = Box(1.0), numbers(3, 2, 4)
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0, 4.0):
            box.value = value
            near(group(x[0], box), torch.stack([model.lin(x[0]) * value for model in models]))
        with pytest.raises(FleetError, match=r"each=True: an input is a Box"):
            group(x, box, each=True)


def test_outputs_that_are_not_alike():
    x = numbers(2, 4)
    with torch.no_grad():
        _, group = group_of(lambda self, x: (self.lin(x), self.lin(x).sum().item()))
        with pytest.raises(FleetError, match=r"for model 0 and .* for model 1; return it as a"):
            group(x)
        models, _ = group_of(lambda self, x: self.lin(x)[: int(self.n)], n=torch.ones(()))
        state = {"n": torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)}
        with pytest.raises(FleetError, match=r"\[1, 6\] of model 0 and .* \[2, 6\] of model 1"):
            Group(models[0], state)(x)


def test_a_users_error_that_speaks_of_randomness():
    def forward(self, x):
        raise ValueError("randomness is not for me")

    _, group = group_of(forward)
    with pytest.raises(ValueError, match="not for me") as caught:
        group(numbers(2, 4))
    assert not isinstance(caught.value, FleetError)


def test_a_tensor_made_in_forward_may_be_written():
    def forward(self, x):
        scale = torch.tensor([1.0, 2.0], dtype=x.dtype)
        scale[0] += 1
        return self.lin(x) * scale[:, None]

    models, group = group_of(forward)
    with torch.no_grad():
        for seed in range(4):
            x = numbers(2, 4, seed=seed)
            near(group(x), loop(models, x))
