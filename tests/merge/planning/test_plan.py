"""Plans on real files: what makes each tensor, and every kind of trouble in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge.checkpoints import Checkpoint, open_checkpoint
from merge.errors import MergeError
from merge.planning.config import parse_config
from merge.planning.plan import MergePlan, TensorMerge, plan_merge

Tensors = dict[str, Tensor]
INSIDE = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def llama(layers: int, *, vocabulary: int = 11, dtype: torch.dtype = torch.float32) -> Tensors:
    return {
        "model.embed_tokens.weight": torch.zeros(vocabulary, 4, dtype=dtype),
        "model.norm.weight": torch.ones(4, dtype=dtype),
        "lm_head.weight": torch.zeros(vocabulary, 4, dtype=dtype),
        **{
            f"model.layers.{k}.{name}": torch.full((4,), float(k), dtype=dtype)
            for k in range(layers)
            for name in INSIDE
        },
    }


def convnext(*, classes: int = 10) -> Tensors:
    return {
        "stem.0.weight": torch.zeros(4, 3, 2, 2),
        "stages.0.blocks.0.conv_dw.weight": torch.zeros(4, 1, 3, 3),
        "stages.0.blocks.1.conv_dw.weight": torch.zeros(4, 1, 3, 3),
        "stages.1.downsample.1.weight": torch.zeros(8, 4, 2, 2),
        "stages.1.blocks.0.conv_dw.weight": torch.zeros(8, 1, 3, 3),
        "head.bn.num_batches_tracked": torch.tensor(3),
        "head.fc.weight": torch.zeros(classes, 8),
        "head.fc.bias": torch.zeros(classes),
    }


def plan(folder: Path, files: dict[str, Tensors], **config: Any) -> MergePlan:
    """The plan for files by reference; the config's `models` are these but for `base`."""
    opened: dict[str, Checkpoint] = {}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
        opened[name] = open_checkpoint(folder / f"{name}.safetensors")
    if "slices" not in config:
        config.setdefault("models", [{"model": name} for name in files if name != "base"])
    if "base" in files:
        config.setdefault("base_model", "base")
    return plan_merge(parse_config({"merge_method": "linear", **config}), opened)


def refused(folder: Path, files: dict[str, Tensors], **config: Any) -> str:
    with pytest.raises(MergeError) as error:
        plan(folder, files, **config)
    return str(error.value)


def by_name(found: MergePlan) -> dict[str, TensorMerge]:
    return {merge.output.name: merge for merge in found.tensors}


def stems(merge: TensorMerge) -> list[str]:
    return [f"{Path(source.checkpoint.path).stem}:{source.name}" for source in merge.models]


# --- what makes what ----------------------------------------------------------------------------


def test_all_tensors_by_name_from_all_models(tmp_path: Path) -> None:
    found = plan(tmp_path, {name: llama(3) for name in "abc"})
    assert [merge.output.name for merge in found.tensors] == sorted(llama(3))
    for merge in found.tensors:
        name = merge.output.name
        assert merge.method is not None
        assert merge.method.name == "linear"
        assert stems(merge) == [f"{model}:{name}" for model in "abc"]
        assert (merge.labels, merge.base, len(merge.settings)) == (("a", "b", "c"), None, 3)
        assert merge.output.shape == tuple(llama(3)[name].shape)
        assert merge.output.dtype == torch.float32
    assert found.layers is None
    assert found.notes == ()
    assert Path(found.giver.path).stem == "a"
    depths = {merge.output.name: merge.depth for merge in found.tensors}
    assert [depths[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(3)] == [0, 0.5, 1]
    assert depths["model.embed_tokens.weight"] == 0
    assert depths["lm_head.weight"] == 1


def test_the_base_is_no_model_listed_or_not(tmp_path: Path) -> None:
    models = {name: llama(2) for name in ("a", "b", "base")}
    parameters = {"density": 0.5}
    entries = [{"model": "a"}, {"model": "base"}, {"model": "b"}]
    for config in ({}, {"models": entries}):
        found = plan(tmp_path, models, merge_method="ties", parameters=parameters, **config)
        for merge in found.tensors:
            assert merge.labels == ("a", "b")
            assert merge.base is not None
            assert Path(merge.base.checkpoint.path).stem == "base"
        assert Path(found.giver.path).stem == "base"


def test_a_base_that_is_not_used_is_merged_as_a_model_and_noted(tmp_path: Path) -> None:
    found = plan(tmp_path, {"a": llama(1), "base": llama(1)})
    assert found.tensors[0].labels == ("a", "base")
    assert any("'base' is merged as a model" in note for note in found.notes)


def test_gradients_filters_and_levels(tmp_path: Path) -> None:
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0]},
        {"value": 0.5},
    ]
    models = {"a": llama(5), "base": llama(5)}
    found = by_name(plan(tmp_path, models, merge_method="slerp", parameters={"t": t}))

    def values(inside: str) -> list[float]:
        return [found[f"model.layers.{k}.{inside}"].settings[0].t for k in range(5)]  # type: ignore[attr-defined]

    assert values("self_attn.q_proj.weight") == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    assert values("mlp.up_proj.weight") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert values("input_layernorm.weight") == [0.5] * 5
    assert found["lm_head.weight"].settings[0].t == 0.5  # type: ignore[attr-defined]


