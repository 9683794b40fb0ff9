"""*report* has one door: shut while anything learns, and every opening is on record."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inputs.data import load_report_data
from soups.errors import SoupError
from soups.finetune import run as finetune
from soups.learners.registry import LEARNERS, RandomSearch, Uniform
from soups.learners.selection import uniform
from soups.pipeline import run
from soups.readings import Reading, count_readings, earlier_readings
from soups.record import RunRecord
from soups.registered import Registered
from soups.report_door import open_report
from soups.reports.registry import REPORTS, LeaveOneOut
from tests.soups.conftest import make_config

ROOT = Path(__file__).parents[2]
DATA = make_config(Path()).data
peeked: list[int] = []


def peek() -> None:
    peeked.append(len(load_report_data(DATA, memory_budget=2**30)["report"]))


def peeking(session, settings):
    """A learner that looks where it must not."""
    peek()
    return uniform(session, Uniform())


def peeking_in_a_thread(session, settings):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(peek).result()
    return uniform(session, Uniform())


def peeking_out_of_fold(session, settings):
    if "/fold_" in session.row:
        peek()
    return uniform(session, Uniform())


def peeking_by_the_door(session, settings):
    record = RunRecord("run.json", config={}, seed=0, device="")
    open_report(make_config(Path()), record, who="me")
    return uniform(session, Uniform())


def peeking_report(material, settings, path):
    peek()
    return []


def learn(kitchen: Path, folder: Path, fresh: bool = False, **changes) -> list[str]:
    said: list[str] = []
    config = make_config(kitchen, output=folder, pictures=False, **changes)
    run(config, root=kitchen, fresh=fresh, progress=False, say=said.append)
    return said


@pytest.mark.parametrize(
    "peeker", ["peeking", "peeking_in_a_thread", "peeking_by_the_door", "peeking_out_of_fold"]
)
def test_a_learner_that_reads_report_fails(kitchen, tmp_path, monkeypatch, peeker):
    # A search is a learner too.
    for name, kind in (("uniform", Uniform), ("random_search", RandomSearch)):
        monkeypatch.setitem(LEARNERS, name, Registered(kind, f"{__name__}:{peeker}"))
        with pytest.raises(
            SoupError, match=r"^greedy_eyes: tried to read \*report\*, which is shut"
        ):
            learn(kitchen, tmp_path / name, learners={"greedy_eyes": {"type": name}})
        record = json.loads((tmp_path / name / "small" / "run.json").read_text())
        assert record["report_readings"] == []
    assert peeked == []


def test_a_report_and_a_fine_tuning_that_read_it_fail(kitchen, tmp_path, monkeypatch):
    monkeypatch.setitem(
        REPORTS, "leave_one_out", Registered(LeaveOneOut, f"{__name__}:peeking_report")
    )
    with pytest.raises(SoupError, match=r"^report/mine: tried to read \*report\*"):
        learn(kitchen, tmp_path, reports={"mine": {"type": "leave_one_out"}})
    monkeypatch.setattr("soups.zoo.make_zoo", lambda *arguments, **settings: peek())
    with pytest.raises(SoupError, match=r"^fine-tuning: tried to read \*report\*"):
        finetune(make_config(kitchen), root=kitchen, fresh=False, progress=False)
    # Outside of what learns, anybody may load it.
    peek()
    assert [peeked.pop()] == [449]


def test_every_reading_stays_on_record(kitchen: Path, tmp_path: Path):
    said = learn(kitchen, tmp_path)
    folder = tmp_path / "small"
    (first,) = earlier_readings(folder / "run.json")
    assert (first.who, first.rows) == ("the leaderboard of small", ("uniform",))
    assert "*report* was read once, for 1 row in all." in (folder / "leaderboard.md").read_text()
    assert any("*report* was read once" in text for text in said)

    # Nothing new is scored: it was opened, and nothing seen.
    before = (folder / "leaderboard.md").read_text()
    learn(kitchen, tmp_path)
    readings = earlier_readings(folder / "run.json")
    assert [one.rows for one in readings] == [("uniform",), ()]
    assert readings[0] == first
    assert (folder / "leaderboard.md").read_text() == before

    # A row more, and all of it again.
    rows = {"uniform": {}, "greedy": {}}
    learn(kitchen, tmp_path, learners=rows)
    learn(kitchen, tmp_path, learners=rows, fresh=True)
    readings = earlier_readings(folder / "run.json")
    assert [one.rows for one in readings] == [("uniform",), (), ("greedy",), ("uniform", "greedy")]
    text = (folder / "leaderboard.md").read_text()
    assert "*report* was read 3 times, for 4 rows in all (`run.json` says when" in text


def test_a_reading_is_on_record_before_anything_is_scored(kitchen, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(*arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("soups.entries._all_logits", killed)
        with pytest.raises(KilledError):
            learn(kitchen, tmp_path)
    path = tmp_path / "small" / "run.json"
    assert [one.rows for one in earlier_readings(path)] == [("uniform",)]
    # A run that stops before the table forgets none of them.
    with monkeypatch.context() as patch:
        patch.setattr("soups.pipeline.make_reports", killed)
        with pytest.raises(KilledError):
            learn(kitchen, tmp_path)
    assert [one.rows for one in earlier_readings(path)] == [("uniform",)]


def test_readings_of_other_images_do_not_count():
    readings = [
        Reading("me", "now", "a", ("x", "y")),
        Reading("me", "now", "b", ("x",)),
        Reading("me", "now", "a"),
        Reading("me", "now", "a", ("z",)),
    ]
    assert count_readings(readings) == (2, 3)
    assert count_readings(readings[:2]) == (1, 1)
    assert count_readings([]) == (0, 0)


@pytest.mark.parametrize("content", ["", "[]", '{"report_readings": [{"who": "me"}]}'])
def test_a_record_that_is_none_is_named(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SoupError, match=r"run\.json: not the record of a run"):
        earlier_readings(tmp_path / "run.json")
    assert earlier_readings(tmp_path / "none.json") == []


def test_the_door_is_the_only_one():
    """No other module of soups loads *report*."""
    loading = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "soups").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        and any(name.name == "load_report_data" for name in node.names)
    }
    assert loading == {"soups/report_door.py"}
