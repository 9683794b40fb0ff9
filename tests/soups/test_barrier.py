"""The look before the soup: it warns where a soup cannot work, and is silent where it can."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.barrier import Midpoint, probe_midpoints
from tests.soups.conftest import load_checkpoint, open_session


def other_basin(file: Path, out: Path) -> None:
    """The same function with its channels in another order, as after another initialisation."""
    tensors = load_file(file)
    order = torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 6, 4, 8])
    for name in (
        "0.weight",
        *(f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    ):
        tensors[name] = tensors[name][order].clone()
    tensors["3.weight"] = tensors["3.weight"][:, order].clone()
    for name in (
        "3.weight",
        *(f"4.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    ):
        tensors[name] = tensors[name][order].clone()
    head = tensors["9.weight"].reshape(10, 12, 4)
    tensors["9.weight"] = head[:, order].reshape(10, 48).clone()
    save_file(tensors, out)


def test_silent_where_all_come_from_one_base(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    midpoints = probe_midpoints(session)
    assert [m.name for m in midpoints] == ["00", "01", "02", "03", "04"]
    assert [m.warning for m in midpoints] == [None] * 5
    load_checkpoint(session, session.zoo.checkpoints[2])
    assert midpoints[2].ingredient == session.accuracy(session.probe(1024))


def test_warns_of_an_ingredient_from_another_basin(kitchen: Path, tmp_path: Path):
    zoo = kitchen / "zoo"
    other_basin(zoo / "03.safetensors", tmp_path / "other.safetensors")
    files = [str(zoo / f"{k:02d}.safetensors") for k in (0, 1, 2, 3, 4)]
    names = [*files, str(tmp_path / "other.safetensors")]
    session = open_session(kitchen, tmp_path, zoo={"path": zoo, "ingredients": names})
    midpoints = {m.name: m for m in probe_midpoints(session)}
    # By itself it is as good as the one that it was made from.
    assert midpoints["other"].ingredient == pytest.approx(midpoints["03"].ingredient, abs=0.01)
    warning = midpoints["other"].warning
    assert warning is not None
    assert warning.startswith("other: ")
    assert "there is a barrier" in warning
    drops = {name: m.ingredient - m.midpoint for name, m in midpoints.items()}
    assert max(drops, key=drops.__getitem__) == "other"


def test_a_small_drop_is_no_barrier():
    assert Midpoint("a", 0.9, 0.801).warning is None
    assert "a: 90.0% by itself, but 79.0% half-way" in (Midpoint("a", 0.9, 0.79).warning or "")
