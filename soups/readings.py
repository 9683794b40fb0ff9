"""Who has read *report*, and when: what `run.json` keeps of it from run to run; imports no torch.

What one sees of *report* and acts on is learned from it. How often it was read says how far its
numbers can be trusted: the record stays when a run is made again, and the table shows the count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from soups.errors import SoupError
from soups.record import RunRecord

KEY = "report_readings"


@dataclass(frozen=True)
class Reading:
    """One opening of *report*: by whom and when (UTC), of which images (their digest).

    `rows` of the table were scored on them. Without rows nothing was learned of *report*: what is
    finished was found to be of the same images.
    """

    who: str
    when: str
    images: str
    rows: tuple[str, ...] = ()


class Count(NamedTuple):
    """In how many readings rows were scored, and how many rows in all."""

    times: int
    rows: int


def count_readings(readings: Sequence[Reading]) -> Count:
    """How often rows were scored on the images of the last reading."""
    scored = [len(one.rows) for one in readings if one.rows and one.images == readings[-1].images]
    return Count(len(scored), sum(scored))


def readings_of(entries: Mapping[str, Any]) -> list[Reading]:
    """The readings among a record's entries."""
    return [Reading(**one | {"rows": tuple(one["rows"])}) for one in entries.get(KEY, [])]


def keep_readings(record: RunRecord, readings: Sequence[Reading]) -> None:
    """Put the readings among the record's entries, in the place of those there."""
    record.entries[KEY] = [asdict(one) for one in readings]


def earlier_readings(path: Path) -> list[Reading]:
    """Those that a `run.json` has on record; none where there is no such file.

    Raises SoupError where the file is something else.
    """
    try:
        return readings_of(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SoupError(
            f"{path}: not the record of a run ({error}); put it back as it was, or remove it, and "
            "the count of how often *report* was read starts over"
        ) from error
