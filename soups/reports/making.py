"""Make the reports of a run: each a step that is done again only if its inputs changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from merge.coefficients import Coefficients
from soups.meter import Meter
from soups.record import fingerprint
from soups.report_door import Report
from soups.reports.material import Material
from soups.reports.points import named_points
from soups.reports.registry import REPORTS, Plane
from soups.rows import REPORT
from soups.run import Run

log = logging.getLogger(__name__)

FOLDER = "reports"
# What is made on *select*, and what *report* says of it when learning is over: two steps of a row.
MADE, JUDGED = "report", "judge"


def make_reports(this: Run, soups: Mapping[str, Coefficients]) -> None:
    """Everything under `reports` of the config, each into `<output>/<name>/reports/<row>/`.

    What a row wrote that is no more in the config, or that is made again, is removed.
    """
    for name in this.steps.names():
        kind, _, row = name.partition("/")
        if kind in (MADE, JUDGED) and row not in this.config.reports:
            _remove(this, kind, row)
    material = Material(this.session, soups)
    for row, settings in this.config.reports.items():
        # A plane shows every soup; the others see those that they name.
        seen = soups if isinstance(settings, Plane) else set(named_points(settings).values())
        inputs = fingerprint(
            this.inputs
            | {"row": row, "report": settings.model_dump(mode="json")}
            | {"soups": {name: soup.sha256 for name, soup in soups.items() if name in seen}}
        )
        if not this.steps.is_done(f"{MADE}/{row}", inputs):
            _remove(this, JUDGED, row)
            make = REPORTS[settings.type].function()
            _make(this, MADE, row, inputs, lambda path: make(material, settings, path))  # noqa: B023
        result: dict[str, Any] = {**this.steps.result(f"{MADE}/{row}"), "remark": material.remark}
        this.record.add(reports={row: result}, warnings=result["record"].get("warnings", []))


def judge_reports(this: Run, soups: Mapping[str, Coefficients], report: Report) -> None:
    """What *report*, which is open, says of that which rows have found on *select*."""
    images = report.sets[REPORT]
    material = Material(this.session, soups)
    for row, settings in this.config.reports.items():
        judge = REPORTS[settings.type].judging()
        if judge is None:
            continue
        found = this.steps.result(f"{MADE}/{row}")["record"]
        inputs = fingerprint(this.inputs | {"found": found, "images": images.digest()})
        if not this.steps.is_done(f"{JUDGED}/{row}", inputs):
            report.scored([f"reports.{row}"])
            _make(this, JUDGED, row, inputs, partial(judge, material, found, images))
        judged = this.steps.result(f"{JUDGED}/{row}")
        made = this.record.entries["reports"][row]
        judged = {"remark": material.judged_remark(images), "judged": judged}
        this.record.add(reports={row: made | judged})


def _make(this: Run, kind: str, row: str, inputs: str, write: Callable[[Path], list[Path]]) -> None:
    """Run the step; `write` is given the path beside which it writes, and says which files."""
    log.info("report %s", row)
    _remove(this, kind, row)
    step, session = f"{kind}/{row}", this.session
    session.begin(step, None)
    with Meter(session.device) as meter:
        files = write(this.folder / FOLDER / row / row)
    this.steps.finish(step, inputs, files, session.spent(meter) | {"record": session.record})


def _remove(this: Run, kind: str, row: str) -> None:
    """Forget a step of a report, with the files that it wrote; what else is there stays."""
    this.steps.remove(f"{kind}/{row}")
    folder = this.folder / FOLDER / row
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
