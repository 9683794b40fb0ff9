"""One zoo of many formats, with a user's own model: the same soups as from safetensors alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import MergeError
from soups.pipeline import run
from tests.soups.conftest import make_config, open_session

LEARNERS = {
    "uniform": {},
    "greedy": {},
    "learned": {"epochs": 1, "batch_size": 64},
    "mehl_layerwise": {"inner_epochs": 1, "batch_size": 64, "block_size": 2},
}


def mix_formats(plain: Path, mixed: Path) -> None:
    """The zoo in `plain`, its ingredients in formats that differ."""
    mixed.mkdir()
    tensors = {f.stem: load_file(f) for f in plain.glob("*.safetensors")}
    wrapped = {f"module.{name}": tensor for name, tensor in tensors["00"].items()}
    torch.save({"state_dict": wrapped, "epoch": 3, "optimizer": {"lr": 0.1}}, mixed / "00.pt")
    save_file(tensors["01"], mixed / "01.safetensors")
    save_shards(tensors["02"], mixed / "02")
    compiled = {f"_orig_mod.module.{name}": tensor for name, tensor in tensors["03"].items()}
    torch.save({"model": compiled}, mixed / "03.pth")
    (mixed / "04").mkdir()
    torch.save(tensors["04"], mixed / "04" / "pytorch_model.bin")
    torch.save(tensors["base"], mixed / "base.pt")


def save_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def learn(kitchen: Path, zoo: dict, output: Path, **changes) -> Path:
    run(
        make_config(kitchen, output=output, zoo=zoo, learners=LEARNERS, **changes),
        root=kitchen,
        fresh=False,
        progress=False,
        say=lambda text: None,
    )
    return output / "small"


@pytest.mark.parametrize("rule", ["uniform", "convex"])
def test_a_zoo_of_many_formats_is_one_zoo(kitchen: Path, tmp_path: Path, rule: str):
    mix_formats(kitchen / "zoo", tmp_path / "zoo")
    plain = learn(kitchen, {"path": kitchen / "zoo"}, tmp_path / "plain", norm_buffers=rule)
    mixed = learn(kitchen, {"path": tmp_path / "zoo"}, tmp_path / "mixed", norm_buffers=rule)
    for row in LEARNERS:
        for file in (f"coefficients/{row}.json", f"soups/{row}.safetensors"):
            assert (mixed / file).read_bytes() == (plain / file).read_bytes(), file
    record = json.loads((mixed / "run.json").read_text())
    notes = {name: " ".join(of["notes"]) for name, of in record["checkpoints"].items()}
    assert list(notes) == ["00", "01", "02", "03", "04"]
    assert "weights taken from 'state_dict'" in notes["00"]
    assert "stripped the prefix 'module.' of every name" in notes["00"]
    assert "'epoch'" in notes["00"]
    assert "weights taken from 'model'" in notes["03"]
    assert "stripped the prefix '_orig_mod.module.'" in notes["03"]
    assert notes["01"] == notes["02"] == ""
    assert any("00.pt: stripped the prefix 'module.'" in note for note in record["notes"])
    hashes = [
        [c["sha256"] for c in json.loads((r / "run.json").read_text())["checkpoints"].values()]
        for r in (plain, mixed)
    ]
    assert hashes[0] == hashes[1]


WRAPPED = """
from torch import nn


class Wrapper(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, num_classes),
        )

    def forward(self, images):
        return self.model(images)
"""


def test_a_model_whose_names_all_begin_with_model(kitchen: Path, tmp_path: Path):
    """`model.` is a usual prefix to strip, but here it is the model's own."""
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    model = {"source": "factory", "factory": f"{tmp_path / 'wrapped.py'}:Wrapper"}
    finetune = make_config(kitchen).zoo.finetune
    assert finetune is not None
    zoo = {"path": tmp_path / "zoo", "finetune": finetune.model_copy(update={"ingredients": 3})}
    plain = learn(kitchen, zoo, tmp_path / "plain", model=model)
    assert "model.0.weight" in load_file(plain / "soups" / "uniform.safetensors")
    wrapped = load_file(tmp_path / "zoo" / "01.safetensors")
    mixed = tmp_path / "mixed_zoo"
    mixed.mkdir()
    for name in ("00", "02", "base"):
        shutil.copy(tmp_path / "zoo" / f"{name}.safetensors", mixed)
    torch.save({"state_dict": {f"module.{n}": t for n, t in wrapped.items()}}, mixed / "01.pt")
    other = learn(kitchen, {"path": mixed}, tmp_path / "other", model=model)
    for row in LEARNERS:
        file = f"coefficients/{row}.json"
        assert (other / file).read_bytes() == (plain / file).read_bytes()


def test_heads_that_differ_are_skipped_and_taken_from_the_first(kitchen: Path, tmp_path: Path):
    """What preflight recommends for another number of classes works to the end."""
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for k in range(3):
        shutil.copy(kitchen / "zoo" / f"{k:02d}.safetensors", zoo)
    other = load_file(zoo / "01.safetensors")
    other |= {"9.weight": other["9.weight"][:7].clone(), "9.bias": other["9.bias"][:7].clone()}
    save_file(other, zoo / "01.safetensors")
    with pytest.raises(MergeError, match="skip: \\['9\\.\\*'\\]"):
        open_session(kitchen, tmp_path / "a", zoo={"path": zoo})
    settings = {"path": zoo, "skip": ["9.*"]}
    references = {"lrs": [1e-3]}
    results = learn(kitchen, settings, tmp_path / "b", references=references)
    first = load_file(zoo / "00.safetensors")
    for row in LEARNERS:
        soup = load_file(results / "soups" / f"{row}.safetensors")
        assert soup["9.weight"].equal(first["9.weight"])
    record = json.loads((results / "run.json").read_text())
    assert record["tensors"]["9.weight"] == "skip: '9.*'"
