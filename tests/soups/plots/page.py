"""What the tests of pictures ask of a page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from soups.caption import Setting
from soups.reports.tables import Effects
from soups.rows import Row
from soups.tables import write_leaderboard


def written(folder: Path, rows: list[Row]) -> Path:
    """A results folder with a leaderboard of these rows."""
    write_leaderboard(rows, folder, Setting("digits", select_examples=9, report_examples=9))
    return folder


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


def check_labels(figure: Any) -> None:
    """No tick label touches its neighbour or leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the layout is found in two steps, as when it is saved
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


def check_page(figure: Figure) -> None:
    """Tick labels, legend, title and axes are apart and on the page."""
    check_labels(figure)
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    page = figure.bbox.padded(1)
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
        if i:
            assert not boxes[0].overlaps(box.padded(-2))


def random_effects(count: int, seed: int = 0) -> Effects:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.01, count)
    values[0] = 0.02
    return Effects(values, rng.uniform(0.001, 0.01, count))
