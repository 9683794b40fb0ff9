"""docs/extending.md: its blocks of code, put into a copy of the source, make what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.soups.conftest import make_config

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "extending.md"
PACKAGES = ("inputs", "kernels", "merge", "fleet", "soups")
# `[^\n]`: with re.S a dot is any character, and the place would reach to the page's last backtick.
BLOCK = re.compile(
    r"^```python\n# ([\w/.]+)(?:, (above|below) `([^\n]+)`)?\n(.*?)^```$", re.M | re.S
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source with everything that the page adds."""
    copy = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    text = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    for name, side, line, code in blocks:
        put(copy / name, side, line, code)
    return copy


def put(file: Path, side: str, line: str, code: str) -> None:
    """Write a new file, or the code beside the one line of a file that is there."""
    if not side:
        assert not file.exists(), f"{file.name} is there already"
        file.write_text(code)
        return
    lines = file.read_text().splitlines(keepends=True)
    places = [k for k, own in enumerate(lines) if own.rstrip("\n") == line]
    assert len(places) == 1, f"{file}: {line!r} stands there {len(places)} times"
    lines.insert(places[0] + (side == "below"), code)
    file.write_text("".join(lines))


def run(source: Path, *words: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_learner(source, kitchen, tmp_path):
    shutil.copy(kitchen / "net.py", tmp_path / "net.py")
    config = make_config(kitchen).model_dump(mode="json", by_alias=True)
    del config["zoo"]["finetune"]
    config |= {"output": str(tmp_path / "results"), "pictures": False, "out_of_fold": 2}
    config["learners"] = {"weighted": {"temperature": 0.02}, "best_single": {}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert "weighted" in run(source, "-m", "soups.learn", tmp_path / "config.yaml", "--quiet")
    folder = tmp_path / "results" / "small"
    soup = json.loads((folder / "coefficients" / "weighted.json").read_text())
    accuracies = json.loads((folder / "run.json").read_text())["ingredients"]["select_accuracy"]
    expected = np.exp(np.array([*accuracies.values()]) / 0.02)
    matrix = np.array(soup["matrix"])[:, 0]
    np.testing.assert_allclose(matrix, expected / expected.sum(), rtol=1e-9)


# Merges lists of files, each into one, and prints what the doctor has to say of a folder: in one
# process, since importing torch takes longer than all of it.
ON_THE_FORMAT = """
import json, pathlib, sys
import merge
from soups.doctor.diagnosis import examine

folder, merges = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for out, files in merges.items():
    merge.merge({"merge_method": "median", "models": [{"model": file} for file in files]}, out)
print(json.dumps(examine(folder).record()))
"""


def test_the_merge_method_on_the_format(source, kitchen, tmp_path):
    names = ["00", "01", "02", "base"]
    states = [load_file(kitchen / "zoo" / f"{name}.safetensors") for name in names]
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    files = [str(zoo / f"{name}.npz") for name in names]
    for file, state in zip(files, states, strict=True):
        np.savez(file, **{n: t.numpy() for n, t in state.items()})
    np.savez_compressed(zoo / "small.npz", **{n: t.numpy() for n, t in states[0].items()})
    (zoo / "cut.npz").write_bytes(Path(files[0]).read_bytes()[:-100])
    merges = {str(tmp_path / f"{count}.safetensors"): files[:count] for count in (3, 4)}

    found = json.loads(run(source, "-c", ON_THE_FORMAT, zoo, json.dumps(merges)))
    assert [patient["name"] for patient in found["patients"]] == names
    wrong = {f["members"][0]: f["text"] for f in found["findings"] if f["kind"] == "unreadable"}
    assert wrong.keys() == {"small", "cut"}
    assert "not savez_compressed" in wrong["small"]
    assert "write it again" in wrong["cut"]

    for out, own in merges.items():
        merged = load_file(out)
        assert merged.keys() == states[0].keys()
        for name, tensor in merged.items():
            if tensor.is_floating_point():
                stacked = torch.stack([state[name] for state in states[: len(own)]]).double()
                torch.testing.assert_close(tensor.double(), stacked.quantile(0.5, dim=0))


@pytest.mark.slow
def test_the_shared_laws_find_what_was_added(source):
    """As the page says: the laws of learners and of methods run on the new ones by themselves."""
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    laws = {
        "weighted": "tests/soups/learners/test_learners.py",
        "median": "tests/merge/methods/test_laws.py",
    }
    # Without the types' checks at run time, which take longer than the laws.
    options = ("-q", "-rp", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
    words = ("-m", "pytest", *options, "-k", " or ".join(laws))
    passed = run(source, *words, *laws.values())
    for added, file in laws.items():
        assert len(re.findall(rf"^PASSED {file}::.*\b{added}\b", passed, re.M)) >= 8, added
