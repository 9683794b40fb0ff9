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
    """Everything under `reports` of the config, into `<output>/<name>/reports/`."""
    session, steps = this.session, this.steps
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
            session.begin(step, this.folder / "work" / step)
            with Meter(session.device) as meter:
                make = REPORTS[settings.type].function()
                files = make(material, settings, this.folder / FOLDER / row)
            steps.finish(step, inputs, files, session.spent(meter) | {"record": session.record})
        result = steps.result(step)
        this.record.add(reports={row: result}, warnings=result["record"].get("warnings", []))
