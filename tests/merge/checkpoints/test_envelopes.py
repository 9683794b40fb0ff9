"""Envelopes, averaged weights and prefixes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import Checkpoint, open_checkpoint
from merge.checkpoints.envelopes import strip_prefixes
from merge.errors import MergeError

STATE = {"a.weight": torch.ones(2), "b": torch.zeros(3)}


def opened(tmp_path: Path, content: Any, *, ema: bool = False) -> Checkpoint:
    torch.save(content, tmp_path / "a.pt")
    return open_checkpoint(tmp_path / "a.pt", ema=ema)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE},
        {"model": STATE},
        {"model_state_dict": STATE},
        {"state_dict": {"model": STATE}},
        {"model": {"state_dict": STATE}},
        {"model": {"depth": 12}, "state_dict": STATE},
        {"state_dict": STATE, "model": {"other": torch.ones(1)}},
        {"epoch": 3, "model": STATE, "loss": torch.ones(())},
        {"model": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}},
        {f"module.model.{name}": tensor for name, tensor in STATE.items()},
    ],
)
def test_the_state_dict_is_found(tmp_path: Path, content: Any) -> None:
    with opened(tmp_path, content) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight", "b"]
        assert checkpoint.read("a.weight").tolist() == [1, 1]
        assert bool(checkpoint.notes) is (content is not STATE)


def test_what_was_done_is_noted(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in STATE.items()} | {"module.extra": 3}
    content = {"state_dict": state, "epoch": 3, "args": None, "ema": STATE}
    with opened(tmp_path, content) as checkpoint:
        assert checkpoint.notes == (
            "averaged weights are there too (1: 'ema'), not taken",
            "weights taken from 'state_dict'",
            "ignored beside it: 2: 'epoch', 'args'",
            "ignored, no weights with a name: 1: 'module.extra'",
            "stripped the prefix 'module.' of every name",
        )


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
@pytest.mark.parametrize("nested", [False, True])
def test_averaged_weights_are_chosen(tmp_path: Path, key: str, nested: bool) -> None:
    average = {name: tensor + 5 for name, tensor in STATE.items()}
    content: dict[str, Any] = {"state_dict": STATE, key: average}
    content = {"model": content} if nested else content
    with opened(tmp_path, content, ema=True) as checkpoint:
        assert checkpoint.read("b").tolist() == [5] * 3
        assert f"weights taken from '{key}'" in checkpoint.notes
    with opened(tmp_path, content) as checkpoint:
        assert checkpoint.read("b").tolist() == [0] * 3


def test_the_counter_of_averaged_models_is_no_weight(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    content = {"model": model.state_dict(), "model_ema": average.state_dict()}
    with opened(tmp_path, content, ema=True) as checkpoint:
        assert list(checkpoint.tensors) == ["bias", "weight"]
        assert "ignored, no weights with a name: 1: 'n_averaged'" in checkpoint.notes


def test_missing_averages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MergeError, match=r"no averaged weights .* it holds 2: 'state_dict', 'epoch'"
    ):
        opened(tmp_path, {"state_dict": STATE, "epoch": 3}, ema=True)
    save_file(STATE, tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match="set ema to false"):
        open_checkpoint(tmp_path / "a.safetensors", ema=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "an empty dict"),
        ({"epoch": 3, "args": "x"}, "2: 'epoch', 'args'"),
        ({"state_dict_ema": STATE}, r"1: 'state_dict_ema'.*with ema"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "one bare tensor"),
        ("text", "no dict"),
        ({0: torch.ones(1)}, "1: …"),
    ],
)
def test_files_without_weights_say_what_they_hold(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(MergeError, match=f"no weights found: it holds {says}"):
        opened(tmp_path, content)


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(MergeError, match="no weights found"):
        opened(tmp_path, content)


def test_prefixes_go_only_where_all_names_have_them(tmp_path: Path) -> None:
    save_file({"model.a": torch.ones(1), "head": torch.ones(1)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["head", "model.a"]
        assert checkpoint.notes == ()
    save_file({"model.module.a": torch.ones(1)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
        assert checkpoint.notes == ("stripped the prefix 'model.module.' of every name",)
    assert strip_prefixes({"model.": 1}) == ({"model.": 1}, [])


def test_prefixes_go_only_as_far_as_the_model_knows_the_names(tmp_path: Path) -> None:
    wrapped = {"module.model.a": torch.ones(1), "module.model.b": torch.ones(1)}
    save_file(wrapped, tmp_path / "a.safetensors")
    for known, left, stripped in (
        (["module.model.a", "module.model.b"], ["module.model.a", "module.model.b"], None),
        (["model.a", "model.b", "model.c"], ["model.a", "model.b"], "module."),
        (["a"], ["a", "b"], "module.model."),
        (["something.else"], ["a", "b"], "module.model."),
    ):
        with open_checkpoint(tmp_path / "a.safetensors", names=known) as checkpoint:
            assert list(checkpoint.tensors) == left
            notes = () if stripped is None else (f"stripped the prefix '{stripped}' of every name",)
            assert checkpoint.notes == notes
