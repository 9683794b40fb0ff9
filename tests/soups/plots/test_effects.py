"""Pictures of what ingredients do: what they show, at many sizes."""

import numpy as np
import pytest

from soups.plots.effects import EffectPanel, draw_effects
from tests.soups.plots.page import check_page, random_effects


@pytest.mark.parametrize("count", [2, 16, 72, 120])
def test_effects(count):
    names = [f"an ingredient with quite a long name {k}" for k in range(count)]
    accuracy, loss = random_effects(count), random_effects(count, 1)
    accuracy.values[1] = 0.0
    order = np.argsort(-accuracy.values).tolist()
    panels = [
        EffectPanel("accuracy, points", accuracy, good="above", scale=100.0),
        EffectPanel("loss, nats", loss, good="below"),
    ]
    figure = draw_effects(names, order, panels, title="title", remark="remark")
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
