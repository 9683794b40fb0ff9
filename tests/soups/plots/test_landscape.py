"""Pictures of lines and planes: what they show, and that no label touches another or leaves the
page."""

import numpy as np
import pytest

from soups.plots.landscape import Curve, Grid, Mark, draw_lines, draw_plane
from soups.reports.tables import Effects
from tests.soups.plots.page import check_page, random_effects


@pytest.mark.parametrize("count", [1, 3, 9])
def test_lines(count):
    t = np.linspace(-0.25, 1.25, 13)
    curves = [
        Curve(
            f"first_{k} → second_{k}, 1.23 apart", t, random_effects(13, k), random_effects(13, k)
        )
        for k in range(count)
    ]
    figure = draw_lines(curves, remark="remark")
    loss, accuracy = figure.axes
    for axes, scale in ((loss, 1), (accuracy, 100)):
        for line, curve in zip(axes.lines, curves, strict=False):
            np.testing.assert_allclose(line.get_ydata(), scale * curve.loss.values)
    looks = {(line.get_color(), line.get_linestyle()) for line in loss.lines[:count]}
    assert len(looks) == count
    assert loss.get_yscale() == "linear"
    check_page(figure)


def test_a_loss_of_many_sizes_is_on_a_log_scale():
    t = np.linspace(0, 1, 5)
    loss = Effects(np.array([0.1, 0.5, 2.0, 8.0, 30.0]), np.full(5, 0.1))
    figure = draw_lines([Curve("a → b", t, random_effects(5), loss)], remark="r")
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[0] > 0.01
    check_page(figure)


@pytest.mark.parametrize(("width", "height"), [(2.0, 1.5), (1.0, 0.2), (1.0, 3.0)])
@pytest.mark.parametrize("soups", [0, 8])
def test_plane(width, height, soups):
    x, y = np.linspace(-0.3, width, 7), np.linspace(-0.2, height, 5)
    bowl = 0.1 + (x - 0.5) ** 2 + (y[:, None] - 0.1) ** 2
    grid = Grid(x, y, 1 - bowl / 20, bowl)
    marks = [
        Mark("base", "corner", 0.0, 0.0, 0.0),
        Mark("best_single", "corner", 0.8 * width, 0.0, 0.0),
        Mark("uniform", "corner", 0.5 * width, 0.7 * height, 0.0),
        Mark("far", "soup", 9.0, 0.0, 3.0),
        *(Mark(f"a learner's row {k}", "soup", 0.1 * k * width, 0.1, 1.0) for k in range(soups)),
        *(Mark(f"{k:02d}", "ingredient", 0.05 * k, 0.05 * k * height, 1.0) for k in range(16)),
    ]
    figure = draw_plane(grid, marks, remark="remark")
    check_page(figure)
    for axes in figure.axes[:2]:
        shown = {line.get_label() for line in axes.lines}
        assert shown >= {"base", "best_single", "uniform", "ingredient"}
        assert "far" not in shown
        looks = {(line.get_marker(), line.get_color()) for line in axes.lines}
        assert len(looks) == len(shown) == 4 + soups
        box = axes.get_window_extent()
        # The same distance is as long across as up.
        assert box.width / box.height == pytest.approx((width + 0.3) / (height + 0.2), rel=0.01)
    assert "1 projection is outside" in figure._suptitle.get_text()


def test_a_flat_plane_can_be_drawn():
    x = np.linspace(0, 1, 3)
    grid = Grid(x, x, np.full((3, 3), 0.5), np.full((3, 3), 0.7))
    check_page(draw_plane(grid, [Mark("a", "corner", 0.0, 0.0, 0.0)], remark="remark"))