def test_outside_the_layers_a_gradient_is_at_its_start(tmp_path: Path) -> None:
    found = by_name(plan(tmp_path, {"a": llama(3), "b": llama(3)}, parameters={"weight": [2, 6]}))
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert found[name].settings[0].weight == 2  # type: ignore[attr-defined]
    assert found["model.layers.1.mlp.up_proj.weight"].settings[0].weight == 4  # type: ignore[attr-defined]


def test_a_models_own_parameters(tmp_path: Path) -> None:
    entries = [{"model": "a", "parameters": {"weight": 3}}, {"model": "b"}]
    found = plan(tmp_path, {"a": llama(1), "b": llama(1)}, models=entries, parameters={"weight": 2})
    assert all([s.weight for s in merge.settings] == [3, 2] for merge in found.tensors)  # type: ignore[attr-defined]


def test_rules_give_tensors_another_method_and_the_first_wins(tmp_path: Path) -> None:
    rules = [
        {"match": "head.fc.*", "merge_method": "linear", "parameters": {"weight": 7}},
        {"match": "head.*", "merge_method": "slerp", "parameters": {"t": 1}},
    ]
    models = {"a": convnext(), "b": convnext(), "base": convnext()}
    del models["base"]["head.fc.bias"]
    found = by_name(
        plan(tmp_path, models, merge_method="ties", methods=rules[:1], parameters={"weight": 2})
    )
    head, stem = found["head.fc.weight"], found["stem.0.weight"]
    assert head.method is not None
    assert stem.method is not None
    assert (head.method.name, head.labels, head.base) == ("linear", ("a", "b"), None)
    assert [s.weight for s in head.settings] == [7, 7]  # type: ignore[attr-defined]
    assert (stem.method.name, stem.settings[0].weight) == ("ties", 2)  # type: ignore[attr-defined]
    assert "head.fc.bias" in found  # the rule's method does not need the base's


# --- slices -------------------------------------------------------------------------------------


def test_layers_are_stacked_and_renamed(tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {
            "sources": [
                {"model": "b", "layer_range": [1, 3], "parameters": {"scale": [0.5, 1.5]}},
            ]
        },
    ]
    models = {"a": llama(4), "b": llama(3)}
    found = plan(tmp_path, models, merge_method="passthrough", slices=slices)
    assert found.layers == (0, 1, 2, 1, 2)
    assert [merge.output.name for merge in found.tensors] == sorted(llama(5))
    tensors = by_name(found)
    made = {
        k: stems(tensors[f"model.layers.{k}.mlp.up_proj.weight"])[0].split(".mlp")[0]
        for k in range(5)
    }
    assert made == {
        0: "a:model.layers.0",
        1: "a:model.layers.1",
        2: "a:model.layers.2",
        3: "b:model.layers.1",
        4: "b:model.layers.2",
    }
    assert stems(tensors["model.embed_tokens.weight"]) == ["a:model.embed_tokens.weight"]
    assert stems(tensors["lm_head.weight"]) == ["b:lm_head.weight"]
    scales = [tensors[f"model.layers.{k}.mlp.up_proj.weight"].settings[0] for k in range(5)]
    assert [one.scale for one in scales] == [None, None, None, 0.5, 1.5]  # type: ignore[attr-defined]
    assert [tensors[f"model.layers.{k}.mlp.up_proj.weight"].depth for k in (0, 2, 4)] == [0, 0.5, 1]


