"""The files of one zoo: what is finished, what was left out, and what the zoo was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from fleet.recipes import Recipe
from inputs.figures import picture_files
from inputs.files import remove_stale_parts, write_whole
from inputs.zoo_files import RECORD_FILE, SNAPSHOT_FILE, holds_checkpoint
from soups.config import FinetuneConfig, ZooConfig
from soups.curves import CURVES_FILE, PICTURE_FILE
from soups.errors import SoupError
from soups.event_files import remove_event_files
from soups.recipe_search import names_of_run, sample_recipes

BASE_FILE = "base.safetensors"
TABLE_FILE = "zoo.csv"
EVENTS_FOLDER = "tensorboard"
# Settings that change how a zoo is made, and not what it is.
NOT_OF_THE_WEIGHTS = {"ingredients", "joint", "save_every", "tensorboard"}


@dataclass
class ZooFolder:
    """The folder of one zoo.

    `rows` has a row of the table for each finished ingredient; `left` says of each that was tried
    and is none why not.
    """

    path: Path

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.left: dict[str, str] = {}
        self.record: dict[str, Any] = {}
        if not self.file(RECORD_FILE).exists():
            return
        try:
            self.record = json.loads(self.file(RECORD_FILE).read_text())
            rows = self.record["ingredients"]
            self.rows = {row["name"]: _with_every_field(row) for row in rows}
            self.left = dict(self.record.get("left", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise SoupError(
                f"{self.path}: {RECORD_FILE} is not the record of a zoo ({error!r}); put the "
                "folder aside, or give the zoo another (zoo.path=…)"
            ) from error

    def file(self, name: str) -> Path:
        """Where a file of the zoo is."""
        return self.path / name

    def has_base(self) -> bool:
        """Whether a base was trained here and is still there."""
        return "base" in self.record and self.file(BASE_FILE).is_file()

    def unfinished(self, runs: Sequence[Sequence[str]]) -> list[int]:
        """Which of the runs, each the names that it gives, are still to be made."""
        return [i for i, run in enumerate(runs) if run[-1] not in self.left and not self._has(run)]

    def table(self) -> pd.DataFrame:
        """One row per ingredient: name, file, recipe, scores on *tune*."""
        return pd.DataFrame(self.rows.values())

    def add_row(self, row: dict[str, Any], order: Sequence[str]) -> None:
        """Remember a finished ingredient; `order` has all names as the table lists them."""
        self.rows[row["name"]] = row
        self.rows = {name: self.rows[name] for name in order if name in self.rows}
        self.write()

    def begin(self, runs: Sequence[Sequence[str]]) -> list[int]:
        """Remember that the unfinished runs are trained; which have to be trained together.

        Those that are finished since a training that was killed began are among them: who trains
        together decides how sums are rounded, and whom halving compares. So it goes on to the same
        bytes; what was finished before the last snapshot is not trained again.
        """
        begun = self.record.get("under_way", [])
        unfinished = {*self.unfinished(runs)}
        chosen = [i for i, run in enumerate(runs) if i in unfinished or run[-1] in begun]
        self.write(under_way=[runs[i][-1] for i in chosen])
        return chosen

    def end(self, left: dict[str, str]) -> None:
        """Remember that a training is over, and why these are no ingredients."""
        self.left = {**self.left, **left}
        self.write(under_way=[])

    def write(self, **changes: Any) -> None:
        """Write the record, then the table, which only shows what the record knows."""
        self.record = {
            **self.record,
            **changes,
            "left": self.left,
            "ingredients": [*self.rows.values()],
        }
        write_whole(self.file(RECORD_FILE), json.dumps(self.record, indent=2) + "\n")
        write_whole(self.file(TABLE_FILE), self.table().to_csv(index=False))

    def remove(self) -> None:
        """Remove the files of a zoo that was made here; nothing where none was."""
        if not self.record:
            return
        finetune = FinetuneConfig.model_validate(self.record["finetune"])
        started = [int(name.partition("_")[0]) for name in (*self.rows, *self.left)]
        # Killed between a file and its row, a run leaves a file alone.
        runs = max(self.record.get("runs", 0), *(run + 2 for run in started), 1)
        recipes = sample_recipes(finetune.model_copy(update={"ingredients": runs}))
        own = {
            f"{n}.safetensors" for i, r in enumerate(recipes) for n in names_of_run(i, r, finetune)
        }
        pictures = [file.name for file in picture_files(PICTURE_FILE)]
        made = [TABLE_FILE, CURVES_FILE, *pictures, SNAPSHOT_FILE, BASE_FILE, *sorted(own)]
        for name in [*made, RECORD_FILE]:
            remove_stale_parts(self.file(name))
            self.file(name).unlink(missing_ok=True)
        remove_event_files(self.file(EVENTS_FOLDER))
        self.rows, self.left, self.record = {}, {}, {}

    def refuse_other_origin(self, origin: dict[str, Any]) -> None:
        """SoupError if the zoo here was made from something else; shows what differs.

        A record of nothing that is finished or under way stands in no one's way.
        """
        begun = self.rows or self.left or self.has_base() or self.file(SNAPSHOT_FILE).exists()
        if not self.record or not begun:
            return
        known = {**self.record, "finetune": _with_every_setting(self.record.get("finetune"))}
        parts = [part for part in origin if part != "data"]
        if all(known.get(part) == origin[part] for part in parts):
            return
        old, new = (dict(_flatten({k: r.get(k) for k in origin})) for r in (known, origin))
        differences = [
            f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}"
            for key in {**old, **new}
            if old.get(key, "not set") != new.get(key, "not set")
        ]
        raise SoupError(
            f"{self.path}: this zoo was made with other settings ({'; '.join(differences)}); "
            "give the new one its own folder (zoo.path=…), or make this one again with --fresh, "
            f"which replaces its {len(self.rows)} ingredients"
        )

    def refuse_other_files(self, own: set[str]) -> None:
        """SoupError if the folder holds checkpoints that this zoo does not make."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise SoupError(f"{self.path}: is a file; give the zoo a folder (zoo.path=…)")
        found = {file.name for file in self.path.iterdir() if holds_checkpoint(file)}
        others = sorted(found - own - {BASE_FILE}) if self.record else sorted(found)
        if others:
            fewer = all(Path(name).stem in self.rows for name in others)
            ask = "raise zoo.finetune.ingredients again" if fewer else "remove `zoo.finetune`"
            raise SoupError(
                f"{self.path}: holds {', '.join(others)}, which this zoo would not make; give it "
                f"its own folder (zoo.path=…), or {ask} to use what is there"
            )

    def _has(self, run: Sequence[str]) -> bool:
        """Whether a run was ended, and all that it gave is there."""
        made = [name for name in run if name in self.rows]
        files = [self.file(f"{name}.safetensors") for name in made]
        return run[-1] in made and all(file.is_file() for file in files)


