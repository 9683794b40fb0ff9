"""A run's table as CSV, Markdown and plain text, and the caption below it."""

from __future__ import annotations

import csv
import dataclasses
import re

import numpy as np
import pytest

from soups.caption import Setting, caption
from soups.diversity import Diversity
from soups.readings import Count
from soups.rows import CrossFitted, Row, ranked, with_intervals
from soups.tables import markdown_table, terminal_table, write_leaderboard
from tests.soups.rows import SEVERITIES, made_predictions, made_rows, row


@pytest.fixture
def predictions() -> dict[str, dict[str, np.ndarray]]:
    return made_predictions()


@pytest.fixture
def rows(predictions) -> list[Row]:
    return made_rows(predictions)


def table_lines(text: str, learner: str) -> list[list[str]]:
    """The cells of the Markdown lines of this learner."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith(f"| {learner} ")
    ]


def test_csv_has_every_number_in_full(rows, predictions, tmp_path):
    rows = with_intervals(rows, predictions)
    write_leaderboard(rows, tmp_path, Setting("digits", 100, 400))
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
        assert line["tied_with_best"] == ("" if found.kind == "reference" else str(found.tied))
        assert float(line["report_brier_scaled"]) == found.report.brier_scaled
        for name in ("best_single", "greedy"):
            one = found.against(name)
            numbers = [line[f"vs_{name}{end}"] for end in ("", "_low", "_high", "_p", "_p_holm")]
            if one is None:
                assert numbers == [""] * 5
            else:
                assert [*map(float, numbers)] == [one.value, *one.interval, one.p, one.p_holm]
        for severity in SEVERITIES:
            name = f"report_noise_{severity}"
            assert float(line[f"{name}_accuracy"]) == found.extra[name]
        assert line["ingredients"] == "00 03"
        assert int(line["peak_bytes"]) == 3 * 2**20
    assert lines["mehl"]["notes"] == "a note"


def test_markdown_shows_what_a_person_looks_for(rows, predictions, tmp_path):
    rows = with_intervals(rows, predictions)
    write_leaderboard(rows, tmp_path, Setting("digits", 100, 4000))
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
    assert "vs best_single [95%]" in soups
    assert "vs greedy [95%]" in soups
    ((learner, used, select, report, *compared, noise, worst, loss, brier, ece, _, _, _),) = (
        table_lines(text, "mehl")
    )
    mehl = next(r for r in rows if r.learner == "mehl")
    assert mehl.interval is not None
    assert (learner, used, select) == ("mehl", "2/16", "90.00")
    low, high = (f"{100 * end:.2f}" for end in mehl.interval)
    assert report == f"**{100 * mehl.report.accuracy:.2f}** [{low}, {high}]"
    assert len(compared) == 4
    for difference, p, one in zip(compared[::2], compared[1::2], mehl.differences, strict=True):
        assert re.fullmatch(r"\+\d+\.\d\d \[[+-]\d+\.\d\d, \+\d+\.\d\d\]", difference)
        assert p == ("< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}")
    assert noise == f"{100 * (mehl.report.accuracy - 0.3):.2f}"
    assert worst == f"{100 * mehl.report.worst_class:.2f}"
    assert (loss, brier, ece) == ("0.500 → 0.250", "0.300 → 0.200", "8.00 → 2.00")
    assert text.count("**") == 2  # a reference is better than mehl, but no soup is
    assert "digits" in text
    assert "4,000 images" in text
    assert "noise (1, 3, 5)" in text
    assert "- mehl: a note" in text


def test_accuracy_out_of_fold_stands_beside_that_in_sample(tmp_path):
    found = CrossFitted(0.8765, 5, 0.4, 0.0125, False, 3.5, 8.0, 4.0)
    rows = [row("a", 0.8, out_of_fold=found, free_coefficients=45), row("b", 0.7, "reference")]
    write_leaderboard(rows, tmp_path, Setting("d", 1, 1))
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
    write_leaderboard(rows, tmp_path, Setting("d", 1, 1))
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
    write_leaderboard(rows, tmp_path, Setting("d", 1, 1))
    text = (tmp_path / "leaderboard.md").read_text()
    assert "renditions %" in text
    assert table_lines(text, "a")[0][4:6] == ["50.00", ""]
    assert table_lines(text, "b")[0][4:6] == ["", "25.00"]


def test_a_table_without_references_or_intervals(tmp_path):
    rows = [row("a", 0.8, extra={}), row("b", 0.7, extra={})]
    write_leaderboard(rows, tmp_path, Setting("d", 1, 1))
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
    other = terminal_table(with_intervals(rows + long, sets, baselines=[*names[:1], "greedy"]))
    assert max(map(len, other.splitlines())) <= 160
    assert text.splitlines()[2].startswith("mehl")
    assert "12,345" in text


def test_ties_and_significant_differences_are_marked():
    rng = np.random.default_rng(0)
    best = rng.random(2000) < 0.9
    right = {"best_single": best & (rng.random(2000) < 0.9), "tied": best.copy(), "mehl": best}
    right["tied"][np.flatnonzero(best)[:3]] = False
    rows = with_intervals(
        [row(name, float(own.mean())) for name, own in right.items()],
        {name: {"report": own} for name, own in right.items()},
    )
    text = markdown_table(rows)
    assert table_lines(text, "tied")[0][3].startswith("≈ ")
    assert table_lines(text, "mehl")[0][3].startswith("**")
    assert "≈" not in table_lines(text, "best_single")[0][3]
    assert table_lines(text, "mehl")[0][5] == "< 0.001"
    assert table_lines(text, "best_single")[0][4:6] == ["", ""]
    lines = {line.split()[0]: line for line in terminal_table(rows).splitlines()}
    assert "≈ " in lines["tied"]
    assert "≈" not in lines["mehl"] + lines["best_single"]
    assert re.search(r"\+\d+\.\d\d \[\+\d+\.\d\d, \+\d+\.\d\d\]\*", lines["mehl"])
    assert "*" not in lines["best_single"]


def test_the_caption_says_what_is_compared_and_how_often_report_was_read(rows, predictions):
    predictions["greedy"]["report"] = predictions["mehl"]["report"].copy()
    predictions["greedy"]["report"][:3] = False
    rows = with_intervals(rows, predictions)
    text = caption(rows, Setting("d", 1, 1, Count(1, 14), Diversity(0.9411, 0.5, 1.882)))
    assert "*report* was read once, for 14 rows in all." in text
    assert "“vs best_single” and “vs greedy”: the difference in report accuracy" in text
    assert "Two of the 16 ingredients are both right or both wrong on 94.1% of *select*" in text
    assert "correlate by 0.50, so that together they average like 1.9 with independent" in text
    tied = [r.learner for r in rows if r.tied]
    assert tied == ["greedy", "mehl"]
    assert "do not tell from the best one, mehl" in text
    text = caption(rows, Setting("d", 1, 1, Count(3, 15), Diversity(1.0, None, None)))
    assert "*report* was read 3 times, for 15 rows in all (`run.json` says when" in text
    assert "independent" not in text
    plain = caption([row("a", 0.8)], Setting("d", 1, 1))
    assert not re.search("was read|McNemar|≈|ingredients are both", plain)
