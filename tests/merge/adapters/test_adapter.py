"""Opening an adapter: names as PEFT writes them, scalings, and all that is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.adapters import is_adapter, open_adapter
from merge.errors import MergeError


def test_factors_scaling_and_what_is_stored_whole(write_adapter, lora) -> None:
    head = torch.ones(3, 4)
    tensors = {**lora("l.0.q", 5, 4), "base_model.model.head.weight": head}
    path = write_adapter("a", tensors, modules_to_save=["head"])
    assert is_adapter(path)
    with open_adapter(path) as adapter:
        assert list(adapter.modules) == ["l.0.q"]
        module = adapter.modules["l.0.q"]
        assert (module.kind, module.rank, module.scaling) == ("linear", 2, 2.0)
        b, a = adapter.factors("l.0.q")
        assert torch.equal(a, tensors["base_model.model.l.0.q.lora_A.weight"])
        assert torch.equal(b, tensors["base_model.model.l.0.q.lora_B.weight"])
        assert adapter.saved == {"head.weight": "base_model.model.head.weight"}


def test_names_with_the_adapters_name_in_them(write_adapter) -> None:
    tensors = {
        "base_model.model.q.lora_A.default.weight": torch.ones(2, 3),
        "base_model.model.q.lora_B.default.weight": torch.ones(4, 2),
        "base_model.model.e.lora_embedding_A.default": torch.ones(2, 9),
        "base_model.model.e.lora_embedding_B.default": torch.ones(3, 2),
        "base_model.model.e.base_layer.weight": torch.ones(9, 3),
        "base_model.model.head.modules_to_save.default.bias": torch.ones(2),
    }
    with open_adapter(write_adapter("a", tensors)) as adapter:
        assert {n: m.kind for n, m in adapter.modules.items()} == {"q": "linear", "e": "embedding"}
        assert adapter.saved.keys() == {"e.weight", "head.bias"}


def test_patterns_and_rslora_give_each_module_its_scaling(write_adapter, lora) -> None:
    tensors = {**lora("l.0.q", 5, 4, 3), **lora("l.1.q", 5, 4), **lora("l.11.q", 5, 4)}
    patterns = {"rank_pattern": {"l.0.q": 3}, "alpha_pattern": {"1.q": 10, r"l\.0\..*": 6}}
    with open_adapter(write_adapter("a", tensors, **patterns)) as adapter:
        found = {name: module.scaling for name, module in adapter.modules.items()}
        assert found == {"l.0.q": 6 / 3, "l.1.q": 10 / 2, "l.11.q": 4 / 2}
    with open_adapter(write_adapter("b", tensors, use_rslora=True, **patterns)) as adapter:
        assert adapter.modules["l.0.q"].scaling == 6 / math.sqrt(3)


def test_a_torch_file_is_read_as_data(tmp_path: Path, write_adapter, lora) -> None:
    path = write_adapter("a", lora("q", 5, 4))
    (path / "adapter_model.safetensors").unlink()
    torch.save(lora("q", 5, 4), path / "adapter_model.bin")
    with open_adapter(path) as adapter:
        assert list(adapter.modules) == ["q"]


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path("/nonexistent/bomb").touch, ())


def test_a_torch_file_that_wants_to_run_code_is_refused(write_adapter, lora) -> None:
    path = write_adapter("a", lora("q", 5, 4))
    (path / "adapter_model.safetensors").unlink()
    torch.save({**lora("q", 5, 4), "x": Bomb()}, path / "adapter_model.bin")
    with pytest.raises(MergeError, match=r"adapter_model\.bin"):
        open_adapter(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r: .*greater than 0"),
        ({"r": "2"}, "r: .*valid integer"),
        ({"r": 3}, "rank 2, adapter_config.json says 3"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern.q"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"bias": "some"}, "bias"),
        ({"use_dora": True}, "DoRA rescales"),
        ({"layer_replication": [[0, 1]]}, "repeated layers"),
        ({"target_parameters": ["experts.w"]}, "bare parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
    ],
)
def test_configs_that_are_refused(write_adapter, lora, config: dict, message: str) -> None:
    path = write_adapter("a", lora("q", 5, 4), **config)
    with pytest.raises(MergeError, match=message):
        open_adapter(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 1, "r": 2}', '{"r": NaN}', "\xff"])
def test_malformed_json_is_refused(write_adapter, lora, text: str) -> None:
    path = write_adapter("a", lora("q", 5, 4))
    (path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MergeError, match=r"adapter_config\.json"):
        open_adapter(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q.lora_A.weight": torch.ones(3, 4)}, "wanted .rank, in. and .out, rank."),
        ({"q.lora_A.weight": torch.ones(2)}, "wanted .rank, in. and .out, rank."),
        ({"q.lora_B.weight": torch.ones(5, 2, 3, 3)}, "wanted .rank, in. and .out, rank."),
        ({"q.lora_B.weight": torch.ones(0, 2)}, "wanted .rank, in. and .out, rank."),
        ({"q.lora_B.weight": torch.ones(5, 2, dtype=torch.int8)}, "int8"),
        ({"q.lora_B.bias": torch.ones(4)}, r"bias of lora_B is \[4\], wanted \[5\]"),
        ({"p.lora_A.weight": torch.ones(2, 4)}, "wanted lora_A and lora_B"),
        ({"q.lora_A.default.weight": torch.ones(2, 4)}, "wanted one of them"),
        ({"q.lora_diag": torch.ones(2)}, "no part of a plain LoRA"),
        (
            {"p.lora_A.x.weight": torch.ones(2, 4), "p.lora_B.x.weight": torch.ones(5, 2)},
            "several adapters",
        ),
    ],
)
def test_tensors_that_are_refused(write_adapter, lora, change: dict, message: str) -> None:
    tensors = {**lora("q", 5, 4), **{f"base_model.model.{n}": t for n, t in change.items()}}
    with pytest.raises(MergeError, match=message):
        open_adapter(write_adapter("a", tensors))


def test_missing_parts_are_named(tmp_path: Path, write_adapter, lora) -> None:
    with pytest.raises(MergeError, match="is no folder"):
        open_adapter(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert not is_adapter(tmp_path / "empty")
    with pytest.raises(MergeError, match=r"has no adapter_config\.json"):
        open_adapter(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(MergeError, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        open_adapter(tmp_path / "empty")
    save_file({"base_model.model.w": torch.ones(2)}, tmp_path / "empty/adapter_model.safetensors")
    with pytest.raises(MergeError, match="no LoRA adapter"):
        open_adapter(tmp_path / "empty")
