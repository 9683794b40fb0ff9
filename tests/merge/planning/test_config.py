"""The merge config: files for mergekit run as they are, and what is wrong is said at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from inputs.config import load_config
from inputs.errors import InputError
from merge.errors import MergeError
from merge.planning.config import MergeConfig, parse_config, split_reference
from merge.planning.parameters import read_cases
from merge.registry import METHODS

SLERP = """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
tokenizer_source: base
"""

TIES = """
models:
  - model: one
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: two
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.25
  - model: base
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
  lambda: 0.9
dtype: bfloat16
out_dtype: torch.float32
"""

PASSTHROUGH = """
slices:
  - sources:
    - model: one
      layer_range: [0, 3]
  - sources:
    - model: two
      layer_range: [1, 4]
      parameters:
        scale:
          - filter: o_proj
            value: 0.5
merge_method: passthrough
"""


def two(**more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **more}


def problems(data: Any) -> dict[str, str]:
    """Key → text of what is wrong with a config."""
    with pytest.raises(MergeError) as error:
        parse_config(data)
    lines = str(error.value).removeprefix("merge config: ").splitlines()
    keys = [line.partition(": ")[0] if ": " in line else "" for line in lines]
    return {key: line.removeprefix(f"{key}: ") for key, line in zip(keys, lines, strict=True)}


def problem(data: Any, key: str) -> str:
    found = problems(data)
    assert list(found) == [key], found
    return found[key]


# --- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SLERP, TIES, PASSTHROUGH])
def test_files_for_mergekit_are_read_from_yaml_and_from_dicts(tmp_path: Path, text: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    config = load_config(tmp_path / "merge.yaml", [], MergeConfig)
    assert config == parse_config(yaml.safe_load(text))


def test_the_parts_of_a_ties_file() -> None:
    config = parse_config(yaml.safe_load(TIES))
    (group,) = config.groups
    assert config.references == ("base", "one", "two")
    assert group.references == ("one", "two", "base")
    assert group.roles(METHODS["ties"]) == ("base", ("one", "two"))
    assert config.dtype == "bfloat16"
    assert config.out_dtype == "float32"
    assert config.memory_budget == 512 * 2**20
    assert (config.seed, config.device) == (0, "cpu")


def test_the_parts_of_a_file_with_slices() -> None:
    config = parse_config(yaml.safe_load(PASSTHROUGH))
    assert [group.layer_ranges for group in config.groups] == [((0, 3),), ((1, 4),)]
    assert config.groups[1].own == ({"scale": [{"filter": "o_proj", "value": 0.5}]},)


def test_overrides_on_top_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(TIES)
    overrides = ["parameters.lambda=0.5", "memory_budget=2GiB", "device=auto"]
    config = load_config(tmp_path / "merge.yaml", overrides, MergeConfig)
    assert config.parameters == {"normalize": True, "int8_mask": True, "lambda": 0.5}
    assert (config.memory_budget, config.device) == (2 * 2**30, "auto")


def test_scientific_notation_is_a_number_with_and_without_a_point(tmp_path: Path) -> None:
    text = PASSTHROUGH.replace("value: 0.5", "value: 1e-5")
    (tmp_path / "merge.yaml").write_text(text)
    config = load_config(tmp_path / "merge.yaml", [], MergeConfig)
    for one in (config, parse_config(yaml.safe_load(text))):
        (scale,) = read_cases(one.groups[1].own[0]["scale"])
        assert float(scale.values[0]) == 1e-5
    assert "wanted a valid number" in problem(
        two(parameters={"weight": "1f-5"}), "parameters.weight"
    )


def test_a_base_that_no_method_uses_is_a_model() -> None:
    (group,) = parse_config(two(base_model="c")).groups
    assert group.all_references == ("a", "b", "c")
    assert group.roles(METHODS["linear"]) == (None, ("a", "b", "c"))


def test_a_base_that_is_listed_is_no_model_twice() -> None:
    (group,) = parse_config(two(base_model="b")).groups
    assert group.roles(METHODS["linear"]) == (None, ("a", "b"))
    assert group.roles(METHODS["ties"]) == ("b", ("a",))


def test_a_base_that_some_method_uses_is_no_model_of_the_others() -> None:
    rules = [{"match": "*", "merge_method": "ties"}]
    (group,) = parse_config(two(base_model="c", methods=rules)).groups
    assert group.roles(METHODS["ties"]) == ("c", ("a", "b"))
    assert group.roles(METHODS["linear"]) == (None, ("a", "b"))


def test_null_is_nothing() -> None:
    data = two(tokenizer=None, dtype=None, parameters=None)
    data["models"][0]["parameters"] = None
    assert parse_config(data) == parse_config(two())


def test_parameters_of_another_method_in_use_are_fine() -> None:
    rules = [{"match": "head.*", "merge_method": "ties", "parameters": {"density": 0.5}}]
    config = parse_config(two(base_model="c", methods=rules, parameters={"density": [0, 1]}))
    assert [method.name for method in config.methods_in_use] == ["linear", "ties"]


def test_coefficients_with_the_places_of_their_ingredients() -> None:
    config = parse_config({"coefficients": "soup.json", "models": [{"model": "a"}]})
    assert config.coefficients == Path("soup.json")


def test_references_are_split_at_the_plus(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_reference("owner/model") == ("owner/model", None)
    assert split_reference("owner/model+owner/lora") == ("owner/model", "owner/lora")
    Path("with+plus").mkdir()
    assert split_reference("with+plus") == ("with+plus", None)
    assert split_reference("with+plus+lora") == ("with+plus", "lora")
    for reference in ("a+b+c", "+lora", "base+"):
        with pytest.raises(MergeError, match="wanted a checkpoint"):
            split_reference(reference)


def test_no_torch_to_read_and_refuse_a_config() -> None:
    code = (
        "import sys, merge.planning.config, merge.planning.parameters, merge.planning.layers\n"
        "from merge.errors import MergeError\n"
        "try: merge.planning.config.parse_config({'merge_method': 'dare-ties'})\n"
        "except MergeError as error: assert 'dare_ties' in str(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"), [("dare-ties", "dare_ties"), ("Linear", "linear"), ("tie", "ties")]
)
def test_a_typo_in_a_method(name: str, meant: str) -> None:
    found = problem(two(merge_method=name), "merge_method")
    assert found == f"found {name!r}; did you mean {meant!r}?"


def test_all_at_once() -> None:
    found = problems(
        {
            "merge_methd": "linear",
            "merge_method": "ties",
            "models": [
                {"model": "a", "paramters": {}, "parameters": {"density": 1.5}},
                {"model": "b", "parameters": {"wieght": 1}},
            ],
            "parameters": {"weight": [{"filter": "mlp", "value": [0, "x"]}]},
            "dtype": "bfloat",
            "memory_budget": "much",
            "skip": ["a"],
            "only": ["b"],
            "tokenizer_source": "union",
            "chat_template": "auto",
        }
    )
    expected = {
        "merge_methd": "did you mean 'merge_method'?",
        "models.0.paramters": "did you mean 'parameters'?",
        "models.0.parameters.density": "found 1.5; wanted a number less than or equal to 1",
        "models.1.parameters.wieght": "did you mean 'weight'?",
        "parameters.weight.0.value.1": "found 'x'; wanted a valid number",
        "dtype": "did you mean 'bfloat16'?",
        "memory_budget": "wanted bytes, such as 4GiB",
        "only": "exclude each other",
        "tokenizer_source": "'union' is not supported",
        "chat_template": "is not supported: tokenizer files are copied as they are",
        "models": "name it with base_model",
    }
    assert found.keys() == expected.keys()
    for key, text in expected.items():
        assert text in found[key]


def test_a_file_with_problems_names_itself_and_the_override(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(TIES)
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "merge.yaml", ["merge_method=tie", "base_model=q"], MergeConfig)
    expected = "override 'merge_method=tie': merge_method: found 'tie'; did you mean 'ties'?"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", {"source": "union"}),
        ("chat_template", "chatml"),
        ("modules", {"text": {"models": []}}),
    ],
)
def test_keys_of_mergekit_that_are_not_supported(key: str, value: Any) -> None:
    assert problem(two(**{key: value}), key).startswith("is not supported: ")


def test_residual_weight_is_not_supported() -> None:
    data = yaml.safe_load(PASSTHROUGH)
    data["slices"][1]["residual_weight"] = 0.5
    assert "is not supported" in problem(data, "slices.1.residual_weight")


@pytest.mark.parametrize(
    ("source", "message"),
    [("base", "there is no base_model"), ("aa", "did you mean 'a'?"), ("union", "not supported")],
)
def test_tokenizer_sources(source: str, message: str) -> None:
    assert message in problem(two(tokenizer_source=source), "tokenizer_source")
    assert parse_config(two(tokenizer_source="a")).tokenizer_source == "a"


def test_where_the_tensors_come_from() -> None:
    slices = yaml.safe_load(PASSTHROUGH)["slices"]
    assert "found neither" in problem({"merge_method": "linear"}, "")
    assert "found both" in problem(two(merge_method="passthrough", slices=slices[:1]), "")
    found = problems(two(coefficients="a.json", skip=["a"]))
    assert found.keys() == {"merge_method", "skip"}
    assert "where the ingredients" in problem({"coefficients": "a.json"}, "models")
    assert "missing" in problem({"models": [{"model": "a"}]}, "merge_method")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("merge_method", "linear"),
        ("parameters", {"weight": 1}),
        ("methods", [{"match": "*", "merge_method": "linear"}]),
        ("skip", ["a"]),
        ("only", ["a"]),
        ("dtype", "bfloat16"),
        ("out_dtype", "float32"),
        ("align", {"model": {"source": "timm", "name": "resnet18"}, "image": [3, 8, 8]}),
        ("seed", 1),
        ("device", "cuda"),
    ],
)
def test_what_has_no_effect_beside_coefficients_is_refused(key: str, value: Any) -> None:
    soup = {"coefficients": "a.json", "models": [{"model": "a"}]}
    assert "no effect beside coefficients" in problem({**soup, key: value}, key)
    soup["models"] = [{"model": "a", "parameters": {"weight": 1}}]
    assert "no effect beside coefficients" in problem(soup, "models.0.parameters")


def test_what_a_learned_soup_is_made_by_stands_beside_its_coefficients() -> None:
    data = {"coefficients": "a.json", "models": [{"model": "a"}], "base_model": "b"}
    assert parse_config({**data, "memory_budget": "1GiB", "tokenizer_source": "base"})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("merge_method", "found 3; wanted a valid string"),
        ("base_model", "wanted a valid string"),
        ("models", "wanted a valid list"),
        ("coefficients", "is not a valid path"),
        ("statistics", "wanted a valid dictionary"),
    ],
)
def test_a_key_of_the_wrong_kind_has_no_other_problem(key: str, message: str) -> None:
    method = "fisher" if key == "statistics" else "ties"
    found = problem({**two(merge_method=method, base_model="c"), key: 3}, key)
    assert message in found
    assert "missing" not in found


def test_a_model_is_the_same_however_its_path_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "lora"):
        Path(name).mkdir()
    Path("link").symlink_to("a")
    for other in ("./a", str(tmp_path / "a"), "b/../a", "link"):
        data = {"merge_method": "linear", "models": [{"model": "a"}, {"model": other}]}
        assert f"'a' and {other!r} are one model" in problem(data, "models")
        data = two(merge_method="ties", base_model=other)
        assert f"'a' is the base_model {other!r} in other words" in problem(data, "models")
    data = {"merge_method": "linear", "models": [{"model": "a+lora"}, {"model": "a+./lora"}]}
    assert "are one model" in problem(data, "models")
    assert parse_config(two(models=[{"model": "a"}, {"model": "./b"}, {"model": "a+lora"}]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (two(merge_method="ties"), "name it with base_model"),
        (two(merge_method="slerp", parameters={"t": 0.5}, base_model="c"), "takes 1 models"),
        (two(merge_method="passthrough"), "takes 1 models, found 2"),
        (
            {"merge_method": "passthrough", "models": [{"model": "a"}], "base_model": "b"},
            "found 2 with base_model 'b'",
        ),
        (two(base_model="a", merge_method="consensus"), "at least 2 models"),
        ({"merge_method": "linear", "models": [{"model": "a"}] * 2}, "'a' is there twice"),
    ],
)
def test_the_number_of_models_and_the_base(data: Any, message: str) -> None:
    assert message in problem(data, "models")


def test_each_method_of_a_rule_is_held_against_the_models() -> None:
    rules = [
        {"match": "a", "merge_method": "passthrough"},
        {"match": "b", "merge_method": "slurp"},
        {"match": "c", "merge_method": "linear", "parameters": {"density": 1}},
    ]
    found = problems(two(methods=rules))
    assert "takes 1 models, found 2" in found["models"]
    assert "did you mean 'slerp'?" in found["methods.1.merge_method"]
    assert "no parameter of merge_method 'linear'" in found["methods.2.parameters.density"]


def slices(*ranges: list[int], **more: Any) -> dict[str, Any]:
    sources = [{"model": f"m{k}", "layer_range": r} for k, r in enumerate(ranges)]
    return {"merge_method": "linear", "slices": [{"sources": sources}], **more}


@pytest.mark.parametrize(
    ("ranges", "key", "message"),
    [
        (([3, 1],), "slices.0.sources.0.layer_range", "[3, 1] is reversed"),
        (([2, 2],), "slices.0.sources.0.layer_range", "[2, 2] is empty"),
        (([-1, 2],), "slices.0.sources.0.layer_range.0", "found -1"),
        (([0],), "slices.0.sources.0.layer_range", "wanted two numbers, [first, last)"),
        (([0, 2], [0, 3]), "slices.0", "2 of 'm0', 3 of 'm1'"),
    ],
)
def test_layer_ranges(ranges: Any, key: str, message: str) -> None:
    assert message in problem(slices(*ranges), key)


def test_a_base_must_be_among_the_sources_of_a_slice() -> None:
    data = slices([0, 2], merge_method="ties", base_model="base")
    assert "base_model 'base' is none of its sources" in problem(data, "slices.0")
    data = slices([0, 2], [0, 2], merge_method="ties")
    data["slices"][0]["base_model"] = "m1"
    assert parse_config(data).groups[0].roles(METHODS["ties"]) == ("m1", ("m0",))


@pytest.mark.parametrize(
    ("parameters", "key", "message"),
    [
        ({"weigth": 1}, "parameters.weigth", "did you mean 'weight'?"),
        ({"weight": {"valeu": 1}}, "parameters.weight", "unknown key 'valeu'"),
        ({"weight": [0, float("inf")]}, "parameters.weight.1", "wanted a finite number"),
        ({"normalize": 3}, "parameters.normalize", "wanted a valid boolean"),
        ({"lambda_": 3}, "parameters.lambda_", "no parameter of merge_method 'linear'"),
    ],
)
def test_parameters(parameters: Any, key: str, message: str) -> None:
    assert message in problem(two(parameters=parameters), key)


@pytest.mark.parametrize("value", [[5, 10], [{"filter": "mlp", "value": [5, 10]}, {"value": 3}]])
def test_a_whole_number_has_no_gradient(value: Any) -> None:
    key = "parameters.max_iter" if value == [5, 10] else "parameters.max_iter.0.value"
    found = problem(two(merge_method="karcher", parameters={"max_iter": value}), key)
    assert found.startswith("is a whole number, which has no gradient over the layers; give one")
    assert found.endswith("[{filter: …, value: …}, …] (found [5, 10])")
    one = [{"filter": "mlp", "value": [5]}, {"value": 3}]
    assert parse_config(two(merge_method="karcher", parameters={"max_iter": one}))


def test_a_parameter_for_all_models_in_one_of_them() -> None:
    data = two()
    data["models"][0]["parameters"] = {"normalize": False}
    assert "one value for all models" in problem(data, "models.0.parameters.normalize")


def test_a_missing_parameter() -> None:
    data = two(merge_method="slerp", base_model="a")
    assert "'t' is missing" in problem(data, "parameters")
    data["methods"] = [{"match": "*", "merge_method": "slerp", "parameters": {"t": 0.5}}]
    assert "'t' is missing" in problem(data, "parameters")
    data["merge_method"] = "task_arithmetic"
    assert parse_config(data).merge_method == "task_arithmetic"


def test_methods_with_data_need_it() -> None:
    assert "'fisher' gathers them" in problem(two(merge_method="fisher"), "statistics")


def test_alignment() -> None:
    align: dict[str, Any] = {"model": {"source": "timm", "name": "resnet18"}}
    assert "give `image" in problem(two(align=align), "align")
    align["image"] = [3, 32, 32]
    assert parse_config(two(align=align)).align is not None
    found = problem(two(align={**align, "reference": "base"}), "align.reference")
    assert "there is no base_model" in found
    assert "give `data`" in problem(two(align={**align, "recalibrate": True}), "align")
    found = problems(slices([0, 2], align=align))
    assert found == {"align": "whole models are aligned; use models instead of slices"}


@pytest.mark.parametrize("data", [[], "linear", 3])
def test_what_is_no_mapping(data: Any) -> None:
    with pytest.raises(MergeError, match="wanted a valid dictionary"):
        parse_config(data)
