"""The picture of overfitting: where its points are, and that its labels can be read."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from soups.errors import SoupError
from soups.plots import overfitting
from soups.rows import CrossFitted, Metrics, Row
from tests.soups.plots.page import written


def row(learner: str, count: int | None, apart: float, error: float | None = 0.01) -> Row:
    scores = Metrics(0.8, 0.5, 0.5, 0.5, 0.1, 0.1, 0.2, 0.2)
    found = CrossFitted(0.8 - apart, 5, standard_error=error)
    return Row(
        learner,
        "soup",
        ("00",),
        4,
        select=scores,
        report=scores,
        free_coefficients=count,
        out_of_fold=found,
    )


def drawn_points(axes: Any) -> dict[str, Any]:
    return {container.get_label(): container for container in axes.containers}


def test_points_are_what_is_lost_out_of_fold_with_their_errors(tmp_path):
    rows = [row("a", 0, 0.0), row("b", 15, 0.015, 0.004), row("c", 900, -0.002, None)]
    rows += [row("left out", None, 0.1)]
    (axes,) = overfitting(written(tmp_path, rows)).axes
    points = drawn_points(axes)
    assert list(points) == ["a", "b", "c"]
    where = {n: (c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for n, c in points.items()}
    assert where["a"] == (0, pytest.approx(0))
    assert where["b"] == (15, pytest.approx(1.5))
    assert where["c"] == (900, pytest.approx(-0.2))
    (bar,) = points["b"].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0], [[15, 1.1], [15, 1.9]])
    assert not points["c"].lines[2]
    assert points["c"].lines[0].get_markerfacecolor() == "white"
    assert "hollow" in axes.get_title(loc="left")
    low, high = axes.get_ylim()
    assert low < -1.0
    assert high > 1.9


def test_labels_touch_neither_points_nor_each_other(tmp_path):
    rng = np.random.default_rng(0)
    counts = [0, 1, *[15] * 6, 48, 48, 615, 615]
    rows = [
        row(f"a_learner_of_kind_{n}", count, float(rng.normal(0.004, 0.002)), 0.002)
        for n, count in enumerate(counts)
    ]
    figure = overfitting(written(tmp_path, rows))
    (axes,) = figure.axes
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    labels = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
    assert len(labels) == len(rows)
    for a, b in itertools.combinations(labels, 2):
        assert not a.padded(-1).overlaps(b.padded(-1))
    bars = [c.lines[0].get_window_extent(renderer) for c in axes.containers]
    assert len(bars) == len(rows)
    ends = [
        axes.transData.transform(c.lines[2][0].get_segments()[0])[:, 1] for c in axes.containers
    ]
    for bar, (low, high) in zip(bars, ends, strict=True):
        whole = Bbox([[bar.x0, low], [bar.x1, high]])
        assert not any(label.padded(-1).overlaps(whole) for label in labels)
    middles = [bar.x0 for bar in bars]
    assert min(abs(a - b) for a, b in itertools.combinations(middles, 2)) > 5


def test_nothing_cross_fitted_has_no_picture(tmp_path):
    folder = written(tmp_path, [row("a", None, 0.0)])
    with pytest.raises(SoupError, match=r"leaderboard.csv: no row was cross-fitted.*out_of_fold"):
        overfitting(folder)
