"""Cooking: the same bits as mixing in memory, the same bytes again, and nothing on an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.checkpoints import Checkpoint, open_checkpoint, scan
from merge.coefficients import Coefficients, Ingredient
from merge.cooking import cook
from merge.errors import MergeError
from merge.mixing import combine

BUDGET = 2**24
Tensors = dict[str, Tensor]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "stem.weight": torch.randn(6, 5, generator=generator).to(dtype),
        "bn.running_var": torch.rand(6, generator=generator).to(dtype) + 0.5,
        "bn.num_batches_tracked": torch.tensor(seed),
        "head.weight": torch.randn(3, 6, generator=generator).to(dtype),
        "head.bias": torch.randn(3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
    }


GROUPS = {"body": ("scale", "stem.weight", "bn.running_var"), "head": ("head.weight", "head.bias")}
CARRIED = {"bn.num_batches_tracked": "int64 values are not mixed"}


def save_zoo(folder: Path, models: list[Tensors], pickled: bool = False) -> list[Checkpoint]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, tensors in enumerate(models):
        if pickled and k % 2:
            paths.append(folder / f"{k}.pt")
            state = {f"module.{name}": tensor for name, tensor in tensors.items()}
            torch.save({"state_dict": state}, paths[-1])
        else:
            paths.append(folder / f"{k}.safetensors")
            save_file(tensors, paths[-1])
    return [open_checkpoint(path) for path in paths]


def coefficients(
    checkpoints: list[Checkpoint],
    matrix: Any,
    *,
    base: Checkpoint | None = None,
    groups: dict[str, tuple[str, ...]] | None = None,
    carried: dict[str, str] | None = None,
    temperature: float = 1.0,
) -> Coefficients:
    return Coefficients(
        ingredients=tuple(
            Ingredient(str(k), scan(checkpoint).sha256) for k, checkpoint in enumerate(checkpoints)
        ),
        groups=GROUPS if groups is None else groups,
        matrix=np.array(matrix, dtype=np.float64),
        base=None if base is None else Ingredient("base", scan(base).sha256),
        carried=CARRIED if carried is None else carried,
        temperature=temperature,
        method="test",
    )


MATRIX = [[0.5, 0.1], [0.3, 0.7], [0.2, 0.2]]


@given(
    count=st.integers(1, 4),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        min_size=4,
        max_size=4,
    ),
    numbers=st.lists(st.floats(-0.5, 1.5), min_size=8, max_size=8),
    with_base=st.booleans(),
    memory_budget=st.sampled_from([300, 1000, BUDGET]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_combine_bit_for_bit_and_near_the_sum_in_fp64(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    dtypes: list[torch.dtype],
    numbers: list[float],
    with_base: bool,
    memory_budget: int,
) -> None:
    folder = tmp_path_factory.mktemp("cook")
    groups = {"a": ("stem.weight", "scale"), "b": ("head.weight", "head.bias")}
    models = [model(k, dtypes[k]) for k in range(count)]
    checkpoints = save_zoo(folder, models, pickled=True)
    matrix = np.array(numbers[: 2 * count]).reshape(count, 2)
    base = save_zoo(folder / "base", [model(9)])[0] if with_base else None
    if base is None:
        matrix[0] += 1 - matrix.sum(0)
    else:
        models = [*models, model(9)]
    carried = CARRIED | {"bn.running_var": "skip"}
    found = coefficients(checkpoints, matrix, base=base, groups=groups, carried=carried)
    out = folder / "soup.safetensors"
    record = cook(found, checkpoints, out, base=base, memory_budget=memory_budget, progress=False)
    soup = load_file(out)
    assert set(soup) == set(found.tensors) | set(carried)
    giver = models[-1] if with_base else models[0]
    for name in carried:
        assert bits(soup[name]) == bits(giver[name])
    for name in found.tensors:
        sources, weights = [m[name] for m in models], found.weights(name)
        assert bits(soup[name]) == bits(combine(sources, weights, dtype=dtypes[0]))
        terms = torch.stack([w * s.double() for w, s in zip(weights, sources, strict=True)])
        epsilon = {torch.float64: 1e-12, torch.float32: 1e-6}.get(
            dtypes[0], torch.finfo(dtypes[0]).eps
        )
        scale = 1 + terms.abs().sum(0)
        assert bool(((soup[name].double() - terms.sum(0)).abs() <= epsilon * scale).all())
    assert record["bytes_written"] == sum(t.nbytes for t in soup.values())


def test_a_one_hot_soup_is_the_ingredient(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    checkpoints = save_zoo(tmp_path, models)
    matrix = [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    found = coefficients(checkpoints, matrix)
    record = cook(found, checkpoints, tmp_path / "out", memory_budget=BUDGET, progress=False)
    soup = load_file(tmp_path / "out")
    for name in found.tensors:
        assert bits(soup[name]) == bits(models[1][name])
    mixed_bytes = sum(models[1][name].nbytes for name in found.tensors)
    assert record["bytes_read"] == mixed_bytes + 8  # no ingredient that weighs nothing


def test_a_soup_of_equal_ingredients_has_their_hash(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(5)] * 3)
    found = coefficients(checkpoints, MATRIX)
    cook(found, checkpoints, tmp_path / "out.safetensors", memory_budget=BUDGET, progress=False)
    with open_checkpoint(tmp_path / "out.safetensors") as soup:
        assert scan(soup).sha256 == found.ingredients[0].sha256


def test_cooking_again_gives_the_same_bytes_whatever_the_budget(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k, torch.bfloat16) for k in range(3)])
    found = coefficients(checkpoints, MATRIX)
    found.save(tmp_path / "found.json")
    cook(found, checkpoints, tmp_path / "a.safetensors", memory_budget=BUDGET, progress=False)
    again = Coefficients.load(tmp_path / "found.json")
    cook(again, checkpoints, tmp_path / "b.safetensors", memory_budget=200, progress=False)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "coefficients": found.sha256}


def test_shards_hold_the_same_soup(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k) for k in range(3)])
    found = coefficients(checkpoints, MATRIX)
    cook(found, checkpoints, tmp_path / "one.safetensors", memory_budget=BUDGET, progress=False)
    cook(
        found,
        checkpoints,
        tmp_path / "shards",
        memory_budget=BUDGET,
        max_shard_bytes=150,
        progress=False,
    )
    with (
        open_checkpoint(tmp_path / "one.safetensors") as one,
        open_checkpoint(tmp_path / "shards") as shards,
    ):
        assert len(shards.files) > 1
        assert scan(one) == scan(shards)


def test_the_record_names_casts_and_carried_tensors(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(0), model(1, torch.float16), model(2)])
    found = coefficients(checkpoints, MATRIX)
    record = cook(found, checkpoints, tmp_path / "out", memory_budget=BUDGET, progress=False)
    assert record["carried"] == CARRIED
    assert record["casts"] == [
        {
            "checkpoint": checkpoints[1].path,
            "from": "float16",
            "to": "float32",
            "tensors": sorted(found.tensors),
        }
    ]
    assert record["coefficients"] == found.sha256
    assert record["seconds"] > 0


def test_the_temperature_is_folded_only_when_asked(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k) for k in range(3)])
    found = coefficients(checkpoints, MATRIX, temperature=2.5)
    cook(found, checkpoints, tmp_path / "plain", memory_budget=BUDGET, progress=False)
    cook(
        found,
        checkpoints,
        tmp_path / "folded",
        memory_budget=200,
        fold_temperature="head",
        progress=False,
    )
    plain, folded = load_file(tmp_path / "plain"), load_file(tmp_path / "folded")
    for name, tensor in plain.items():
        factor = 2.5 if name.startswith("head") else 1
        assert bits(folded[name]) == bits(tensor * factor if factor != 1 else tensor)
    with pytest.raises(MergeError, match=r"fold_temperature: 'haed' has no weight.*'head'"):
        cook(
            found,
            checkpoints,
            tmp_path / "wrong",
            memory_budget=BUDGET,
            fold_temperature="haed",
            progress=False,
        )
    assert not (tmp_path / "wrong").exists()


def test_the_temperature_is_folded_into_a_carried_head(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k, torch.float16) for k in range(3)])
    carried = CARRIED | {"head.weight": "skip", "head.bias": "skip"}
    groups = {"body": GROUPS["body"]}
    found = coefficients(
        checkpoints, [[0.5], [0.3], [0.2]], groups=groups, carried=carried, temperature=3.0
    )
    out = tmp_path / "out"
    cook(found, checkpoints, out, memory_budget=BUDGET, fold_temperature="head", progress=False)
    wanted = (model(0, torch.float16)["head.weight"].float() * 3).half()
    assert bits(load_file(out)["head.weight"]) == bits(wanted)


def refuse(
    found: Coefficients, checkpoints: list[Checkpoint], folder: Path, match: str, **changes: Any
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    out = changes.pop("out", folder / "soup.safetensors")
    with pytest.raises(MergeError, match=match):
        cook(
            found,
            checkpoints,
            out,
            **({"memory_budget": BUDGET, "progress": False} | changes),
        )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_other_weights_are_refused(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k) for k in range(3)])
    found = coefficients(checkpoints, MATRIX)
    scans = [scan(c) for c in checkpoints]
    cook(found, checkpoints, tmp_path / "a", memory_budget=BUDGET, scans=scans, progress=False)
    swapped = [checkpoints[k] for k in (1, 0, 2)]
    refuse(
        found,
        swapped,
        tmp_path,
        r"1.safetensors: SHA-256 is .* ingredient '0' was",
        scans=[scans[k] for k in (1, 0, 2)],
    )
    refuse(found, checkpoints[:2], tmp_path, "2 checkpoints were given, wanted 3")


def test_names_shapes_and_dtypes_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    found = coefficients(save_zoo(tmp_path / "good", models), MATRIX)
    del models[0]["head.bias"]
    models[1]["stem.weight"] = torch.randn(7, 5)
    models[2]["scale"] = torch.tensor(3)
    checkpoints = save_zoo(tmp_path / "bad", models)
    for match in (
        r"0.safetensors: 'head.bias' is missing",
        r"1.safetensors: 'stem.weight' is \[7, 5\], \S*0.safetensors has \[6, 5\]",
        r"2.safetensors: 'scale' is int64, which is not mixed",
    ):
        refuse(found, checkpoints, tmp_path, match)


def test_a_carried_tensor_that_nobody_has_is_named(tmp_path: Path) -> None:
    checkpoints = save_zoo(tmp_path, [model(k) for k in range(3)])
    found = coefficients(checkpoints, MATRIX, carried=CARRIED | {"gone": "skip"})
    refuse(found, checkpoints, tmp_path, "'gone' is missing, wanted to be carried")


@pytest.mark.parametrize("through", ["file", "link", "hard link", "folder"])
def test_the_output_may_not_be_an_input(tmp_path: Path, through: str) -> None:
    checkpoints = save_zoo(tmp_path / "zoo", [model(k) for k in range(3)])
    found = coefficients(checkpoints, MATRIX)
    out = tmp_path / "zoo" / "1.safetensors"
    if through == "link":
        (tmp_path / "soup").symlink_to(out)
        out = tmp_path / "soup"
    elif through == "hard link":
        (tmp_path / "soup").hardlink_to(out)
        out = tmp_path / "soup"
    elif through == "folder":
        out = tmp_path / "zoo" / ".." / "zoo"
    changes = {"max_shard_bytes": 1000} if through == "folder" else {}
    refuse(found, checkpoints, tmp_path, "holds the input .*/zoo/", out=out, **changes)


def test_values_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[1]["head.weight"][1, 1] = torch.nan
    checkpoints = save_zoo(tmp_path, models)
    found = coefficients(checkpoints, MATRIX)
    refuse(found, checkpoints, tmp_path, "'head.weight': the result has non-finite values")
    carried = CARRIED | {"head.weight": "skip", "head.bias": "skip"}
    found = coefficients(
        [checkpoints[1]], [[1.0]], groups={"body": GROUPS["body"]}, carried=carried
    )
    cook(found, [checkpoints[1]], tmp_path / "out", memory_budget=BUDGET, progress=False)
    assert bits(load_file(tmp_path / "out")["head.weight"]) == bits(models[1]["head.weight"])


def test_a_sum_beyond_the_range_of_the_stored_dtype_stops_it(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([60000.0]).half()}, {"w": torch.tensor([-60000.0]).half()}]
    checkpoints = save_zoo(tmp_path, models)
    found = coefficients(checkpoints, [[2.0], [-1.0]], groups={"m": ("w",)}, carried={})
    refuse(found, checkpoints, tmp_path, "'w': the result has non-finite values.*float16")


def test_a_variance_that_is_not_positive_stops_it(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[0]["bn.running_var"][2] = 9.0
    checkpoints = save_zoo(tmp_path, models)
    found = coefficients(checkpoints, [[-0.9, 0.0], [0.9, 0.5], [1.0, 0.5]])
    refuse(found, checkpoints, tmp_path, "'bn.running_var': the smallest mixed variance is -")


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    paths = []
    for k in range(2):
        weight = torch.full((2, 2), float(k))
        paths.append(tmp_path / f"{k}.pt")
        torch.save({"embed": weight, "head": weight}, paths[-1])
    save_file({"embed": torch.full((2, 2), 2.0)}, tmp_path / "2.safetensors")
    checkpoints = [open_checkpoint(p) for p in [*paths, tmp_path / "2.safetensors"]]
    one = {"model": ("embed", "head")}
    found = coefficients(checkpoints, [[0.25], [0.25], [0.5]], groups=one, carried={})
    cook(found, checkpoints, tmp_path / "out", memory_budget=BUDGET, progress=False)
    soup = load_file(tmp_path / "out")
    assert soup["embed"].tolist() == soup["head"].tolist() == [[1.25, 1.25], [1.25, 1.25]]
    two = {"a": ("embed",), "b": ("head",)}
    apart = coefficients(checkpoints, [[0.25, 1], [0.25, 0], [0.5, 0]], groups=two, carried={})
    refuse(apart, checkpoints, tmp_path, "'embed' and 'head' are tied, but their groups")


PEAK = """
import sys
from pathlib import Path
import numpy as np
from merge.checkpoints import open_checkpoint
from merge.coefficients import Coefficients, Ingredient
from merge.cooking import cook

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder, count = Path(sys.argv[1]), int(sys.argv[2])
checkpoints = [open_checkpoint(folder / f"{k % 3}.safetensors") for k in range(count)]
found = Coefficients(
    tuple(Ingredient(str(k), f"{k:064}") for k in range(count)),
    {"model": tuple(checkpoints[0].tensors)}, np.full((count, 1), 1 / count),
)
import torch
torch.ones(9).add_(torch.ones(9), alpha=2.0)
before = resident("VmRSS")
cook(found, checkpoints, folder / "out.safetensors", memory_budget=50 << 20, progress=False)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_bounded_by_the_budget_and_not_by_the_number_of_ingredients(
    tmp_path: Path,
) -> None:
    for k in range(3):
        tensors = {f"t{i}": torch.randn(1 << 22) for i in range(4)}  # 64 MiB, each tensor 16
        save_file(tensors, tmp_path / f"{k}.safetensors")
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(tmp_path), str(count)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for count in (3, 24)
    ]
    assert max(peaks) < 58 << 20  # the budget and what a run needs besides tensors
    assert peaks[1] - peaks[0] < 4 << 20
