"""A LoRA out of two checkpoints: exact at full rank, and nothing dropped silently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge.adapters import applied, extract_adapter, open_adapter
from merge.checkpoints import open_checkpoint
from merge.errors import MergeError

SHAPES = {
    "wte.weight": (9, 4),
    "l.0.q.weight": (6, 4),
    "l.0.q.bias": (6,),
    "l.0.v.weight": (6, 4),
    "l.0.v.bias": (6,),
    "l.0.conv.weight": (5, 3, 3, 2),
    "l.0.depthwise.weight": (5, 1, 3, 3),
    "l.0.norm.weight": (4,),
    "l.0.norm.bias": (4,),
    "l.1.q.weight": (6, 4),
    "pos": (3, 4),
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.fixture
def extract(tmp_path: Path):
    """`extract(changes, **settings)`: the record, the base's tensors and the applied adapter's."""

    def run(
        changes: dict[str, Tensor], **settings: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        ours = tensors()
        theirs = {**ours, **{n: ours.get(n, 0) + delta for n, delta in changes.items()}}
        save_file(ours, tmp_path / "base.safetensors")
        save_file(theirs, tmp_path / "tuned.safetensors")
        with (
            open_checkpoint(tmp_path / "base.safetensors") as base,
            open_checkpoint(tmp_path / "tuned.safetensors") as tuned,
        ):
            record = extract_adapter(base, tuned, tmp_path / "out", **settings)
            with open_adapter(tmp_path / "out") as adapter:
                both = applied(base, adapter)
                return record, theirs, {name: both.read(name) for name in both.tensors}

    return run


def test_at_full_rank_the_adapter_is_the_fine_tune(extract) -> None:
    changes = {n: 0.1 * t for n, t in tensors(1).items() if n not in ("pos", "l.1.q.weight")}
    record, theirs, found = extract({**changes, "head.weight": torch.ones(2, 4)}, rank=99)
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert record["modules"].keys() == {"l.0.q", "l.0.v", "l.0.conv"}
    assert record["biases"].keys() == {"l.0.q.bias", "l.0.v.bias"}
    assert record["stored_whole"].keys() == {"wte", "l.0.depthwise", "l.0.norm", "head"}
    assert record["not_represented"] == {}
    assert record["modules"]["l.0.conv"]["rank"] == 5
    assert record["modules"]["l.0.q"]["relative_error"] < 1e-6
    change = 0.1 * np.linalg.norm(tensors(1)["l.0.q.weight"])
    wanted = change / np.linalg.norm(tensors()["l.0.q.weight"])
    assert record["modules"]["l.0.q"]["relative_change"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("settings", [{"rank": 2}, {"energy": 0.8}, {"rank": 3, "energy": 0.8}])
def test_rank_and_energy(extract, settings: dict[str, Any]) -> None:
    changes = {name: tensors(1)[name] for name in ("l.0.q.weight", "l.0.conv.weight")}
    record, _, found = extract(changes, **settings)
    for name, delta in changes.items():
        matrix = (found[name] - tensors()[name]).double().flatten(1).numpy()
        u, s, v = np.linalg.svd(delta.double().flatten(1).numpy(), full_matrices=False)
        parts = np.cumsum(s**2) / (s**2).sum()
        rank = int(np.argmax(parts >= settings.get("energy", 1)) + 1)
        rank = min(rank, settings.get("rank", rank)) if "energy" in settings else settings["rank"]
        np.testing.assert_allclose(matrix, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
        module = record["modules"][name.removesuffix(".weight")]
        assert module["rank"] == rank
        assert module["relative_error"] == pytest.approx(np.sqrt(1 - parts[rank - 1]), abs=1e-5)


def test_what_cannot_be_held_is_named_or_left_on_request(extract, tmp_path: Path) -> None:
    changes = {name: tensors(1)[name] for name in ("l.0.q.weight", "pos")}
    with pytest.raises(MergeError, match=r"1 changed tensors .*: pos \(a bare parameter, relative"):
        extract(changes, rank=4)
    assert not (tmp_path / "out").exists()
    record, _, found = extract(changes, rank=4, allow_partial=True)
    assert list(record["not_represented"]) == ["pos"]
    assert torch.equal(found["pos"], tensors()["pos"])


def test_a_bias_alone_and_a_norm_in_part(extract) -> None:
    names = ("l.0.v.bias", "l.0.norm.bias", "l.1.q.weight")
    record, theirs, found = extract({name: tensors(1)[name] for name in names}, rank=4)
    assert record["biases"].keys() == {"l.0.v.bias", "l.0.norm.bias"}
    assert record["stored_whole"] == {}
    for name in names:
        torch.testing.assert_close(found[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_kept_names_take_all_modules_with_that_ending(extract) -> None:
    """PEFT finds modules_to_save by the ends of names."""
    changes = {name: tensors(1)[name] for name in ("l.0.q.weight", "l.1.q.weight", "l.0.v.weight")}
    record, theirs, found = extract(changes, rank=4, keep=["l.1.q.*"])
    assert record["stored_whole"].keys() == {"l.1.q"}
    assert torch.equal(found["l.1.q.weight"], theirs["l.1.q.weight"])
    assert record["modules"].keys() == {"l.0.q", "l.0.v"}


def test_a_kept_ending_is_not_adapted_elsewhere(tmp_path: Path) -> None:
    ours = {"norm.weight": torch.ones(4), "b.norm.weight": torch.ones(4), "q.weight": torch.eye(4)}
    theirs = {**ours, "norm.weight": 2 * torch.ones(4), "q.weight": torch.ones(4, 4)}
    save_file(ours, tmp_path / "base.safetensors")
    save_file(theirs, tmp_path / "tuned.safetensors")
    with (
        open_checkpoint(tmp_path / "base.safetensors") as base,
        open_checkpoint(tmp_path / "tuned.safetensors") as tuned,
    ):
        record = extract_adapter(base, tuned, tmp_path / "out", rank=2)
    assert record["stored_whole"] == {"b.norm": 0.0, "norm": 1.0}


def test_weights_with_inputs_first(tmp_path: Path) -> None:
    """GPT-2's Conv1D: A is [rank, in] all the same, the weight [in, out]."""
    draw = torch.Generator().manual_seed(0)
    ours = {"h.c.weight": torch.randn(4, 6, generator=draw), "h.c.bias": torch.ones(6)}
    theirs = {**ours, "h.c.weight": torch.randn(4, 6, generator=draw)}
    save_file(ours, tmp_path / "base.safetensors")
    save_file(theirs, tmp_path / "tuned.safetensors")
    with (
        open_checkpoint(tmp_path / "base.safetensors") as base,
        open_checkpoint(tmp_path / "tuned.safetensors") as tuned,
    ):
        extract_adapter(base, tuned, tmp_path / "out", rank=4)
        with open_adapter(tmp_path / "out") as adapter:
            module = adapter.modules["h.c"]
            assert (module.rows, module.window) == (6, (4,))
            assert adapter.config.fan_in_fan_out
            found = applied(base, adapter).read("h.c.weight")
            torch.testing.assert_close(found, theirs["h.c.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither rank nor energy"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
    ],
)
def test_wrong_settings(extract, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        extract({"l.0.q.weight": torch.ones(6, 4)}, **settings)


def test_checkpoints_that_do_not_belong_together(tmp_path: Path) -> None:
    def refused(ours: dict[str, Tensor], theirs: dict[str, Tensor], message: str) -> None:
        save_file(ours, tmp_path / "base.safetensors")
        save_file(theirs, tmp_path / "tuned.safetensors")
        with (
            open_checkpoint(tmp_path / "base.safetensors") as base,
            open_checkpoint(tmp_path / "tuned.safetensors") as tuned,
            pytest.raises(MergeError, match=message),
        ):
            extract_adapter(base, tuned, tmp_path / "out", rank=2)

    eye = {"q.weight": torch.eye(4)}
    refused(eye, eye, "nothing to extract")
    refused(eye, {"p.weight": torch.eye(4)}, "no tensor in common")
    refused(eye, {"q.weight": torch.eye(5)}, r"'q.weight' is \[5, 5\], the base .* has \[4, 4\]")
    refused(eye, {"q.weight": torch.full((4, 4), torch.nan)}, "not finite")
    refused({"q.weight": torch.eye(4).to(torch.float8_e4m3fn)}, eye, "quantised")
