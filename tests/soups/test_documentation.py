"""docs/commands.md and docs/config.md are what the command lines and the schemas say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inputs.config import Settings
from soups import plots
from soups.documentation.__main__ import DOCUMENTS, main
from soups.documentation.commands import PROGRAMS
from soups.documentation.keys import CHAPTERS, explanation, is_kind, meaning, sections
from soups.learners.registry import LEARNERS
from soups.reports.registry import REPORTS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def schemas() -> dict[type[Settings], str]:
    """Every group of keys, and where it stands."""
    titles: dict[type[Settings], str] = {}
    for chapter, _, root, at in CHAPTERS:
        list(sections(root, at, titles, chapter))
    return titles


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The documents as they are generated here."""
    return {name: write() for name, write in DOCUMENTS.items()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_committed_file_is_the_generated_one(pages, name):
    committed = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert committed == pages[name], (
        f"write it again: python -m soups.documentation {name} > docs/{name}.md"
    )


def test_the_command_writes_helps_in_any_surroundings(tmp_path):
    """A narrow terminal with colours, from a folder that is not the source's."""
    surroundings = {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "LINES": "5"}
    done = subprocess.run(
        [sys.executable, "-m", "soups.documentation", "commands"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | surroundings | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout == (DOCS / "commands.md").read_text(encoding="utf-8")


def test_the_command_writes_keys_in_any_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["config"])
    assert capsys.readouterr().out == (DOCS / "config.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_page_names_this_machine(pages, name):
    for place in (ROOT, Path.home() / ".cache"):
        assert str(place) not in pages[name]


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["config", "commands"]])
def test_what_is_no_name_is_refused(arguments):
    with pytest.raises(SystemExit, match=r"usage: .*commands,config"):
        main(arguments)


def test_every_command_has_its_help(pages):
    text = pages["commands"]
    for program in PROGRAMS:
        assert f"## {program.name}\n" in text
    for words in (
        "--fresh",
        "--json",
        "--dry-run",
        "soups doctor",
        "merge inspect",
        "fleet.store gc",
    ):
        assert words in text
    assert not re.search(r" +$", text, re.M)


def test_every_key_of_a_config_has_a_row(pages):
    text = pages["config"]
    found = schemas()
    for settings in found:
        for name, info in settings.model_fields.items():
            assert f"| `{info.alias or name}` |" in text
    for registry in (LEARNERS, REPORTS):
        for name, entry in registry.items():
            assert entry.settings in found
            assert f"type: {name}`" in text


@pytest.mark.parametrize("settings", schemas(), ids=lambda settings: settings.__name__)
def test_every_key_is_explained(pages, settings):
    """By a sentence below it in the class; a key that tells kinds apart has the same one always."""
    said = {
        name: meaning(settings, name)
        for name, info in settings.model_fields.items()
        if not is_kind(name, info)
    }
    assert [name for name, text in said.items() if not text.endswith(".")] == []
    rows = pages["config"]
    assert all(f"| {text.replace('|', chr(92) + '|')} |" in rows for text in said.values())
    assert explanation(settings)


def test_every_link_in_the_page_has_its_own_heading(pages):
    text = pages["config"]
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    addresses = [
        "".join(c for c in h.lower() if c.isalnum() or c in " -_").replace(" ", "-")
        for h in headings
    ]
    assert len(set(addresses)) == len(addresses)
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= set(addresses)


def test_no_row_is_too_wide_to_read(pages):
    """The widest has three links to kinds; the fourteen learners have a link to the first."""
    rows = [line for line in pages["config"].splitlines() if line.startswith("|")]
    for row in rows:
        key, may_be, *_ = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        assert may_be.count("](#") <= 3, key


def test_every_picture_is_spoken_of():
    page = (DOCS / "pictures.md").read_text(encoding="utf-8")
    for name in plots.__all__:
        assert f"{name}(" in page, name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_list_of_the_readme():
    listed = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Documentation\n")[1]
    listed = listed.split("\n## ")[0]
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in listed, page.name
