"""The methods that mergekit has too give its numbers, from the same files.

The peer comes with the `bench` extra. Two of its faults are not copied: breadcrumbs there zeroes
tensors too small to keep a share of, and a vocabulary of another size is only warned about.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.merging import merge

pytestmark = pytest.mark.slow
SHAPES = {"a.weight": (40, 30), "b.weight": (6, 5, 3, 3), "b.bias": (17,), "c.weight": (300, 200)}
EACH = ({"weight": 0.4, "density": 0.3}, {"weight": 0.9, "density": 0.5}, {"weight": 0.2})
EXACT: dict[str, tuple[dict[str, Any], ...]] = {
    "linear": ({}, {"normalize": False}),
    "slerp": ({"t": 0.3}, {"t": [{"filter": "bias", "value": 0.9}, {"value": 0.1}]}),
    "nuslerp": (
        {},
        {"nuslerp_flatten": False},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ({}, {"normalize_weights": False}),
    "karcher": ({}, {"max_iter": 3}),
    "nearswap": ({"t": 0.004},),
    "passthrough": ({}, {"scale": 0.5}),
    "model_stock": ({}, {"filter_wise": True}),
    "task_arithmetic": ({}, {"normalize": True, "lambda": 0.7}),
    "ties": ({}, {"normalize": False}, {"lambda": 1.4, "rescale": True}),
    "breadcrumbs": ({}, {"gamma": 0.05, "normalize": True}, {"rescale": True}),
    "breadcrumbs_ties": ({}, {"gamma": 0.05, "normalize": True}),
    "sce": ({}, {"select_topk": 0.3}),
}
DRAWN: dict[str, tuple[dict[str, Any], ...]] = {
    "dare_linear": ({}, {"rescale": False}),
    "dare_ties": ({}, {"normalize": True}),
    "della": ({"epsilon": 0.1}, {"epsilon": 0.1, "rescale": False}),
    "della_linear": ({"epsilon": 0.1}, {"epsilon": 0.1, "normalize": True}),
}
TWO_MODELS = {"nuslerp": 2, "slerp": 1, "nearswap": 1, "passthrough": 1}
WITHOUT_BASE = {"linear", "karcher", "passthrough"}


@pytest.fixture(scope="module")
def peer():
    scripts = pytest.importorskip(
        "mergekit.scripts.merge_raw_pytorch", reason="needs mergekit, from the bench extra"
    )
    from click.testing import CliRunner

    def run(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
        (folder / "config.yaml").write_text(json.dumps(config))
        arguments = [str(folder / "config.yaml"), str(folder / "peer"), "--quiet"]
        result = CliRunner().invoke(scripts.main, arguments)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return load_file(next((folder / "peer").glob("*.safetensors")))

    return run


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    base = {name: torch.randn(shape) * 0.05 for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for k in range(3):
        deltas = {name: torch.randn(t.shape) * 0.01 for name, t in base.items()}
        save_file({n: t + deltas[n] for n, t in base.items()}, folder / f"{k}.safetensors")
    return folder


def config_of(zoo: Path, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    known = {"weight", "density"} if method in DRAWN or "ties" in method else {"weight"}
    known |= {"density"} if "breadcrumbs" in method else set()
    weighted = method not in {"slerp", "nearswap", "passthrough", "model_stock", "karcher", "sce"}
    models = [
        {
            "model": str(zoo / f"{k}.safetensors"),
            "parameters": {n: v for n, v in each.items() if n in known and weighted},
        }
        for k, each in enumerate(EACH[: TWO_MODELS.get(method, 3)])
    ]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    if method in WITHOUT_BASE:
        return config
    return config | {"base_model": str(zoo / "base.safetensors")}


@pytest.mark.parametrize(
    ("method", "parameters"), [(m, p) for m, many in EXACT.items() for p in many]
)
def test_the_same_numbers(method: str, parameters: dict[str, Any], zoo: Path, peer, tmp_path: Path):
    config = config_of(zoo, method, parameters)
    theirs = peer(config, tmp_path)
    merge(config, tmp_path / "ours.safetensors", progress=False)
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == theirs.keys()
    base = load_file(zoo / "base.safetensors")
    if parameters.get("filter_wise"):  # of a convolution: the peer takes each row of a kernel
        ours.pop("b.weight")
    for name, tensor in ours.items():
        rounding = 2**-22 * theirs[name].abs().max()
        moved = (theirs[name] - base[name]).abs().max()
        assert (tensor - theirs[name]).abs().max() <= 1e-5 * moved + rounding, name


@pytest.mark.parametrize(
    ("method", "parameters"), [(m, p) for m, many in DRAWN.items() for p in many]
)
def test_the_same_moments(method: str, parameters: dict[str, Any], zoo: Path, peer, tmp_path: Path):
    config = config_of(zoo, method, parameters)
    theirs = peer(config, tmp_path)["c.weight"]
    merge(config, tmp_path / "ours.safetensors", progress=False)
    ours = load_file(tmp_path / "ours.safetensors")["c.weight"]
    base = load_file(zoo / "base.safetensors")["c.weight"]
    ours, theirs = ours - base, theirs - base
    error = float(theirs.std()) / theirs.numel() ** 0.5  # of a mean
    assert not torch.equal(ours, theirs)
    assert abs(float(ours.mean() - theirs.mean())) < 5 * error
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)
    zeros = [float((delta == 0).float().mean()) for delta in (ours, theirs)]
    assert zeros[0] == pytest.approx(zeros[1], abs=0.01)
    for k in range(3):
        model = load_file(zoo / f"{k}.safetensors")["c.weight"] - base
        shares = [
            float(torch.corrcoef(torch.stack([delta.flatten(), model.flatten()]))[0, 1])
            for delta in (ours, theirs)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_breadcrumbs_keeps_something_of_small_tensors(tmp_path: Path):
    save_file({"scale": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "0.safetensors")
    config = {
        "merge_method": "breadcrumbs",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [{"model": str(tmp_path / "0.safetensors"), "parameters": {"density": 0.2}}],
    }
    merge(config, tmp_path / "out.safetensors", progress=False)
    assert load_file(tmp_path / "out.safetensors")["scale"].count_nonzero() == 1
