"""Reliability diagrams: how images are put into bins, and pages of many and of few."""

from __future__ import annotations

import numpy as np
import pytest

from soups.plots.calibration import BINS, Bins, draw_reliability
from soups.statistics import expected_calibration_error
from tests.soups.plots.page import check_page


def random_bins(images: int, seed: int = 0) -> Bins:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1.0, images).astype(np.float32)
    return Bins.of(confidence, rng.random(images) < confidence)


def test_bins_are_those_of_the_calibration_error():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, 5))
    labels = rng.integers(0, 5, 400)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = Bins.of(chances.max(axis=1), logits.argmax(axis=1) == labels)
    assert found.error == pytest.approx(expected_calibration_error(logits, labels))
    assert found.counts.sum() == 400


def test_a_bin_has_its_upper_end_and_not_its_lower_one():
    edges = np.arange(BINS + 1, dtype=np.float64) / BINS
    found = Bins.of(edges, np.ones(BINS + 1, dtype=bool))
    assert found.counts.tolist() == [2] + [1] * (BINS - 1)


def test_intervals_are_wilsons():
    """Wilson (1927) for 8 of 10: [0.490, 0.943], as Brown, Cai and DasGupta (2001) have it."""
    found = Bins.of(np.full(10, 0.9), np.arange(10) < 8)
    place = int(np.flatnonzero(found.counts)[0])
    assert found.accuracy[place] == 0.8
    assert found.low[place] == pytest.approx(0.4902, abs=5e-4)
    assert found.high[place] == pytest.approx(0.9433, abs=5e-4)
    assert np.isnan(found.accuracy[np.arange(BINS) != place]).all()


@pytest.mark.parametrize("count", [1, 3, 4, 6, 12])
def test_each_row_has_a_panel(count):
    names = [f"a learner with quite a long name {k}" for k in range(count)]
    bins = [random_bins(200, seed) for seed in range(count)]
    figure = draw_reliability(names, bins, "remark")
    assert len(figure.axes) == count
    for axes, own in zip(figure.axes, bins, strict=True):
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        drawn = np.concatenate([np.asarray(line.get_ydata()) for line in marks])
        np.testing.assert_array_equal(np.sort(drawn), np.sort(own.accuracy[own.counts > 0]))
        assert axes.get_title(loc="right") == f"{100 * own.error:.1f}%"
    check_page(figure)


def test_a_bin_of_few_images_is_hollow():
    figure = draw_reliability(["a"], [Bins.of(np.array([0.3, *[0.9] * 8]), np.ones(9, bool))], "r")
    filled, hollow = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert filled.get_xdata() == pytest.approx([0.9])
    assert hollow.get_xdata() == pytest.approx([0.3])
    assert hollow.get_markerfacecolor() == "white"
