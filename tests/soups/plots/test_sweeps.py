"""The picture of a sweep: what is drawn where."""

import itertools

import pytest

from soups.plots.sweeps import Compared, draw_comparisons

LEARNERS = ("uniform", "learned_layerwise", "mehl_layerwise", "pooled", "best_single+select")


def comparisons(zoos: tuple[str, ...], axes: dict[str, list[str]]) -> list[Compared]:
    found = []
    for zoo, learner in itertools.product(zoos, LEARNERS):
        mean = 1.0 * LEARNERS.index(learner) - 2.0 * zoos.index(zoo)
        for values in dict.fromkeys([(), *itertools.product(*axes.values())]):
            fixed = dict(zip(axes, values, strict=False)) if values else {}
            found.append(Compared(learner, zoo, fixed, mean, mean - 0.4, mean + 0.6))
    return found


def test_every_comparison_has_its_place():
    axes = {"images": ["250", "1000", "4000"], "ingredients": ["4", "8"]}
    found = comparisons(("bn", "ln", "all"), axes)
    figure = draw_comparisons(found, "greedy", [*axes])
    panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == [
        f"{of}, images {n}" for of in ("zoo bn", "zoo ln", "all zoos") for n in axes["images"]
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [*LEARNERS]
    of_panels = [zoo for zoo in ("bn", "ln", "all") for _ in axes["images"]]
    for panel, zoo in zip(panels, of_panels, strict=True):
        marks = [line for line in panel.lines if len(line.get_xdata()) == 1]
        assert len(marks) == len(LEARNERS) * 2
        drawn = sorted(float(line.get_xdata()[0]) for line in marks)
        means = [one.mean for one in found if one.zoo == zoo and not one.fixed]
        assert drawn == pytest.approx(sorted(means * 2))
        ends = [segment for c in panel.collections for segment in c.get_segments()]
        assert sorted(end[0][0] for end in ends) == pytest.approx([m - 0.4 for m in drawn])
        assert sorted(end[1][0] for end in ends) == pytest.approx([m + 0.6 for m in drawn])
    rows = [float(line.get_ydata()[0]) for line in panels[0].lines if len(line.get_xdata()) == 1]
    assert len({round(y, 3) for y in rows}) == len(rows)
    assert all(abs(y - round(y)) < 0.4 for y in rows)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "ingredients 4",
        "ingredients 8",
    }
    assert panels[0].get_ylim()[0] > panels[0].get_ylim()[1]


@pytest.mark.parametrize("axes", [{}, {"images": ["250", "1000"]}])
def test_fewer_axes_and_one_zoo(axes: dict[str, list[str]]):
    found = comparisons(("all",), axes)
    figure = draw_comparisons(found, "greedy", [*axes])
    assert len(figure.axes) == max(1, len(axes.get("images", [])))
    for panel in figure.axes:
        assert len([line for line in panel.lines if len(line.get_xdata()) == 1]) == len(LEARNERS)
    assert not figure.legends
