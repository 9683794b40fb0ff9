from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from merge.coefficients import Coefficients, Ingredient
from soups.leaderboard import Metrics, Row
from soups.plots import plot_coefficients, plot_leaderboard
from soups.significance import Difference
from soups.statistics import Interval


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


def overlaps(texts: list[Any], renderer: Any) -> list[tuple[str, str]]:
    """Pairs of neighbouring labels that touch."""
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [(a, b) for (a, x), (b, y) in itertools.pairwise(boxes) if x.overlaps(y)]


def shown_labels(axes: Any) -> tuple[list[Any], list[Any]]:
    """The tick labels that are drawn; matplotlib also keeps some beyond the axes' ends."""
    (left, right), (top, bottom) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    x = [t for t in axes.get_xticklabels() if t.get_text() and left <= t.get_position()[0] <= right]
    y = [t for t in axes.get_yticklabels() if t.get_text() and top <= t.get_position()[1] <= bottom]
    return x, y


def bar_widths(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def heat_map_of(figure: Any) -> Any:
    return figure.axes[0].get_images()[0]


def check_labels(figure: Any) -> None:
    """No tick label touches its neighbour or leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox.padded(1)
    for axes in figure.axes:
        x_labels, y_labels = shown_labels(axes)
        assert overlaps(x_labels, renderer) == []
        assert overlaps(y_labels, renderer) == []
        for text in (*x_labels, *y_labels, axes.xaxis.label, axes.yaxis.label, axes.title):
            box = text.get_window_extent(renderer)
            if text.get_text():
                assert page.containsx(box.x0) and page.containsx(box.x1), text  # noqa: PT018
                assert page.containsy(box.y0) and page.containsy(box.y1), text  # noqa: PT018


@pytest.mark.parametrize(
    ("ingredients", "groups", "base"),
    [(2, 2, False), (5, 4, True), (16, 40, False), (72, 150, False), (120, 3, False)],
)
def test_heat_map(tmp_path, ingredients, groups, base):
    found = coefficients(ingredients, tensor_names(groups), base=base)
    figure = plot_coefficients(found, tmp_path / "a.png")
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
    with Image.open(tmp_path / "a.png") as png:
        assert png.format == "PNG"
        assert png.info["dpi"][0] == pytest.approx(150, abs=0.1)


def test_one_strong_coefficient_does_not_bleach_the_others(tmp_path):
    found = coefficients(16, tensor_names(40))
    matrix = found.matrix.copy()
    matrix[3, 2] += 1.3
    matrix[:, 2] /= matrix[:, 2].sum()
    strong = Coefficients(found.ingredients, found.groups, matrix)
    norm = heat_map_of(plot_coefficients(strong, tmp_path / "a.png")).norm
    assert norm.vmax < 0.2


def test_equal_coefficients_are_white(tmp_path):
    found = coefficients(4, ["a", "b"])
    equal = Coefficients(found.ingredients, found.groups, np.full((4, 2), 0.25))
    image = heat_map_of(plot_coefficients(equal, tmp_path / "a.png"))
    colour = image.cmap(image.norm(0.25))
    assert min(colour[:3]) > 0.95


@pytest.mark.parametrize(("ingredients", "base"), [(1, False), (8, False), (8, True), (72, False)])
def test_model_level_soups_are_bars(tmp_path, ingredients, base):
    found = coefficients(ingredients, ["model"], base=base)
    figure = plot_coefficients(found, tmp_path / "a.png")
    (axes,) = figure.axes
    widths = bar_widths(axes)
    np.testing.assert_allclose(widths[:ingredients], found.matrix[:, 0])
    assert len(widths) == ingredients + base
    check_labels(figure)


@pytest.mark.parametrize("groups", [["model"], ["a", "b", "c"]])
def test_weights_are_drawn_with_their_intervals(tmp_path, groups):
    found = coefficients(4, groups)
    weights = [
        {"ingredient": "01", "weight": 0.4, "standard_error": 0.1, "low": 0.2, "high": 0.6},
        {"ingredient": "03", "weight": -0.1, "standard_error": 0.05, "low": -0.2, "high": 0.0},
    ]
    figure = plot_coefficients(found, tmp_path / "a.png", weights=weights)
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


def test_norm_buffers_are_left_out(tmp_path):
    with_buffers = coefficients(8, ["model", "norm buffers"])
    assert len(plot_coefficients(with_buffers, tmp_path / "a.png").axes) == 1
    layers = coefficients(8, ["a", "b", "norm buffers of a", "norm buffers of b"])
    image = heat_map_of(plot_coefficients(layers, tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(image.get_array()), layers.matrix[:, :2])


def test_long_names_are_shortened_and_the_shared_part_is_said_once(tmp_path):
    groups = [f"visual.{'deep.' * 12}{k}.weight" for k in range(3)] + ["visual.head.bias"]
    heat = plot_coefficients(coefficients(4, groups), tmp_path / "a.png").axes[0]
    labels = [label.get_text() for label in heat.get_xticklabels()]
    assert labels[-1] == "head.bias"
    assert all(len(label) <= 30 for label in labels)
    assert labels[0] != labels[1]
    assert "visual" in heat.get_xlabel()


def test_the_same_coefficients_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot_coefficients(coefficients(3, ["x", "y"]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def row(
    learner: str,
    accuracy: float,
    kind: Literal["soup", "reference"] = "soup",
    *,
    interval: bool = True,
) -> Row:
    against = Difference("best_single", accuracy - 0.8, Interval(-0.1, 0.1), 0.5, 1.0)
    score = Metrics(accuracy, 0.5, 0.5, 0.5, 0.1, 0.1, 0.2, 0.2)
    return Row(
        learner,
        kind,
        ("00",),
        4,
        select=Metrics(accuracy + 0.01, 0.5, 0.5, 0.5, 0.1, 0.1, 0.2, 0.2),
        report=score,
        interval=Interval(accuracy - 0.02, accuracy + 0.02) if interval else None,
        differences=(against,) if interval else (),
    )


@pytest.mark.parametrize("interval", [True, False])
@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("soups", [1, 12])
def test_leaderboard(tmp_path, soups, references, interval):
    names = ["best_single", *(f"soup_{k}" for k in range(1, soups))]
    rows = [row(n, 0.8 + 0.01 * k, interval=interval) for k, n in enumerate(names)]
    rows += [
        row(f"ensemble with a rather long name {k}", 0.9, "reference", interval=interval)
        for k in range(references)
    ]
    figure = plot_leaderboard(rows, tmp_path / "a.png")
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:soups] == names[::-1]
    assert len(labels) == soups + references
    assert axes.yaxis_inverted()
    drawn = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in axes.lines}
    expected = [100 * (0.8 + 0.01 * k) for k in range(soups)][::-1]
    assert drawn["soup: report, 95% interval"] == pytest.approx(expected)
    assert drawn["soup: select"] == pytest.approx([x + 1 for x in expected])
    assert ("best_single: report" in drawn) == interval
    check_labels(figure)
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_pictures_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; import soups.plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from soups.leaderboard import Metrics, Row\n"
        "scores = Metrics(*[0.5] * 8)\n"
        "row = Row('a', 'soup', ('00',), 4, select=scores, report=scores)\n"
        "soups.plots.plot_leaderboard([row], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)
