"""Runs joined into one table for each task."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from soups.boards.folders import RunFolder
from soups.errors import SoupError


@dataclass(frozen=True)
class Task:
    """The runs that were measured on one data set's report split, with the same classes.

    `table` has a line for each row of each run, soups before references, each by report accuracy;
    its first columns are `run`, one of `names`, which are in the order of `runs`, and `learner`.
    """

    name: str
    data: str
    report: str
    classes: tuple[str, ...] | None
    runs: tuple[RunFolder, ...]
    names: tuple[str, ...]
    table: pd.DataFrame

    @property
    def texts(self) -> list[str]:
        """The columns of the table that have something else than numbers."""
        return [name for name in self.table if not is_numeric_dtype(self.table[name])]

    def run(self, name: str) -> RunFolder:
        """The run of this name."""
        return self.runs[self.names.index(name)]


def join(runs: Sequence[RunFolder]) -> list[Task]:
    """One task for each data set, report split and classes, in the order of the runs.

    A run that has kept no classes belongs to the one task with its data and split, if there is one.
    Raises SoupError for runs that should have the same report images, and have not.
    """
    groups: dict[tuple[str, str, tuple[str, ...] | None], list[RunFolder]] = {}
    for run in runs:
        data = run.record.config.data
        split = data.report.model_dump(mode="json", by_alias=True, exclude_none=True)
        classes = run.examples.classes if run.examples is not None else None
        groups.setdefault((data.path, json.dumps(split), classes), []).append(run)
    for key in [key for key in groups if key[2] is None]:
        others = [other for other in groups if other[:2] == key[:2] and other[2] is not None]
        if len(others) == 1:
            groups[others[0]] += groups.pop(key)
    for members in groups.values():
        _check_images(members)
    names = _task_names([data for data, _, _ in groups])
    order = {id(run): place for place, run in enumerate(runs)}
    return [
        _task(name, *key, sorted(members, key=lambda run: order[id(run)]))
        for name, (key, members) in zip(names, groups.items(), strict=True)
    ]


def _check_images(runs: Sequence[RunFolder]) -> None:
    """SoupError where the data have changed between runs that are to be compared image by image."""
    for one, other in itertools.combinations([run for run in runs if run.right], 2):
        if one.images == other.images and not _are_alike(one, other):
            raise SoupError(
                f"{one.folder}, {other.folder}: the same report split by their configs, but other "
                f"images ({one.report_count:,} and {other.report_count:,}) or labels: "
                f"{one.record.config.data.path} has changed, or was in another place; run the "
                "older one again, or leave one out"
            )


def _are_alike(one: RunFolder, other: RunFolder) -> bool:
    """Whether as many images are there, with the same labels where these were kept."""
    if one.examples is None or other.examples is None:
        return one.report_count == other.report_count
    return np.array_equal(one.examples.labels, other.examples.labels)


def _task(
    name: str, data: str, split: str, classes: tuple[str, ...] | None, runs: Sequence[RunFolder]
) -> Task:
    names = _run_names(runs)
    tables = [run.table.assign(run=label) for run, label in zip(runs, names, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    table = table[["run", *(column for column in table if column != "run")]]
    order = pd.DataFrame({"kind": table["kind"] == "reference", "by": -table["report_accuracy"]})
    table = table.loc[order.sort_values(["kind", "by"], kind="stable").index]
    report = ", ".join(f"{key} {value}" for key, value in json.loads(split).items())
    return Task(
        name, data, report, classes, tuple(runs), tuple(names), table.reset_index(drop=True)
    )


def _run_names(runs: Sequence[RunFolder]) -> list[str]:
    """The runs' names; of those that share one, as much of the folder as tells them apart."""
    names = [run.name for run in runs]
    found = []
    for run, name in zip(runs, names, strict=True):
        namesakes = [other.folder for other in runs if other.name == name]
        found.append(name if len(namesakes) == 1 else _apart(run.folder, namesakes))
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        places = ", ".join(
            str(run.folder) for run, name in zip(runs, found, strict=True) if name in twice
        )
        raise SoupError(
            f"{places}: these runs would have one name, {', '.join(twice)}; rename a folder"
        )
    return found


def _apart(folder: Path, namesakes: Sequence[Path]) -> str:
    """The last parts of the folder's path, as many as are needed that no other has them."""
    parts = [place.resolve().parts for place in namesakes]
    own = folder.resolve().parts
    for count in range(1, len(own) + 1):
        if sum(other[-count:] == own[-count:] for other in parts) == 1:
            return "/".join(own[-count:])
    return str(folder)


def _task_names(paths: Sequence[str]) -> list[str]:
    """What tasks, and their files, are called: the end of the data's path, and where several have
    the same, a number."""
    short = [re.sub(r"[^\w.-]+", "-", Path(path).name).strip("-.") or "data" for path in paths]
    found: list[str] = []
    for name in short:
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        free = (other for other in numbered if other not in (*short, *found))
        found.append(name if short.count(name) == 1 else next(free))
    return found