def test_sources_of_a_slice_meet_at_their_own_layers(tmp_path: Path) -> None:
    sources = [
        {
            "model": "a",
            "layer_range": [2, 4],
            "parameters": {"weight": [{"filter": "layers.3.", "value": 9}]},
        },
        {"model": "b", "layer_range": [0, 2]},
    ]
    slices = [{"sources": sources, "parameters": {"weight": 4}}]
    tensors = by_name(
        plan(
            tmp_path,
            {"a": llama(4), "b": llama(2)},
            slices=slices,
            parameters={"weight": 1, "normalize": False},
        )
    )
    last = tensors["model.layers.1.mlp.up_proj.weight"]
    assert stems(last) == [
        "a:model.layers.3.mlp.up_proj.weight",
        "b:model.layers.1.mlp.up_proj.weight",
    ]
    assert [s.weight for s in last.settings] == [9, 4]  # type: ignore[attr-defined]
    first = tensors["model.layers.0.mlp.up_proj.weight"]
    assert [s.weight for s in first.settings] == [4, 4]  # type: ignore[attr-defined]
    assert first.settings[0].normalize is False  # type: ignore[attr-defined]


def test_a_slice_of_one_layer_is_at_the_end_of_its_gradient(tmp_path: Path) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": [1, 2]}]}]
    found = plan(
        tmp_path,
        {"a": llama(2)},
        merge_method="passthrough",
        slices=slices,
        parameters={"scale": [1, 2]},
    )
    tensors = by_name(found)
    assert tensors["model.layers.0.mlp.up_proj.weight"].settings[0].scale == 2  # type: ignore[attr-defined]
    assert tensors["lm_head.weight"].settings[0].scale == 1  # type: ignore[attr-defined]


def test_a_slice_with_a_base(tmp_path: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("base", "a")]
    found = plan(
        tmp_path,
        {"a": llama(2), "base": llama(2)},
        merge_method="slerp",
        slices=[{"sources": sources}],
        parameters={"t": 0.5},
    )
    for merge in found.tensors:
        assert merge.labels == ("a",)
        assert merge.base is not None


def test_slices_that_the_models_do_not_have(tmp_path: Path) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": [0, 9]}]}]
    message = refused(tmp_path, {"a": llama(4)}, merge_method="passthrough", slices=slices)
    assert "slices.0.sources.0.layer_range: found [0, 9], but 'a' has 4 layers" in message
    message = refused(tmp_path, {"a": convnext()}, merge_method="passthrough", slices=slices)
    assert "'stages' is one of stages" in message


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float16", "out_dtype": "bfloat16"}, torch.bfloat16),
        ({"out_dtype": "float64"}, torch.float64),
    ],
)
def test_mixed_dtypes_are_merged_and_noted(
    tmp_path: Path, config: dict[str, Any], stored: torch.dtype
) -> None:
    models = {"a": llama(1, dtype=torch.float16), "b": llama(1, dtype=torch.bfloat16)}
    found = plan(tmp_path, models, **config)
    assert {merge.output.dtype for merge in found.tensors} == {stored}
    (note,) = found.notes
    compute = "float64" if stored == torch.float64 else "float32"
    name = str(stored).removeprefix("torch.")
    assert note.startswith("'lm_head.weight', ")
    assert note.endswith(
        f"and 2 more are float16 and bfloat16 in the checkpoints: merged in {compute}, stored as "
        f"{name}"
    )


def test_one_dtype_stays(tmp_path: Path) -> None:
    models = {name: llama(1, dtype=torch.bfloat16) for name in "ab"}
    found = plan(tmp_path, models)
    assert {merge.output.dtype for merge in found.tensors} == {torch.bfloat16}
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("lm_head.weight", torch.zeros(11, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        ("lm_head.weight", torch.zeros(11, 4, dtype=torch.int8), "int8"),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 4, dtype=torch.int32), "int32"),
    ],
)
def test_quantised_weights_are_refused(
    tmp_path: Path, name: str, value: Tensor, dtype: str
) -> None:
    models = {"a": {**llama(1), name: value}, "b": {**llama(1), name: value}}
    message = refused(tmp_path, models)
    assert f"a.safetensors: '{name}' is quantised ({dtype})" in message
    assert "dequantise the checkpoint first" in message
    found = plan(tmp_path, models, skip=[name])
    assert by_name(found)[name].output.dtype == value.dtype


