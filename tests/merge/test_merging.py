"""Whole merges, from config to folder, on real files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inputs.models import build_model
from merge.checkpoints import open_checkpoint, scan
from merge.coefficients import Coefficients, Ingredient
from merge.cooking import cook
from merge.errors import MergeError
from merge.merging import merge
from merge.planning.config import parse_config
from merge.result.output import Output

ROOT = Path(__file__).parents[2]
DIGITS = {
    "path": "digits",
    "size": 8,
    "channels": 1,
    "mean": [0.3],
    "std": [0.38],
    **{split: {"from": "all", "fraction": 0.25} for split in ("fit", "tune", "select", "report")},
}


def save_zoo(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> dict[str, Any]:
    """A base and models beside it, and the config that merges them by task_arithmetic."""
    save_file(tensors, folder / "base.safetensors")
    for k in range(count):
        moved = {
            name: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t + k
            for name, t in tensors.items()
        }
        save_file(moved, folder / f"{k}.safetensors")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base.safetensors"),
        "models": [
            {"model": str(folder / f"{k}.safetensors"), "parameters": {"weight": 0.3}}
            for k in range(count)
        ],
    }


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tensors = {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "norm.running_mean": torch.randn(4),
        "norm.num_batches_tracked": torch.tensor(5),
        "head.weight": torch.randn(10, 4),
        "head.bias": torch.randn(10),
    }
    return save_zoo(tmp_path, tensors)


def test_the_folder_and_its_record(config: dict[str, Any], tmp_path: Path):
    record = merge(config, tmp_path / "out", progress=False)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "README.md",
        "merge.json",
        "model.safetensors",
    ]
    files = ["README.md", "model.safetensors", "merge.json"]
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == record | {"files": files}
    hashes = {entry["name"]: entry["sha256"] for entry in record["ingredients"]}
    for reference, sha256 in hashes.items():
        with open_checkpoint(reference) as checkpoint:
            assert scan(checkpoint).sha256 == sha256
    assert record["methods"] == {"task_arithmetic": 4}
    assert "norm.num_batches_tracked" in record["carried"]
    assert any("num_batches_tracked" in note for note in record["notes"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(sha256 in card for sha256 in hashes.values())
    assert merge(parse_config(config), tmp_path / "again", progress=False)["notes"]
    assert (tmp_path / "again" / "README.md").exists()


def test_hashes_are_known_until_a_file_changes(config: dict[str, Any], tmp_path: Path):
    first = merge(config, tmp_path / "a", progress=False)["ingredients"]
    assert merge(config, tmp_path / "b", progress=False)["ingredients"] == first
    moved = load_file(tmp_path / "0.safetensors")
    save_file({n: t + 1 for n, t in moved.items()}, tmp_path / "0.safetensors")
    second = merge(config, tmp_path / "c", progress=False)["ingredients"]
    changed = [a["name"] for a, b in zip(first, second, strict=True) if a != b]
    assert changed == [str(tmp_path / "0.safetensors")]


def test_integer_buffers_are_the_bases(config: dict[str, Any], tmp_path: Path):
    merge(config, tmp_path / "out.safetensors", progress=False)
    assert load_file(tmp_path / "out.safetensors")["norm.num_batches_tracked"] == 5


def test_parts_have_their_own_method_or_none(config: dict[str, Any], tmp_path: Path):
    config |= {
        "skip": ["norm.*"],
        "methods": [{"match": "head.*", "merge_method": "linear", "parameters": {"weight": 1.0}}],
    }
    merge(config, tmp_path / "out.safetensors", progress=False)
    found = load_file(tmp_path / "out.safetensors")
    base, *models = [load_file(tmp_path / f"{n}.safetensors") for n in ("base", 0, 1, 2)]
    assert torch.equal(found["norm.running_mean"], base["norm.running_mean"])
    mean = sum(m["head.bias"].double() for m in models) / 3
    torch.testing.assert_close(found["head.bias"].double(), mean, rtol=1e-6, atol=1e-6)
    deltas = sum(m["conv.weight"].double() - base["conv.weight"].double() for m in models)
    expected = base["conv.weight"].double() + 0.3 * deltas
    torch.testing.assert_close(found["conv.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_learned_soup_is_cooked(config: dict[str, Any], tmp_path: Path):
    paths = [entry["model"] for entry in config["models"]]
    checkpoints = [open_checkpoint(path) for path in paths]
    coefficients = Coefficients(
        ingredients=tuple(Ingredient(c.path, scan(c).sha256) for c in checkpoints),
        groups={"body": ("conv.weight",), "head": ("head.weight", "head.bias")},
        matrix=np.array([[0.2, 0.9], [0.5, 0.3], [0.3, -0.2]]),
        carried={"norm.running_mean": "norm", "norm.num_batches_tracked": "integer"},
    )
    coefficients.save(tmp_path / "soup.json")
    cook(coefficients, checkpoints, tmp_path / "cooked.safetensors", memory_budget=1 << 20)
    soup = {"coefficients": str(tmp_path / "soup.json"), "models": [{"model": p} for p in paths]}
    merge(soup, tmp_path / "out.safetensors", progress=False)
    cooked = load_file(tmp_path / "cooked.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, cooked[name]) for name, tensor in found.items())
    soup["models"].reverse()
    with pytest.raises(MergeError, match="belong to other weights"):
        merge(soup, tmp_path / "no.safetensors", progress=False)


def test_statistics_are_gathered_and_merged(tmp_path: Path):
    settings = {
        "model": {"source": "factory", "factory": f"{tmp_path}/net.py:build"},
        "data": DIGITS,
        "examples": 64,
        "labels": "true",
    }
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    entries = []
    for k in range(2):
        torch.manual_seed(k)
        parsed = parse_config(
            {"merge_method": "linear", "models": [{"model": "a"}]} | {"statistics": settings}
        )
        assert parsed.statistics is not None
        model = build_model(parsed.statistics.model, classes=10, channels=1, root=Path())
        save_file(model.state_dict(), tmp_path / f"{k}.safetensors")
        entries.append({"model": str(tmp_path / f"{k}.safetensors")})
    for method in ("fisher", "regmean"):
        config = {"merge_method": method, "models": entries, "statistics": settings}
        merge(config, tmp_path / method, progress=False)
        kind = "fisher" if method == "fisher" else "gram"
        files = sorted((tmp_path / f"{method}.statistics").glob(f"{kind}-*.safetensors"))
        assert len(files) == 2
        before = [file.stat().st_mtime_ns for file in files]
        merge(config, tmp_path / method, overwrite=True, progress=False)
        assert [file.stat().st_mtime_ns for file in files] == before, "gathered once"
        files[0].rename(tmp_path / "aside")
        files[1].rename(files[0])
        (tmp_path / "aside").rename(files[1])
        swapped = (tmp_path / method / "model.safetensors").read_bytes()
        merge(config, tmp_path / method, overwrite=True, progress=False)
        assert (tmp_path / method / "model.safetensors").read_bytes() == swapped, "made again"
        found = load_file(tmp_path / method / "model.safetensors")
        models = [load_file(entry["model"]) for entry in entries]
        if method == "fisher":
            weights = [load_file(file)["1.weight"].double() for file in files]
            total = sum(weights)
            mixed = sum(w * m["1.weight"].double() for w, m in zip(weights, models, strict=True))
            expected = torch.where(total > 0, mixed / total, sum(m["1.weight"] for m in models) / 2)
            torch.testing.assert_close(
                found["1.weight"].double(), expected.double(), rtol=1e-4, atol=1e-5
            )
        else:
            mean = (models[0]["1.bias"] + models[1]["1.bias"]) / 2
            torch.testing.assert_close(found["1.bias"], mean)
            assert not torch.allclose(
                found["3.weight"], (models[0]["3.weight"] + models[1]["3.weight"]) / 2
            )


def test_statistics_are_wanted_before_anything_is_read(config: dict[str, Any], tmp_path: Path):
    with pytest.raises(MergeError, match="statistics"):
        merge(config | {"merge_method": "fisher"}, tmp_path / "out", progress=False)


# --- interruptions ------------------------------------------------------------------------------


def big_zoo(folder: Path) -> Path:
    """Checkpoints whose merge takes some seconds, and the config file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"blocks.{k}.weight": torch.randn(500, 400, generator=generator) for k in range(24)}
    config = save_zoo(folder, tensors)
    config |= {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.1}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder / "config.yaml"


