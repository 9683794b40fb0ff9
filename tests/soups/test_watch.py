"""What a person sees of training, in a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Sequence

import pytest
from rich.console import Console

import soups.watch
from fleet.training.trainee import Point
from soups.watch import Lines, LiveTable, Watches, new_view


def point(name: str, state: str = "training", **changes) -> Point:
    values = {
        "phase": "fit",
        "epoch": 2,
        "step": 1234,
        "loss": 0.51234,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tune_accuracy": None,
        "tune_loss": None,
        "seconds": 1.0,
    }
    return Point(name=name, state=state, **(values | changes))  # pyright: ignore[reportArgumentType]


def table_on(height: int, monkeypatch: pytest.MonkeyPatch) -> tuple[LiveTable, io.StringIO]:
    """A table on a page of so many rows that is drawn at every step, and what is written."""
    monkeypatch.setattr(soups.watch, "SECONDS_BETWEEN_REFRESHES", 0.0)
    page = io.StringIO()
    return LiveTable(
        "zoo/a", Console(file=page, force_terminal=True, width=90, height=height)
    ), page


def last_picture(page: io.StringIO) -> list[str]:
    """The lines that were drawn last, without what moves the cursor and colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.getvalue())
    return [line.rstrip() for line in text[text.rindex("model") :].splitlines()]


def test_a_row_for_each_model_and_the_bar(monkeypatch: pytest.MonkeyPatch):
    view, page = table_on(30, monkeypatch)
    view.begin(["00", "01", "02"], steps=100, done=20)
    view.point(point("00", tune_accuracy=0.975, tune_loss=0.1))
    view.point(point("00", loss=1e30, lr=5e-4))
    view.point(point("01", phase="head", epoch=1, state="failed"))
    view.advance(30)
    head, _, *rows, bar = last_picture(page)
    assert head.split() == ["model", "epoch", "step", "loss", "lr", "tune", "%", "state"]
    assert [row.split() for row in rows] == [
        ["00", "2", "1,234", "1e+30", "5.00e-04", "97.50", "training"],
        ["01", "head", "1", "1,234", "0.5123", "1.00e-03", "failed"],
        ["02", "waiting"],
    ]
    assert bar.startswith("zoo/a")
    assert "50/100 steps" in bar
    view.end()
    view.end()
    assert page.getvalue().rstrip().splitlines()[-1].count("50/100 steps") == 1


def test_a_small_page_shows_those_in_training(monkeypatch: pytest.MonkeyPatch):
    view, page = table_on(9, monkeypatch)
    names = [f"{i:02d}" for i in range(12)]
    view.begin(names, steps=100, done=0)
    for name in names[:5]:
        view.point(point(name, state="done"))
    view.point(point("05", state="stopped"))
    for name in names[6:9]:
        view.point(point(name))
    view.advance(1)
    _, _, *rows, others, _ = last_picture(page)
    assert [row.split()[0] for row in rows] == ["05", "06", "07", "08"]
    assert others == "8 more: 3 waiting, 5 done"
    view.end()


def test_logs_go_above_the_table_and_then_to_stderr_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        view = LiveTable("zoo/a", Console(stderr=True, force_terminal=True, width=90, height=20))
        view.begin(["00"], steps=10, done=0)
        assert handler.stream is not sys.__stderr__
        logging.getLogger("soups").error("careful")
        view.end()
        assert handler.stream is sys.stderr
    finally:
        logging.getLogger().removeHandler(handler)
    written = capsys.readouterr().err
    # The table is taken away before the line, and drawn again below it.
    assert "\x1b[2K" in written[: written.index("careful")]
    assert written.count("waiting") == 2


def test_it_is_not_drawn_at_every_step():
    page = io.StringIO()
    view = LiveTable("zoo/a", Console(file=page, force_terminal=True, width=90, height=20))
    view.begin(["00"], steps=10**6, done=0)
    before = len(page.getvalue())
    for _ in range(1000):
        view.advance(1)
    assert len(page.getvalue()) <= 3 * before
    view.end()


def test_elsewhere_there_is_a_line_when_a_model_is_done(capsys: pytest.CaptureFixture[str]):
    view = new_view("zoo/a")
    assert isinstance(view, Lines)
    view.begin(["00", "01"], steps=10, done=4)
    view.take_up([point("00"), point("02", state="done")])
    sys.stderr.write("the plan\n")
    view.advance(1)
    view.point(point("00"))
    view.point(point("00", state="done", tune_accuracy=0.975))
    view.point(point("01", state="failed", loss=float("nan")))
    sys.stderr.write("01 failed: a log says why\n")
    view.end()
    written = capsys.readouterr()
    assert not written.out
    lines = re.split(r"[\r\n]+", written.err.strip())
    assert lines[0].startswith("zoo/a:  40%")
    assert lines[-1].startswith("zoo/a:  50%")
    assert lines[1:-1] == [
        "the plan",
        "00 done: epoch 2, step 1,234, loss 0.5123, lr 1.00e-03, tune % 97.50",
        "01 failed: a log says why",
    ]


def test_what_was_before_a_restart_is_shown_again(monkeypatch: pytest.MonkeyPatch):
    view, page = table_on(30, monkeypatch)
    view.begin(["00", "01"], steps=100, done=60)
    before = [point("00", tune_accuracy=0.5), point("00", step=7), point("01", state="done")]
    view.take_up(before)
    view.advance(1)
    _, _, *rows, _ = last_picture(page)
    assert [row.split() for row in rows] == [
        ["00", "2", "7", "0.5123", "1.00e-03", "50.00", "training"],
        ["01", "2", "1,234", "0.5123", "1.00e-03", "done"],
    ]
    view.end()


def test_several_watches_are_told_everything():
    told: list[tuple] = []

    class Teller:
        def begin(self, names: Sequence[str], steps: int, done: int) -> None:
            told.append(("begin", names, steps, done))

        def advance(self, steps: int) -> None:
            told.append(("advance", steps))

        def point(self, point: Point) -> None:
            told.append(("point", point))

        def end(self) -> None:
            told.append(("end",))

    both = Watches([Teller(), Teller()])
    one = point("00")
    both.begin(["00"], 10, 0)
    both.advance(2)
    both.point(one)
    both.end()
    assert told[::2] == told[1::2]
    assert told[::2] == [("begin", ["00"], 10, 0), ("advance", 2), ("point", one), ("end",)]
