"""What a method declares, and how its settings are read."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field

from merge.errors import MergeError
from merge.method import Method, MethodSettings, Reach, per_model
from merge.registry import FAMILIES, METHODS, find_method


class Sample(MethodSettings):
    """Of each kind one."""

    weight: float = per_model(1.0, ge=0)
    lambda_: float = Field(alias="lambda")
    way: Literal["short", "long"] = "short"
    by_rows: bool = False

    @property
    def acts_on(self) -> Reach | None:
        return "rows" if self.by_rows else None


def sample(**changes: object) -> Method:
    values = {
        "name": "sample",
        "summary": "A sample.",
        "formula": "W = w",
        "paper": "2203.05482",
        "settings": Sample,
        "function": "math:hypot",
        "gram": "deltas",
    }
    return Method(**{**values, **changes})  # type: ignore[arg-type]


def test_names_of_settings() -> None:
    method = sample()
    assert method.per_model == {"weight"}
    assert method.required == {"lambda_"}
    assert method.spelled == {
        "weight": "weight",
        "lambda": "lambda_",
        "way": "way",
        "by_rows": "by_rows",
    }


def test_settings_of_each_model() -> None:
    one, two = sample().settings_of({"weight": [1, 2], "lambda": 0.5, "way": "long"}, 2)
    assert (one.model_dump(), two.model_dump()) == (
        {"weight": 1.0, "lambda_": 0.5, "way": "long", "by_rows": False},
        {"weight": 2.0, "lambda_": 0.5, "way": "long", "by_rows": False},
    )
    assert sample().settings_of({"lambda_": 0.5}, 1) == sample().settings_of({"lambda": 0.5}, 1)


def test_arguments_are_tuples_where_each_model_has_its_own() -> None:
    method = sample()
    settings = method.settings_of({"weight": (1, 2, 3), "lambda": 0.5}, 3)
    assert method.arguments(settings) == {
        "weight": (1.0, 2.0, 3.0),
        "lambda_": 0.5,
        "way": "short",
        "by_rows": False,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"sample: lambda: Field required"),
        ({"lambda": 1, "wieght": 1}, r"sample: unknown setting 'wieght'; did you mean 'weight'\?"),
        ({"lambda": [1, 2]}, r"'lambda' is one value for all models"),
        ({"lambda": 1, "weight": [1, 2, 3]}, r"'weight' has 3 values, .* each of 2 models"),
        ({"lambda": 1, "weight": -1}, r"weight: .*greater than or equal to 0 \(found -1\)"),
        ({"lambda": 1, "weight": [1, -2]}, r"weight: .*\(found -2\)"),
        ({"lambda": math.inf}, r"lambda: .*finite"),
        ({"lambda": math.nan}, r"lambda: .*finite"),
        ({"lambda": 1, "way": "round"}, r"way: .*'short' or 'long'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        sample().settings_of(given, 2)


def test_settings_may_change_what_the_function_acts_on() -> None:
    method = sample()
    (plain,) = method.settings_of({"lambda": 1}, 1)
    (by_rows,) = method.settings_of({"lambda": 1, "by_rows": True}, 1)
    assert (method.acts_on_with(plain), method.gram_with(plain)) == ("elements", "deltas")
    assert (method.acts_on_with(by_rows), method.gram_with(by_rows)) == ("rows", None)


@pytest.mark.parametrize(
    ("models", "found", "wanted"),
    [
        ((1, None), 0, "at least 1"),
        ((2, None), 1, "at least 2"),
        ((1, 1), 2, "takes 1 models"),
        ((2, 3), 4, "2 to 3"),
    ],
)
def test_wrong_counts_of_models(models: tuple[int, int | None], found: int, wanted: str) -> None:
    (problem,) = sample(models=models).check_inputs(models=found, base=True)
    assert wanted in problem
    assert f"found {found}" in problem


def test_a_missing_base_is_a_problem_only_where_it_is_required() -> None:
    (problem,) = sample().check_inputs(models=1, base=False)
    assert "base_model" in problem
    assert sample(base="optional").check_inputs(models=1, base=False) == []
    assert len(sample(models=(2, None)).check_inputs(models=1, base=False)) == 2


def test_functions_are_loaded_by_name() -> None:
    assert sample().load("math:hypot") is math.hypot


def test_methods_are_found_by_name_or_the_nearest_is_said() -> None:
    assert find_method("linear").name == "linear"
    with pytest.raises(MergeError, match=r"found 'liner'; did you mean 'linear'\?"):
        find_method("liner")
    with pytest.raises(MergeError, match="did you mean 'model_stock'"):
        find_method("model-stok")


def test_each_name_is_used_once() -> None:
    assert len(METHODS) == sum(map(len, FAMILIES.values()))


def test_the_catalogue_imports_no_torch() -> None:
    code = "import sys, merge.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
