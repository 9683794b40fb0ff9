"""Entries of the leaderboard: what each is made of and has cost, and how it is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from inputs.config import Settings
from inputs.data import ImageSet
from merge.coefficients import Coefficients
from soups.candidates import Files, Models
from soups.examples import FILE, ReportExamples, RowOutcomes, disagreements, thumbnails
from soups.learners.registry import BestSingle, Greedy, GreedyFull, Uniform, WiseFT
from soups.record import fingerprint
from soups.rows import REPORT, Metrics, Row, load_predictions, save_predictions, score
from soups.run import Run
from soups.session import Session
from soups.statistics import accuracy, correctness, fit_temperature

log = logging.getLogger(__name__)

Sets = Mapping[str, ImageSet]
Logits = Mapping[str, Float[Tensor, "rows classes"]]


@dataclass(frozen=True)
class Entry:
    """A row to be evaluated: `inputs` is what its logits depend on, `spent` what it has cost.

    Its logits are those of the model in the file `model` times `temperature`, or the mean of the
    logits of the ingredients `team`.
    """

    row: str
    kind: Literal["soup", "reference"]
    ingredients: tuple[str, ...]
    inputs: dict[str, Any]
    spent: Mapping[str, Any]
    model: Path | None = None
    temperature: float = 1.0
    team: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    free_coefficients: int | None = None


def soup_entry(this: Run, row: str, soup: Coefficients) -> Entry:
    learned = this.steps.result(f"learn/{row}")
    this.record.add(learners={row: learned}, cooked={row: this.steps.result(f"cook/{row}")})
    used = np.any(soup.matrix != 0, axis=1)
    return Entry(
        row=row,
        kind="soup",
        ingredients=tuple(
            i.name for i, member in zip(soup.ingredients, used, strict=True) if member
        ),
        inputs={"coefficients": soup.sha256},
        spent=learned,
        model=this.soup(row),
        temperature=soup.temperature,
        notes=_notes(learned["record"]),
        free_coefficients=free_coefficients(
            this.config.learners[row], soup, learned["record"], this.session.numels
        ),
    )


def free_coefficients(
    settings: Settings, soup: Coefficients, record: Mapping[str, Any], mixed: Container[str]
) -> int:
    """How many numbers the learner was free to choose, as its record says, or by its kind.

    A choice among K ingredients counts as K − 1, a place on a line as 1, and columns over G groups
    of `mixed` tensors, which sum to one, as (K − 1)·G.
    """
    if "free_coefficients" in record:
        return record["free_coefficients"]
    choice = len(soup.ingredients) - 1
    match settings:
        case Uniform():
            return 0
        case BestSingle() | Greedy() | GreedyFull():
            return choice
        case WiseFT():
            return 1 + (choice if settings.soup == "greedy" else 0)
    groups = sum(any(name in mixed for name in names) for names in soup.groups.values())
    return choice * groups


def _notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What the table says of a row whose ingredients were held in fewer bits."""
    if "originals_minus_compressed" not in record:
        return ()
    lost = -100 * record["originals_minus_compressed"]
    return (
        f"learned on {record['precision']} rows: {lost:+.2f} points on select with them, against "
        "the originals that it is cooked from",
    )


def evaluate_entries(
    this: Run, entries: Sequence[Entry], sets: Sets, scored: Callable[[Sequence[str]], None]
) -> list[tuple[Row, dict[str, np.ndarray]]]:
    """The rows' metrics, and whether each example is right; what is finished is not run again.

    `scored` is told which rows are to be run, before they are.
    All models that are to be run go over the images together, from the weights in their files; so
    do the ingredients of the ensembles. Each row is on record once its chunk is through.
    """
    images = {name: images.digest() for name, images in sets.items()}
    # What is kept of a row: a table that asks for more evaluates it again.
    kept = [f.name for kind in (Metrics, RowOutcomes) for f in fields(kind)]
    inputs = {
        entry.row: fingerprint(entry.inputs | images | {"run": this.inputs, "kept": kept})
        for entry in entries
    }
    todo = [e for e in entries if not this.steps.is_done(f"evaluate/{e.row}", inputs[e.row])]
    scored([entry.row for entry in todo])
    for entry, logits in _all_logits(this, todo, sets):
        _finish(this, entry, inputs[entry.row], logits, sets)
    this.session.release()
    return [_row(this, entry) for entry in entries]


