"""Soups of fewer ingredients: which are chosen, and that *report* has no part in it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from soups import pipeline, report_door
from soups.learners.registry import Greedy
from soups.learners.selection import greedy_members
from soups.reports import subsets as module
from soups.reports.material import Material
from soups.reports.registry import Subsets
from soups.reports.subsets import choose_subsets, greedy_along, soups_of
from tests.soups.conftest import make_config, open_session

NAMES = ["a", "b", "c", "d"]


def score_of(values: dict[str, float]):
    """Scores by the members' names; what is not named scores 0."""
    asked: list[list[str]] = []

    def score(trials):
        asked.append(["".join(sorted(NAMES[k] for k in trial)) for trial in trials])
        return [values.get(members, 0.0) for members in asked[-1]]

    return score, asked


def test_orders_are_walked_together():
    score, asked = score_of({"ab": 0.9, "abd": 0.95, "bc": 0.5, "cd": 0.7})
    accuracies = [0.8, 0.7, 0.6, 0.5]
    kept = greedy_along([[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]], accuracies, score, "ge")
    assert kept == [[0, 1, 3], [1], [2, 3], [3]]
    # One call for each place, with a trial for each order that is so long.
    assert asked == [["ab", "bc", "cd"], ["abc", "bd"], ["abd"]]


@pytest.mark.parametrize(("accept", "kept"), [("ge", [0, 1]), ("gt", [0])])
def test_an_equal_score_is_kept_as_greedy_does(accept, kept):
    score, _ = score_of({"ab": 0.8})
    assert greedy_along([[0, 1]], [0.8, 0.8], score, accept) == [kept]


def test_all_soups_follow_from_what_was_found():
    found = {
        "best_first": ["b", "a", "c"],
        "greedy_without_the_best": [["b", "c"], ["a"], ["c"]],
        "random_orders": [["c", "a", "b"]],
    }
    soups = {(s.of, s.soup, s.count): {"abc"[k] for k in s.members} for s in soups_of(found, "abc")}
    best = [soups["best n", "greedy", n] for n in (1, 2, 3)]
    assert best == [{"b"}, {"b"}, {"b", "c"}]
    assert [soups["best n", "uniform", n] for n in (1, 2)] == [{"b"}, {"a", "b"}]
    assert [soups["best n", "best_single", n] for n in (1, 3)] == [{"b"}, {"b"}]
    assert [soups["without the best n", "uniform", n] for n in (0, 2)] == [set("abc"), {"c"}]
    assert [soups["without the best n", "best_single", n] for n in (0, 1, 2)] == [
        *({"b"}, {"a"}, {"c"}),
    ]
    assert [soups["without the best n", "greedy", n] for n in (0, 1)] == [{"b", "c"}, {"a"}]
    assert [soups["random n", "uniform", n] for n in (1, 2, 3)] == [{"c"}, {"a", "c"}, set("abc")]


def test_greedy_of_all_is_what_the_learner_keeps(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    session.ingredients = session.ingredients.of(session.evaluate_ingredients().right, 0.0)
    session.begin("report/subsets", None)
    choose_subsets(Material(session, {}), Subsets(orders=2), tmp_path / "subsets")
    found = session.record
    session.begin("greedy", None)
    members = greedy_members(session, Greedy())
    assert found["greedy_without_the_best"][0] == [session.zoo.names[k] for k in members]
    assert found["best_first"][0] == members[0] or session.zoo.names[members[0]]
    assert [len(order) for order in found["random_orders"]] == [5, 5]
    assert not [*tmp_path.glob("subsets*")]


def run(kitchen, output, **changes):
    learners = {"uniform": {"type": "uniform"}, "greedy": {"type": "greedy"}}
    settings = {"learners": learners, "reports": {"subsets": {"orders": 2}}, "pictures": False}
    config = make_config(kitchen, output=output, **(settings | changes))
    pipeline.run(config, root=kitchen, fresh=False, progress=False, say=lambda text: None)
    return output / "small"


def test_what_is_chosen_is_chosen_on_select_and_judged_on_report(kitchen, tmp_path, monkeypatch):
    order = []
    load = report_door.load_report_data
    monkeypatch.setattr(
        report_door, "load_report_data", lambda *a, **k: order.append("opened") or load(*a, **k)
    )
    images = []
    scored = module.run_soups

    def watched(session, coalitions, images_=None):
        order.append("report" if images_ is not None else "select")
        images.append(len(session.select if images_ is None else images_))
        return scored(session, coalitions, images_)

    monkeypatch.setattr(module, "run_soups", watched)
    folder = run(kitchen, tmp_path)
    assert order == ["select"] * 4 + ["opened", "report"]
    assert images[-1] == 449
    with (folder / "reports" / "subsets" / "subsets.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 + 3 * 5 + 2 * 5
    assert {row["soup"] for row in rows if row["of"] == "random n"} == {"uniform"}
    singles = [float(r["accuracy"]) for r in rows if r["soup"] == "best_single"]
    assert len(set(singles[:5])) == 1
    error = float(rows[0]["accuracy_error"])
    p = float(rows[0]["accuracy"])
    assert error == pytest.approx(np.sqrt(p * (1 - p) / 448))
    record = json.loads((folder / "run.json").read_text())["reports"]["subsets"]
    assert record["remark"].startswith("449 images of report; chosen on")
    assert record["judged"]["forward_passes"] > 0
    # All is known: nothing is scored again.
    order.clear()
    run(kitchen, tmp_path)
    assert order == ["opened"]
    # Taken out of the config, its files go.
    run(kitchen, tmp_path, reports={})
    assert not (folder / "reports" / "subsets").exists()