def command(config: Path, out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "merge", str(config), str(out), "--quiet"]
    return [*words, "--max-shard-size", "2MB", *options]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path):
    config = big_zoo(tmp_path)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    inputs = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    started = time.perf_counter()
    subprocess.run(command(config, tmp_path / "whole"), env=env, check=True)
    seconds = time.perf_counter() - started
    moments = random.Random(0)
    killed = 0
    while killed < 20:
        process = subprocess.Popen(command(config, tmp_path / "out", "--resume"), env=env)
        try:
            assert process.wait(timeout=moments.uniform(0.1, 1.0) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if (tmp_path / "out").exists():
            same_result(tmp_path)
            shutil.rmtree(tmp_path / "out")
    subprocess.run(command(config, tmp_path / "out", "--resume"), env=env, check=True)
    same_result(tmp_path)
    assert {file: file.read_bytes() for file in inputs} == inputs
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".out")]


def same_result(folder: Path) -> None:
    wanted = {f.name: f.read_bytes() for f in (folder / "whole").iterdir()}
    found = {f.name: f.read_bytes() for f in (folder / "out").iterdir()}
    assert found.keys() == wanted.keys()
    weights = [name for name in wanted if "safetensors" in name]
    assert len(weights) > 5
    assert all(found[name] == wanted[name] for name in weights)


