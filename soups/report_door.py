"""The one door to *report*: shut while anything learns; every opening is put on record."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from inputs.data import ImageSet, load_report_data, report_refused
from soups.config import LearnConfig
from soups.errors import SoupError
from soups.readings import Reading, keep_readings, readings_of
from soups.record import RunRecord
from soups.rows import REPORT


def shut(who: Callable[[], str]) -> AbstractContextManager[None]:
    """While this is open, who tries to read *report* fails with a SoupError that names `who()`."""
    return report_refused(
        lambda: SoupError(
            f"{who()}: tried to read *report*, which is shut while anything learns or is chosen; "
            "learn from session.select, and leave *report* to the leaderboard"
        )
    )


@dataclass
class Report:
    """*report* while it is open: its sets by name, and all readings that are known of."""

    sets: Mapping[str, ImageSet]
    readings: list[Reading]
    record: RunRecord

    def scored(self, rows: Sequence[str]) -> None:
        """Put on record that these rows are scored in this reading; call it before they are."""
        self.readings[-1] = replace(self.readings[-1], rows=(*self.readings[-1].rows, *rows))
        keep_readings(self.record, self.readings)
        self.record.save()


def open_report(config: LearnConfig, record: RunRecord, *, who: str) -> Report:
    """*report* and its shifted sets, as `load_report_data` has them; the opening is on record."""
    sets = load_report_data(config.data, memory_budget=config.memory_budget)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    this = Reading(who, when, sets[REPORT].digest())
    report = Report(sets, [*readings_of(record.entries), this], record)
    report.scored(())
    return report


def report_digest(config: LearnConfig) -> str:
    """The digest of *report*, which no model sees for it: this is no reading."""
    return load_report_data(config.data, memory_budget=config.memory_budget)[REPORT].digest()
