from __future__ import annotations

import numpy as np
import pytest

from soups.errors import SoupError
from soups.rows import Row, load_predictions, ranked, save_predictions, score, with_intervals
from soups.significance import differences, tied_with_best
from soups.statistics import fit_temperature
from tests.soups.rows import made_predictions, made_rows, row


@pytest.fixture
def predictions() -> dict[str, dict[str, np.ndarray]]:
    return made_predictions()


@pytest.fixture
def rows(predictions) -> list[Row]:
    return made_rows(predictions)


def test_score_of_known_logits():
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    found = score(logits, np.array([0, 0, 1, 1]))
    assert found.accuracy == 0.75
    assert found.worst_class == 0.5
    assert found.loss == pytest.approx(-np.log([0.9, 0.6, 0.4, 0.8]).mean())
    assert found.loss_scaled == found.loss
    assert found.ece_scaled == found.ece
    assert found.brier == pytest.approx(2 * np.square([0.1, 0.4, 0.6, 0.2]).mean())
    assert found.brier_scaled == found.brier


def test_scaling_by_the_fitted_temperature_helps_an_overconfident_model():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 10))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    logits *= 5
    beta = fit_temperature(logits[:2000], labels[:2000])
    found = score(logits[2000:], labels[2000:], temperature=beta)
    assert found.ece > 0.2
    assert found.ece_scaled < 0.05
    assert found.loss_scaled < found.loss
    assert found.brier_scaled < found.brier


def test_soups_are_ranked_before_references():
    rows = [row("a", 0.7), row("b", 0.9, "reference"), row("c", 0.8), row("d", 0.7)]
    assert [r.learner for r in ranked(rows)] == ["c", "a", "d", "b"]


def test_intervals_hold_the_accuracy_and_the_differences(rows, predictions):
    right = {name: sets["report"] for name, sets in predictions.items()}
    for found in with_intervals(rows, predictions, seed=1):
        assert found.interval is not None
        assert found.interval.low < found.report.accuracy < found.interval.high
        baselines = [name for name in ("best_single", "greedy") if name != found.learner]
        assert [one.baseline for one in found.differences] == baselines
        for one in found.differences:
            assert one == differences(right, one.baseline, seed=1)[found.learner]
            assert found.against(one.baseline) == one
            expected = found.report.accuracy - right[one.baseline].mean()
            assert one.value == pytest.approx(expected)
            assert one.interval.low <= expected <= one.interval.high
        assert found.against("absent") is None


def test_only_soups_are_tied_with_the_best_soup(rows, predictions):
    right = {name: sets["report"] for name, sets in predictions.items() if name != "ensemble"}
    tied = {r.learner: r.tied for r in with_intervals(rows, predictions)}
    assert tied.pop("ensemble") is None
    assert {name for name, own in tied.items() if own} == tied_with_best(right)
    assert tied["mehl"]
    assert not tied["best_single"]
    references = [r for r in rows if r.kind == "reference"]
    assert [r.tied for r in with_intervals(references, predictions)] == [None]


def test_a_rows_interval_does_not_depend_on_the_other_rows(rows, predictions):
    assert with_intervals(rows[::-1], predictions)[0] == with_intervals(rows, predictions)[-1]


@pytest.mark.parametrize("baselines", [(), ("absent",)])
def test_without_a_baseline_there_is_no_difference(rows, predictions, baselines):
    found = with_intervals(rows, predictions, baselines=baselines)
    assert all(r.differences == () for r in found)


def test_predictions_come_back(predictions, tmp_path):
    predictions["a/b"] = {"report_noise_1": np.array([True, False])}
    save_predictions(tmp_path / "predictions.npz", predictions)
    first = (tmp_path / "predictions.npz").read_bytes()
    found = load_predictions(tmp_path / "predictions.npz")
    assert found.keys() == predictions.keys()
    for name, sets in predictions.items():
        assert found[name].keys() == sets.keys()
        for split, right in sets.items():
            assert found[name][split].dtype == bool
            np.testing.assert_array_equal(found[name][split], right)
    save_predictions(tmp_path / "predictions.npz", found)
    assert (tmp_path / "predictions.npz").read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"])
def test_a_broken_file_of_predictions_is_named(tmp_path, content):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(SoupError, match=r"predictions\.npz: not a file of predictions"):
        load_predictions(tmp_path / "predictions.npz")
