"""What learners reach on images that they have not seen: cross-fitting on folds of *select*."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor
from tqdm.auto import tqdm

from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.candidates import Candidates
from soups.evaluate import Scores
from soups.folds import STREAM, split_folds
from soups.learners.registry import LEARNERS, LearnerSettings
from soups.meter import Meter
from soups.record import fingerprint
from soups.rows import CrossFitted, Predictions, Row, load_predictions, save_predictions
from soups.run import Run
from soups.session import Session

# What a learner's record holds where the learner has cross-fitted itself.
KEY = "out_of_fold"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutOfFold:
    """Scores on all of *select*, each image by the soup that was learned without its fold.

    `loss` is the mean of `losses`, the cross-entropies in nats of the logits times the soup's
    temperature.
    """

    accuracy: float
    loss: float
    right: Bool[np.ndarray, " rows"]
    losses: Float32[np.ndarray, " rows"]
    folds: int


def cross_fit(
    session: Session,
    settings: LearnerSettings,
    learner: Callable[[Session, Any], Coefficients],
    folds: int,
) -> OutOfFold:
    """Learn without each of `folds` folds of *select* in turn, and score each soup on its fold.

    All rows of a run have the same folds, drawn by the run's seed; the learner's streams are named
    `<row>/fold_<number>`. Soups that are equal are scored together. Where the session has a folder,
    each fold has one in it, so that a learner that can go on when killed does.
    Raises SoupError where *select* has fewer images than folds.
    """
    labels = session.select.labels
    held_out = split_folds(labels, folds, generator(session.seed, STREAM))
    by_soup: dict[tuple[bytes, float], tuple[Coefficients, list[int]]] = {}
    name = f"{session.row} out of fold"
    for fold in tqdm(range(folds), desc=name, unit="fold", disable=not session.progress):
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held_out[fold]] = False
        with session.on(rest.nonzero().flatten(), fold_name(fold)) as inner:
            inner.progress = False
            if session.folder is not None:
                inner.folder = session.folder / fold_name(fold)
                inner.folder.mkdir(parents=True, exist_ok=True)
            soup = learner(inner, settings)
        key = (soup.matrix.tobytes(), soup.temperature)
        by_soup.setdefault(key, (soup, []))[1].append(fold)
    right = torch.zeros(len(labels), dtype=torch.bool)
    losses = torch.zeros(len(labels))
    for soup, its_folds in by_soup.values():
        rows = torch.cat([held_out[fold] for fold in its_folds])
        scores = score_soup(session, soup, rows)
        right[rows], losses[rows] = scores.right[0], scores.losses[0]
    return OutOfFold(
        accuracy=right.double().mean().item(),
        loss=losses.double().mean().item(),
        right=right.numpy(),
        losses=losses.numpy(),
        folds=folds,
    )


def fold_name(fold: int) -> str:
    """What the part of a row without this fold is called."""
    return f"fold_{fold}"


def score_soup(session: Session, soup: Coefficients, rows: Int[Tensor, " rows"]) -> Scores:
    """The scores of one soup, its logits times its temperature, on these images of *select*."""
    images = session.select.subset(rows)
    mixed = {
        group: tuple(name for name in names if name in session.numels)
        for group, names in soup.groups.items()
    }
    # What is left out: norm buffers, which follow the run's rule, and second names of tied tensors.
    columns = [g for g, names in enumerate(mixed.values()) if names]
    groups = {group: names for group, names in mixed.items() if names}
    matrix = np.array(soup.matrix[None, :, columns])
    candidate = Candidates(matrix, groups, session.sources, session.norms)
    session.examples_forward += len(images)
    (chunk,) = session.chunks(candidate, [images])
    logits = torch.cat([found.cpu() for _, found in chunk.logits(images)], dim=1)
    return Scores.of(soup.temperature * logits, images.labels)


def paired_standard_error(a: Bool[np.ndarray, " rows"], b: Bool[np.ndarray, " rows"]) -> float:
    """The standard error of accuracy(a) − accuracy(b) on the same images: sd(a − b) / √n."""
    apart = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else float("nan")


# --- the rows of a run ---------------------------------------------------------------------------


def cross_fit_rows(this: Run, block_sizes: Mapping[str, int | None]) -> None:
    """Cross-fit every learner of the run that has not done so itself; a step for each row."""
    for row, settings in this.config.learners.items():
        if this.folds and KEY not in this.steps.result(f"learn/{row}")["record"]:
            _cross_fit_row(this, row, settings, block_sizes[row])


def _cross_fit_row(this: Run, row: str, settings: LearnerSettings, block_size: int | None) -> None:
    session, steps, name = this.session, this.steps, f"{KEY}/{row}"
    inputs = fingerprint(
        this.inputs
        | {"row": row, "settings": settings.model_dump(mode="json"), "block": block_size}
        | {"folds": this.folds}
    )
    if not steps.is_done(name, inputs):
        log.info("cross-fitting %s", row)
        folder = steps.scratch(name, inputs)
        session.begin(row, folder)
        with Meter(session.device) as meter:
            found = cross_fit(session, settings, LEARNERS[settings.type].function(), this.folds)
        session.release()
        path = folder / "predictions.npz"
        save_predictions(path, {row: {"select": found.right}})
        scores = {"accuracy": found.accuracy, "loss": found.loss, "folds": found.folds}
        steps.finish(name, inputs, [path], session.spent(meter) | scores)
        for fold in range(this.folds):  # what they needed to go on
            shutil.rmtree(folder / fold_name(fold))
    this.record.add(out_of_fold={row: steps.result(name)})


def keep_own(record: dict[str, Any], row: str, folder: Path) -> list[Path]:
    """Write the outcomes per image of a learner that cross-fits itself; the files.

    They are `right` under `out_of_fold` in its record, if there, and are taken from it.
    """
    own = record.get(KEY)
    if not isinstance(own, dict) or "right" not in own:
        return []
    record[KEY] = {name: value for name, value in own.items() if name != "right"}
    path = folder / f"{KEY}.npz"
    save_predictions(path, {row: {"select": np.asarray(own["right"], dtype=bool)}})
    return [path]


def with_out_of_fold(this: Run, rows: Sequence[Row], predictions: Predictions) -> list[Row]:
    """The rows with what cross-fitting has found; `predictions` has the set `select` of each."""
    return [
        replace(row, out_of_fold=_found(this, row.learner, predictions[row.learner]["select"]))
        for row in rows
    ]


def _found(this: Run, row: str, in_sample: Bool[np.ndarray, " rows"]) -> CrossFitted | None:
    settings = this.config.learners.get(row)
    if settings is None:
        return None
    own = this.steps.result(f"learn/{row}")["record"].get(KEY)
    if own is None and not this.folds:
        return None
    if own is None:
        result = this.steps.result(f"{KEY}/{row}")
        path = this.folder / "work" / KEY / row / "predictions.npz"
    else:
        # A number alone is the accuracy, on the learner's own folds.
        result = own if isinstance(own, dict) else {"accuracy": own}
        result = {"folds": getattr(settings, "folds", this.folds), "own": True} | result
        path = this.folder / "work" / "learn" / row / f"{KEY}.npz"
    known = {f.name: result[f.name] for f in fields(CrossFitted) if f.name in result}
    if path.exists():
        right = load_predictions(path)[row]["select"]
        known["standard_error"] = paired_standard_error(in_sample, right)
    return CrossFitted(**known)
