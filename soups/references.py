"""Rows of the table that are not soups: what their cost or their data would buy otherwise."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fleet.recipes import Recipe
from fleet.train import TrainResult, train
from inputs.data import ImageSet
from merge.coefficients import Coefficients
from soups.entries import Entry
from soups.learners.registry import LEARNERS
from soups.learners.selection import best_single, uniform
from soups.meter import Meter
from soups.plan import largest_batch
from soups.record import fingerprint
from soups.run import Run
from soups.session import Session
from soups.zoo import save_weights

log = logging.getLogger(__name__)


def references(this: Run, soups: Mapping[str, Coefficients]) -> list[Entry]:
    """The rows that are not soups, as `references` asks for them."""
    wanted = this.config.references
    ensembles = _ensembles(this, soups) if wanted.ensembles else []
    return ensembles + (_finetuned(this, soups) if wanted.finetuned else [])


def _ensembles(this: Run, soups: Mapping[str, Coefficients]) -> list[Entry]:
    """The mean logits of all ingredients, and of the members of the first greedy soup."""
    names = this.session.zoo.names
    teams = {"ensemble_all": tuple(range(len(names)))}
    greedy = [row for row, s in this.config.learners.items() if s.type == "greedy"]
    for row in greedy[:1]:
        teams[f"ensemble_{row}"] = tuple(np.flatnonzero(soups[row].matrix.any(axis=1)).tolist())
    nothing = {"seconds": 0.0, "peak_bytes": 0, "forward_passes": 0.0, "backward_passes": 0.0}
    return [
        Entry(
            row=team,
            kind="reference",
            ingredients=tuple(names[k] for k in members),
            inputs={"team": members},
            spent=nothing,
            team=members,
            notes=(f"mean logits; every prediction runs {len(members)} models",),
        )
        for team, members in teams.items()
    ]


def _finetuned(this: Run, soups: Mapping[str, Coefficients]) -> list[Entry]:
    """The best single and the uniform soup, fine-tuned on *select* as long as learners took."""
    longest = max(this.steps.result(f"learn/{row}")["steps"] for row in soups)
    if not longest:
        return []
    starts = {"best_single": best_single, "uniform": uniform}
    return [_finetuned_entry(this, name, learner, longest) for name, learner in starts.items()]


def _finetuned_entry(this: Run, start: str, learner: Callable, longest: int) -> Entry:
    session, config = this.session, this.config
    row = f"{start}+select"
    batch = largest_batch(config.learners)
    # The trainer leaves incomplete batches out.
    per_epoch = len(session.select) // batch
    epochs = max(1, round(longest / per_epoch))
    steps = epochs * per_epoch
    settings = {"steps": steps, "lrs": config.references.lrs, "batch": batch}
    inputs = fingerprint(this.inputs | settings | {"tune": this.data.tune.digest()})
    path = this.folder / "work" / "learn" / row / "model.safetensors"
    if not this.steps.is_done(f"learn/{row}", inputs):
        log.info("fine-tuning %s on select, for comparison", start)
        this.score_ingredients()
        session.begin(row, this.steps.scratch(f"learn/{row}", inputs))
        coefficients = learner(session, LEARNERS[start].settings())
        with Meter(session.device) as meter:
            session.load(coefficients)
            model, lr = _finetune_on_select(
                session.model,
                session,
                this.data.tune,
                name=row,
                epochs=epochs,
                batch_size=batch,
                lrs=config.references.lrs,
            )
        save_weights(model, path)
        names = [
            i.name
            for i, a in zip(coefficients.ingredients, coefficients.matrix, strict=True)
            if a.any()
        ]
        this.steps.finish(
            f"learn/{row}", inputs, [path], session.spent(meter) | {"lr": lr, "names": names}
        )
    result = this.steps.result(f"learn/{row}")

    return Entry(
        row=row,
        kind="reference",
        ingredients=tuple(result["names"]),
        inputs={"finetuned": inputs},
        spent=result,
        model=path,
        notes=(
            f"{steps} steps on select at lr {result['lr']:g}, the best on tune of "
            f"{', '.join(f'{lr:g}' for lr in config.references.lrs)}",
        ),
    )


@dataclass(frozen=True)
class _OnSelect:
    """What the trainer sees when a model is fine-tuned on *select*: *tune* still judges it."""

    fit: ImageSet
    tune: ImageSet
    classes: tuple[str, ...]


def _finetune_on_select(
    start: nn.Module,
    session: Session,
    tune: ImageSet,
    *,
    name: str,
    epochs: int,
    batch_size: int,
    lrs: Sequence[float],
) -> tuple[nn.Module, float]:
    """`start` fine-tuned on *select* with each lr; the best on *tune*, its lr."""
    select = session.select
    best: list[tuple[float, nn.Module, float]] = []

    def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
        if final and (not best or result.tune_accuracy > best[0][0]):
            best[:] = [(result.tune_accuracy, copy.deepcopy(model), lrs[result.index])]

    train(
        [lambda: copy.deepcopy(start)] * len(lrs),
        [
            Recipe(lr=lr, epochs=epochs, batch_size=batch_size, seed=session.seed, weight_decay=0.0)
            for lr in lrs
        ],
        _OnSelect(fit=select, tune=tune, classes=select.classes),
        keep,
        device=session.device,
        names=[f"{name} lr={lr:g}" for lr in lrs],
        at_once=1,  # memory_budget is planned for one model
        progress=session.progress,
    )
    session.examples_forward += len(lrs) * epochs * len(select)
    session.examples_backward += len(lrs) * epochs * len(select)
    ((_, model, lr),) = best
    return model, lr
