"""Variants as adapter folders: PEFT reads them, and so does the store."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fleet.errors import FleetError
from fleet.storage.adapter_folder import is_bottlenecks, read_bottlenecks
from fleet.storage.building import add_variant
from fleet.storage.config import HowToStore
from fleet.variants import Encoded, Node, Store, Variant, tensor_hash
from merge.errors import MergeError
from tests.fleet.storage.stores import encoded, same


class Small(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.crossed = Conv1D(5, 6)
        self.conv = nn.Conv2d(1, 4, (3, 2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, classes)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        image = torch.nn.functional.pad(self.norm(x)[:, None], (0, 0, 1, 1))
        x = x + self.conv(image).mean((1, 3))[..., None] + self.crossed(x).mean(-1, keepdim=True)
        return self.head(x.mean(1))


@pytest.fixture
def store(tmp_path):
    torch.manual_seed(0)
    model = Small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return Store.create(tmp_path / "store", model.state_dict())


def base_model(store, classes=3):
    model = Small(classes)
    values = {key: store.node_tensor("base", key) for key in store.base.tensors}
    model.load_state_dict({k: v for k, v in values.items() if k[:5] != "head." or classes == 3})
    return model


def model_of(store, name, classes=3):
    model = Small(classes)
    model.load_state_dict(store.tensors(name))
    return model


def lora(store, config, seed=1):
    """A LoRA whose every factor is random, as PEFT saves it; the model that it makes."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(store), config)
    for _name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    folder = store.folder.with_name(f"peft-{seed}")
    model.save_pretrained(folder)
    return folder, model.eval()


CONFIGS = {
    "linear": {"target_modules": ["layers.0", "layers.1"], "r": 2, "lora_alpha": 6},
    "ranks": {
        "target_modules": ["layers.0", "layers.1", "head"],
        "r": 2,
        "rank_pattern": {"layers.1": 3},
        "alpha_pattern": {"head": 5},
    },
    "embedding": {"target_modules": ["embed", "layers.1"], "r": 2},
    "convolution": {"target_modules": ["conv", "layers.1"], "r": 2},
    "conv1d": {"target_modules": ["crossed"], "r": 2, "fan_in_fan_out": True},
    "saved": {"target_modules": ["layers.1"], "modules_to_save": ["head", "norm"]},
    "biases": {"target_modules": ["layers.1"], "r": 2, "bias": "lora_only"},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_lora_of_peft_goes_in_and_comes_out(store, tmp_path, case):
    folder, model = lora(store, peft.LoraConfig(**CONFIGS[case]))
    add_variant(store, "lora", folder, HowToStore(exact=True))
    store.export_adapter("lora", tmp_path / "out")
    original, written = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "out")
    )
    factors = {name for name in original if "lora_" in name}
    assert factors == {name for name in written if "lora_" in name}
    for name in factors:
        assert torch.equal(written[name], original[name]), name
    tokens = torch.arange(10).view(2, 5)
    read = peft.PeftModel.from_pretrained(base_model(store), tmp_path / "out").eval()
    wanted = model(tokens)
    torch.testing.assert_close(read(tokens), wanted)
    torch.testing.assert_close(model_of(store, "lora")(tokens), wanted, rtol=1e-4, atol=1e-4)
    add_variant(store, "again", tmp_path / "out", HowToStore(exact=True))
    same(store.tensors("again"), store.tensors("lora"))


@pytest.mark.filterwarnings("ignore")
def test_names_get_a_prefix(store, tmp_path):
    folder, model = lora(store, peft.LoraConfig(**CONFIGS["ranks"]))
    add_variant(store, "lora", folder, HowToStore(exact=True))
    store.export_adapter("lora", tmp_path / "out", prefix="inner.")
    outer = nn.Module()
    outer.inner = base_model(store)
    outer.forward = lambda tokens: outer.inner(tokens)
    read = peft.PeftModel.from_pretrained(outer, tmp_path / "out").eval()
    tokens = torch.arange(10).view(2, 5)
    torch.testing.assert_close(read(tokens), model(tokens))


