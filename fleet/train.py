"""Train many models at once, each by its own recipe, each as if it were alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fleet.alike import architecture, named_tensors
from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.feed import Batch
from fleet.training.halving import Halving, Rungs
from fleet.training.interrupts import Interrupts
from fleet.training.jobs import Job, Make, checked_jobs, classes_of
from fleet.training.kind import Kind, classifier_head, prepare, surely_bad
from fleet.training.plan import Manner, kept_bytes
from fleet.training.snapshot import Saving, Snapshot
from fleet.training.trainee import Point, State, Trainee, TrainingData, TrainResult
from fleet.training.workers import Workers
from inputs.budget import format_bytes
from inputs.data import ImageSet
from inputs.randomness import generator

logger = logging.getLogger(__name__)

__all__ = [
    "Checkpoint",
    "JointTrainer",
    "Point",
    "TrainResult",
    "TrainingData",
    "Watch",
    "classifier_head",
    "evaluate",
    "train",
]

EVAL_BATCH_SIZE = 512
FROM_SCRATCH = "remove the file, or give another one, to train from the beginning"

Checkpoint = Callable[[nn.Module, TrainResult, bool], None]


@runtime_checkable
class Watch(Protocol):
    """Shows how training goes; nothing depends on it."""

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """`steps` of all models together, `done` of them before a restart."""

    def advance(self, steps: int) -> None:
        """So many steps more, of all models together; those that a model leaves out count too."""

    def point(self, point: Point) -> None:
        """A model's curve goes on."""

    def end(self) -> None:
        """Training is over, or interrupted."""


