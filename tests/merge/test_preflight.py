"""Preflight on real files: every kind of trouble is found, named and given a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge.checkpoints import Checkpoint, open_checkpoint, scan
from merge.errors import MergeError
from merge.preflight import Preflight, inspect_ingredients

Tensors = dict[str, Tensor]


def model(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "stem.weight": torch.randn(4, 3, generator=generator),
        "bn.num_batches_tracked": torch.tensor(seed),
        "head.weight": torch.randn(10, 4, generator=generator),
        "head.bias": torch.randn(10, generator=generator),
    }


def opened(folder: Path, models: list[Tensors]) -> list[Checkpoint]:
    folder.mkdir(parents=True, exist_ok=True)
    for k, tensors in enumerate(models):
        save_file(tensors, folder / f"{k}.safetensors")
    return [open_checkpoint(folder / f"{k}.safetensors") for k in range(len(models))]


def expected_of(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def inspect(checkpoints: list[Checkpoint], **settings: Any) -> Preflight:
    return inspect_ingredients(checkpoints, progress=False, **settings)


def only(messages: list[str]) -> str:
    assert len(messages) == 1, messages
    return messages[0]


def test_a_sound_zoo_has_no_problems(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    checkpoints = opened(tmp_path, models)
    base = opened(tmp_path / "base", [model(9)])[0]
    found = inspect(checkpoints, base=base, expected=expected_of(models[0]))
    assert (found.problems, found.warnings, found.notes) == ([], [], [])
    assert found.mixed == ("head.bias", "head.weight", "stem.weight")
    assert found.carried == {"bn.num_batches_tracked": "int64 values are not mixed"}
    assert found.frozen == ()
    assert found.scans == tuple(scan(c) for c in checkpoints)
    assert found.base_scan == scan(base)
    found.raise_if_broken()


def test_no_ingredients_and_one() -> None:
    assert "no ingredients" in only(inspect([]).problems)


def test_one_ingredient_is_a_warning(tmp_path: Path) -> None:
    found = inspect(opened(tmp_path, [model(0)]))
    assert found.problems == []
    assert "0.safetensors is the only ingredient" in only(found.warnings)
    assert found.frozen == ()


def test_another_number_of_classes_gets_the_skip_that_helps(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[1] |= {"head.weight": torch.randn(100, 4), "head.bias": torch.randn(100)}
    checkpoints = opened(tmp_path, models)
    problem = only(inspect(checkpoints).problems)
    for part in (
        "1.safetensors: ",
        "'head.bias' is [100]",
        "'head.weight' is [100, 4], ",
        "0.safetensors has [10, 4]",
        "merge models with the same head",
        "skip: ['head.*']",
    ):
        assert part in problem
    base = opened(tmp_path / "base", [models[1]])[0]
    problem = only(inspect(checkpoints, base=base).problems)
    assert "0.safetensors and 1 more checkpoints: " in problem
    assert "the base has [100, 4]" in problem
    problem = only(inspect(checkpoints, expected=expected_of(models[0])).problems)
    assert "the model has [10, 4]" in problem
    found = inspect(checkpoints, skip=["head.*"])
    assert found.problems == []
    assert found.carried["head.weight"] == "skip: 'head.*'"
    assert found.mixed == ("stem.weight",)


def test_what_most_have_is_wanted_whoever_is_first(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[0]["stem.weight"] = torch.randn(4, 5)
    problem = only(inspect(opened(tmp_path, models)).problems)
    assert "0.safetensors: 'stem.weight' is [4, 5], " in problem
    assert "1.safetensors has [4, 3]" in problem
    assert "merge models of one architecture" in problem


def test_missing_and_extra_names(tmp_path: Path) -> None:
    models = [model(k) for k in range(4)]
    models[2]["stem.wieght"] = models[2].pop("stem.weight")
    missing, extra = inspect(opened(tmp_path, models)).problems
    assert "2.safetensors: 'stem.weight' is missing, the other ingredients" in missing
    assert "the nearest name there is 'stem.wieght'" in missing
    assert "2.safetensors: has 'stem.wieght', which most ingredients do not have" in extra
    assert "skip: ['stem.*']" in extra


def test_the_remedy_for_extra_names_leaves_what_the_model_has(tmp_path: Path) -> None:
    """As in CLIP's files: `tower.*` would be all of the model."""
    wanted = {f"tower.{name}": tensor for name, tensor in model(0).items()}
    models = [wanted | {"tower.scale": torch.ones(2), "old.weight": torch.ones(2)}] * 2
    problem = only(inspect(opened(tmp_path, models), expected=expected_of(wanted)).problems)
    assert problem.endswith("skip: ['old.*', 'tower.scale']")


