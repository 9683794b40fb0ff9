"""Several adapters into one: against dense sums in float64, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from merge.adapters import Adapter, combine_adapters, open_adapter
from merge.errors import MergeError
from merge.part import Part
from merge.registry import METHODS


def dense(adapter: Adapter, name: str, shape: tuple[int, int]) -> np.ndarray:
    """`s · B · A` of one module in float64; zeros where it has none."""
    if name not in adapter.modules:
        return np.zeros(shape)
    b, a = adapter.factors(name, dtype=torch.float64)
    return adapter.modules[name].scaling * (b.numpy() @ a.numpy())


@pytest.fixture
def pair(write_adapter, lora) -> list[Adapter]:
    """Different ranks, scalings and modules: `l.0.q` in both, the others in one."""
    first = write_adapter("a", {**lora("l.0.q", 6, 5), **lora("l.1.q", 6, 5, seed=1)})
    second = {**lora("l.0.q", 6, 5, 3, seed=2), **lora("l.0.v", 4, 5, 3, seed=3)}
    return [
        open_adapter(first),
        open_adapter(write_adapter("b", second, r=3, lora_alpha=5, use_rslora=True)),
    ]


SHAPES = {"l.0.q": (6, 5), "l.1.q": (6, 5), "l.0.v": (4, 5)}
WEIGHTS = [0.75, -0.5]


def total(pair: list[Adapter], name: str) -> np.ndarray:
    return sum(w * dense(x, name, SHAPES[name]) for w, x in zip(WEIGHTS, pair, strict=True))


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_the_exact_sum(tmp_path: Path, pair, method: str) -> None:
    record = combine_adapters(pair, method, weights=WEIGHTS, out=tmp_path / "out")
    with open_adapter(tmp_path / "out") as merged:
        assert merged.modules.keys() == SHAPES.keys()
        for name, shape in SHAPES.items():
            assert merged.modules[name].scaling == 1
            np.testing.assert_allclose(
                dense(merged, name, shape), total(pair, name), rtol=1e-5, atol=1e-6
            )
        assert merged.modules["l.0.q"].rank == 5
        assert merged.modules["l.1.q"].rank == 2
    assert record["modules"]["l.0.q"]["zero_in"] == []
    assert record["modules"]["l.0.v"]["zero_in"] == [pair[0].path]
    assert all(module["relative_error"] < 1e-7 for module in record["modules"].values())


@pytest.mark.parametrize(
    ("method", "rank", "wanted"), [("svd", None, 3), ("linear", 1, 1), ("svd", 4, 4)]
)
def test_the_best_approximation_of_the_sum(tmp_path: Path, pair, method, rank, wanted) -> None:
    record = combine_adapters(pair, method, weights=WEIGHTS, rank=rank, out=tmp_path / "out")
    with open_adapter(tmp_path / "out") as merged:
        for name, shape in SHAPES.items():
            u, s, v = np.linalg.svd(total(pair, name), full_matrices=False)
            best = (u[:, :wanted] * s[:wanted]) @ v[:wanted]
            np.testing.assert_allclose(dense(merged, name, shape), best, rtol=1e-5, atol=1e-6)
            error = np.sqrt((s[wanted:] ** 2).sum() / (s**2).sum())
            assert record["modules"][name]["relative_error"] == pytest.approx(error, abs=1e-6)
            assert merged.modules[name].rank == record["modules"][name]["rank"] <= wanted


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("knots", {}),
    ],
)
def test_a_merge_method_on_the_dense_changes(tmp_path: Path, pair, method, settings) -> None:
    """At full rank the adapter is the method's own result on deltas to a base of zeros."""
    combine_adapters(
        pair, method, weights=WEIGHTS, rank=9, seed=3, out=tmp_path / "out", **settings
    )
    with open_adapter(tmp_path / "out") as merged:
        for name, shape in SHAPES.items():
            changes = [torch.from_numpy(dense(x, name, shape)).float() for x in pair]
            wanted = METHODS[method](
                torch.zeros(shape), changes, weight=WEIGHTS, part=Part(name, seed=3), **settings
            )
            np.testing.assert_allclose(
                dense(merged, name, shape), wanted.numpy(), rtol=1e-5, atol=1e-5
            )


def test_the_default_rank_of_a_dense_method_is_the_largest(tmp_path: Path, pair) -> None:
    record = combine_adapters(pair, "task_arithmetic", weights=WEIGHTS, out=tmp_path / "out")
    found = {name: module["rank"] for name, module in record["modules"].items()}
    assert found == {"l.0.q": 3, "l.1.q": 2, "l.0.v": 3}