# --- bad input ----------------------------------------------------------------------------------


def test_the_output_is_no_input(config: dict[str, Any], tmp_path: Path):
    before = (tmp_path / "0.safetensors").read_bytes()
    for out in (tmp_path / "0.safetensors", tmp_path):
        for overwrite in (False, True):
            with pytest.raises(
                MergeError, match=r"0\.safetensors|is there already|no merge has made"
            ):
                merge(config, out, overwrite=overwrite, progress=False)
    assert (tmp_path / "0.safetensors").read_bytes() == before


def test_another_number_of_classes(config: dict[str, Any], tmp_path: Path):
    other = load_file(tmp_path / "1.safetensors")
    other |= {"head.weight": torch.randn(7, 4), "head.bias": torch.randn(7)}
    save_file(other, tmp_path / "1.safetensors")
    with pytest.raises(MergeError, match=r"1\.safetensors.*(class|head)") as caught:
        merge(config, tmp_path / "out", progress=False)
    assert "skip" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mixed_precisions_are_merged_and_noted(config: dict[str, Any], tmp_path: Path):
    for name, dtype in (("0", torch.float16), ("1", torch.bfloat16)):
        tensors = load_file(tmp_path / f"{name}.safetensors")
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(cast, tmp_path / f"{name}.safetensors")
    record = merge(config, tmp_path / "out", progress=False)
    assert any("float16" in note for note in record["notes"])
    assert load_file(tmp_path / "out" / "model.safetensors")["head.bias"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(dtype: torch.dtype, config: dict[str, Any], tmp_path: Path):
    tensors = load_file(tmp_path / "1.safetensors")
    tensors["head.weight"] = tensors["head.weight"].to(dtype)
    save_file(tensors, tmp_path / "1.safetensors")
    with pytest.raises(MergeError, match="quantised"):
        merge(config, tmp_path / "out", progress=False)


def test_a_result_that_is_not_finite_stops_the_run(config: dict[str, Any], tmp_path: Path):
    tensors = load_file(tmp_path / "1.safetensors")
    tensors["head.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "1.safetensors")
    with pytest.raises(MergeError, match=r"'head\.bias'.*non-finite"):
        merge(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_tied_weights_stay_tied(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

    for name in ("a", "b"):
        torch.save(Tied().state_dict(), tmp_path / f"{name}.pt")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"{n}.pt")} for n in ("a", "b")],
    }
    merge(config, tmp_path / "out.safetensors", progress=False)
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["embed.weight"], found.get("head.weight", found["embed.weight"]))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(config: dict[str, Any], tmp_path: Path):
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "import runpy; sys.argv = ['merge', *sys.argv[1:]]\n"
        "runpy.run_module('merge', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.yaml"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()


