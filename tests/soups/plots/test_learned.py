"""The picture of coefficients: what it shows, at many sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from merge.coefficients import Coefficients, Ingredient
from soups.plots.learned import draw_coefficients
from tests.soups.plots.page import check_labels


def coefficients(ingredients: int, groups: list[str], *, base: bool = False, **settings):
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.5, 1.5, (ingredients, len(groups)))
    matrix *= (0.7 if base else 1.0) / matrix.sum(axis=0)
    return Coefficients(
        ingredients=tuple(Ingredient(f"{k:02d}", f"{k:064x}") for k in range(ingredients)),
        groups={group: (f"{group}.tensor",) for group in groups},
        matrix=matrix,
        base=Ingredient("base", "f" * 64) if base else None,
        method="mehl_layerwise",
        **settings,
    )


def tensor_names(count: int) -> list[str]:
    return [f"stages.{i // 20}.blocks.{i // 5 % 4}.layer{i % 5}.weight" for i in range(count)]


def bar_widths(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def heat_map_of(figure: Any) -> Any:
    return figure.axes[0].get_images()[0]


@pytest.mark.parametrize(
    ("ingredients", "groups", "base"),
    [(2, 2, False), (5, 4, True), (16, 40, False), (72, 150, False), (120, 3, False)],
)
def test_heat_map(ingredients, groups, base):
    found = coefficients(ingredients, tensor_names(groups), base=base)
    figure = draw_coefficients(found)
    heat, bars, bar = figure.axes
    image = heat_map_of(figure)
    shown = np.asarray(image.get_array())
    np.testing.assert_array_equal(shown[:ingredients], found.matrix)
    assert (image.norm.vmin + image.norm.vmax) / 2 == pytest.approx(1 / ingredients)
    if base:
        np.testing.assert_allclose(shown[-1], 0.3)
        assert heat.get_yticklabels()[-1].get_text() == "base"
    widths = bar_widths(bars)
    np.testing.assert_allclose(widths, shown.mean(axis=1))
    assert "mehl_layerwise" in heat.get_title(loc="left")
    assert "1/K" in bar.get_ylabel()
    check_labels(figure)


def test_one_strong_coefficient_does_not_bleach_the_others():
    found = coefficients(16, tensor_names(40))
    matrix = found.matrix.copy()
    matrix[3, 2] += 1.3
    matrix[:, 2] /= matrix[:, 2].sum()
    strong = Coefficients(found.ingredients, found.groups, matrix)
    norm = heat_map_of(draw_coefficients(strong)).norm
    assert norm.vmax < 0.2


def test_equal_coefficients_are_white():
    found = coefficients(4, ["a", "b"])
    equal = Coefficients(found.ingredients, found.groups, np.full((4, 2), 0.25))
    image = heat_map_of(draw_coefficients(equal))
    colour = image.cmap(image.norm(0.25))
    assert min(colour[:3]) > 0.95


@pytest.mark.parametrize(("ingredients", "base"), [(1, False), (8, False), (8, True), (72, False)])
def test_model_level_soups_are_bars(ingredients, base):
    found = coefficients(ingredients, ["model"], base=base)
    figure = draw_coefficients(found)
    (axes,) = figure.axes
    widths = bar_widths(axes)
    np.testing.assert_allclose(widths[:ingredients], found.matrix[:, 0])
    assert len(widths) == ingredients + base
    check_labels(figure)


@pytest.mark.parametrize("groups", [["model"], ["a", "b", "c"]])
def test_weights_are_drawn_with_their_intervals(groups):
    found = coefficients(4, groups)
    weights = [
        {"ingredient": "01", "weight": 0.4, "standard_error": 0.1, "low": 0.2, "high": 0.6},
        {"ingredient": "03", "weight": -0.1, "standard_error": 0.05, "low": -0.2, "high": 0.0},
    ]
    figure = draw_coefficients(found, weights=weights)
    axes = figure.axes[0 if len(groups) == 1 else 1]
    lines = [segment.tolist() for drawn in axes.collections for segment in drawn.get_segments()]
    assert lines == [[[0.2, 1], [0.6, 1]], [[-0.2, 3], [0.0, 3]]]
    points = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    assert points == [(0.4, 1), (-0.1, 3)]
    left, right = axes.get_xlim()
    assert left < -0.2
    assert right > 0.6
    check_labels(figure)
    assert "95%" in axes.get_xlabel() + axes.get_title(loc="left")


def test_norm_buffers_are_left_out():
    with_buffers = coefficients(8, ["model", "norm buffers"])
    assert len(draw_coefficients(with_buffers).axes) == 1
    layers = coefficients(8, ["a", "b", "norm buffers of a", "norm buffers of b"])
    image = heat_map_of(draw_coefficients(layers))
    np.testing.assert_array_equal(np.asarray(image.get_array()), layers.matrix[:, :2])


def test_long_names_are_shortened_and_the_shared_part_is_said_once():
    groups = [f"visual.{'deep.' * 12}{k}.weight" for k in range(3)] + ["visual.head.bias"]
    heat = draw_coefficients(coefficients(4, groups)).axes[0]
    labels = [label.get_text() for label in heat.get_xticklabels()]
    assert labels[-1] == "head.bias"
    assert all(len(label) <= 30 for label in labels)
    assert labels[0] != labels[1]
    assert "visual" in heat.get_xlabel()
