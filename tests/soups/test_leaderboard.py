from __future__ import annotations

import csv
import dataclasses
import re
from typing import Any, Literal

import numpy as np
import pytest

from soups.errors import SoupError
from soups.leaderboard import (
    CrossFitted,
    Metrics,
    Row,
    load_predictions,
    markdown_table,
    ranked,
    save_predictions,
    score,
    terminal_table,
    with_intervals,
    write_leaderboard,
)
from soups.statistics import fit_temperature

SEVERITIES = (1, 3, 5)


def metrics(accuracy: float) -> Metrics:
    return Metrics(accuracy, accuracy - 0.1, 0.5, 0.25, 0.08, 0.02)


def row(
    learner: str, report: float, kind: Literal["soup", "reference"] = "soup", **settings: Any
) -> Row:
    defaults: dict[str, Any] = {
        "ingredients": ("00", "03"),
        "zoo_size": 16,
        "extra": {f"report_noise_{s}": report - s / 10 for s in SEVERITIES},
        "seconds": 12.5,
        "peak_bytes": 3 * 2**20,
        "forward_passes": 16.0,
    }
    return Row(learner, kind, select=metrics(0.9), report=metrics(report), **defaults | settings)


@pytest.fixture
def predictions() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    accuracies = {"best_single": 0.8, "greedy": 0.85, "mehl": 0.9, "ensemble": 0.95}
    return {
        name: {"report": rng.random(400) < p, "select": rng.random(100) < p}
        for name, p in accuracies.items()
    }


@pytest.fixture
def rows(predictions) -> list[Row]:
    return [
        row(
            name,
            float(sets["report"].mean()),
            kind="reference" if name == "ensemble" else "soup",
            notes=("a note",) if name == "mehl" else (),
        )
        for name, sets in predictions.items()
    ]