def test_embeddings_convolutions_and_what_is_stored_whole(tmp_path: Path, write_adapter) -> None:
    def make(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        shapes = {
            "e.lora_embedding_A": (2, 9),
            "e.lora_embedding_B": (4, 2),
            "c.lora_A.weight": (2, 3, 3, 2),
            "c.lora_B.weight": (5, 2, 1, 1),
            "head.weight": (3, 4),
        }
        return {
            f"base_model.model.{name}": torch.randn(shape, generator=draw)
            for name, shape in shapes.items()
        }

    parts = [make(0), make(1)]
    pair = [
        open_adapter(write_adapter(f"a{k}", tensors, modules_to_save=["head"]))
        for k, tensors in enumerate(parts)
    ]
    record = combine_adapters(pair, "cat", weights=[3.0, 1.0], out=tmp_path / "out")
    with open_adapter(tmp_path / "out") as merged:
        found = {name: (module.kind, module.window) for name, module in merged.modules.items()}
        assert found == {"e": ("embedding", (9,)), "c": ("conv", (3, 3, 2))}
        for name, shape in (("e", (4, 9)), ("c", (5, 18))):
            wanted = 3 * dense(pair[0], name, shape) + dense(pair[1], name, shape)
            np.testing.assert_allclose(dense(merged, name, shape), wanted, rtol=1e-5, atol=1e-5)
        head = merged.checkpoint.read(merged.saved["head.weight"])
        first, second = (part["base_model.model.head.weight"] for part in parts)
        torch.testing.assert_close(head, 0.75 * first + 0.25 * second)
        assert merged.config.modules_to_save == ["head"]
    assert record["averaged"] == ["base_model.model.head.weight"]


def test_the_same_targets_stay_as_they_were_written(tmp_path: Path, write_adapter, lora) -> None:
    paths = [write_adapter(f"a{k}", lora("l.0.q", 6, 5, seed=k)) for k in range(2)]
    combine_adapters([*map(open_adapter, paths)], "cat", weights=[1.0, 1.0], out=tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["q"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})


def test_patterns_name_whole_modules(tmp_path: Path, write_adapter, lora) -> None:
    """A pattern matches endings: `q` would also give `x.q` its rank."""
    tensors = {**lora("q", 6, 5, 3), **lora("x.q", 6, 5), **lora("y", 6, 5)}
    path = write_adapter("a", tensors, rank_pattern={"x.q": 2, "^q": 3})
    combine_adapters([open_adapter(path)], "cat", weights=[1.0], out=tmp_path / "out")
    with open_adapter(tmp_path / "out") as merged:
        found = {name: (module.rank, module.scaling) for name, module in merged.modules.items()}
        assert found == {"q": (3, 1.0), "x.q": (2, 1.0), "y": (2, 1.0)}


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("cat", {"weights": [1.0]}, "1 weights for 2 adapters"),
        ("cat", {"weights": [1.0, float("nan")]}, "finite"),
        ("cat", {"rank": 3}, "'svd' cuts"),
        ("svd", {"rank": 0}, "at least 1"),
        ("svd", {"density": 0.5}, "has no settings, found 1: 'density'"),
        ("slerp", {}, "slerp"),
        ("nuslerp2", {}, "nuslerp2"),
    ],
)
def test_wrong_settings(tmp_path: Path, pair, method: str, arguments: dict, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        combine_adapters(pair, method, **{"weights": WEIGHTS, **arguments}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit(tmp_path: Path, write_adapter, lora) -> None:
    head = {"base_model.model.head.weight": torch.ones(3)}
    first = open_adapter(write_adapter("a", {**lora("q", 6, 5), **head}))

    def refused(tensors: dict, message: str, weights=(1.0, 1.0), **config) -> None:
        name = f"b{len(list(tmp_path.iterdir()))}"
        other = open_adapter(write_adapter(name, tensors, **config))
        with pytest.raises(MergeError, match=message):
            combine_adapters([first, other], "cat", weights=weights, out=tmp_path / "out")

    refused(lora("q", 6, 4), r"b\d: 'q' is for linear \[6, 4\], in .*a for linear \[6, 5\]")
    refused({**lora("q", 6, 5), "base_model.model.head.weight": torch.ones(4)}, "same task head")
    refused({**lora("q", 6, 5), **head}, "weights sum to 0", weights=(1.0, -1.0))
    refused(
        {**lora("p", 6, 5), "base_model.model.q.weight": torch.ones(6, 5)},
        "store these modules whole",
        modules_to_save=["q"],
    )
    refused({**lora("q", 6, 5), "base_model.model.q.lora_B.bias": torch.ones(6)}, "lora_bias")


def test_a_folder_in_use_is_refused_and_a_killed_runs_is_not(tmp_path: Path, pair) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"half")
    combine_adapters(pair, "cat", weights=WEIGHTS, out=out)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(MergeError, match=r"not empty, it holds 1: 'adapter_config\.json'"):
        combine_adapters(pair, "cat", weights=WEIGHTS, out=out)
    with pytest.raises(MergeError, match="is a file"):
        combine_adapters(pair, "cat", weights=WEIGHTS, out=out / "adapter_config.json")
    combine_adapters(pair, "cat", weights=WEIGHTS, out=tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == before


def test_results_that_are_not_finite_are_refused(tmp_path: Path, pair) -> None:
    with pytest.raises(MergeError, match="non-finite"):
        combine_adapters(
            pair, "cat", weights=[1e30, 1e30], out=tmp_path / "out", dtype=torch.float16
        )
    assert not (tmp_path / "out" / "adapter_config.json").exists()