def test_integers_in_one_checkpoint_alone(tmp_path: Path) -> None:
    models = {"a": llama(1), "b": llama(1)}
    models["b"]["model.norm.weight"] = torch.ones(4, dtype=torch.int64)
    assert "'model.norm.weight' is int64, wanted floating point" in refused(tmp_path, models)


# --- carried ------------------------------------------------------------------------------------


def test_integer_buffers_are_carried_from_the_base(tmp_path: Path) -> None:
    models = {name: convnext() for name in ("a", "b", "base")}
    models["b"]["head.bn.num_batches_tracked"] = torch.tensor(4)
    found = plan(tmp_path, models, merge_method="ties", parameters={"density": 0.5})
    buffer = by_name(found)["head.bn.num_batches_tracked"]
    assert (buffer.method, buffer.settings, buffer.base) == (None, (), None)
    assert stems(buffer) == ["base:head.bn.num_batches_tracked"]
    assert buffer.output.dtype == torch.int64
    assert buffer.reason == "int64 values are not merged"
    assert found.notes == (
        "'head.bn.num_batches_tracked' is carried from "
        f"{tmp_path}/base.safetensors (int64 values are not merged)",
        "'head.bn.num_batches_tracked' is not the same in all checkpoints",
    )


def test_integer_buffers_of_another_shape_or_dtype_are_not_the_same(tmp_path: Path) -> None:
    for other in (torch.tensor([3]), torch.tensor(3, dtype=torch.int32)):
        models = {"a": convnext(), "b": {**convnext(), "head.bn.num_batches_tracked": other}}
        assert any("not the same in all" in note for note in plan(tmp_path, models).notes)


def test_skip_and_only(tmp_path: Path) -> None:
    models = {name: convnext() for name in "ab"}
    found = by_name(plan(tmp_path, models, skip=["head.fc.*", "stem.*"], dtype="float16"))
    carried = {name for name, merge in found.items() if merge.method is None}
    assert carried == {
        "head.bn.num_batches_tracked",
        "head.fc.bias",
        "head.fc.weight",
        "stem.0.weight",
    }
    assert found["head.fc.bias"].reason == "skip: 'head.fc.*'"
    assert stems(found["head.fc.bias"]) == ["a:head.fc.bias"]
    assert found["head.fc.bias"].output.dtype == torch.float16
    found = by_name(plan(tmp_path, models, only=["head.fc.*"]))
    assert {name for name, merge in found.items() if merge.method} == {
        "head.fc.bias",
        "head.fc.weight",
    }
    assert found["stem.0.weight"].reason == "only names others"


def test_skipping_carries_over_names_and_shapes_that_differ(tmp_path: Path) -> None:
    models = {"a": convnext(), "b": convnext(classes=100)}
    del models["b"]["head.fc.bias"]
    found = by_name(plan(tmp_path, models, skip=["head.fc.*"]))
    assert found["head.fc.weight"].output.shape == (10, 8)
    assert stems(found["head.fc.bias"]) == ["a:head.fc.bias"]


def test_a_skipped_tensor_that_nobody_can_give_is_left_out(tmp_path: Path) -> None:
    models = {"a": convnext(), "b": {**convnext(), "extra": torch.zeros(2)}}
    found = plan(tmp_path, models, skip=["extra"])
    assert "extra" not in by_name(found)
    assert any("'extra' is left out: skip: 'extra'" in note for note in found.notes)


# --- tied ---------------------------------------------------------------------------------------


def tied(layers: int, *, both: bool) -> Tensors:
    tensors = {**llama(layers), "score.bias": torch.zeros(2)}
    if both:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    else:
        del tensors["lm_head.weight"]
    return tensors