def table_lines(text: str, learner: str) -> list[list[str]]:
    """The cells of the Markdown lines of this learner."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith(f"| {learner} ")
    ]


def test_score_of_known_logits():
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    found = score(logits, np.array([0, 0, 1, 1]))
    assert found.accuracy == 0.75
    assert found.worst_class == 0.5
    assert found.loss == pytest.approx(-np.log([0.9, 0.6, 0.4, 0.8]).mean())
    assert found.loss_scaled == found.loss
    assert found.ece_scaled == found.ece


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


def test_soups_are_ranked_before_references():
    rows = [row("a", 0.7), row("b", 0.9, "reference"), row("c", 0.8), row("d", 0.7)]
    assert [r.learner for r in ranked(rows)] == ["c", "a", "d", "b"]


def test_intervals_hold_the_accuracy_and_the_difference(rows, predictions):
    for found in with_intervals(rows, predictions, seed=1):
        assert found.interval is not None
        assert found.interval.low < found.report.accuracy < found.interval.high
        assert found.difference_interval is not None
        expected = found.report.accuracy - predictions["best_single"]["report"].mean()
        assert found.difference == pytest.approx(expected)
        assert found.difference_interval.low <= expected <= found.difference_interval.high


def test_a_rows_interval_does_not_depend_on_the_other_rows(rows, predictions):
    assert with_intervals(rows[::-1], predictions)[0] == with_intervals(rows, predictions)[-1]


@pytest.mark.parametrize("baseline", [None, "absent"])
def test_without_a_baseline_there_is_no_difference(rows, predictions, baseline):
    found = with_intervals(rows, predictions, baseline=baseline)
    assert all(r.difference is None and r.difference_interval is None for r in found)
    assert "vs " not in markdown_table(found)


def test_csv_has_every_number_in_full(rows, predictions, tmp_path):
    rows = with_intervals(rows, predictions)
    write_leaderboard(rows, tmp_path, data="digits", select_examples=100, report_examples=400)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        lines = {line["learner"]: line for line in csv.DictReader(file)}
    assert list(lines) == [r.learner for r in ranked(rows)]
    for found in rows:
        line = lines[found.learner]
        assert float(line["report_accuracy"]) == found.report.accuracy
        assert float(line["select_ece_scaled"]) == found.select.ece_scaled
        assert found.interval == (
            float(line["report_accuracy_low"]),
            float(line["report_accuracy_high"]),
        )
        assert float(line["difference"]) == found.difference
        for severity in SEVERITIES:
            name = f"report_noise_{severity}"
            assert float(line[f"{name}_accuracy"]) == found.extra[name]
        assert line["ingredients"] == "00 03"
        assert int(line["peak_bytes"]) == 3 * 2**20
    assert lines["mehl"]["notes"] == "a note"


def test_markdown_shows_what_a_person_looks_for(rows, predictions, tmp_path):
    rows = with_intervals(rows, predictions)
    write_leaderboard(rows, tmp_path, data="digits", select_examples=100, report_examples=4000)
    text = (tmp_path / "leaderboard.md").read_text()
    soups, references = text.split("## References (not soups)")
    assert [
        line.split()[1] for line in soups.splitlines() if re.match(r"\| [a-z]+_?\w* +\| +\d", line)
    ] == [
        "mehl",
        "greedy",
        "best_single",
    ]
    assert "ensemble" in references
    ((learner, used, select, report, difference, noise, worst, loss, ece, *_),) = table_lines(
        text, "mehl"
    )
    mehl = next(r for r in rows if r.learner == "mehl")
    assert mehl.interval is not None
    assert (learner, used, select) == ("mehl", "2/16", "90.00")
    low, high = (f"{100 * end:.2f}" for end in mehl.interval)
    assert report == f"**{100 * mehl.report.accuracy:.2f}** [{low}, {high}]"
    assert re.fullmatch(r"\+\d+\.\d\d \[[+-]\d+\.\d\d, \+\d+\.\d\d\]", difference)
    assert noise == f"{100 * (mehl.report.accuracy - 0.3):.2f}"
    assert worst == f"{100 * mehl.report.worst_class:.2f}"
    assert (loss, ece) == ("0.500 → 0.250", "8.00 → 2.00")
    assert text.count("**") == 2  # a reference is better than mehl, but no soup is
    assert "digits" in text
    assert "4,000 images" in text
    assert "noise (1, 3, 5)" in text
    assert "- mehl: a note" in text


def test_accuracy_out_of_fold_stands_beside_that_in_sample(tmp_path):
    found = CrossFitted(0.8765, 5, 0.4, 0.0125, False, 3.5, 8.0, 4.0)
    rows = [row("a", 0.8, out_of_fold=found, free_coefficients=45), row("b", 0.7, "reference")]
    write_leaderboard(rows, tmp_path, data="d", select_examples=1, report_examples=1)
    text = (tmp_path / "leaderboard.md").read_text()
    assert table_lines(text, "a")[0][2:4] == ["90.00", "87.65"]
    assert table_lines(text, "b")[0][2:4] == ["90.00", ""]
    assert "(5 folds)" in text
    assert "87.65" in terminal_table(rows)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    for name, value in vars(found).items():
        assert first[f"out_of_fold_{name}"] == str(value)
        assert second[f"out_of_fold_{name}"] == ""
    assert (first["free_coefficients"], second["free_coefficients"]) == ("45", "")
    assert "flattering" not in text
    rows[0] = row("a", 0.8, out_of_fold=dataclasses.replace(found, own=True))
    write_leaderboard(rows, tmp_path, data="d", select_examples=1, report_examples=1)
    assert "a: on the folds by which" in (tmp_path / "leaderboard.md").read_text()
    plain = [row("a", 0.8)]
    assert "out of fold" not in markdown_table(plain) + terminal_table(plain)


def test_equally_good_soups_are_all_bold():
    assert markdown_table([row("a", 0.8), row("b", 0.8), row("c", 0.7)]).count("**") == 4


def test_a_pipe_in_a_name_does_not_break_the_table():
    lines = markdown_table([row("a|b", 0.8), row("c", 0.7)]).splitlines()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(cells) == 1


def test_a_shift_that_a_row_lacks_is_left_open(tmp_path):
    rows = [row("a", 0.8), row("b", 0.7, extra={"report_noise_1": 0.5, "renditions": 0.25})]
    write_leaderboard(rows, tmp_path, data="d", select_examples=1, report_examples=1)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "renditions %" in text
    assert table_lines(text, "a")[0][4:6] == ["50.00", ""]
    assert table_lines(text, "b")[0][4:6] == ["", "25.00"]


def test_a_table_without_references_or_intervals(tmp_path):
    rows = [row("a", 0.8, extra={}), row("b", 0.7, extra={})]
    write_leaderboard(rows, tmp_path, data="d", select_examples=1, report_examples=1)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "References" not in text
    assert "bootstrap" not in text
    assert len(terminal_table(rows).splitlines()) == 4


def test_the_terminal_table_fits(rows, predictions):
    names = ["best_single fine-tuned on select for as many steps", "ensemble"]
    long = [row(name, 0.9712, "reference", seconds=12_345.0) for name in names]
    shifts = {
        f"report_{k}_{s}": 0.5 for k in ("noise", "blur", "rotation") for s in (1, 2, 3, 4, 5)
    }
    rows = [
        row(r.learner, r.report.accuracy, r.kind, extra=shifts, out_of_fold=CrossFitted(0.8, 5))
        for r in rows[:-1]
    ]
    sets = predictions | dict.fromkeys(names, predictions["ensemble"])
    text = terminal_table(with_intervals(rows + long, sets))
    assert max(map(len, text.splitlines())) <= 160
    assert text.splitlines()[2].startswith("mehl")
    assert "12,345" in text


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