class JointTrainer:
    """Trains `models[i]()` by `recipes[i]` on `data[i].fit`, or on one `data`, all at once.

    Models of one architecture are stacked and computed as a group; those of several take turns
    within a step. Each has its own recipe, epochs, seed and data, and ends where it would have
    ended alone, up to rounding. Which others there are changes no bit of it where its sizes are
    multiples of 64 numbers; elsewhere it can change how sums are rounded.

    `at_once` models are alive at a time (1: one after another), and as many as fit
    `memory_budget`, in bytes; those that are done make room. `plan` says how many and what peak
    that predicts, once `run` has built the first ones. With `halving` models that are behind leave
    early (ASHA, 1810.05934). A model whose loss is not finite leaves alone: see TrainResult.

    `checkpoint(model, result, final)` is called when a model is done, and after every
    `checkpoints_every` epochs before that; it must not change the model, which is in eval mode.

    With `snapshot`, a file, all of it is saved every `snapshot_minutes`, every `snapshot_steps`
    steps of the models, and on Ctrl-C; a trainer that finds the file goes on from it, to the same
    bits, and removes it at the end.

    Raises FleetError for recipes that do not fit the models or the images, naming every problem.
    """

    def __init__(
        self,
        models: Sequence[Make],
        recipes: Sequence[Recipe],
        data: TrainingData | Sequence[TrainingData],
        checkpoint: Checkpoint | None = None,
        *,
        names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        at_once: int | None = None,
        memory_budget: int | None = None,
        halving: Halving | None = None,
        checkpoints_every: int | None = None,
        snapshot: Path | None = None,
        snapshot_minutes: float = 10.0,
        snapshot_steps: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        given = {
            "at_once": at_once,
            "checkpoints_every": checkpoints_every,
            "snapshot_steps": snapshot_steps,
            "snapshot_minutes": snapshot_minutes,
        }
        for option, value in given.items():
            if value is not None and not value > 0:
                raise FleetError(f"{option} is {value}; give a number above 0, or leave it out")
        names = [f"model {i}" for i in range(len(models))] if names is None else names
        sets = [data] * len(models) if isinstance(data, TrainingData) else list(data)
        self._jobs = checked_jobs(models, recipes, sets, names)
        self._checkpoint, self._every = checkpoint, checkpoints_every
        self._device = torch.device(device)
        self._budget = memory_budget
        limits = [limit for limit in (at_once, halving and halving.at_once) if limit]
        self._at_once = min(limits, default=len(models))
        self._rungs = None if halving is None else Rungs(halving)
        self._saving = Saving(snapshot, snapshot_minutes, snapshot_steps)
        self._watch = watch
        self._workers = Workers(self._device, len(self._jobs))
        self._kinds: dict[Hashable, Kind] = {}
        self._kept: dict[int, int] = {}
        self._next: tuple[Trainee, Kind] | None = None
        self._waiting = list(self._jobs)
        self._results: dict[int, TrainResult] = {}
        self.curves: list[Point] = []

    @property
    def plan(self) -> str:
        """How models of each kind train, with the predicted peak in memory beside the images."""
        kinds = [(type(kind.model).__name__, kind.manner) for kind in self._kinds.values()]
        return describe(kinds, len(self._kept), len(self._waiting), self._predicted_bytes())

    def run(self) -> list[TrainResult]:
        """Train, or go on; a result for each model, in order."""
        saved = self._saving.load()
        total = sum(job.steps for job in self._jobs)
        if self._watch is not None:
            names = [job.name for job in self._jobs]
            self._watch.begin(names, total, 0 if saved is None else self._steps_in(saved))
        try:
            # Initialisation draws from torch's global generators: give them back as they were.
            devices = [self._device] if self._device.type == "cuda" else []
            with Interrupts() as interrupts, self._workers, torch.random.fork_rng(devices):
                self._admit(saved)
                while self._kinds_in_use():
                    self._round()
                    self._admit()
                    if interrupts.asked or self._saving.is_due():
                        self._save()
                    if interrupts.asked:
                        raise KeyboardInterrupt
        finally:
            if self._watch is not None:
                self._watch.end()
        self._saving.finish()
        return [self._results[job.index] for job in self._jobs]

    def _kinds_in_use(self) -> list[Kind]:
        return [kind for kind in self._kinds.values() if kind.bucket.trainees]

    # --- who trains ---

    def _admit(self, saved: Snapshot | None = None) -> None:
        """Build models while there is room for them, all that are in `saved` to begin with."""
        entering: dict[int, tuple[Kind, list[Trainee]]] = {}
        records = {} if saved is None else self._taken_up(saved)
        while self._waiting:
            job = self._waiting[0]
            if not records and len(self._kept) >= self._at_once:
                break
            if self._next is None or self._next[0].index != job.index:
                self._next = self._built(job, records.get(job.name), saved)
            trainee, kind = self._next
            kept = kept_bytes(job.recipe, trainee.state, kind.bucket.kernel.parts.trained)
            alone = not self._kept
            if not alone and self._predicted_bytes() + kept > (self._budget or math.inf):
                break
            self._next = None
            self._kept[job.index] = kept
            del self._waiting[0]
            records.pop(job.name, None)
            entering.setdefault(id(kind), (kind, []))[1].append(trainee)
        for kind, trainees in entering.values():
            self._enter(kind, trainees)

    def _enter(self, kind: Kind, trainees: list[Trainee]) -> None:
        kind.bucket.enter([(trainee, trainee.release()) for trainee in trainees])
        for trainee in trainees:
            trainee.begin(kind.bucket.kernel.parts.trained)

    def _predicted_bytes(self) -> int:
        peaks = [kind.manner.peak_bytes for kind in self._kinds.values()]
        return sum(self._kept.values()) + max(peaks, default=0)

    def _built(
        self, job: Job, record: dict[str, Any] | None, saved: Snapshot | None
    ) -> tuple[Trainee, Kind]:
        torch.manual_seed(generator(job.recipe.seed, "init").initial_seed())
        model = job.make().to(self._device)
        classes = classes_of(model, job)
        trainee = Trainee(
            job.index, job.name, job.recipe, job.data, classes=classes, dtype=_dtype(model)
        )
        trainee.bind({name: tensor.detach() for name, tensor in named_tensors(model).items()})
        if record is not None and saved is not None:
            try:
                trainee.restore(record, saved.tensors[job.name])
            except FleetError as error:
                raise FleetError(
                    f"{self._saving.path}: {job.name} was another model there ({error}); "
                    f"{FROM_SCRATCH}"
                ) from error
        kind = self._kind_of(trainee, model)
        return trainee, kind

    def _kind_of(self, trainee: Trainee, model: nn.Module) -> Kind:
        """The kind that this model, in this phase of its training, is computed with."""
        trained = prepare(model, trainee)
        shape, classes = trainee.feed.shape, trainee.classes
        sam = trainee.recipe.sam_rho is not None
        key = (architecture(model), tuple(trained), shape, classes, sam)
        if key not in self._kinds:
            rows = max(job.rows for job in self._jobs)
            pixels = torch.zeros((1, rows, *shape), dtype=trainee.dtype, device=self._device)
            self._kinds[key] = Kind.of(
                model,
                trained,
                Batch(pixels, pixels.new_zeros(1, rows, classes)),
                self._jobs,
                at_once=self._at_once,
                threads=self._workers.count,
                budget=self._budget,
            )
        return self._kinds[key]

    # --- one step of everyone ---

    def _round(self) -> None:
        for kind in self._kinds_in_use():
            trainees = kind.advance(self._workers)
            if self._watch is not None:
                self._watch.advance(len(trainees))
            ended = [trainee for trainee in trainees if not self._goes_on(kind, trainee)]
            if not ended:
                continue
            moving = [trainee for trainee in ended if trainee.index not in self._results]
            kind.bucket.leave(ended, keep=moving)
            for trainee in moving:
                trainee.next_phase()
                self._enter(self._kind_of(trainee, kind.model), [trainee])

    # --- what follows a step ---

    def _goes_on(self, kind: Kind, trainee: Trainee) -> bool:
        """Whether it stays in its bucket after a step; notes points, scores and results."""
        if not trainee.at_point and not surely_bad(trainee.losses[-1]):
            return True
        bad = trainee.first_bad_step()
        if bad is not None:
            reason = (
                f"the loss is not finite at step {bad} with lr {trainee.recipe.lr:g}; lower lr, "
                "lengthen warmup or set clip_norm"
            )
            return self._end(trainee, None, "failed", reason)
        if not trainee.ends_epoch or trainee.phase == "head":
            self._point(trainee, None, "training")
            return trainee.step < trainee.feed.steps
        return self._epoch_ended(kind, trainee)

    def _epoch_ended(self, kind: Kind, trainee: Trainee) -> bool:
        recipe, epoch = trainee.recipe, trainee.epoch
        last = trainee.step == trainee.feed.steps
        due = self._every is not None and epoch % self._every == 0 and not last
        looks = recipe.keep == "best" or recipe.patience is not None or self._rungs is not None
        if not (last or due or looks):
            self._point(trainee, None, "training")
            return True
        state = trainee.judged()
        result = self._score(kind, trainee, state)
        if not math.isfinite(result.tune_loss):
            reason = (
                f"the loss on tune is not finite after epoch {epoch} with lr {recipe.lr:g}; lower "
                "lr or set clip_norm"
            )
            return self._end(trainee, result, "failed", reason)
        if recipe.keep == "best" and (trainee.best is None or _better(result, trainee.best[0])):
            trainee.best = result, {name: tensor.clone() for name, tensor in state.items()}
        if due:
            self._give(kind, state, result, final=False)
        accuracy = result.tune_accuracy
        behind = self._rungs is not None and not self._rungs.stays(trainee.name, epoch, accuracy)
        if self._rungs is not None and behind and not last:
            reason = (
                f"{accuracy:.4f} on tune after epoch {epoch} is not among the best "
                f"1/{self._rungs.halving.factor} of those that came so far"
            )
            return self._end(trainee, result, "stopped", reason)
        if trainee.patience.stays(accuracy) and not last:
            self._point(trainee, result, "training")
            return True
        kept, state = trainee.best if trainee.best is not None else (result, state)
        final = replace(kept, seconds=trainee.seconds)
        self._give(kind, state, final, final=True)
        return self._end(trainee, final, "done", "", score=result)

    def _score(self, kind: Kind, trainee: Trainee, state: Mapping[str, Tensor]) -> TrainResult:
        model = _holding(kind.model, state)
        with self._workers.all_threads():
            accuracy, loss = evaluate(model, trainee.data.tune, device=self._device)
        return TrainResult(trainee.index, trainee.epoch, accuracy, loss, trainee.seconds)

    def _give(
        self, kind: Kind, state: Mapping[str, Tensor], result: TrainResult, *, final: bool
    ) -> None:
        if self._checkpoint is not None:
            self._checkpoint(_holding(kind.model, state), result, final)

    def _end(
        self,
        trainee: Trainee,
        result: TrainResult | None,
        state: State,
        reason: str,
        score: TrainResult | None = None,
    ) -> bool:
        """It leaves, with this result; False, since it does not go on."""
        left = _steps_left(trainee)
        self._point(trainee, score or result, state)
        if result is None:
            nan = math.nan
            result = TrainResult(trainee.index, trainee.epoch, nan, nan, trainee.seconds)
        self._results[trainee.index] = replace(result, state=state, reason=reason)
        del self._kept[trainee.index]
        if reason:
            level = logging.WARNING if state == "failed" else logging.INFO
            logger.log(level, "%s %s: %s", trainee.name, state, reason)
        if self._watch is not None and left:
            self._watch.advance(left)
        return False

    def _point(self, trainee: Trainee, score: TrainResult | None, state: State) -> None:
        scores = None if score is None else (score.tune_accuracy, score.tune_loss)
        point = trainee.point(scores, state)
        self.curves.append(point)
        if self._watch is not None:
            self._watch.point(point)

    # --- saved and taken up again ---

    def _save(self) -> None:
        trainees = [t for kind in self._kinds_in_use() for t in kind.bucket.trainees]
        jobs = {job.index: job for job in self._jobs}
        begun = [*self._results, *(trainee.index for trainee in trainees)]
        record = {
            "recipes": {jobs[index].name: _settings(jobs[index].recipe) for index in begun},
            "training": {trainee.name: trainee.record() for trainee in trainees},
            "results": {jobs[i].name: asdict(result) for i, result in self._results.items()},
            "rungs": None if self._rungs is None else self._rungs.state(),
            "curves": [asdict(point) for point in self.curves],
        }
        self._saving.save(record, {trainee.name: trainee.tensors() for trainee in trainees})

    def _taken_up(self, saved: Snapshot) -> dict[str, dict[str, Any]]:
        """The records of the models that were training; results and scores are taken over."""
        record, asked = saved.record, {job.name: job for job in self._jobs}
        for name, former in record["recipes"].items():
            recipe = _settings(asked[name].recipe) if name in asked else former
            changed = [field for field, value in recipe.items() if former.get(field) != value]
            if changed:
                raise FleetError(
                    f"{self._saving.path}: {name} was trained with another recipe there "
                    f"({', '.join(changed)}); {FROM_SCRATCH}"
                )
        for name, result in record["results"].items():
            if name in asked:
                index = asked[name].index
                self._results[index] = TrainResult(**{**result, "index": index})
        if self._rungs is not None and record["rungs"] is not None:
            self._rungs.load(record["rungs"])
        self.curves = [Point(**point) for point in record["curves"]]
        found = {name: own for name, own in record["training"].items() if name in asked}
        left = [job for job in self._waiting if job.index not in self._results]
        self._waiting = sorted(left, key=lambda job: job.name not in found)
        return found

    def _steps_in(self, saved: Snapshot) -> int:
        """Steps of the models that were done before."""
        record = saved.record
        done = 0
        for job in self._jobs:
            own = record["training"].get(job.name)
            if job.name in record["results"]:
                done += job.steps
            elif own is not None:
                head = job.recipe.head_epochs * job.steps_per_epoch if own["phase"] == "fit" else 0
                done += head + own["step"]
        return done


def train(
    models: Sequence[Make],
    recipes: Sequence[Recipe],
    data: TrainingData | Sequence[TrainingData],
    checkpoint: Checkpoint | None = None,
    *,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
    at_once: int | None = None,
    checkpoints_every: int | None = None,
    progress: bool = True,
) -> list[TrainResult]:
    """JointTrainer with a bar and no snapshot; FleetError that names every model that failed."""
    names = [f"model {i}" for i in range(len(models))] if names is None else names
    trainer = JointTrainer(
        models,
        recipes,
        data,
        checkpoint,
        names=names,
        device=device,
        at_once=at_once,
        checkpoints_every=checkpoints_every,
        watch=_Bar(disable=not progress),
    )
    results = trainer.run()
    failed = [f"{names[r.index]}: {r.reason}" for r in results if r.state == "failed"]
    if failed:
        raise FleetError("; ".join(failed))
    return results


class _Bar:
    """A bar over the steps of all models."""

    def __init__(self, *, disable: bool) -> None:
        self._disable = disable
        self._bar: tqdm | None = None

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        described = names[0] if len(names) == 1 else f"{len(names)} models"
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=described,
            disable=self._disable,
            unit="step",
            mininterval=0.5,
        )

    def advance(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def point(self, point: Point) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{point.loss:.3f}", refresh=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()


def evaluate(
    model: nn.Module, images: ImageSet, *, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy in evaluation mode."""
    model.eval()
    dtype = _dtype(model)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for pixels, labels in images.batches(EVAL_BATCH_SIZE):
            labels = labels.to(device)
            logits = model(pixels.to(device, dtype))
            hits += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
    return hits.item() / len(images), loss.item() / len(images)


def _holding(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`model` in evaluation mode with these weights."""
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(state[name])
    return model.eval()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _steps_left(trainee: Trainee) -> int:
    after = trainee.recipe.epochs * trainee.feed.steps_per_epoch if trainee.phase == "head" else 0
    return trainee.feed.steps - trainee.step + after


def _better(result: TrainResult, other: TrainResult) -> bool:
    ours = result.tune_accuracy, -result.tune_loss
    return ours > (other.tune_accuracy, -other.tune_loss)


def describe(
    kinds: Sequence[tuple[str, Manner]], training: int, waiting: int, predicted: int
) -> str:
    """The plan in words; `kinds` are named."""
    size = format_bytes(predicted)
    lines = [f"models that train at once: {training}, waiting: {waiting}; predicted {size}"]
    for name, manner in kinds:
        extra = ", activations computed again" if manner.checkpointing else ""
        extra += f", batches in {manner.micro_batches} parts" if manner.micro_batches > 1 else ""
        size = format_bytes(manner.step_bytes)
        lines.append(f"  {name}: {manner.width} computed together, {size} each{extra}")
    return "\n".join(lines)
