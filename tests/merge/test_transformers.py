"""Files written for mergekit run unchanged, and what they make opens with `from_pretrained`."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from merge.__main__ import app

transformers = pytest.importorskip("transformers", reason="needs transformers, from the dev extra")

LAYERS = 4
FILES = {
    "linear": """
models:
  - model: ./coder
    parameters:
      weight: 0.6
  - model: ./writer
    parameters:
      weight: 0.4
merge_method: linear
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - model: ./base
        layer_range: [0, 4]
      - model: ./coder
        layer_range: [0, 4]
merge_method: slerp
base_model: ./base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "ties": """
models:
  - model: ./base
    # no parameters necessary for base model
  - model: ./coder
    parameters:
      density: 0.5
      weight: 0.5
  - model: ./writer
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "dare_ties": """
models:
  - model: ./coder
    parameters:
      density: 0.53
      weight: 0.4
  - model: ./writer
    parameters:
      density: 0.53
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: dare_ties
base_model: ./base
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "breadcrumbs": """
models:
  - model: ./coder
    parameters:
      weight: 0.7
  - model: ./writer
    parameters:
      weight: 0.3
merge_method: breadcrumbs
base_model: ./base
parameters:
  density: 0.9
  gamma: 0.01
dtype: float32
""",
    "passthrough": """
slices:
  - sources:
    - model: ./coder
      layer_range: [0, 3]
  - sources:
    - model: ./writer
      layer_range: [1, 4]
merge_method: passthrough
dtype: float32
""",
}
EXACT = ("linear", "slerp", "ties", "breadcrumbs", "passthrough")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and two fine-tunes of it, as their library saves them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for name in ("coder", "writer"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    return folder


def merged(name: str, models: Path, out: Path, *options: str) -> Path:
    (models / f"{name}.yaml").write_text(FILES[name])
    before = Path.cwd()
    os.chdir(models)  # as paths in mergekit's files start there
    try:
        result = CliRunner().invoke(app, [f"{name}.yaml", str(out), "--quiet", *options])
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_mergekits_runs_unchanged_and_the_result_runs(
    name: str, models: Path, tmp_path: Path
):
    out = merged(name, models, tmp_path / "out")
    model, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == (6 if name == "passthrough" else LAYERS)
    assert str(model.config.dtype) == f"torch.{yaml.safe_load(FILES[name])['dtype']}"
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logits = model.float()(tokens).logits
        base = transformers.LlamaForCausalLM.from_pretrained(models / "base")(tokens).logits
    assert logits.shape == (1, 10, 120)
    assert logits.isfinite().all()
    assert not torch.equal(logits, base)
    assert (out / "README.md").read_text().startswith("---")


@pytest.mark.parametrize("name", FILES)
def test_shards_open_as_one(name: str, models: Path, tmp_path: Path):
    whole = merged(name, models, tmp_path / "whole")
    shards = merged(name, models, tmp_path / "shards", "--max-shard-size", "40kB")
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 1
    one = transformers.LlamaForCausalLM.from_pretrained(whole).state_dict()
    other = transformers.LlamaForCausalLM.from_pretrained(shards).state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_numbers_are_mergekits(name: str, models: Path, tmp_path: Path):
    config = pytest.importorskip("mergekit.config", reason="needs mergekit, from the bench extra")
    from mergekit.merge import MergeOptions, run_merge

    out = merged(name, models, tmp_path / "out")
    before = Path.cwd()
    os.chdir(models)
    try:
        parsed: Any = config.MergeConfiguration.model_validate(yaml.safe_load(FILES[name]))
        run_merge(parsed, str(tmp_path / "peer"), MergeOptions(copy_tokenizer=False, quiet=True))
    finally:
        os.chdir(before)
    ours = load_file(out / "model.safetensors")
    theirs = load_file(next((tmp_path / "peer").glob("*.safetensors")))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        # The peer computes in float16 where that is the dtype.
        rounding = 2**-10 if tensor.dtype == torch.float16 else 1e-5
        error = (tensor.float() - theirs[key].float()).abs().max()
        assert error <= rounding * theirs[key].float().abs().max(), key
