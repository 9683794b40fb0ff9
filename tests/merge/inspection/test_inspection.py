"""What an inspection finds, against loops over numpy arrays in float64."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inputs.figures import save_figure
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.errors import MergeError
from merge.inspection.heatmap import plot_inspection
from merge.inspection.inspection import Inspection, inspect_models, short_names

BUDGET = 64 << 20
SHAPES = {
    "embed.weight": (11, 5),
    "layers.0.conv.weight": (3, 2, 3, 3),
    "layers.0.scale": (),
    "layers.1.empty": (0, 4),
    "layers.1.weight": (260, 257),
    "head.weight": (1,),
}
LAYER_OF = {
    "embed.weight": "before",
    "layers.0.conv.weight": "layers.0",
    "layers.0.scale": "layers.0",
    "layers.1.empty": "layers.1",
    "layers.1.weight": "layers.1",
    "head.weight": "after",
}


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def opened(folder: Path, models: list[dict[str, Tensor]]) -> list[Checkpoint]:
    folder.mkdir(parents=True, exist_ok=True)
    for k, tensors in enumerate(models):
        save_file(tensors, folder / f"{k}.safetensors")
    return [open_checkpoint(folder / f"{k}.safetensors") for k in range(len(models))]


def inspected(
    folder: Path,
    models: list[dict[str, Tensor]],
    base: dict[str, Tensor] | None = None,
    only: list[str] | None = None,
) -> Inspection:
    anchor = opened(folder / "base", [base])[0] if base is not None else None
    checkpoints = opened(folder / "models", models)
    return inspect_models(checkpoints, base=anchor, only=only, memory_budget=BUDGET, progress=False)


def flat(tensors: dict[str, Tensor], layer: str | None = None) -> np.ndarray:
    names = [name for name in sorted(tensors) if layer in {None, LAYER_OF[name]}]
    return np.concatenate([tensors[name].double().numpy().ravel() for name in names])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("anchored", [True, False])
def test_norms_and_cosines(tmp_path: Path, dtype: torch.dtype, anchored: bool) -> None:
    base = random_tensors(0, dtype)
    models = [random_tensors(seed, dtype) for seed in (1, 2, 3)]
    found = inspected(tmp_path, models, base if anchored else None)
    assert found.anchor == ("base" if anchored else "mean")
    assert found.layers == ("before", "layers.0", "layers.1", "after")
    for layer in (None, *found.layers):
        values = [flat(model, layer) for model in models]
        anchor = flat(base, layer) if anchored else sum(values) / len(values)
        deltas = [value - anchor for value in values]
        expected = [[cosine(a, b) for b in deltas] for a in deltas]
        index = None if layer is None else found.layers.index(layer)
        np.testing.assert_allclose(found.cosines(index), expected, rtol=1e-5, atol=1e-6)
        if layer is None:
            norms = [model.norm for model in found.models]
            np.testing.assert_allclose(norms, [np.linalg.norm(v) for v in values], rtol=1e-6)
            went = [model.delta_norm or 0.0 for model in found.models]
            np.testing.assert_allclose(went, [np.linalg.norm(d) for d in deltas], rtol=1e-6)
        else:
            assert index is not None
            rms = np.sqrt(np.mean([d**2 for d in deltas]))
            assert found.distances()[index] == pytest.approx(rms, rel=1e-6)


def test_signs_are_counted_element_by_element(tmp_path: Path) -> None:
    base = random_tensors(0)
    models = [random_tensors(seed) for seed in (1, 2, 3)]
    generator = torch.Generator().manual_seed(9)
    for model in models:  # many deltas that are zero, which conflict with nothing
        for name, tensor in model.items():
            same = torch.rand(tensor.shape, generator=generator) < 0.5
            model[name] = torch.where(same, base[name], tensor)
    found = inspected(tmp_path, models, base)
    conflict = found.conflict()
    assert conflict is not None
    for k, layer in enumerate(found.layers):
        signs = np.sign([flat(model, layer) - flat(base, layer) for model in models])
        disagree = [len({s for s in column if s}) == 2 for column in signs.T]
        assert conflict[k] == np.mean(disagree)
        opposition = found.opposition(k)
        assert opposition is not None
        for a, b in itertools.product(range(3), repeat=2):
            assert opposition[a, b] == np.mean(signs[a] * signs[b] == -1)
    total = found.opposition()
    assert total is not None
    signs = np.sign([flat(model) - flat(base) for model in models])
    assert total[0, 1] == np.mean(signs[0] * signs[1] == -1)


def test_without_a_base_signs_say_nothing(tmp_path: Path) -> None:
    found = inspected(tmp_path, [random_tensors(1), random_tensors(2)])
    assert found.conflict() is None
    assert found.opposition() is None
    assert found.cosines()[0, 1] == pytest.approx(-1, abs=1e-6)
    assert "to the mean" in found.to_markdown()


@pytest.mark.parametrize("anchored", [True, False])
def test_frozen_tensors_are_equal_everywhere(tmp_path: Path, anchored: bool) -> None:
    base = random_tensors(0)
    models = [random_tensors(seed) for seed in (1, 2, 3)]
    third = torch.full((260, 257), 1 / 3)  # three of them over three is not it in floating point
    for model in models:
        model["layers.1.weight"] = third
        model["embed.weight"] = base["embed.weight"]
    base["layers.1.weight"] = third.clone() if anchored else base["layers.1.weight"]
    base["head.weight"] = models[0]["head.weight"]
    found = inspected(tmp_path, models, base if anchored else None)
    assert found.frozen == ("embed.weight", "layers.1.weight")
    assert np.isnan(found.cosines(found.layers.index("before"))).all()


def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path: Path) -> None:
    base, models = random_tensors(0), [random_tensors(1), random_tensors(2)]
    models[0]["only"] = torch.full((3,), 2.0)
    for tensors in (base, *models):
        tensors["steps"] = torch.tensor([7])
    models[1]["head.weight"] = torch.ones(2)
    found = inspected(tmp_path, models, base)
    missing = [str(tmp_path / "base" / "0.safetensors"), str(tmp_path / "models" / "1.safetensors")]
    assert found.left_out == {
        "head.weight": "shapes differ: [1], [2]",
        "only": f"missing in {', '.join(missing)}",
        "steps": "int64, not floating point",
    }
    expected = np.linalg.norm([t.double().norm() for n, t in models[0].items() if n != "steps"])
    assert found.models[0].norm == pytest.approx(expected, rel=1e-6)
    assert found.models[0].tensors == 8
    assert found.models[0].parameters == sum(t.numel() for t in models[0].values())
    assert found.models[0].dtypes == {"float32": 7, "int64": 1}
    assert "Not compared, int64, not floating point: 1 tensor (steps)." in found.to_markdown()


def test_values_that_are_not_finite_are_counted_and_count_as_zero(tmp_path: Path) -> None:
    base, models = random_tensors(0), [random_tensors(1), random_tensors(2)]
    models[0]["layers.1.weight"][3, 4] = float("nan")
    models[0]["embed.weight"][0] = float("inf")
    base["layers.0.scale"] = torch.tensor(float("-inf"))
    found = inspected(tmp_path, models, base)
    assert [model.nonfinite for model in found.models] == [6, 0]
    assert found.base is not None
    assert found.base.nonfinite == 1
    bad = ~np.isfinite([flat(tensors) for tensors in (base, *models)]).all(0)
    anchor, a, b = (np.where(bad, 0, flat(tensors)) for tensors in (base, *models))
    assert found.cosines()[0, 1] == pytest.approx(cosine(a - anchor, b - anchor), rel=1e-5)
    assert found.models[0].norm == pytest.approx(np.linalg.norm(a), rel=1e-6)


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    tied = tensors | {"tail.weight": tensors["embed.weight"]}
    torch.save(tied, tmp_path / "tied.pt")
    save_file(random_tensors(2), tmp_path / "one.safetensors")
    checkpoints = [open_checkpoint(tmp_path / n) for n in ("tied.pt", "one.safetensors")]
    found = inspect_models(checkpoints, memory_budget=BUDGET, progress=False)
    assert found.tied == (("embed.weight", "tail.weight"),)
    assert found.left_out == {}
    assert found.models[0].tensors == len(SHAPES) + 1
    assert found.models[0].parameters == found.models[1].parameters
    assert found.models[0].norm == pytest.approx(np.linalg.norm(flat(tensors)), rel=1e-6)
    assert found.elements.sum() == found.models[0].parameters
    assert "embed.weight, tail.weight" in found.to_markdown()


def test_tensors_stored_with_gaps_are_read_right(tmp_path: Path) -> None:
    wide = torch.randn(300, 400, generator=torch.Generator().manual_seed(3))
    torch.save({"w": wide.T, "v": wide[:, ::3]}, tmp_path / "a.pt")
    save_file(
        {"w": wide.T.contiguous(), "v": wide[:, ::3].contiguous()}, tmp_path / "b.safetensors"
    )
    checkpoints = [open_checkpoint(tmp_path / n) for n in ("a.pt", "b.safetensors")]
    found = inspect_models(checkpoints, memory_budget=BUDGET, progress=False)
    assert found.frozen == ("v", "w")
    assert found.models[0].norm == found.models[1].norm


def test_a_small_budget_finds_the_same(tmp_path: Path) -> None:
    base = opened(tmp_path / "base", [random_tensors(0)])[0]
    models = opened(tmp_path / "models", [random_tensors(seed) for seed in (1, 2, 3)])
    large = inspect_models(models, base=base, memory_budget=BUDGET, progress=False)
    with pytest.raises(MergeError, match=r"wanted at least \d+ to compare 4") as error:
        inspect_models(models, base=base, memory_budget=1000, progress=False)
    least = int(str(error.value).partition("at least ")[2].split()[0])
    small = inspect_models(models, base=base, memory_budget=least, progress=False)
    np.testing.assert_allclose(small.gram, large.gram, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(small.opposed, large.opposed)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="wanted at least"):
        inspect_models(models, base=base, memory_budget=least - 1, progress=False)


def test_one_model_alone_and_none(tmp_path: Path) -> None:
    found = inspected(tmp_path, [random_tensors(1)])
    assert found.models[0].delta_norm is None
    assert found.frozen == ()
    assert "## Models" in found.to_markdown()
    assert "## Layers" not in found.to_markdown()
    with pytest.raises(MergeError, match="nothing to inspect"):
        inspect_models([], memory_budget=BUDGET)
    with pytest.raises(MergeError, match="2 names for 1 models"):
        inspect_models(
            opened(tmp_path, [{} | random_tensors(1)]), names=["a", "b"], memory_budget=BUDGET
        )


def test_two_towers_have_rows_of_their_own(tmp_path: Path) -> None:
    names = [f"{tower}blocks.{k}.w" for tower in ("", "visual.") for k in range(2)]
    models = [{name: torch.full((2,), float(seed)) for name in names} for seed in (1, 2)]
    found = inspected(tmp_path, models)
    assert found.layers == ("blocks.0", "blocks.1", "visual.blocks.0", "visual.blocks.1")
    assert found.elements.tolist() == [2, 2, 2, 2]


def test_the_tables_are_written(tmp_path: Path) -> None:
    found = inspected(tmp_path, [random_tensors(1), random_tensors(2)], random_tensors(0))
    found.save(tmp_path / "out")
    tables = found.tables()
    assert set(tables) == {"models", "layers", "cosine", "pairs", "tensors"}
    for name in tables:
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(tables[name])
        if name == "pairs":
            assert [row["layer"] for row in rows] == ["all", *found.layers]
            assert float(rows[0]["cosine"]) == found.cosines()[0, 1]
            assert float(rows[0]["opposed"]) == found.opposition()[0, 1]  # type: ignore[index]
    assert (tmp_path / "out" / "inspection.md").read_text() == found.to_markdown() + "\n"


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["zoo/a.safetensors", "zoo/b.safetensors"], ["a", "b"]),
        (["x/a/model.safetensors", "x/b/model.safetensors"], ["a", "b"]),
        (["x/a/1/m", "x/b/2/m"], ["a/1", "b/2"]),
        (["a", "x/b"], ["a", "x/b"]),
        (["a", "a"], ["a (1)", "a (2)"]),
        (["zoo/a.pt"], ["a.pt"]),
        (["owner/a", "/x/b"], ["owner/a", "/x/b"]),
    ],
)
def test_short_names_tell_paths_apart(paths: list[str], short: list[str]) -> None:
    assert short_names(paths) == short


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_the_picture(tmp_path: Path, count: int, anchored: bool) -> None:
    models = [random_tensors(seed) for seed in range(1, count + 1)]
    found = inspected(tmp_path, models, random_tensors(0) if anchored else None)
    figure = plot_inspection(found.tables())
    figure.savefig(tmp_path / "a.png", dpi=40)
    paired = anchored and count > 1
    heat, rows = figure.axes[0], figure.axes[2 if paired else 1]
    assert [label.get_text().split()[0] for label in heat.get_yticklabels()] == found.names
    shown = np.ma.getdata(heat.images[0].get_array())  # type: ignore[call-overload]
    off = ~np.eye(count, dtype=bool)
    np.testing.assert_array_equal(shown[off], found.cosines()[off])
    if paired:
        opposed = np.ma.getdata(figure.axes[1].images[0].get_array())  # type: ignore[call-overload]
        np.testing.assert_array_equal(opposed[off], 100 * found.opposition()[off])  # type: ignore[index]
    widths = [bar.get_width() for bar in rows.patches]  # type: ignore[attr-defined]
    conflict = found.conflict()
    expected = found.distances() if conflict is None else 100 * conflict
    np.testing.assert_allclose(widths, expected, rtol=1e-12)
    # Signs are shown for pairs only where these differ from all.
    assert bool(rows.lines) == (anchored and count > 2)


def test_the_picture_of_saved_tables_is_the_same(tmp_path: Path) -> None:
    found = inspected(tmp_path, [random_tensors(seed) for seed in (1, 2, 3)], random_tensors(0))
    found.save(tmp_path / "tables")
    saved = {name: pd.read_csv(tmp_path / "tables" / f"{name}.csv") for name in found.tables()}
    for name, tables in (("a.png", found.tables()), ("b.png", saved)):
        save_figure(plot_inspection(tables), tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_of_some_tensors(tmp_path: Path) -> None:
    models = [random_tensors(seed) for seed in (1, 2)]
    name = next(iter(models[0]))
    whole, part = (
        inspected(tmp_path, models, random_tensors(0), only=only) for only in (None, [name])
    )
    assert part.elements.sum() == models[0][name].numel() < whole.elements.sum()