def test_networks_trained_apart_are_aligned_first(tmp_path: Path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),\n"
        "        nn.Flatten(), nn.Linear(216, 10),\n"
        "    )\n"
    )
    align = {
        "model": {"source": "factory", "factory": f"{tmp_path}/net.py:build"},
        "data": DIGITS,
    }
    parsed = parse_config({"merge_method": "linear", "models": [{"model": "a"}], "align": align})
    assert parsed.align is not None
    model = build_model(parsed.align.model, classes=10, channels=1, root=Path())
    first = model.state_dict()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {name: t[order] if t.shape[:1] == (6,) else t for name, t in first.items()}
    moved["4.weight"] = first["4.weight"].view(10, 6, 36)[:, order].reshape(10, 216)
    for name, tensors in (("a", first), ("b", moved)):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"{n}.safetensors")} for n in ("a", "b")],
    }
    merge(config | {"align": align}, tmp_path / "aligned.safetensors", progress=False)
    found = load_file(tmp_path / "aligned.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, first[name], msg=name)
    recalibrated = config | {"align": align | {"recalibrate": True}}
    record = merge(recalibrated, tmp_path / "again", progress=False)
    assert any("running statistics of 1 norms" in note for note in record["notes"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(again["0.weight"], found["0.weight"])
    assert not torch.equal(again["1.running_mean"], found["1.running_mean"])


def test_an_input_in_the_output_is_never_removed(config: dict[str, Any], tmp_path: Path):
    merge(config, tmp_path / "out", progress=False)
    inner = tmp_path / "out" / "model.safetensors"
    before = inner.read_bytes()
    config["models"][0]["model"] = str(inner)
    with pytest.raises(MergeError, match="holds the input"):
        merge(config, tmp_path / "out", overwrite=True, progress=False)
    assert inner.read_bytes() == before


def test_the_folder_one_stands_in(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge(config, ".", progress=False)
    assert (tmp_path / "here" / "model.safetensors").exists()


def stopped_after_one_shard(
    config: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        finish = Output.finish

        def stop(output: Output, shard: str, record: dict[str, Any]) -> None:
            finish(output, shard, record)
            raise KeyboardInterrupt

        patch.setattr(Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(config, out, max_shard_bytes=300, progress=False)


def test_only_the_same_merge_is_resumed(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [entry["model"] for entry in config["models"]]
    checkpoints = [open_checkpoint(path) for path in paths]
    names = sorted({*checkpoints[0].tensors} - {"norm.num_batches_tracked"})

    def save_soup(first: float) -> None:
        Coefficients(
            ingredients=tuple(Ingredient(c.path, scan(c).sha256) for c in checkpoints),
            groups={"all": tuple(names)},
            matrix=np.array([[first], [0.5], [0.5 - first]]),
            carried={"norm.num_batches_tracked": "integer"},
        ).save(tmp_path / "soup.json")

    save_soup(0.3)
    soup = {"coefficients": str(tmp_path / "soup.json"), "models": [{"model": p} for p in paths]}
    stopped_after_one_shard(soup, tmp_path / "out", monkeypatch)
    save_soup(0.9)
    with pytest.raises(MergeError, match=r"--resume: .*of another config, shard size or input"):
        merge(soup, tmp_path / "out", max_shard_bytes=300, resume=True, progress=False)
    save_soup(0.3)
    stopped_after_one_shard(soup, tmp_path / "out", monkeypatch)
    with pytest.raises(MergeError, match="--resume"):
        merge(soup, tmp_path / "out", resume=True, progress=False)
    merge(soup, tmp_path / "out", max_shard_bytes=300, resume=True, progress=False)
    merge(soup, tmp_path / "whole", max_shard_bytes=300, progress=False)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