def test_files_with_the_same_trouble_share_one_message(tmp_path: Path) -> None:
    models = [model(k) for k in range(6)]
    for tensors in models:
        tensors |= {f"old.{i}.weight": torch.randn(2) for i in range(50)}
    problem = only(inspect(opened(tmp_path, models), expected=expected_of(model(0))).problems)
    assert "0.safetensors and 5 more checkpoints: has 'old.0.weight'" in problem
    assert "and 46 more, which the model does not have" in problem
    assert len(problem) < 500


def test_extra_names_that_are_skipped_are_left_out_with_a_note(tmp_path: Path) -> None:
    models = [model(k) | {"ema.decay": torch.ones(1)} for k in range(2)]
    found = inspect(opened(tmp_path, models), expected=expected_of(model(0)), skip=["ema.*"])
    assert found.problems == []
    assert "'ema.decay' is left out: skip: 'ema.*'" in only(found.notes)
    assert "ema.decay" not in found.carried
    assert inspect(opened(tmp_path, models), skip=["ema.*"]).carried["ema.decay"]


def test_a_skip_that_matches_nothing(tmp_path: Path) -> None:
    found = inspect(opened(tmp_path, [model(0), model(1)]), skip=["haed.weight", "HEAD.*"])
    first, second = found.problems
    assert "skip: 'haed.weight' matches no tensor; the nearest names are 'head.weight'" in first
    assert "'HEAD.*'" in second


def test_skipping_everything_is_a_problem(tmp_path: Path) -> None:
    found = inspect(opened(tmp_path, [model(0), model(1)]), skip=["*"])
    assert "no tensor is left to mix, 4 are carried" in only(found.problems)


def test_several_dtypes_are_noted(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[1] = {n: t.half() if t.is_floating_point() else t for n, t in models[1].items()}
    found = inspect(opened(tmp_path, models))
    assert found.problems == []
    note = only(found.notes)
    assert "1.safetensors: 'head.bias', 'head.weight', 'stem.weight' are float16" in note
    assert "stored as float32" in note


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("known", [True, False])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype, known: bool) -> None:
    models = [model(k) for k in range(2)]
    for tensors in models:
        tensors["stem.weight"] = tensors["stem.weight"].to(dtype)
    settings = {"expected": expected_of(model(0))} if known else {}
    problems = inspect(opened(tmp_path, models), **settings).problems
    assert len(problems) == 2
    name = str(dtype).removeprefix("torch.")
    assert f"'stem.weight' is quantised ({name}), wanted float32" in problems[0]
    found = inspect(opened(tmp_path, models), skip=["stem.*"], **settings)
    assert found.problems == []


def test_masks_and_counters_are_carried(tmp_path: Path) -> None:
    masks = {"attn.mask": torch.ones(2, 2, dtype=torch.bool), "attn.bias": torch.ones(2).byte()}
    found = inspect(opened(tmp_path, [model(0) | masks, model(1) | masks]))
    assert found.problems == []
    assert found.carried["attn.mask"] == "bool values are not mixed"
    assert found.carried["attn.bias"] == "uint8 values are not mixed"


