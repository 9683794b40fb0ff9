from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from soups.boards.images import LOSSLESS_BYTES
from soups.boards.making import PAGE, write_boards, write_page
from soups.examples import ReportExamples
from tests.soups.boards.conftest import CLASSES, IMAGES, WriteRun, examples_of, shares

EVIL = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the texts of its scripts and its style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._latest = [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._latest = self.texts[tag]

    def handle_endtag(self, tag: str) -> None:
        self._latest = [""]  # what is between elements belongs to none

    def handle_data(self, data: str) -> None:
        self._latest[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


def parsed(path: Path) -> Parsed:
    return Parsed(path.read_text("utf-8"))


@pytest.fixture
def small(write_run: WriteRun) -> Parsed:
    return parsed(write_page(write_run()))


def test_the_page_asks_for_nothing(small: Parsed):
    assert not small.of("link")
    assert not small.of("iframe")
    assert [sorted(script) for script in small.of("script")] == [["id", "type"], []]
    named = [
        v for _, attributes in small.tags for k, v in attributes.items() if k in ("src", "href")
    ]
    assert all(value is not None and value.startswith("#") for value in named)
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import)\s*\(|@import|url\(", small.texts["script"][1]
    )
    assert "url(" not in small.texts["style"][0]


def test_its_policy_allows_its_own_parts_and_no_others(small: Parsed):
    (policy,) = (
        meta["content"] or ""
        for meta in small.of("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, text in (
        ("script-src", small.texts["script"][1]),
        ("style-src", small.texts["style"][0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert not any("style" in attributes for _, attributes in small.tags)


def test_names_are_text_wherever_they_stand(write_run: WriteRun, tmp_path: Path):
    folder = write_run(name=EVIL, renamed={"mehl": EVIL, "best_single": EVIL + "2"}, path=EVIL)
    found = parsed(write_boards([folder], tmp_path / "out", quoted=True).files[-1])
    assert len(found.of("script")) == 2
    assert not found.of("img")
    assert found.data["tasks"][0]["rows"][0]["learner"] == EVIL
    assert EVIL in "".join(found.texts["p"])


def test_the_data_have_every_row_and_who_is_right(small: Parsed):
    (task,) = small.data["tasks"]
    right = shares()
    (images,) = task["images"].values()
    assert images["count"] == IMAGES
    assert images["classes"] == [*CLASSES]
    for row in task["rows"]:
        bits = np.frombuffer(base64.b64decode(row["outcomes"]["right"]), np.uint8)
        own = np.unpackbits(bits, bitorder="little")[:IMAGES].astype(bool)
        assert (own == right[row["learner"]]).all()
        predicted = np.array(row["outcomes"]["predicted"])
        assert ((predicted == images["labels"]) == own[images["shown"]]).all()


def test_the_sheet_has_each_thumbnail_in_its_place(small: Parsed):
    (images,) = small.data["tasks"][0]["images"].values()
    kind, _, code = images["sheet"].partition(",")
    assert kind == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    width, height = images["tile"]
    for place, pixels in enumerate(examples_of(shares()).thumbnails):
        y, x = height * (place // images["across"]), width * (place % images["across"])
        assert (sheet[y : y + height, x : x + width] == pixels[0]).all()


def test_large_thumbnails_are_a_smaller_picture(write_run: WriteRun):
    folder = write_run()
    examples = ReportExamples.load(folder / "examples.npz")
    rng = np.random.default_rng(0)
    shown = np.arange(100, dtype=np.int64)
    flat = rng.integers(0, 256, (100, 3, 1, 1)) + np.zeros((1, 1, 32, 32))
    pixels = np.clip(flat + rng.normal(0, 4, flat.shape), 0, 255).astype(np.uint8)
    assert pixels.nbytes > LOSSLESS_BYTES
    ReportExamples(examples.labels, CLASSES, shown, pixels, examples.rows).save(
        folder / "examples.npz"
    )
    (images,) = parsed(write_page(folder)).data["tasks"][0]["images"].values()
    kind, _, code = images["sheet"].partition(",")
    assert kind == "data:image/jpeg;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))).astype(float)
    for place in range(100):
        y, x = 32 * (place // 10), 32 * (place % 10)
        tile = sheet[y : y + 32, x : x + 32].transpose(2, 0, 1)
        assert np.abs(tile - pixels[place]).mean() < 6


def test_a_run_with_nothing_but_its_table_has_a_page(write_run: WriteRun):
    folder = write_run(lacks=("examples.npz", "coefficients"))
    (task,) = parsed(write_page(folder)).data["tasks"]
    assert task["images"] == {}
    assert task["heatmaps"] == []
    assert [row["outcomes"] for row in task["rows"]] == [None] * 4


def test_a_row_that_the_examples_lack_is_shown_without(write_run: WriteRun):
    folder = write_run()
    path = folder / "leaderboard.csv"
    path.write_text(
        path.read_text() + path.read_text().splitlines()[1].replace("mehl", "new") + "\n"
    )
    rows = parsed(write_page(folder)).data["tasks"][0]["rows"]
    assert [row["learner"] for row in rows if row["outcomes"] is None] == ["new"]


def test_runs_on_the_same_images_share_them(write_run: WriteRun, tmp_path: Path):
    runs = [write_run(name) for name in "ab"]
    other = write_run("c", split_seed=9)
    (task,) = parsed(write_boards([*runs, other], tmp_path / "out", quoted=False).files[-1]).data[
        "tasks"
    ]
    assert len(task["images"]) == 2
    by_run = {row["run"]: row["outcomes"]["images"] for row in task["rows"]}
    assert by_run["a"] == by_run["b"] != by_run["c"]


def test_the_page_says_how_often_report_was_read(write_run: WriteRun):
    folder = write_run()
    record = json.loads((folder / "run.json").read_text())
    reading = {"who": "the leaderboard", "when": "", "images": "abc", "rows": ["mehl"]}
    for times, said in ((1, "report read once"), (3, "report read 3 times")):
        (folder / "run.json").write_text(
            json.dumps(record | {"report_readings": times * [reading]})
        )
        assert f"4 classes, {said}" in "".join(parsed(write_page(folder)).texts["p"])


def test_curves_that_were_kept_are_shown(small: Parsed):
    (curves,) = small.data["tasks"][0]["curves"]
    assert curves["title"] == "wise_ft: from the base to the soup"
    assert curves["lines"][0]["points"][0] == [0.0, 0.8]


def test_a_number_that_is_not_finite_is_left_out(write_run: WriteRun):
    folder = write_run()
    table = pd.read_csv(folder / "leaderboard.csv")
    table["report_loss"] = [np.inf, -np.inf, np.nan, 0.25]
    table.to_csv(folder / "leaderboard.csv", index=False)
    rows = parsed(write_page(folder)).data["tasks"][0]["rows"]
    assert [row["report_loss"] for row in rows] == [None, None, None, 0.25]


def test_quoted_rows_are_apart_and_name_their_source(write_run: WriteRun, tmp_path: Path):
    folder = write_run()
    without = parsed(write_boards([folder], tmp_path / "a", quoted=False).files[-1])
    assert "Quoted" not in "".join(without.texts.get("h2", []))
    found = parsed(write_boards([folder], tmp_path / "b", quoted=True).files[-1])
    cells = [text for text in found.texts["td"] if text.strip()]
    assert cells[::2] == ["80.38", "79.97", "81.03", "81.39", "81.62"]
    assert {*cells[1::2]} == {"arXiv 2203.05482", "arXiv 2407.03641"}
    assert "not measured here" in "".join(found.texts["h2"])
    assert len(found.data["tasks"][0]["rows"]) == 4
    assert "MEHL-Soup+" not in (tmp_path / "b" / "leaderboard_digits.csv").read_text()


def test_a_sweep_has_its_words_and_every_comparison(write_sweep: Callable[[], Path]):
    folder = write_sweep()
    path = write_page(folder)
    assert path == folder / PAGE
    found = parsed(path)
    said = "".join(found.texts["p"])
    assert "Use pooled: over 4 runs it is +0.40 [+0.10, +0.70] points ahead of greedy." in said
    assert "Not told from greedy: uniform." in said
    assert "Behind it: mehl −0.50 [−0.80, −0.20]." in said
    (sweep,) = found.data["sweeps"]
    assert [key["column"] for key in sweep["keys"]] == ["against", "images"]
    assert len(sweep["rows"]) == 6 + 2
    rows = {(row["learner"], row["images"]): row for row in sweep["rows"]}
    assert rows["pooled", "250"]["difference"] == pytest.approx(0.005)
    assert rows["pooled", "250"]["report_accuracy"] == pytest.approx(0.6075)
    assert rows["pooled", "all"]["report_accuracy"] == pytest.approx(0.61125)
    assert rows["greedy", "all"]["is_baseline"]


def test_a_sweep_without_its_runs_has_no_means(write_sweep: Callable[[], Path]):
    folder = write_sweep()
    (folder / "runs.csv").unlink()
    (sweep,) = parsed(write_page(folder)).data["sweeps"]
    assert {column["key"] for column in sweep["columns"]} == {
        "learner",
        "difference",
        "ahead",
        "runs",
    }


def test_a_sweep_in_which_nothing_was_compared(write_sweep: Callable[[], Path]):
    folder = write_sweep()
    path = folder / "comparisons.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    found = parsed(write_page(folder))
    assert "No learner was compared with another" in "".join(found.texts["p"])
    assert found.data["sweeps"][0]["rows"] == []


def test_the_same_folders_give_the_same_page(write_run: WriteRun, tmp_path: Path):
    folder = write_run()
    first, second = (write_boards([folder], tmp_path / k, quoted=True).files for k in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