def names_to_come(zoo: ZooConfig) -> list[str]:
    """The names that the ingredients of a zoo with `finetune` have, or will have.

    Those that are known to be left out are not among them.
    """
    finetune = zoo.finetune
    assert finetune is not None
    folder = ZooFolder(zoo.path)
    runs = [names_of_run(i, recipe, finetune) for i, recipe in enumerate(sample_recipes(finetune))]
    return [
        name
        for run in runs
        for name in run
        if name in folder.rows or (run[-1] not in folder.rows and run[-1] not in folder.left)
    ]


def _with_every_field(row: dict[str, Any]) -> dict[str, Any]:
    """A row that was written before a recipe had some field has its default there."""
    place = {"name": row["name"], "file": row["file"]}
    return {**place, **Recipe().model_dump(mode="json"), **row}


def _with_every_setting(finetune: Any) -> Any:
    """What was recorded, with the defaults of settings that there were not yet."""
    try:
        known = FinetuneConfig.model_validate(finetune)
    except ValidationError:
        # Made by settings that are none any more: compared as it is, and shown to differ.
        return finetune
    return json.loads(known.model_dump_json(exclude=NOT_OF_THE_WEIGHTS))


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _flatten(inner, f"{key}.{part}" if key else part)
    else:
        yield key, value
