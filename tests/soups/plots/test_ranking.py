"""The pictures of the leaderboard: the rows as they stand in its file."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from soups.plots import costs, leaderboard
from soups.rows import CrossFitted, Metrics, Row
from soups.significance import Difference
from soups.statistics import Interval
from tests.soups.plots.page import check_labels, check_page, written


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
    figure = leaderboard(written(tmp_path, rows))
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


def test_costs_are_bars_with_their_numbers(tmp_path):
    cheap = replace(row("best_single", 0.8), seconds=0.25, peak_bytes=2**30, forward_passes=16.0)
    fitted = CrossFitted(0.8, 5, seconds=4.0, forward_passes=21.0, backward_passes=20.0)
    dear = replace(
        row("a learner with quite a long name, and then some", 0.82),
        seconds=1.5,
        peak_bytes=3 * 2**29,
        forward_passes=5.0,
        backward_passes=5.0,
        out_of_fold=fitted,
    )
    free = row("ensemble_all", 0.9, "reference")
    figure = costs(written(tmp_path, [cheap, dear, free]))
    seconds, passes, memory = figure.axes
    widths = [[bar.get_width() for bar in axes.patches[:3]] for axes in figure.axes]
    assert widths == [[1.5, 0.25, 0], [10, 16, 0], [1.5, 1, 0]]
    beside = [[bar.get_width() for bar in axes.patches[3:6]] for axes in (seconds, passes)]
    assert beside == [[4, 0, 0], [41, 0, 0]]
    assert [text.get_text() for text in seconds.texts] == ["1.5 + 4", "0.25", "0"]
    assert [text.get_text() for text in memory.texts] == ["1.5", "1", "0"]
    assert memory.get_xlabel() == "peak memory of the process, GiB"
    assert figure.axes[0].get_xlim()[0] == 0
    check_page(figure)
