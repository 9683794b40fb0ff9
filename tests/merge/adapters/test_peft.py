"""Round trips with PEFT itself on a tiny Llama and a tiny GPT-2."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge.adapters import applied, combine_adapters, extract_adapter, open_adapter
from merge.checkpoints import open_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Conv1D weights are [in, out], some square, and its head is tied to the embedding."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def train(base: Path, out: Path, seed: int, **config: Any) -> Path:
    """An adapter of PEFT with random factors; what it stores whole is changed, too."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base), peft.LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(load(base), adapter)
    return model.merge_and_unload().state_dict()


def same(base: Path, adapter: Path, *, atol: float = 1e-6) -> None:
    """The applied adapter has the weights that PEFT merges."""
    wanted = merged_by_peft(base, adapter)
    checkpoint = open_checkpoint(base, names=wanted)
    with applied(checkpoint, open_adapter(adapter)) as both:
        assert both.tensors.keys() <= wanted.keys()
        for name in both.tensors:
            torch.testing.assert_close(both.read(name), wanted[name], rtol=1e-5, atol=atol)


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": lambda: {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": lambda: {
        "r": 2,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, ".*down_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
    },
    "embedding": lambda: {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "saved": lambda: {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_applied_is_what_peft_merges(tmp_path: Path, llama: Path, config: str) -> None:
    same(llama, train(llama, tmp_path / "a", 1, **CONFIGS[config]()))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj", "c_fc"]])
def test_applied_to_a_model_with_conv1d_and_biases(
    tmp_path: Path, gpt2: Path, bias: str, targets: list[str]
) -> None:
    path = train(
        gpt2, tmp_path / "a", 1, r=2, target_modules=targets, bias=bias, fan_in_fan_out=True
    )
    same(gpt2, path)


def test_lora_bias(tmp_path: Path, gpt2: Path) -> None:
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    same(gpt2, train(gpt2, tmp_path / "a", 1, **config, lora_bias=True))


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_peft_opens_what_was_combined(tmp_path: Path, llama: Path, method: str) -> None:
    first = train(llama, tmp_path / "a", 1, **CONFIGS["patterns"]())
    second = train(llama, tmp_path / "b", 2, **CONFIGS["saved"](), use_rslora=True)
    with open_adapter(first) as a, open_adapter(second) as b:
        combine_adapters([a, b], method, weights=[0.75, 0.5], out=tmp_path / "out")
    same(llama, tmp_path / "out")
    if method == "svd":
        return
    base = load(llama).state_dict()
    one, two = merged_by_peft(llama, first), merged_by_peft(llama, second)
    both = merged_by_peft(llama, tmp_path / "out")
    for name, weight in base.items():
        if name.endswith("_proj.weight"):
            wanted = weight + 0.75 * (one[name] - weight) + 0.5 * (two[name] - weight)
        else:
            wanted = two[name]
        torch.testing.assert_close(both[name], wanted, rtol=1e-5, atol=1e-5)


def tuned(base: Path, out: Path) -> dict[str, torch.Tensor]:
    model = load(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return model.state_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_opens_what_was_extracted(
    tmp_path: Path, request: pytest.FixtureRequest, family: str
) -> None:
    base = request.getfixturevalue(family)
    wanted = tuned(base, tmp_path / "tuned")
    with (
        open_checkpoint(base, names=wanted) as ours,
        open_checkpoint(tmp_path / "tuned", names=wanted) as theirs,
    ):
        record = extract_adapter(ours, theirs, tmp_path / "full", rank=64)
        half = extract_adapter(ours, theirs, tmp_path / "half", energy=0.5)
    assert record["not_represented"] == {}
    found = merged_by_peft(base, tmp_path / "full")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    same(base, tmp_path / "half")
    found = merged_by_peft(base, tmp_path / "half")
    start = load(base).state_dict()
    for module, said in half["modules"].items():
        change = wanted[f"{module}.weight"] - start[f"{module}.weight"]
        rest = wanted[f"{module}.weight"] - found[f"{module}.weight"]
        error = float(rest.norm() / change.norm())
        assert error == pytest.approx(said["relative_error"], rel=1e-4)
        assert error**2 <= 0.5 + 1e-6


def test_names_that_opening_stripped_are_the_models_again(tmp_path: Path, gpt2: Path) -> None:
    """A tied Llama has all of its tensors below `model.`, which opening takes off."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    wanted = tuned(tmp_path / "base", tmp_path / "tuned")
    with (
        open_checkpoint(tmp_path / "base") as ours,
        open_checkpoint(tmp_path / "tuned") as theirs,
    ):
        assert "norm.weight" in ours.tensors
        record = extract_adapter(ours, theirs, tmp_path / "out", rank=32)
        assert record["prefix"] == "model."
        with open_adapter(tmp_path / "out") as adapter:
            both = applied(ours, adapter)
            torch.testing.assert_close(both.read("norm.weight"), wanted["model.norm.weight"])
    found = merged_by_peft(tmp_path / "base", tmp_path / "out")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
