"""Filters, gradients and levels, against the rules written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import MergeError
from merge.planning.parameters import read_cases, read_scope, resolve, setting_errors
from merge.registry import METHODS

LINEAR, SLERP, TIES = METHODS["linear"], METHODS["slerp"], METHODS["ties"]
UP = "model.layers.3.mlp.up_proj.weight"
ATTENTION = "model.layers.3.self_attn.q_proj.weight"


def slerp_t(setting: Any, name: str = UP, fraction: float = 0.0) -> float:
    (settings,) = resolve(
        SLERP,
        output=name,
        inputs=[name],
        own=[{}],
        shared=[read_scope({"t": setting})],
        fraction=fraction,
    )
    return settings.t  # type: ignore[attr-defined]


def weights(*, rule: Any = None, own: list[Any], shared: list[Any], name: str = UP) -> list[float]:
    found = resolve(
        LINEAR,
        output=name,
        inputs=[name] * len(own),
        own=[read_scope({} if one is None else {"weight": one}) for one in own],
        shared=[read_scope({} if one is None else {"weight": one}) for one in shared],
        rule=None if rule is None else read_scope({"weight": rule}),
    )
    return [settings.weight for settings in found]  # type: ignore[attr-defined]


@pytest.mark.parametrize("setting", [0.25, "0.25", "2.5e-1", [0.25], {"value": 0.25}])
def test_a_scalar_in_all_its_spellings(setting: Any) -> None:
    assert slerp_t(setting) == 0.25


def test_the_first_matching_filter_wins() -> None:
    setting = [
        {"filter": "self_attn", "value": 0.1},
        {"filter": "mlp", "value": 0.2},
        {"filter": "up_proj", "value": 0.3},
        {"value": 0.5},
    ]
    assert slerp_t(setting, ATTENTION) == 0.1
    assert slerp_t(setting, UP) == 0.2
    assert slerp_t(setting, "lm_head.weight") == 0.5


def test_a_star_matches_all_and_is_no_part_of_a_name() -> None:
    assert slerp_t([{"filter": "*", "value": 0.7}, {"value": 0.1}]) == 0.7
    assert slerp_t([{"filter": "layers.*.mlp", "value": 0.7}, {"value": 0.1}]) == 0.1


@given(
    points=st.lists(st.floats(-10, 10), min_size=2, max_size=6),
    fraction=st.floats(0, 1),
)
def test_gradients_are_piecewise_linear(points: list[float], fraction: float) -> None:
    place = fraction * (len(points) - 1)
    expected = sum(max(0.0, 1 - abs(place - k)) * point for k, point in enumerate(points))
    assert math.isclose(slerp_t(points, fraction=fraction), expected, abs_tol=1e-9)


def test_a_gradient_meets_its_points() -> None:
    points = [0, 0.5, 0.3, 0.7, 1]
    assert [slerp_t(points, fraction=k / 4) for k in range(5)] == points
    assert slerp_t(["1e-5", 1e-3], fraction=0.5) == pytest.approx(0.000505)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)]
)
def test_bools_hold_up_to_the_next_point(fraction: float, expected: bool) -> None:
    (settings,) = resolve(
        LINEAR,
        output=UP,
        inputs=[UP],
        own=[{}],
        shared=[read_scope({"normalize": [True, False, True]})],
        fraction=fraction,
    )
    assert settings.normalize is expected  # type: ignore[attr-defined]


def test_texts_hold_up_to_the_next_point() -> None:
    scope = read_scope({"elect": ["sum", "count"], "density": [0.2, 0.4]})
    found = [
        resolve(TIES, output=UP, inputs=[UP], own=[{}], shared=[scope], fraction=fraction)[0]
        for fraction in (0.75, 1.0)
    ]
    assert [one.elect for one in found] == ["sum", "count"]  # type: ignore[attr-defined]
    assert [one.density for one in found] == pytest.approx([0.35, 0.4])  # type: ignore[attr-defined]


def test_levels_from_strong_to_weak() -> None:
    assert weights(rule=4, own=[3, 3], shared=[2, 1]) == [4, 4]
    assert weights(own=[3, None], shared=[2, 1]) == [3, 2]
    assert weights(own=[None, None], shared=[None, 1]) == [1, 1]
    assert weights(own=[None], shared=[None, None]) == [1.0]  # the default


def test_where_no_filter_matches_the_next_level_counts() -> None:
    own = [{"filter": "self_attn", "value": 3}]
    assert weights(own=[own, None], shared=[[{"filter": "q_proj", "value": 2}], 1]) == [1, 1]
    assert weights(own=[own, None], shared=[None, 1], name=ATTENTION) == [3, 1]


def test_filters_look_at_a_models_own_names_and_shared_settings_at_the_results() -> None:
    scope = read_scope(
        {
            "weight": [{"filter": "layers.7.", "value": 7}, {"value": 1}],
            "normalize": [{"filter": "layers.0.", "value": False}],
        }
    )
    found = resolve(
        LINEAR,
        output="layers.0.w",
        inputs=["layers.7.w", "layers.8.w"],
        own=[{}, {}],
        shared=[scope],
    )
    assert [settings.weight for settings in found] == [7, 1]  # type: ignore[attr-defined]
    assert [settings.normalize for settings in found] == [False, False]  # type: ignore[attr-defined]


def test_shared_settings_are_not_read_from_a_model() -> None:
    own = [read_scope({"normalize": False}), {}]
    found = resolve(LINEAR, output=UP, inputs=[UP, UP], own=own, shared=[])
    assert [settings.normalize for settings in found] == [True, True]  # type: ignore[attr-defined]


def test_lambda_is_spelled_as_in_papers() -> None:
    (settings,) = resolve(
        TIES, output=UP, inputs=[UP], own=[{}], shared=[read_scope({"lambda": 0.5})]
    )
    assert settings.lambda_ == 0.5  # type: ignore[attr-defined]


def test_a_required_setting_that_no_filter_reaches() -> None:
    with pytest.raises(MergeError, match=r"'norm.weight'.*'slerp' wants 't'.*- value"):
        slerp_t([{"filter": "mlp", "value": 1}], "norm.weight")


def test_settings_that_only_meet_in_one_tensor_are_checked_there() -> None:
    with pytest.raises(MergeError, match=r"'a': merge_method 'karcher': max_iter.*2.5"):
        resolve(
            METHODS["karcher"],
            output="a",
            inputs=["a", "a"],
            own=[{}, {}],
            shared=[read_scope({"max_iter": [0, 5]})],
            fraction=0.5,
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([], "empty list"),
        (None, "no number"),
        ([[1, 2]], "no number"),
        ([{"filter": "a", "value": 1}, 0.5], "- value: 0.5"),
        ({"filter": "a"}, "no `value`"),
        ({"value": 1, "filtre": "a"}, "unknown key 'filtre'"),
        ({"value": 1, "filter": 3}, "filter 3 is no text"),
        ({"value": {"value": 1}}, "no number"),
    ],
)
def test_shapes_that_are_no_parameter(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_cases(setting)


@pytest.mark.parametrize(
    ("setting", "places"),
    [
        (1.5, [()]),
        ([0.5, -1, 2], [(1,), (2,)]),
        ([{"filter": "a", "value": 0.5}, {"value": [0, "x"]}], [(1, "value", 1)]),
        ({"value": float("nan")}, [("value",)]),
        ([0, "1e-3", 1], []),
    ],
)
def test_every_value_is_held_against_the_bounds(setting: Any, places: list[Any]) -> None:
    found = setting_errors(TIES, "density", read_cases(setting))
    assert [place for place, _ in found] == places