def _all_logits(this: Run, entries: Sequence[Entry], sets: Sets) -> Iterator[tuple[Entry, Logits]]:
    """Every entry with its logits on every set, as soon as they are there."""
    if entries:
        log.info("evaluating %s", ", ".join(entry.row for entry in entries))
    whole = [entry for entry in entries if entry.model is not None]
    if whole:
        files = Files(
            this.session.model, [e.model for e in whole if e.model], this.session.zoo.tied
        )
        for members, logits in _logits_in_chunks(this.session, files, sets):
            for m, own in zip(members, logits, strict=True):
                entry = whole[m]
                yield entry, {name: entry.temperature * z for name, z in own.items()}
    teams = {entry.row: entry.team for entry in entries if entry.team}
    if teams:
        means = _ensemble_logits(this.session, teams, sets)
        yield from ((entry, means[entry.row]) for entry in entries if entry.team)


def _logits_in_chunks(
    session: Session, models: Models, sets: Sets
) -> Iterator[tuple[Sequence[int], Sequence[Logits]]]:
    """Chunks of models, and of each of them its logits on every set."""
    classes = len(session.select.classes)
    kept = 4 * classes * sum(map(len, sets.values()))
    for chunk in session.chunks(models, [*sets.values()], kept=kept, refuse=False):
        logits = [
            {name: torch.empty(len(images), classes) for name, images in sets.items()}
            for _ in chunk.members
        ]
        for name, images in sets.items():
            for rows, found in chunk.logits(images):
                for own, of_model in zip(logits, found, strict=True):
                    own[name][rows] = of_model.cpu()
        yield chunk.members, logits


def _ensemble_logits(
    session: Session, teams: Mapping[str, Sequence[int]], sets: Sets
) -> dict[str, dict[str, Tensor]]:
    """Team → set → mean logits of its members: each ingredient is run once for all teams."""
    classes = len(session.select.classes)
    sums = {
        team: {name: torch.zeros(len(images), classes) for name, images in sets.items()}
        for team in teams
    }
    wanted = sorted({k for members in teams.values() for k in members})
    models = session.ingredient_models(wanted)
    for chunk in session.chunks(models, [*sets.values()], refuse=False):
        for name, images in sets.items():
            for rows, found in chunk.logits(images):
                for m, logits in zip(chunk.members, found.cpu(), strict=True):
                    for team, members in teams.items():
                        if wanted[m] in members:
                            sums[team][name][rows] += logits / len(members)
    return sums


def _finish(this: Run, entry: Entry, inputs: str, logits: Logits, sets: Sets) -> None:
    name = f"evaluate/{entry.row}"
    folder = this.folder / "work" / name
    labels = {name: images.labels.numpy() for name, images in sets.items()}
    arrays = {name: values.numpy() for name, values in logits.items()}
    temperature = fit_temperature(arrays["select"], labels["select"])
    right = {name: correctness(arrays[name], labels[name]) for name in sets}
    result = {
        "temperature_on_select": temperature,
        "select": vars(score(arrays["select"], labels["select"], temperature=temperature)),
        "report": vars(score(arrays["report"], labels["report"], temperature=temperature)),
        "extra": {name: accuracy(right[name]) for name in sets if name not in ("select", "report")},
    }
    save_predictions(folder / "predictions.npz", {entry.row: right})
    outcomes = {entry.row: RowOutcomes.of(arrays[REPORT], labels[REPORT])}
    _examples(sets[REPORT], outcomes, np.zeros(0, dtype=np.int64)).save(folder / FILE)
    this.steps.finish(name, inputs, [folder / "predictions.npz", folder / FILE], result)


def _examples(
    report: ImageSet, rows: Mapping[str, RowOutcomes], shown: Int64[np.ndarray, " shown"]
) -> ReportExamples:
    pixels = thumbnails(report, shown)
    return ReportExamples(report.labels.numpy(), report.classes, shown, pixels, rows)


def report_examples(this: Run, rows: Sequence[str], report: ImageSet) -> ReportExamples:
    """Of evaluated rows, each one's outcomes on *report*, and the images on which they disagree."""
    outcomes = {
        row: ReportExamples.load(this.folder / "work" / "evaluate" / row / FILE).rows[row]
        for row in rows
    }
    labels = report.labels.numpy()
    shown = disagreements([own.predicted == labels for own in outcomes.values()])
    return _examples(report, outcomes, shown)


def _row(this: Run, entry: Entry) -> tuple[Row, dict[str, np.ndarray]]:
    name = f"evaluate/{entry.row}"
    result = this.steps.result(name)
    row = Row(
        learner=entry.row,
        kind=entry.kind,
        ingredients=entry.ingredients,
        zoo_size=len(this.session.zoo.names),
        select=Metrics(**result["select"]),
        report=Metrics(**result["report"]),
        extra=result["extra"],
        seconds=entry.spent["seconds"],
        peak_bytes=entry.spent["peak_bytes"],
        forward_passes=entry.spent["forward_passes"],
        backward_passes=entry.spent["backward_passes"],
        notes=entry.notes,
        free_coefficients=entry.free_coefficients,
    )
    path = this.folder / "work" / name / "predictions.npz"
    return row, load_predictions(path)[entry.row]
