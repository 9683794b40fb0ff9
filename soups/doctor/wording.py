"""A diagnosis as people read it in a terminal; imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tabulate import tabulate

from soups.doctor.finding import Finding, listed, plural

if TYPE_CHECKING:
    from soups.doctor.diagnosis import Diagnosis

WIDEST = 100
TITLES = {"wrong": "Wrong", "odd": "Odd", "note": "To know"}


def wording(diagnosis: Diagnosis) -> str:
    """A table of the checkpoints, what was found, and what would probably work."""
    parts = [_head(diagnosis), _table(diagnosis)]
    for level, title in TITLES.items():
        found = [finding for finding in diagnosis.findings if finding.level == level]
        if found:
            parts.append("\n".join([f"{title}:", *(line for one in found for line in _lines(one))]))
    if not any(finding.level != "note" for finding in diagnosis.findings):
        parts.append("Nothing is wrong or odd.")
    if diagnosis.advice:
        wrong = any(finding.level == "wrong" for finding in diagnosis.findings)
        title = f"What would probably work{', without what is wrong' if wrong else ''}:"
        parts.append("\n".join([title, *_advice(diagnosis)]))
    return "\n\n".join(parts)


def _head(diagnosis: Diagnosis) -> str:
    closed = sum(finding.kind == "unreadable" for finding in diagnosis.findings)
    return (
        f"{diagnosis.folder}: {plural(len(diagnosis.patients), 'checkpoint')}"
        f"{f', and {closed} that cannot be opened' if closed else ''}; most have "
        f"{diagnosis.tensors:,} tensors, {diagnosis.parameters:,} numbers"
    )


def _table(diagnosis: Diagnosis) -> str:
    base = diagnosis.base if diagnosis.sure in ("sure", "likely") else None
    measured = diagnosis.basins is not None
    headers = ["checkpoint", f"from {base or 'the mean'}", "mean cosine", "nearest"]
    headers += ["accuracy %"] * measured + [""]
    lines = []
    for patient in diagnosis.patients:
        marks = dict.fromkeys(
            finding.kind
            for finding in diagnosis.findings
            if patient.name in finding.members and finding.level != "note"
        )
        remark = ", ".join(["base"] * (patient.name == base) + [*marks])
        line = [
            patient.name,
            "" if patient.distance is None else f"{patient.distance:#.3g}",
            "" if patient.cosine is None else f"{patient.cosine:.2f}",
            patient.nearest or "",
        ]
        if measured:
            line.append("" if patient.accuracy is None else f"{100 * patient.accuracy:.1f}")
        lines.append([*line, remark])
    align = ["left", "right", "right", "left", *["right"] * measured, "left"]
    return tabulate(lines, headers, tablefmt="simple", colalign=align, disable_numparse=True)


def _lines(finding: Finding) -> Iterator[str]:
    who = f"{listed(finding.members)}: " if finding.members else ""
    yield from _wrapped(f"- {who}{finding.text}", "  ")
    if finding.remedy:
        yield from _wrapped(f"  → {finding.remedy}", "    ")


def _advice(diagnosis: Diagnosis) -> Iterator[str]:
    for of, title in (("learner", "learners"), ("method", "merge methods")):
        own = [advice for advice in diagnosis.advice if advice.of == of]
        if own:
            yield f"{title} (python -m {'soups.learn' if of == 'learner' else 'merge'}):"
        for advice in own:
            names = ", ".join(advice.names)
            yield from _wrapped(f"- {advice.verdict}: {names}. {_sentence(advice.why)}", "  ")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDEST,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