def test_whole_numbers_where_others_have_floats(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[2]["head.bias"] = torch.arange(10)
    problem = only(inspect(opened(tmp_path, models)).problems)
    assert "2.safetensors: 'head.bias' is int64, wanted floating point" in problem


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    models = [model(k) for k in range(3)]
    models[1]["head.weight"][:2, 1] = torch.nan
    models[1]["stem.weight"][0, 0] = torch.inf
    checkpoints = opened(tmp_path, models)
    problem = only(inspect(checkpoints).problems)
    for part in (
        "1.safetensors: ",
        "'head.weight' has 2 of 40",
        "'stem.weight' has 1 of 12",
        "skip: ['head.*', 'stem.*']",
    ):
        assert part in problem
    assert inspect(checkpoints, check_finite=False).problems == []
    found = inspect(checkpoints, skip=["head.*", "stem.weight"], expected=expected_of(models[0]))
    assert "no tensor is left" in only(found.problems)
    assert len([note for note in found.notes if "and is not mixed" in note]) == 2


def test_frozen_tensors_and_the_same_ingredient_twice(tmp_path: Path) -> None:
    models = [model(k) | {"stem.weight": torch.ones(4, 3)} for k in (0, 1, 0)]
    found = inspect(opened(tmp_path, models))
    assert found.problems == []
    assert found.frozen == ("stem.weight",)
    assert "'stem.weight' is the same in all ingredients (frozen)" in only(found.notes)
    warning = only(found.warnings)
    assert "0.safetensors" in warning
    assert "2.safetensors' hold the same weights" in warning


def test_equal_bytes_of_another_shape_are_not_frozen(tmp_path: Path) -> None:
    models = [model(0) | {"a": torch.zeros(4)}, model(1) | {"a": torch.zeros(2, 2)}]
    assert inspect(opened(tmp_path, models)).frozen == ()


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, [model(0), model(1)])
    tensors = model(9) | {"classifier.weight": torch.ones(2)}
    del tensors["head.weight"]
    base = opened(tmp_path / "base", [tensors])[0]
    found = inspect(checkpoints, base=base)
    problem = only(found.problems)
    assert "base/0.safetensors: 'head.weight' is missing in the base" in problem
    assert "leave the base out" in problem
    assert "'classifier.weight' is in the base alone, and left out" in only(found.warnings)
    found = inspect(checkpoints, base=base, skip=["head.weight", "classifier.*"])
    assert found.carried["head.weight"]  # from the first ingredient: the base has none


def test_what_is_carried_must_fit_the_model(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, [model(0), model(1)])
    tensors = model(9) | {"head.weight": torch.ones(1000, 4)}
    base = opened(tmp_path / "base", [tensors])[0]
    found = inspect(checkpoints, base=base, skip=["head.*"], expected=expected_of(model(0)))
    problem = only(found.problems)
    assert "base/0.safetensors: 'head.weight' (carried, skip: 'head.*') is [1000, 4]" in problem
    assert "the model has [10, 4]" in problem
    assert "leave the base out" in problem
    assert inspect(checkpoints, skip=["head.*"], expected=expected_of(model(0))).problems == []


def test_a_tied_partner_is_enough(tmp_path: Path) -> None:
    weight = torch.randn(5, 2)
    torch.save({"embed": weight, "head": weight}, tmp_path / "0.pt")
    save_file({"embed": torch.randn(5, 2)}, tmp_path / "1.safetensors")
    checkpoints = [open_checkpoint(tmp_path / "0.pt"), open_checkpoint(tmp_path / "1.safetensors")]
    found = inspect(checkpoints)
    assert found.problems == []
    assert found.mixed == ("embed", "head")
    assert found.tied == (("embed", "head"),)
    assert any("'embed', 'head' are one tensor (tied)" in note for note in found.notes)
    both = expected_of({"embed": weight, "head": weight})
    problem = only(inspect([checkpoints[1]], expected=both).problems)
    assert "'head' is missing" in problem
    found = inspect([checkpoints[1]], expected=both, tied=[("embed", "head")])
    assert found.problems == []
    assert found.mixed == ("embed",)
    assert "'head' is tied to 'embed', and stored as that alone" in only(found.notes)


def test_all_problems_come_in_one_report(tmp_path: Path) -> None:
    models = [model(k) for k in range(4)]
    models[1]["head.weight"] = torch.randn(7, 4)
    del models[2]["stem.weight"]
    models[3]["head.bias"][0] = torch.nan
    found = inspect(opened(tmp_path, models), skip=["nothing"])
    with pytest.raises(MergeError) as caught:
        found.raise_if_broken()
    text = str(caught.value)
    assert text.startswith("these checkpoints cannot be mixed: 4 problems\n- ")
    for part in ("'nothing'", "[7, 4]", "'stem.weight' is missing", "'head.bias' has 1 of 10"):
        assert part in text


def test_hundreds_of_problems_are_counted() -> None:
    with pytest.raises(MergeError) as caught:
        Preflight([f"problem {i}" for i in range(300)], [], []).raise_if_broken()
    assert "problem 19" in str(caught.value)
    assert "problem 20" not in str(caught.value)
    assert "- and 280 more problems" in str(caught.value)


def test_known_scans_are_taken_as_they_are(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, [model(0), model(1)])
    scans = [scan(c) for c in checkpoints]
    assert inspect(checkpoints, scans=scans).scans == tuple(scans)
    with pytest.raises(MergeError, match="1 scans were given for 2 ingredients and 0 base"):
        inspect(checkpoints, scans=scans[:1])
