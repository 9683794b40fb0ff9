"""The page in headless Chromium: what a person does with it, with a mouse and without."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from scipy.stats import binomtest

from soups.boards.making import write_boards, write_page
from tests.soups.boards.conftest import WriteRun, shares
from tests.soups.boards.test_curves import change_record, write_curves

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# In order: the soups by report accuracy.
SOUPS = ["mehl", "greedy", "best_single"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file; in the end nothing was logged, had failed, or was asked for from elsewhere."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def show(path: Path, *, width: int = 1280, scheme: str = "light", rows: int = 1) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=False
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("tbody tr" if rows else "table", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


@pytest.fixture
def page(show: Callable[..., Page], write_run: WriteRun) -> Page:
    return show(write_page(write_run()))


def learners(page: Page) -> list[str]:
    return page.locator("tbody .learner .name").all_text_contents()


def header(page: Page, name: str) -> Locator:
    return page.locator("thead th").filter(has=page.get_by_role("button", name=name, exact=True))


def test_the_verdict_comes_first(page: Page):
    assert "Use mehl" in (page.locator(".verdict p").first.text_content() or "")
    assert page.locator(".mark.best").count() == 1
    assert learners(page) == [*SOUPS, "ensemble"]


def test_sorting_by_pointer_and_by_key(page: Page):
    report = header(page, "report %")
    assert report.get_attribute("aria-sort") == "descending"
    report.get_by_role("button").click()
    assert learners(page) == [*reversed(SOUPS), "ensemble"]
    assert report.get_attribute("aria-sort") == "ascending"
    seconds = header(page, "seconds")
    seconds.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert learners(page) == ["best_single", "greedy", "mehl", "ensemble"]
    assert seconds.get_attribute("aria-sort") == "ascending"
    assert report.get_attribute("aria-sort") == "none"
    # The focus stays where it was.
    page.keyboard.press("Space")
    assert learners(page) == ["mehl", "greedy", "best_single", "ensemble"]
    difference = header(page, "vs best_single")
    for expected in (["mehl", "greedy", "best_single"], ["greedy", "mehl", "best_single"]):
        difference.get_by_role("button").click()
        # The baseline itself has no difference: it stays last either way.
        assert learners(page)[:3] == expected


def test_filtering(page: Page):
    box = page.get_by_label("Filter")
    box.fill("GREE")
    assert learners(page) == ["greedy"]
    assert page.locator(".count").text_content() == "1 of 4 rows"
    box.fill("reference of")
    assert learners(page) == ["ensemble"]
    box.fill("nothing has this")
    assert learners(page) == []
    box.fill("")
    assert len(learners(page)) == 4


def test_choosing_columns(page: Page):
    headers = page.locator("thead button")
    before = headers.all_text_contents()
    assert "loss" not in before
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("loss", exact=True).check()
    page.get_by_label("seconds", exact=True).uncheck()
    assert set(headers.all_text_contents()) == {*before, "loss"} - {"seconds"}
    shown = [text for text in headers.all_text_contents() if text]
    place = shown.index("loss") - len(shown)
    cells = page.locator(f"tbody tr td:nth-last-child({-place})").all_text_contents()
    assert {len(cell.lstrip("0.").replace(".", "")) for cell in cells if cell} == {3}
    page.keyboard.press("Escape")
    assert not page.get_by_label("loss", exact=True).is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Columns"


def test_comparing_two_rows(page: Page):
    right = shares()
    wins = int((right["mehl"] & ~right["greedy"]).sum())
    losses = int((right["greedy"] & ~right["mehl"]).sum())
    page.get_by_label("B", exact=True).select_option("greedy")
    said = page.locator(".flips").text_content() or ""
    assert f"{wins} are right only with A, mehl, and {losses} only with B, greedy" in said
    p = binomtest(wins, wins + losses).pvalue
    assert f"p = {p:.3f} by the exact McNemar test" in said
    ours, theirs = page.locator(".gallery").all()
    assert ours.locator("li").count() == min(24, wins)
    assert theirs.locator("li").count() == losses
    first = ours.locator("li").first
    label = first.locator(".label").text_content()
    a, b = first.locator(".guess").all_text_contents()
    assert a.startswith(f"A {label} ")
    assert not b.startswith(f"B {label} ")
    assert page.locator(".learner", has_text="<i>fox</i>").count() == 0


def test_the_images_are_drawn(page: Page):
    page.wait_for_function(
        """() => [...document.querySelectorAll(".images canvas")].every((canvas) =>
            canvas.getContext("2d").getImageData(0, 0, 8, 8).data.some((value) => value !== 0))"""
    )
    assert page.locator(".images canvas").count() > 0


def test_a_long_name_of_a_class_leaves_its_percentage_in_sight(page: Page):
    tile = page.locator(".images li").first
    tile.locator(".guess span").first.evaluate("span => { span.textContent = 'm'.repeat(60) }")
    right = tile.evaluate("tile => tile.getBoundingClientRect().right")
    small = tile.locator(".guess small").first
    assert (small.text_content() or "").endswith("%")
    assert small.evaluate("small => small.getBoundingClientRect().right") <= right


def test_more_images_on_demand(page: Page):
    gallery = page.locator(".gallery").first
    assert gallery.locator("li").count() == 24
    more = gallery.get_by_role("button")
    rest = int((more.text_content() or "").split()[1])
    more.click()
    assert gallery.locator("li").count() == 24 + rest
    assert more.count() == 0


def test_ticking_rows_compares_them(page: Page):
    boxes = page.locator("td.pick input")
    assert boxes.evaluate_all("boxes => boxes.map((box) => box.checked)") == [
        *(True, False, True, False)
    ]
    page.get_by_label("compare ensemble").focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.ariaLabel") == "compare ensemble, it is B"
    # The two that were ticked last.
    assert "with A, best_single, and" in (page.locator(".flips").text_content() or "")
    assert "with B, ensemble:" in (page.locator(".flips").text_content() or "")
    page.get_by_label("compare ensemble").uncheck()
    assert page.locator(".flips").count() == 0
    assert "Tick two rows" in (page.locator(".result").text_content() or "")


def test_everything_is_reached_with_the_keyboard(page: Page):
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const at = document.activeElement;
                const ring = getComputedStyle(at).outlineStyle;
                return [at.tagName.toLowerCase(), at.type ?? "", ring]; }"""
        )
        if found[0] == "body":
            break
        assert found[2] != "none", f"no ring around {found}"
        reached.append((found[0], found[1]))
    assert reached[0] == ("button", "button")  # the theme
    assert ("input", "search") in reached
    assert reached.count(("input", "checkbox")) == 4
    assert reached.count(("select", "select-one")) == 3
    assert reached.count(("svg", "")) >= 4  # costs, map, curve
    assert reached[-1] == ("summary", "")


