"""Entries of the leaderboard: what each is made of and has cost, and how it is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from inputs.data import ImageSet
from merge.coefficients import Coefficients
from soups.evaluate import predict
from soups.leaderboard import Metrics, Row, load_predictions, save_predictions, score
from soups.record import fingerprint
from soups.run import Run
from soups.statistics import accuracy, correctness, fit_temperature
from soups.zoo import load_weights

log = logging.getLogger(__name__)

Sets = Mapping[str, ImageSet]
Logits = Mapping[str, Float[Tensor, "rows classes"]]


@dataclass(frozen=True)
class Entry:
    """A row to be evaluated: `inputs` is what its logits depend on, `spent` what it has cost."""

    row: str
    kind: Literal["soup", "reference"]
    ingredients: tuple[str, ...]
    inputs: dict[str, Any]
    spent: Mapping[str, Any]
    logits: Callable[[Sets], Logits]
    notes: tuple[str, ...] = ()


def soup_entry(this: Run, row: str, soup: Coefficients) -> Entry:
    learned = this.steps.result(f"learn/{row}")
    this.record.add(learners={row: learned}, cooked={row: this.steps.result(f"cook/{row}")})

    def logits(sets: Sets) -> Logits:
        load_weights(this.session.model, str(this.soup(row)))
        return {
            n: soup.temperature * z for n, z in predict_all(this, this.session.model, sets).items()
        }

    used = np.any(soup.matrix != 0, axis=1)
    names = tuple(i.name for i, member in zip(soup.ingredients, used, strict=True) if member)
    return Entry(row, "soup", names, {"coefficients": soup.sha256}, learned, logits)


def evaluate_entry(this: Run, entry: Entry, sets: Sets) -> tuple[Row, dict[str, np.ndarray]]:
    """The row's metrics, and whether each example is right."""
    steps = this.steps
    inputs = fingerprint(
        entry.inputs
        | {name: images.digest() for name, images in sets.items()}
        | {"run": this.inputs}
    )
    name = f"evaluate/{entry.row}"
    path = this.folder / "work" / name / "predictions.npz"
    if not steps.is_done(name, inputs):
        log.info("evaluating %s", entry.row)
        path.parent.mkdir(parents=True, exist_ok=True)
        logits = entry.logits(sets)
        labels = {name: images.labels.numpy() for name, images in sets.items()}
        arrays = {name: values.numpy() for name, values in logits.items()}
        temperature = fit_temperature(arrays["select"], labels["select"])
        right = {name: correctness(arrays[name], labels[name]) for name in sets}
        result = {
            "temperature_on_select": temperature,
            "select": vars(score(arrays["select"], labels["select"], temperature=temperature)),
            "report": vars(score(arrays["report"], labels["report"], temperature=temperature)),
            "extra": {
                name: accuracy(right[name]) for name in sets if name not in ("select", "report")
            },
        }
        save_predictions(path, {entry.row: right})
        steps.finish(name, inputs, [path], result)
    result = steps.result(name)
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
    )
    return row, load_predictions(path)[entry.row]


def predict_all(
    this: Run, model: nn.Module, sets: Sets
) -> dict[str, Float[Tensor, "rows classes"]]:
    """The model's logits on every set."""
    batch_size = this.config.eval_batch_size
    return {name: predict(model, images, batch_size=batch_size) for name, images in sets.items()}
