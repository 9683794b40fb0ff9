"""`leaderboard.html`: one file that holds its style, its scripts, its data and its pictures.

It asks for nothing from anywhere, and its own security policy forbids it to: only the style and the
script whose hashes are in it count. What a person has named is escaped in HTML, and enters the
page as text from the data, which is JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("dom.js", "table.js", "compare.js", "charts.js", "heatmap.js", "main.js")
TITLE = "Leaderboard"


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, a line on the data, sentences, and what the script draws.

    `kind` says how: `task` or `sweep`.
    """

    kind: str
    title: str
    about: str
    sentences: Sequence[str]
    payload: Mapping[str, Any]


def page(sections: Sequence[Section], *, published: Mapping[str, Any] | None = None) -> str:
    """The whole page; `published` are quoted rows, shown below in a table of their own."""
    style, script = _file("page.css"), _scripts()
    data: dict[str, list[Any]] = {"tasks": [], "sweeps": []}
    bodies, links = [], []
    for number, section in enumerate(sections):
        of_kind = data[f"{section.kind}s"]
        bodies.append(_section(section, f"part-{number}", len(of_kind)))
        links.append(_link(f"part-{number}", section.title))
        of_kind.append(section.payload)
    if published is not None:
        bodies.append("\n".join(_published(published)))
        links.append(_link("quoted", "quoted"))
    return Template(_file("page.html")).substitute(
        title=TITLE,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        contents="\n".join(links) if len(links) > 1 else "",
        sections="\n".join(bodies),
        data=_json(data),
    )


def _section(section: Section, name: str, number: int) -> str:
    sentences = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in section.sentences)
    return (
        f'<section class="board" id="{name}" data-{section.kind}="{number}" '
        f'aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(section.title)}</h2>\n'
        f'<p class="quiet">{escape(section.about)}</p>\n'
        f'<div class="verdict">\n{sentences}\n</div>\n</section>'
    )


def _published(quoted: Mapping[str, Any]) -> Iterator[str]:
    yield '<section class="board" id="quoted" aria-labelledby="quoted-title">'
    yield '<h2 id="quoted-title">Quoted, not measured here</h2>'
    yield f'<p class="quiet">{escape(quoted["task"])}: other models and other images than above, '
    yield "so that these numbers rank among themselves alone.</p>"
    yield '<div class="scroll"><table class="quoted"><thead><tr><th scope="col">method</th>'
    yield '<th scope="col" class="number">accuracy, %</th><th scope="col">source</th></tr></thead>'
    yield "<tbody>"
    for row in quoted["rows"]:
        yield (
            f'<tr><th scope="row">{escape(row["learner"])}</th><td class="number">'
            f"{100 * row['report_accuracy']:.2f}</td><td>{escape(row['source'])}</td></tr>"
        )
    yield "</tbody></table></div></section>"


def _link(name: str, title: str) -> str:
    return f'<a href="#{name}">{escape(title)}</a>'


def _scripts() -> str:
    """All scripts as one, in a scope of its own."""
    parts = "\n".join(_file(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _json(data: Any) -> str:
    """JSON that no HTML parser takes for anything else: without a `<`."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return files("soups.boards").joinpath("page", name).read_text("utf-8")