def test_the_keys_go_through_a_picture(page: Page):
    chart = page.get_by_role("application", name="Accuracy against seconds")
    chart.focus()
    said = page.locator("figure", has=chart).locator("output")
    found = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        found.append(said.text_content())
    assert found[0] == "best_single: 70.00%, 0.50 s, on the front"
    assert found[2] == found[3] == "mehl: 90.00%, 12 s, on the front"
    page.keyboard.press("ArrowLeft")
    assert (said.text_content() or "").startswith("greedy: 87.92%, 3.00 s")


def test_models_that_were_scored_once_are_points(
    show: Callable[..., Page],
    write_run: WriteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = write_run()
    change_record(folder, checkpoints={"00": {}, "01": {}}, learners={})
    write_curves(tmp_path / "my-zoo", {"00": 2, "01": 2})
    monkeypatch.chdir(tmp_path)
    chart = show(write_page(folder)).get_by_role("application", name="Training of the ingredients")
    assert chart.locator("circle.curve").count() == 2
    assert chart.locator("path.curve").count() == 0


def test_the_map_says_what_each_cell_is(page: Page):
    cells = page.get_by_role("application", name="Coefficients of mehl")
    cells.focus()
    page.keyboard.press("ArrowRight")
    said = page.locator(".heat output")
    assert (said.text_content() or "").startswith("00, layer0: 0.")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert (said.text_content() or "").startswith("01, layer1: 0.")
    page.get_by_label("Learner", exact=True).select_option("greedy")
    assert page.locator(".heat .bars rect").count() == 5


def test_light_and_dark(show: Callable[..., Page], write_run: WriteRun):
    path = write_page(write_run())

    def paper(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    for scheme, other in (("light", "Dark theme"), ("dark", "Light theme")):
        page = show(path, scheme=scheme)
        before = paper(page)
        assert (before > 600) == (scheme == "light")
        page.get_by_role("button", name=other, exact=True).click()
        assert (paper(page) > 600) == (scheme == "dark")
        page.emulate_media(media="print")
        assert paper(page) > 600


def test_print_has_the_table_and_no_controls(page: Page):
    page.emulate_media(media="print")
    assert page.locator("tbody .learner").first.is_visible()
    for control in (".tools", "#theme", "td.pick"):
        assert not page.locator(control).first.is_visible()
    assert len(page.pdf()) > 10_000


def test_a_name_that_is_html_stays_a_name(show: Callable[..., Page], write_run: WriteRun):
    name = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>"
    page = show(write_page(write_run(name=name, renamed={"mehl": name, "best_single": "<b>b</b>"})))
    assert learners(page)[0] == name
    assert page.title() == "Leaderboard"
    assert page.locator("main img, main b b").count() == 0
    assert name in (page.locator(".verdict").text_content() or "")


def test_a_run_with_its_table_alone(show: Callable[..., Page], write_run: WriteRun):
    page = show(write_page(write_run(lacks=("examples.npz", "coefficients"))))
    assert learners(page) == [*SOUPS, "ensemble"]
    assert "was not kept" in (page.locator(".compare").text_content() or "")
    assert page.locator("td.pick").count() == 0


def test_choosing_the_runs_of_a_sweep(show: Callable[..., Page], write_sweep: Callable[[], Path]):
    page = show(write_page(write_sweep()))
    assert learners(page) == ["pooled", "uniform", "mehl", "greedy"]
    cells = page.locator("tbody tr").first.locator("td .value").all_text_contents()
    assert cells[:3] == ["+0.40", "3/4", "4"]
    page.get_by_label("images").select_option("250")
    cells = page.locator("tbody tr").first.locator("td .value").all_text_contents()
    assert cells[:1] == ["+0.50"]
    assert page.locator(".bar.better").count() == 2


def test_a_sweep_without_comparisons(show: Callable[..., Page], write_sweep: Callable[[], Path]):
    folder = write_sweep()
    (folder / "comparisons.csv").write_text(
        (folder / "comparisons.csv").read_text().splitlines()[0] + "\n"
    )
    page = show(write_page(folder), rows=0)
    assert page.locator(".count").text_content() == "0 rows"


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window(
    show: Callable[..., Page],
    write_run: WriteRun,
    write_sweep: Callable[[], Path],
    tmp_path: Path,
    width: int,
):
    folders = [write_run("a"), write_run("b", split_seed=4), write_sweep()]
    path = write_boards(folders, tmp_path / "out", quoted=True).files[-1]
    for scheme in ("light", "dark"):
        page = show(path, width=width, scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        picture = tmp_path / f"{width}_{scheme}.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 20_000


def test_a_column_of_texts_is_shown_as_texts(show: Callable[..., Page], write_run: WriteRun):
    folder = write_run()
    table = pd.read_csv(folder / "leaderboard.csv")
    table.assign(out_of_fold_own=["True", "False", None, None]).to_csv(
        folder / "leaderboard.csv", index=False
    )
    page = show(write_page(folder))
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("out of fold own").check()
    assert learners(page) == [*SOUPS, "ensemble"]
    assert page.locator("td.text").all_text_contents() == ["True", "False", "", ""]


def test_a_very_long_name_widens_nothing(show: Callable[..., Page], write_run: WriteRun):
    page = show(write_page(write_run(renamed={"mehl": "m" * 150})))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
