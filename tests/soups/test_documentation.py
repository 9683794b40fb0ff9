"""docs/commands.md and docs/config.md are what the command lines and the schemas say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from inputs.config import Settings
from soups import documentation, plots
from soups.documentation import CHAPTERS, DOCUMENTS, PROGRAMS, explanation, sections
from soups.learners.registry import LEARNERS
from soups.reports.registry import REPORTS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def schemas() -> dict[type[Settings], str]:
    """Every group of keys, and where it stands."""
    titles: dict[type[Settings], str] = {}
    for _, _, root, at in CHAPTERS:
        list(sections(root, at, titles))
    return titles


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_committed_file_is_the_generated_one(name):
    committed = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert committed == DOCUMENTS[name](), (
        f"write it again: python -m soups.documentation {name} > docs/{name}.md"
    )


def test_the_command_writes_it():
    command = [sys.executable, "-m", "soups.documentation", "config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == DOCUMENTS["config"]()
    wrong = subprocess.run([*command[:-1], "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode != 0
    assert "commands,config" in wrong.stderr


def test_every_command_has_its_help():
    text = DOCUMENTS["commands"]()
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


def test_every_key_of_a_config_has_a_row():
    text = DOCUMENTS["config"]()
    found = schemas()
    for settings in found:
        for name, info in settings.model_fields.items():
            assert f"| `{info.alias or name}` |" in text
    for registry in (LEARNERS, REPORTS):
        for name, entry in registry.items():
            assert entry.settings in found
            assert f"type: {name}`" in text


@pytest.mark.parametrize("settings", schemas(), ids=lambda settings: settings.__name__)
def test_every_key_is_explained(settings):
    """In the docstring, or by a section of its own; `type` and `source` choose the section."""
    said = set(re.findall(r"`([\w.]+)", explanation(settings)))
    missing = [
        name
        for name, info in settings.model_fields.items()
        if name not in ("type", "source", "parameters", "models", "model", "data", "seed")
        and (info.alias or name) not in said
        and not list(documentation.inner_settings(info.annotation, ""))
        and info.annotation is not type(None)
    ]
    assert missing == []


def test_every_link_in_the_page_has_its_heading():
    text = DOCUMENTS["config"]()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    addresses = {
        "".join(c for c in h.lower() if c.isalnum() or c in " -_").replace(" ", "-")
        for h in headings
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= addresses


def test_every_picture_is_spoken_of():
    page = (DOCS / "pictures.md").read_text(encoding="utf-8")
    for name in plots.__all__:
        assert f"{name}(" in page, name


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
