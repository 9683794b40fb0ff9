"""Pictures of the reports: what they show, and that no label touches another or leaves the page."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from soups.reports import pictures
from soups.reports.pictures import (
    Curve,
    EffectPanel,
    Grid,
    Mark,
    plot_effects,
    plot_lines,
    plot_plane,
)
from soups.reports.tables import Effects
from tests.soups.test_plots import check_labels


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures = []
    save = pictures.save_figure

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "save_figure", keep)
    return figures


def random_effects(count: int, seed: int = 0) -> Effects:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.01, count)
    values[0] = 0.02
    return Effects(values, rng.uniform(0.001, 0.01, count))


def check_page(figure: Figure) -> None:
    """Tick labels, legend and titles are apart and on the page."""
    check_labels(figure)
    renderer = figure.canvas.get_renderer()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    suptitle = figure._suptitle
    boxes.append(suptitle.get_window_extent(renderer))
    page = figure.bbox.padded(1)
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
        if i:
            assert not boxes[0].overlaps(box.padded(-2))


@pytest.mark.parametrize("count", [2, 16, 72, 120])
def test_effects(tmp_path, drawn, count):
    names = [f"an ingredient with quite a long name {k}" for k in range(count)]
    accuracy, loss = random_effects(count), random_effects(count, 1)
    accuracy.values[1] = 0.0
    order = np.argsort(-accuracy.values).tolist()
    panels = [
        EffectPanel("accuracy, points", accuracy, good="above", scale=100.0),
        EffectPanel("loss, nats", loss, good="below"),
    ]
    path = plot_effects(names, order, panels, tmp_path / "a.png", title="title", remark="remark")
    (figure,) = drawn
    left, right = figure.axes
    points = {
        line.get_label(): np.asarray(line.get_xdata())
        for line in left.lines
        if line.get_marker() == "o"
    }
    np.testing.assert_allclose(
        np.sort(points["helps"]), 100 * np.sort(accuracy.values[accuracy.low > 0])
    )
    assert 0.0 in points["can be either"]
    assert sum(map(len, points.values())) == count
    of_loss = {line.get_label(): line.get_xdata() for line in right.lines}
    np.testing.assert_allclose(np.sort(of_loss["hurts"]), np.sort(loss.values[loss.low > 0]))
    assert left.yaxis_inverted()
    check_page(figure)
    with Image.open(path) as png:
        assert png.format == "PNG"


@pytest.mark.parametrize("count", [1, 3, 9])
def test_lines(tmp_path, drawn, count):
    t = np.linspace(-0.25, 1.25, 13)
    curves = [
        Curve(
            f"first_{k} → second_{k}, 1.23 apart", t, random_effects(13, k), random_effects(13, k)
        )
        for k in range(count)
    ]
    plot_lines(curves, tmp_path / "a.png", remark="remark")
    (figure,) = drawn
    loss, accuracy = figure.axes
    for axes, scale in ((loss, 1), (accuracy, 100)):
        for line, curve in zip(axes.lines, curves, strict=False):
            np.testing.assert_allclose(line.get_ydata(), scale * curve.loss.values)
    looks = {(line.get_color(), line.get_linestyle()) for line in loss.lines[:count]}
    assert len(looks) == count
    assert loss.get_yscale() == "linear"
    check_page(figure)


def test_a_loss_of_many_sizes_is_on_a_log_scale(tmp_path, drawn):
    t = np.linspace(0, 1, 5)
    loss = Effects(np.array([0.1, 0.5, 2.0, 8.0, 30.0]), np.full(5, 0.1))
    plot_lines([Curve("a → b", t, random_effects(5), loss)], tmp_path / "a.png", remark="r")
    assert drawn[0].axes[0].get_yscale() == "log"
    assert drawn[0].axes[0].get_ylim()[0] > 0.01
    check_page(drawn[0])


@pytest.mark.parametrize(("width", "height"), [(2.0, 1.5), (1.0, 0.2), (1.0, 3.0)])
@pytest.mark.parametrize("soups", [0, 8])
def test_plane(tmp_path, drawn, width, height, soups):
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
    plot_plane(grid, marks, tmp_path / "a.png", remark="remark")
    (figure,) = drawn
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
    check_page(figure)


def test_a_flat_plane_can_be_drawn(tmp_path, drawn):
    x = np.linspace(0, 1, 3)
    grid = Grid(x, x, np.full((3, 3), 0.5), np.full((3, 3), 0.7))
    plot_plane(grid, [Mark("a", "corner", 0.0, 0.0, 0.0)], tmp_path / "a.png", remark="remark")
    check_page(drawn[0])
