"""`python -m merge`: what a user types and what is answered."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from merge.__main__ import app

ROOT = Path(__file__).parents[2]


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name in ("base", "a", "b"):
        tensors = {"blocks.0.weight": torch.randn(30, 20), "head.bias": torch.randn(7)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    path = tmp_path / "config.yaml"
    models = [{"model": str(tmp_path / f"{n}.safetensors")} for n in ("a", "b")]
    path.write_text(
        json.dumps(
            {
                "merge_method": "ties",
                "base_model": str(tmp_path / "base.safetensors"),
                "models": models,
                "parameters": {"density": 0.5},
            }
        )
    )
    return path


def test_a_config_comes_first_or_after_run(config: Path, tmp_path: Path):
    assert run(config, tmp_path / "one").exit_code == 0
    assert run("run", config, tmp_path / "two", "--quiet").exit_code == 0
    assert run("--quiet", config, tmp_path / "three").exit_code == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]


def test_overrides(config: Path, tmp_path: Path):
    assert run(config, tmp_path / "out", "parameters.density=0.0").exit_code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in found.items())


def test_a_dry_run_writes_nothing(config: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    result = run(config, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "2 tensors: ties" in result.stdout
    assert "predicted peak" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ties", "dare-ties", "did you mean 'dare_ties'?"),
        ("density", "densty", "did you mean 'density'?"),
        ("0.5", "1.5", "parameters.density"),
        ("base_model", "basemodel", "did you mean 'base_model'?"),
        ("a.safetensors", "aa.safetensors", "the nearest name there is"),
        ('"base_model"', '"tokenizer": {}, "base_model"', "tokenizer"),
    ],
)
def test_mistakes_are_told_at_once(old: str, new: str, message: str, config: Path, tmp_path: Path):
    config.write_text(config.read_text().replace(old, new, 1))
    result = run(config, tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_all_mistakes_at_once(config: Path, tmp_path: Path):
    text = config.read_text().replace("ties", "slerp").replace("0.5", '0.5, "lamda": 1')
    config.write_text(text)
    said = " ".join(run(config, tmp_path / "out").stderr.split())
    for message in ("takes 1 models", "'t'", "lamda"):
        assert message in said


def test_inspect(config: Path, tmp_path: Path):
    models = [tmp_path / f"{n}.safetensors" for n in ("a", "b")]
    base = ("--base", tmp_path / "base.safetensors")
    result = run("inspect", *models, *base, "--out", tmp_path / "tables", "--quiet")
    assert result.exit_code == 0
    assert "Cosine similarity" in result.stdout
    assert (tmp_path / "tables" / "inspection.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tables").glob("*.csv"))


def test_methods(config: Path):
    assert "ties" in run("methods").stdout
    assert "2306.01708" in run("methods", "ties").stdout
    result = run("methods", "tyes")
    assert result.exit_code == 2
    assert "did you mean 'ties'?" in result.stderr


def test_adapters_are_extracted_and_merged(config: Path, tmp_path: Path):
    base = tmp_path / "base.safetensors"
    for name in ("a", "b"):
        tuned = load_file(base)
        tuned["blocks.0.weight"] += torch.randn(30, 2) @ torch.randn(2, 20)
        save_file(tuned, tmp_path / f"{name}.safetensors")
        model = tmp_path / f"{name}.safetensors"
        result = run("extract", model, tmp_path / f"{name}-lora", "--base", base, "--rank", 2)
        assert result.exit_code == 0, result.output
    entries = [
        {"model": str(tmp_path / f"{n}-lora"), "parameters": {"weight": 0.5}} for n in ("a", "b")
    ]
    both = tmp_path / "both.yaml"
    both.write_text(json.dumps({"merge_method": "cat", "models": entries}))
    assert run("adapters", both, tmp_path / "both").exit_code == 0
    onto = tmp_path / "onto.yaml"
    onto.write_text(
        json.dumps(
            {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'both'}"}]}
        )
    )
    assert run(onto, tmp_path / "out.safetensors").exit_code == 0
    found = load_file(tmp_path / "out.safetensors")["blocks.0.weight"]
    tuned = [load_file(tmp_path / f"{n}.safetensors")["blocks.0.weight"] for n in ("a", "b")]
    torch.testing.assert_close(found, sum(tuned) / 2, rtol=1e-4, atol=1e-4)


def test_a_lora_of_another_base_is_refused(config: Path, tmp_path: Path):
    base = tmp_path / "base.safetensors"
    tuned = load_file(base)
    tuned["blocks.0.weight"] += torch.randn(30, 2) @ torch.randn(2, 20)
    save_file(tuned, tmp_path / "a.safetensors")
    model = tmp_path / "a.safetensors"
    assert run("extract", model, tmp_path / "lora", "--base", base, "--rank", 2).exit_code == 0
    save_file({"blocks.0.weight": torch.randn(12, 20)}, base)
    onto = tmp_path / "onto.yaml"
    onto.write_text(
        json.dumps(
            {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'lora'}"}]}
        )
    )
    result = run(onto, tmp_path / "out")
    assert result.exit_code == 2
    assert "blocks.0" in result.stderr
    assert "[12, 20]" in result.stderr


@pytest.mark.slow
def test_an_interrupted_merge_says_how_to_go_on(config: Path, tmp_path: Path):
    tensors = {f"blocks.{k}.weight": torch.randn(2000, 1000) for k in range(8)}
    for name in ("base", "a", "b"):
        save_file(
            {n: t + torch.randn_like(t) for n, t in tensors.items()},
            tmp_path / f"{name}.safetensors",
        )
    words = [sys.executable, "-m", "merge", str(config), str(tmp_path / "out"), "--quiet"]
    process = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / ".out.unfinished").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command with --resume to go on" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_help_comes_without_torch():
    code = (
        "import sys\n"
        "from merge.__main__ import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
