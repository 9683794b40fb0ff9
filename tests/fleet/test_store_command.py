"""`python -m fleet.store`: what a user types and what is answered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fleet.storage import building
from fleet.store import app
from fleet.variants import Store
from tests.fleet.storage.stores import same

ROOT = Path(__file__).parents[2]


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def fine(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def values(seed: int, base: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if base is None:
        shapes = {"layer.weight": (32, 24), "layer.bias": (32,), "head.weight": (5, 32)}
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found = {k: v + 0.01 * torch.randn(v.shape, generator=draw) for k, v in base.items()}
    return {**found, "layer.bias": base["layer.bias"]}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    folder = tmp_path / "zoo"
    folder.mkdir()
    base = values(0)
    save_file(base, folder / "base.safetensors")
    for seed in (1, 2):
        save_file(values(seed, base), folder / f"m{seed}.safetensors")
    return folder


@pytest.fixture
def store(zoo: Path, tmp_path: Path) -> Path:
    fine("build", "--zoo", zoo, tmp_path / "store", "--quiet")
    return tmp_path / "store"


def adapter(folder: Path, rows: int = 32, columns: int = 24, rank: int = 3) -> Path:
    folder.mkdir()
    draw = torch.Generator().manual_seed(9)
    prefix = "base_model.model.layer.lora_"
    factors = {
        f"{prefix}A.weight": torch.randn(rank, columns, generator=draw),
        f"{prefix}B.weight": torch.randn(rows, rank, generator=draw),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_zoo_becomes_a_store_and_gives_its_checkpoints_back(zoo, store, tmp_path):
    listed = fine("list", store)
    assert "m1" in listed
    assert "2 variants" in listed
    for name in ("m1", "m2"):
        fine("export", store, name, tmp_path / "out" / f"{name}.safetensors")
        same(
            load_file(tmp_path / "out" / f"{name}.safetensors"),
            load_file(zoo / f"{name}.safetensors"),
        )
    assert "all of them whole" in fine("verify", store)


def test_a_config_with_overrides(zoo, tmp_path):
    config = tmp_path / "store.yaml"
    config.write_text(f"base: {zoo}/base.safetensors\nvariants: {zoo}\nexact: true\n")
    fine("build", config, tmp_path / "exact", "--quiet")
    fine("build", config, tmp_path / "near", "exact=false", "tolerance=0.5", "--quiet")
    exact, near = Store(tmp_path / "exact"), Store(tmp_path / "near")
    same(exact.tensors("m1"), load_file(zoo / "m1.safetensors"))
    assert near.nbytes("m1") < exact.nbytes("m1") / 2
    assert "did you mean 'tolerance'" in refused(
        "build", config, tmp_path / "x", "tolerence=0.5", "--quiet"
    )
    assert not (tmp_path / "x").exists()


def test_variants_are_added_shown_replaced_and_removed(zoo, store, tmp_path):
    new = values(7, values(0))
    save_file(new, tmp_path / "new.safetensors")
    assert "over base" in fine("add", store, "new", tmp_path / "new.safetensors")
    same(Store(store).tensors("new"), new)
    shown = fine("show", store, "new")
    assert "layer.weight" in shown
    assert "layer.bias" not in shown, "that is the base's"
    fine("add", store, "new", tmp_path / "new.safetensors", "--tolerance", "0.7")
    assert Store(store).nbytes("new") < 32 * 24 * 4 / 4
    fine("remove", store, "new")
    assert "no variant 'new'" in refused("show", store, "new")
    assert fine("gc", store).split()[0] not in {"0", "freed"}
    assert fine("gc", store).startswith("0 B")


def test_an_adapter_is_added_as_its_factors(zoo, store, tmp_path):
    fine("add", store, "lora", adapter(tmp_path / "lora"))
    opened = Store(store)
    assert opened.nbytes("lora") == 3 * (32 + 24) * 4
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.layer.lora_{side}.weight"] for side in "AB")
    base = load_file(zoo / "base.safetensors")
    wanted = {**base, "layer.weight": base["layer.weight"] + 2.0 * b @ a}
    found = opened.tensors("lora")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert "low_rank (scale 2.0)" in fine("show", store, "lora")


def test_an_adapter_is_exported_as_a_folder(store, tmp_path):
    folder = adapter(tmp_path / "lora")
    fine("add", store, "lora", folder)
    fine("export", store, "lora", tmp_path / "out", "--adapter", "--prefix", "model.")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = load_file(folder / "adapter_model.safetensors")
    same(
        written, {name.replace("model.layer", "model.model.layer"): v for name, v in wanted.items()}
    )
    said = refused("export", store, "m1", tmp_path / "other", "--adapter")
    assert "has no low-rank tensors; export the whole checkpoint" in said
    assert "is for --adapter" in refused("export", store, "m1", tmp_path / "x", "--prefix", "a.")


def test_a_build_that_is_interrupted_goes_on(zoo, tmp_path, monkeypatch):
    made, make = [], building._made

    def making(writer, name, *more):
        if made:
            raise KeyboardInterrupt
        made.append(name)
        return make(writer, name, *more)

    monkeypatch.setattr(building, "_made", making)
    done = run("build", "--zoo", zoo, tmp_path / "store")
    assert done.exit_code == 130
    assert "what was finished is kept; run the same command to go on" in done.output
    assert list(Store(tmp_path / "store").variants) == ["m1"]
    monkeypatch.undo()
    assert "2 variants" in fine("build", "--zoo", zoo, tmp_path / "store", "--quiet")
    assert Store(tmp_path / "store").verify() == []


def test_levels_are_left_out_one_at_a_time(zoo, tmp_path):
    config = tmp_path / "store.yaml"
    config.write_text(f"base: {zoo}/base.safetensors\nvariants: {zoo}\ntolerance: 0.7\n")
    for level in ("general", "domain", "task"):
        said = fine("build", config, tmp_path / level, f"leave_out=[{level}]", "--quiet")
        assert "general 3.75 KiB, domain" in said
        assert "on disk" in said


def test_what_does_not_fit_is_refused_in_words(zoo, store, tmp_path):
    before = (store / "manifest.jsonl").read_bytes()
    other = adapter(tmp_path / "other", rows=16)
    assert "the base that the adapter was trained on" in refused("add", store, "x", other)
    zero = adapter(tmp_path / "zero", rank=0)
    assert "r: Input should be greater than 0" in refused("add", store, "x", zero)
    save_file({"else": torch.zeros(2)}, tmp_path / "else.safetensors")
    assert "lacks 3 tensors" in refused("add", store, "x", tmp_path / "else.safetensors")
    model = zoo / "m1.safetensors"
    assert "no node 'nodee'" in refused("add", store, "x", model, "--node", "nodee")
    assert "is called 'a/b'" in refused("add", store, "a/b", model)
    assert "does not exist" in refused("add", store, "x", tmp_path / "none.safetensors")
    assert "give one of" in refused("add", store, "x", model, "--exact", "--tolerance", "1")
    assert "greater than 0" in refused("add", store, "x", model, "--tolerance", "-1")
    assert (store / "manifest.jsonl").read_bytes() == before


def test_what_is_no_store_or_no_zoo_is_refused(zoo, store, tmp_path):
    for command in ("list", "verify", "gc"):
        assert "there is no such folder" in refused(command, tmp_path / "none")
        assert "is no store" in refused(command, zoo)
    assert "wanted CONFIG and OUT" in refused("build", "config.yaml")
    assert "wanted OUT alone" in refused("build", "--zoo", zoo, tmp_path / "x", "exact=true")
    assert "for --zoo" in refused("build", "a.yaml", tmp_path / "x", "--exact")
    (zoo / "base.safetensors").unlink()
    assert "has no base" in refused("build", "--zoo", zoo, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_damage_is_listed_and_told_by_the_exit_code(zoo, store):
    fine("add", store, "m3", zoo / "m1.safetensors", "--tolerance", "0.7")
    opened = Store(store)
    (digest,) = opened.variants["m1"].tensors["head.weight"].parts.values()
    path = opened.packs.path(opened.packs.pack_of(digest))
    path.write_bytes(path.read_bytes()[:-1])
    done = run("verify", store)
    assert done.exit_code == 1
    assert path.name in done.output
    assert "'m1'" in done.output
    assert "cannot be read: 'm1'" in refused("export", store, "m1", store.parent / "m1.safetensors")
    fine("export", store, "m3", store.parent / "m3.safetensors")


def test_a_second_writer_is_told_of_the_first(store):
    with Store(store).transaction():
        command = [sys.executable, "-m", "fleet.store", "gc", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_starts_without_torch():
    code = "import sys, fleet.store, fleet.storage.state; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
