"""What the engine streams is what the methods give on plain tensors, whatever the budget."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.errors import MergeError
from merge.merging import merge
from merge.method import Method
from merge.part import Part
from merge.registry import METHODS

SHAPES = {
    "blocks.0.weight": (300, 500),
    "blocks.0.bias": (500,),
    "blocks.1.weight": (20, 10, 3, 3),
    "empty": (0, 4),
    "head.scale": (),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.01},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1},
    "wudi": {"iterations": 3},
}
PLAIN = [method for method in METHODS.values() if method.statistics is None]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for k in range(3):
        tensors = {name: t + 0.05 * torch.randn(t.shape) for name, t in base.items()}
        save_file(tensors, folder / f"{k}.safetensors")
    return folder


def config_of(method: Method, zoo: Path, **more: Any) -> dict[str, Any]:
    most = method.models[1] or 3
    config = {
        "merge_method": method.name,
        "models": [{"model": str(zoo / f"{k}.safetensors")} for k in range(min(most, 3))],
        "parameters": SETTINGS.get(method.name, {}),
    }
    if method.base != "ignored":
        config["base_model"] = str(zoo / "base.safetensors")
    return config | more


def run(method: Method, zoo: Path, out: Path, **more: Any) -> dict[str, Tensor]:
    merge(config_of(method, zoo, **more), out, progress=False)
    return load_file(out)


@pytest.mark.parametrize("method", PLAIN, ids=lambda method: method.name)
def test_it_is_the_method_on_plain_tensors(method: Method, zoo: Path, tmp_path: Path):
    config = config_of(method, zoo)
    found = run(method, zoo, tmp_path / "out.safetensors")
    models = [load_file(entry["model"]) for entry in config["models"]]
    base = load_file(config["base_model"]) if "base_model" in config else None
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        depth = {"blocks.0": 0.0, "blocks.1": 1.0, "head.sca": 1.0}.get(name[:8], 0.0)
        expected = method(
            None if base is None else base[name],
            [model[name] for model in models],
            part=Part(name, depth=depth),
            **config["parameters"],
        )
        assert tensor.shape == expected.shape
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", PLAIN, ids=lambda method: method.name)
def test_a_small_budget_gives_the_same(method: Method, zoo: Path, tmp_path: Path):
    """Measured and merged in two passes, by slices; what needs whole tensors says so."""
    large = run(method, zoo, tmp_path / "large.safetensors")
    needed = 30 * 300 * 500 * 4 if method.acts_on == "tensors" else 4_000_000
    small = run(method, zoo, tmp_path / "small.safetensors", memory_budget=needed)
    for name, tensor in small.items():
        assert torch.equal(tensor, large[name]), name


def test_an_embedding_is_measured_in_slices(tmp_path: Path):
    """Its thresholds are exact, and its norms are summed in the same blocks."""
    for name in ("base", "0", "1"):
        save_file({"w": torch.randn(5000, 300).half()}, tmp_path / f"{name}.safetensors")
    budget = 5000 * 300 * 2 * 4
    for name in ("ties", "breadcrumbs", "dare_linear", "della", "sce", "model_stock"):
        config = config_of(METHODS[name], tmp_path)
        config["models"] = config["models"][:2]
        config["parameters"] = SETTINGS.get(name, {})
        if name in ("ties", "breadcrumbs"):
            config["parameters"] = config["parameters"] | {"rescale": True}
        large, small = tmp_path / f"{name}-large.safetensors", tmp_path / f"{name}.safetensors"
        once = merge(config, large, progress=False)
        more = merge(config | {"memory_budget": budget}, small, progress=False)
        assert more["bytes_read"] > once["bytes_read"], name
        assert torch.equal(load_file(small)["w"], load_file(large)["w"]), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ties", {"density": 1.0, "rescale": True}),
        ("dare_linear", {"density": 0.3, "rescale": False}),
        ("della", {"density": 0.3, "epsilon": 0.1, "rescale_by": "probability"}),
    ],
)
def test_what_needs_no_measuring_is_read_once(
    name: str, parameters: dict[str, Any], zoo: Path, tmp_path: Path
):
    config = config_of(METHODS[name], zoo, parameters=parameters, memory_budget=2_000_000)
    record = merge(config, tmp_path / "out.safetensors", progress=False)
    size = sum(t.nbytes for t in load_file(zoo / "base.safetensors").values())
    assert record["bytes_read"] == 4 * size


@pytest.mark.parametrize("name", ["dare_linear", "della", "knots"])
def test_moving_the_models_changes_no_draw(name: str, zoo: Path, tmp_path: Path):
    parameters = {"merge": "dare_linear"} if name == "knots" else SETTINGS[name]
    before = run(METHODS[name], zoo, tmp_path / "a.safetensors", parameters=parameters)
    shutil.copytree(zoo, tmp_path / "moved")
    moved = tmp_path / "moved"
    after = run(METHODS[name], moved, tmp_path / "b.safetensors", parameters=parameters)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", PLAIN, ids=lambda method: method.name)
def test_half_precision_is_merged_in_single(method: Method, zoo: Path, tmp_path: Path):
    for path in zoo.glob("*.safetensors"):
        halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(halves, tmp_path / path.name)
        save_file({n: t.float() for n, t in halves.items()}, tmp_path / f"wide-{path.name}")
    half, wide = config_of(method, tmp_path), config_of(method, tmp_path)
    for entry in wide["models"]:
        entry["model"] = str(tmp_path / f"wide-{Path(entry['model']).name}")
    if "base_model" in wide:
        wide["base_model"] = str(tmp_path / "wide-base.safetensors")
    merge(half, tmp_path / "half.safetensors", progress=False)
    merge(wide | {"dtype": "bfloat16"}, tmp_path / "wide.safetensors", progress=False)
    found, expected = (load_file(tmp_path / f"{n}.safetensors") for n in ("half", "wide"))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


def test_ties_over_all_of_the_model(zoo: Path, tmp_path: Path):
    parameters = {"density": 0.2, "scope": "model", "normalize_by": "count"}
    found = run(METHODS["ties"], zoo, tmp_path / "out.safetensors", parameters=parameters)
    base = load_file(zoo / "base.safetensors")

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([(tensors[n] - base[n]).double().flatten() for n in sorted(base)])

    trimmed = torch.stack([flat(load_file(zoo / f"{k}.safetensors")) for k in range(3)])
    for delta in trimmed:
        least = delta.abs().sort(descending=True).values[int(0.2 * len(delta)) - 1]
        delta[delta.abs() < least] = 0
    agree = trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1, -1)
    expected = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(flat(found), expected, rtol=1e-5, atol=1e-6)
    budget = {"memory_budget": 1_000_000}
    small = run(METHODS["ties"], zoo, tmp_path / "b.safetensors", parameters=parameters, **budget)
    assert all(torch.equal(tensor, small[name]) for name, tensor in found.items())


def test_other_settings_leave_the_trimming_over_all_of_the_model(zoo: Path, tmp_path: Path):
    shared = {"density": 0.2, "scope": "model", "normalize": False}
    weighted = shared | {"weight": [{"filter": "blocks.0", "value": 0.5}, {"value": 1.0}]}
    plain = run(METHODS["ties"], zoo, tmp_path / "a.safetensors", parameters=shared)
    found = run(METHODS["ties"], zoo, tmp_path / "b.safetensors", parameters=weighted)
    base = load_file(zoo / "base.safetensors")
    for name, tensor in found.items():
        factor = 0.5 if "blocks.0" in name else 1.0
        wanted = base[name] + factor * (plain[name] - base[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


def test_a_tied_tensor_counts_once(tmp_path: Path):
    """A model stored with its head twice is trimmed like one that stores it once."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    for name in ("base", "0", "1", "2"):
        head, other = torch.randn(40, 30), torch.randn(50, 20)
        save_file({"a": head, "c": other}, once / f"{name}.safetensors")
        torch.save({"a": head, "b": head, "c": other}, twice / f"{name}.pt")
    parameters = {"density": 0.2, "scope": "model"}
    plain = run(METHODS["ties"], once, tmp_path / "a.safetensors", parameters=parameters)
    config = config_of(METHODS["ties"], twice, parameters=parameters)
    config["base_model"] = str(twice / "base.pt")
    config["models"] = [{"model": str(twice / f"{k}.pt")} for k in range(3)]
    merge(config, tmp_path / "b.safetensors", progress=False)
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["a"], plain["a"])
    assert torch.equal(found["b"], plain["a"])
    assert torch.equal(found["c"], plain["c"])


def test_errors_of_a_method_name_the_tensor(tmp_path: Path):
    """Three directions in a plane that balance out: no mean of theirs is a direction."""
    turns = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3])
    for k, turn in enumerate(turns):
        save_file({"w": torch.stack([turn.cos(), turn.sin()])}, tmp_path / f"{k}.safetensors")
    config = config_of(METHODS["multislerp"], tmp_path, parameters={"weight": 1.0})
    config.pop("base_model", None)
    with pytest.raises(MergeError, match=r"'w': multislerp: .*balance out"):
        merge(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