def bottlenecks(store, name="v", classes=4):
    """A variant with two bottleneck adapters and a head of its own, and its tensors by hash."""
    adapters, tensors = {}, {}
    for module, activation in (("layers.0", "gelu"), ("layers.1", "relu")):
        parts = {"down": torch.randn(2, 6), "down_bias": torch.randn(2)}
        parts |= {"up": torch.randn(6, 2), "up_bias": torch.randn(6)}
        hashes = {part: tensor_hash(value) for part, value in parts.items()}
        adapters[module] = Encoded("bottleneck", hashes, {"activation": activation})
        tensors |= {hashes[part]: value for part, value in parts.items()}
    records = {}
    for key, value in (
        ("head.weight", torch.randn(classes, 6)),
        ("head.bias", torch.randn(classes)),
    ):
        records[key], given = encoded("plain", value)
        tensors |= given
    store.add(Variant(name, "base", records, classes, adapters=adapters), tensors)


def test_bottleneck_adapters_come_back(store, tmp_path):
    bottlenecks(store)
    store.export_adapter("v", tmp_path / "out")
    assert is_bottlenecks(tmp_path / "out")
    variant = add_variant(store, "again", tmp_path / "out", HowToStore(exact=True))
    assert variant.classes == 4
    same(store.tensors("again"), store.tensors("v"))
    one, two = store.parts("v"), store.parts("again")
    assert one.keys() == two.keys()
    for key in one:
        same(one[key], two[key])
    for module, record in store.variants["v"].adapters.items():
        assert variant.adapters[module].settings == record.settings
    with pytest.raises(FleetError, match="over the base itself; give no node"):
        add_variant(store, "x", tmp_path / "out", HowToStore(exact=True), node="n")


def test_a_folder_of_bottlenecks_that_does_not_fit_is_refused(store, tmp_path):
    bottlenecks(store)
    store.export_adapter("v", tmp_path / "out")
    config = tmp_path / "out" / "bottlenecks.json"
    whole = json.loads(config.read_text())
    for content, said in (
        ([], "wanted adapters and classes"),
        ({**whole, "adapters": []}, "wanted an object"),
        ({**whole, "adapters": {**whole["adapters"], "more": {}}}, "holds others"),
        ({**whole, "classes": "many"}, "classes"),
        ({**whole, "adapters": dict.fromkeys(whole["adapters"], 3)}, "settings"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(FleetError, match=said):
            read_bottlenecks("x", tmp_path / "out")
    config.write_text("{")
    with pytest.raises(MergeError, match="not valid JSON"):
        read_bottlenecks("x", tmp_path / "out")


def test_what_is_more_than_an_adapter_is_refused(store, tmp_path):
    base = {key: store.node_tensor("base", key) for key in store.base.tensors}
    key = "layers.1.weight"
    sign, signs = encoded("sign", base[key] + 1, base[key])
    low, factors = encoded("low_rank", base[key] + 1, base[key], rank=1)
    plain, values = encoded("plain", base[key] + 1)
    bias, biases = encoded("plain", base["layers.1.bias"] + 1)
    store.add_node(Node("n", "base", {key: plain}), values)
    store.add(Variant("signs", "base", {key: sign}), signs)
    store.add(Variant("in node", "n", {key: low}), factors)
    store.add(Variant("whole", "base", {"layers.1.bias": bias}), biases)
    store.add(Variant("nothing", "base", {}), {})
    for name, said in (
        ("signs", r"neither of low_rank, plain \('layers.1.weight' is sign\)"),
        ("in node", "made from the node 'n'"),
        ("whole", "has no low-rank tensors"),
        ("nothing", "has no low-rank tensors"),
        ("none", "no variant 'none'"),
    ):
        with pytest.raises(FleetError, match=said):
            store.export_adapter(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.add(Variant("low", "base", {key: low}), factors)
    with pytest.raises(FleetError, match="inside the store"):
        store.export_adapter("low", store.folder / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(MergeError, match="is not empty"):
        store.export_adapter("low", tmp_path / "out")