def torch_plan(folder: Path, models: dict[str, Tensors], **config: Any) -> MergePlan:
    opened = {}
    for name, tensors in models.items():
        torch.save(tensors, folder / f"{name}.pt")
        opened[name] = open_checkpoint(folder / f"{name}.pt")
    entries = [{"model": name} for name in models]
    return plan_merge(parse_config({"merge_method": "linear", "models": entries, **config}), opened)


def test_a_tensor_that_is_stored_once_stays_stored_once(tmp_path: Path) -> None:
    found = plan(tmp_path, {name: tied(1, both=False) for name in "ab"})
    assert "lm_head.weight" not in by_name(found)
    found = torch_plan(tmp_path, {"a": tied(1, both=False), "b": tied(1, both=True)})
    assert "lm_head.weight" not in by_name(found)
    note = "'lm_head.weight' is left out: it is tied to 'model.embed_tokens.weight'"
    assert any(note in text for text in found.notes)
    assert stems(by_name(found)["model.embed_tokens.weight"]) == [
        "a:model.embed_tokens.weight",
        "b:model.embed_tokens.weight",
    ]


def test_tied_tensors_that_are_stored_twice_name_each_other(tmp_path: Path) -> None:
    models = {name: tied(1, both=True) for name in "ab"}
    found = by_name(torch_plan(tmp_path, models))
    assert found["lm_head.weight"].tied_to is None
    assert found["model.embed_tokens.weight"].tied_to == "lm_head.weight"
    with pytest.raises(MergeError, match=r"are one tensor \(tied\), but are made differently"):
        torch_plan(tmp_path, models, parameters={"weight": [{"filter": "lm_head", "value": 2}]})
    with pytest.raises(MergeError, match=r"are one tensor \(tied\)"):
        torch_plan(tmp_path, models, skip=["lm_head.*"])


def test_tied_tensors_are_at_one_depth(tmp_path: Path) -> None:
    models = {name: tied(3, both=True) for name in ("a", "base")}
    found = by_name(torch_plan(tmp_path, models, merge_method="lines", base_model="base"))
    assert found["model.embed_tokens.weight"].tied_to == "lm_head.weight"
    assert found["model.embed_tokens.weight"].depth == found["lm_head.weight"].depth == 1


def test_what_is_tied_in_one_checkpoint_alone_is_merged_apart(tmp_path: Path) -> None:
    apart = {**llama(1), "score.bias": torch.zeros(2)}
    found = by_name(torch_plan(tmp_path, {"a": tied(1, both=True), "b": apart}))
    assert found["model.embed_tokens.weight"].tied_to is None
    assert stems(found["lm_head.weight"])[1] == "b:lm_head.weight"


# --- what cannot be merged ----------------------------------------------------------------------


def test_missing_and_extra_tensors_are_listed(tmp_path: Path) -> None:
    models = {name: convnext() for name in "abc"}
    del models["b"]["stem.0.weight"]
    models["c"]["aux.weight"] = torch.zeros(3)
    message = refused(tmp_path, models)
    assert "2 problems" in message
    assert (
        f"{tmp_path}/b.safetensors: 'stem.0.weight' is missing, other checkpoints have it; give "
        "checkpoints of one model, or carry it with skip: ['stem.0.*']" in message
    )
    assert f"{tmp_path}/c.safetensors: has 'aux.weight', which most checkpoints do" in message
    plan(tmp_path, models, skip=["stem.0.*", "aux.*"])


def test_another_number_of_classes(tmp_path: Path) -> None:
    message = refused(tmp_path, {"a": convnext(), "b": convnext(classes=100)})
    assert f"b.safetensors: 'head.fc.bias' is [100], {tmp_path}/a.safetensors has [10]" in message
    assert "'head.fc.weight' is [100, 8]" in message
    assert "numbers of classes differ" in message
    assert "skip: ['head.fc.*']" in message


def test_another_vocabulary(tmp_path: Path) -> None:
    models = {"a": llama(1), "b": llama(1), "base": llama(1, vocabulary=12)}
    message = refused(tmp_path, models, merge_method="ties")
    assert "the vocabularies differ; merge models with the same one" in message
    assert f"a.safetensors: 'lm_head.weight' is [11, 4], {tmp_path}/base.safetensors" in message
    assert "skip: ['lm_head.*', 'model.embed_tokens.*']" in message


