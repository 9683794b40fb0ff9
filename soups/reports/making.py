"""Make the reports of a run: each a step that is done again only if its inputs changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from merge.coefficients import Coefficients
from soups.meter import Meter
from soups.record import fingerprint
from soups.reports.material import Material
from soups.reports.points import named_points
from soups.reports.registry import REPORTS, Plane
from soups.run import Run

log = logging.getLogger(__name__)

FOLDER = "reports"


def make_reports(this: Run, soups: Mapping[str, Coefficients]) -> None:
    """Everything under `reports` of the config, each into `<output>/<name>/reports/<row>/`.

    What a row wrote that is no more in the config, or that is made again, is removed.
    """
    session, steps = this.session, this.steps
    for name in steps.names():
        kind, _, row = name.partition("/")
        if kind == "report" and row not in this.config.reports:
            _remove(this, row)
    material = Material(session, soups)
    for row, settings in this.config.reports.items():
        step = f"report/{row}"
        # A plane shows every soup; the others see those that they name.
        seen = soups if isinstance(settings, Plane) else set(named_points(settings).values())
        inputs = fingerprint(
            this.inputs
            | {"row": row, "report": settings.model_dump(mode="json")}
            | {"soups": {name: soup.sha256 for name, soup in soups.items() if name in seen}}
        )
        if not steps.is_done(step, inputs):
            log.info("report %s", row)
            _remove(this, row)
            session.begin(step, None)
            with Meter(session.device) as meter:
                make = REPORTS[settings.type].function()
                files = make(material, settings, this.folder / FOLDER / row / row)
            steps.finish(step, inputs, files, session.spent(meter) | {"record": session.record})
        result = steps.result(step)
        this.record.add(reports={row: result}, warnings=result["record"].get("warnings", []))


def _remove(this: Run, row: str) -> None:
    """Forget a report, with the files that it wrote; what else is in its folder stays."""
    this.steps.remove(f"report/{row}")
    folder = this.folder / FOLDER / row
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