def test_another_architecture(tmp_path: Path) -> None:
    models = {"a": convnext(), "b": convnext()}
    models["b"]["stem.0.weight"] = torch.zeros(4, 3, 4, 4)
    assert "merge models of one architecture" in refused(tmp_path, models)


def test_globs_that_match_nothing(tmp_path: Path) -> None:
    models = {name: convnext() for name in "ab"}
    rules = [{"match": "haed.*", "merge_method": "linear"}]
    message = refused(tmp_path, models, skip=["stam.*"], methods=rules)
    assert "skip: 'stam.*' matches no tensor; the nearest names are 'stem.0.weight'" in message
    assert "methods.0.match: 'haed.*' matches no tensor" in message


def test_a_filter_that_is_in_no_name_is_noted(tmp_path: Path) -> None:
    weight = [{"filter": "self_atn", "value": 2}, {"value": 1}]
    found = plan(tmp_path, {name: llama(1) for name in "ab"}, parameters={"weight": weight})
    (note,) = found.notes
    assert "the filter 'self_atn' is in no tensor's name; did you mean 'self_attn'?" in note


def test_a_parameter_that_some_tensors_lack(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        {"a": convnext(), "base": convnext()},
        merge_method="slerp",
        parameters={"t": [{"filter": "stages", "value": 0.5}]},
    )
    assert (
        "'head.fc.bias', 'head.fc.weight', 'stem.0.weight': merge_method 'slerp' wants" in message
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("multislerp", {}),
        ("knots", {"merge": "linear"}),
        ("knots", {"merge": "ties"}),
    ],
)
def test_weights_that_cannot_be_normalized(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    models = {name: llama(1) for name in ("a", "b", "base")}
    weights = {"a": 1, "b": [{"filter": "norm", "value": -1}, {"value": 2}]}
    entries = [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]
    config: dict[str, Any] = {"merge_method": method, "parameters": parameters, "models": entries}
    if method == "linear":
        models.pop("base")
    message = refused(tmp_path, models, **config)
    assert message.count("\n") == 1
    assert "'model.layers.0.input_layernorm.weight', 'model.norm.weight': the weights" in message
    assert "[1.0, -1.0] sum to 0" in message


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"normalize": False}),
        ("multislerp", {"normalize_weights": False}),
        ("knots", {"merge": "ties"}),
        ("task_arithmetic", {"normalize": True}),
    ],
)
def test_weights_that_sum_to_0_where_nothing_divides_by_them(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    models = {name: {"w.weight": torch.zeros(2, 2)} for name in ("a", "b", "base")}
    entries = [
        {"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 1), ("b", -1))
    ]
    plan(tmp_path, models, merge_method=method, parameters=parameters, models=entries)


def test_fisher_weights_of_zero(tmp_path: Path) -> None:
    data = {split: {"from": split} for split in ("fit", "tune", "select", "report")}
    statistics = {
        "model": {"source": "timm", "name": "resnet18"},
        "data": {"path": "digits", **data},
    }
    message = refused(
        tmp_path,
        {name: llama(1) for name in "ab"},
        merge_method="fisher",
        parameters={"weight": 0},
        statistics=statistics,
    )
    assert "[0.0, 0.0] sum to 0" in message


def test_a_gradient_needs_layers(tmp_path: Path) -> None:
    models = {name: {"fc1.weight": torch.zeros(2)} for name in "ab"}
    assert "no numbered layers" in refused(tmp_path, models, parameters={"weight": [0, 1]})
    rules = [{"match": "fc1.*", "merge_method": "linear", "parameters": {"weight": [0, 1]}}]
    assert "no numbered layers" in refused(tmp_path, models, methods=rules)
    plan(tmp_path, models, parameters={"weight": 1})


def test_nothing_to_merge(tmp_path: Path) -> None:
    models = {name: convnext() for name in "ab"}
    assert "no tensor is left to merge, 8 are carried" in refused(tmp_path, models, skip=["*"])


def test_the_report_is_bounded(tmp_path: Path) -> None:
    models = {name: {f"x{k}.weight": torch.zeros(2) for k in range(30)} for name in "ab"}
    message = refused(tmp_path, models, skip=[f"nothing{k}.*" for k in range(30)])
    assert "30 problems" in message
    assert message.count("\n") == 21
    assert message.endswith("and 10 more problems like these")
