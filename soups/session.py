"""What a learner is handed: one model, the zoo, *select*, and the run's rules. Never *report*."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from inputs.config import Settings
from inputs.data import ImageSet
from merge.coefficients import Coefficients
from merge.mixing import combine
from soups.candidates import Candidates, Models, with_rest
from soups.deltas import Mixture
from soups.errors import SoupError
from soups.evaluate import Chunk, Passes, Scores, device_of, evaluate, predict
from soups.groups import group_tensors
from soups.ingredients import Zoo
from soups.learners.registry import Precision
from soups.meter import Meter, memory_in_use
from soups.norms import Groups, NormBuffers
from soups.sources import Sources

Found = TypeVar("Found")


@dataclass(frozen=True)
class IngredientScores:
    """Accuracy of each ingredient on *select*, and the seconds that measuring it took.

    `right`: whether each is right on each image of *select*, from which its accuracy on some of
    them is known.
    """

    accuracies: tuple[float, ...]
    seconds: float
    right: Bool[Tensor, "ingredients rows"] | None = None

    @classmethod
    def of(cls, right: Bool[Tensor, "ingredients rows"], seconds: float) -> IngredientScores:
        """The scores that these outcomes give."""
        return cls(tuple(right.double().mean(1).tolist()), seconds, right)


@dataclass
class Session:
    """The state that learners share; one learner at a time uses the one model.

    `row` is the learner's name in the table: its random streams and its folder are named by it.
    Without a folder nothing is kept of a search that is killed.
    `record` collects what the learner has to say about its run. `in_use` is the memory that the
    plan has found taken before any learner; while it is not known, what is taken now counts.
    `rows`: where this is a session on some of *select*, which of its images (see `on`).
    """

    model: nn.Module
    zoo: Zoo
    select: ImageSet
    norms: NormBuffers
    seed: int
    eval_batch_size: int
    memory_budget: int
    in_use: int | None = None
    train_mode: bool = False
    progress: bool = True
    block_sizes: dict[str, int] = field(default_factory=dict)
    ingredients: IngredientScores = IngredientScores((), 0.0)
    row: str = ""
    folder: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)
    examples_forward: int = 0
    examples_backward: int = 0
    steps: int = 0
    shared_seconds: float = 0.0
    rows: Int[Tensor, " rows"] | None = None
    asked_for_ingredients: bool = False
    found: dict[str, tuple[Any, int, float]] = field(default_factory=dict)

    def begin(self, row: str, folder: Path | None) -> None:
        """Start one row of the table; in `folder` it keeps what it needs to go on when killed."""
        self.row, self.folder, self.record = row, folder, {}
        self.sources.release()
        self.passes.begin()
        self.examples_forward = self.examples_backward = 0
        self.steps, self.shared_seconds = 0, 0.0
        self.asked_for_ingredients = False

    @contextmanager
    def on(self, rows: Int[Tensor, " rows"], name: str) -> Iterator[Session]:
        """A session on these images of *select*: the same model, zoo, rules and memory.

        Its row is `<row>/<name>`, by which its random streams are named; its record is its own,
        and it has no folder. What it has cost is added to this session's when it is left; its
        ingredients' accuracies are known from all of *select*. Use one session at a time.
        Raises SoupError where there are no rows.
        """
        if not len(rows):
            raise SoupError(
                f"learners.{self.row}: {name} has no images of select; wanted at least one: give "
                "select more images"
            )
        # Made here, so that both have the same ones.
        _ = self.sources, self.passes
        inner = copy.copy(self)
        inner.row, inner.folder, inner.record = f"{self.row}/{name}", None, {}
        inner.select = self.select.subset(rows)
        inner.rows = rows if self.rows is None else self.rows[rows]
        inner.examples_forward = inner.examples_backward = inner.steps = 0
        inner.shared_seconds = 0.0
        if self.row in self.block_sizes:
            inner.block_sizes = self.block_sizes | {inner.row: self.block_sizes[self.row]}
        try:
            yield inner
        finally:
            self.examples_forward += inner.examples_forward
            self.examples_backward += inner.examples_backward
            self.steps += inner.steps
            self.shared_seconds += inner.shared_seconds
            self.asked_for_ingredients = inner.asked_for_ingredients

    def spent(self, meter: Meter) -> dict[str, float]:
        """What the row has cost so far; passes are over *select*."""
        return {
            "seconds": meter.seconds + self.shared_seconds,
            "peak_bytes": meter.peak_bytes,
            "steps": self.steps,
            "forward_passes": self.examples_forward / len(self.select),
            "backward_passes": self.examples_backward / len(self.select),
        }

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @cached_property
    def numels(self) -> dict[str, int]:
        """The tensors that learners mix, in the model's order, and their sizes."""
        parameters = self.model.named_parameters()
        return {n: p.numel() for n, p in parameters if self._with_tied((n,))}

    def groups(self, settings: Settings) -> Groups:
        """The groups that these settings ask for; the whole model where they do not say."""
        return group_tensors(self.numels, getattr(settings, "groups", "model"))

    def mixture(self, groups: Groups, capacity: int, precision: Precision = "fp32") -> Mixture:
        """A fresh mixture over the session's model; what is not mixed is put in place."""
        self._load_carried()
        self.release()
        return Mixture(self.model, groups, capacity, self.zoo.stored, precision)

    def coefficients(
        self,
        groups: Groups,
        matrix: Float[np.ndarray, "ingredients groups"],
        settings: Settings,
        *,
        with_base: bool = False,
        temperature: float = 1.0,
    ) -> Coefficients:
        """The artefact: the learner's columns, the tied names and the norm buffers' columns."""
        buffer_groups, columns = self.norms.columns(groups, matrix)
        named = {g: self._with_tied(names) for g, names in groups.items()}
        base = self.zoo.base_ingredient if with_base else None
        return Coefficients(
            ingredients=self.zoo.ingredients,
            groups=named | buffer_groups,
            matrix=np.concatenate([matrix, columns], axis=1),
            base=base,
            carried=dict(self.zoo.preflight.carried),
            norm_buffers=self.norms.rule,
            temperature=temperature,
            method=self.row,
            settings=settings.model_dump(mode="json"),
        )

    def evaluate(
        self,
        candidates: Float64[np.ndarray, "candidates ingredients groups"],
        groups: Groups,
        images: ImageSet | None = None,
    ) -> Scores:
        """The scores of many candidate soups on *select*, or on some of it.

        Each is a matrix over the ingredients, as `coefficients` takes it, with a column for each
        of `groups`; where a column does not sum to one, the base takes the rest. A candidate's
        scores are the same bits in the same calls since `begin`; what else is in a call, and what
        was called before, may change losses by about 1e-6 of them.
        """
        images = images or self.select
        return self._score(Candidates(candidates, groups, self.sources, self.norms), images)

    def skip(
        self,
        candidates: Float64[np.ndarray, "candidates ingredients groups"],
        groups: Groups,
        images: ImageSet,
        seconds: float,
    ) -> None:
        """Count a pass that is not run, since its scores are known from a run that was killed.

        What follows is then run as it would have been after that pass.
        """
        self.examples_forward += len(candidates) * len(images)
        self.shared_seconds += seconds
        self._hold()
        models = Candidates(candidates, groups, self.sources, self.norms)
        for _ in self.passes.parts(models, [images]):
            pass

    def evaluate_ingredients(self, images: ImageSet | None = None) -> Scores:
        """The scores of the ingredients themselves, with their own norm buffers."""
        return self._score(self.ingredient_models(), images or self.select)

    def ingredient_models(self, chosen: Sequence[int] | None = None) -> Candidates:
        """The ingredients, or some of them, as candidates: each has all of its own weight."""
        alone = np.eye(len(self.zoo.checkpoints))[:, :, None]
        alone = alone if chosen is None else alone[list(chosen)]
        groups = self.whole_model()
        return Candidates(alone, groups, self.sources, self.norms, own_buffers=True)

    def chunks(
        self,
        models: Models,
        sets: Sequence[ImageSet],
        *,
        kept: int = 0,
        refuse: bool = True,
    ) -> Iterator[Chunk]:
        """The models in chunks that fit, to be run on `sets`; `kept` bytes of results for each.

        Where nothing fits: SoupError, or without `refuse` one model at a time.
        """
        self._load_carried()
        if isinstance(models, Candidates):
            self._hold()
        return self.passes.chunks(models, sets, kept=kept, refuse=refuse)

    def keep(self, matrix: Float64[np.ndarray, "ingredients 1"]) -> None:
        """Say that the next candidates are this soup with something added, or on a line from it.

        Where the ingredients do not fit in memory, those of the soup are then not read again.
        """
        if not self._hold():
            self.passes.release()  # to make room for the soup before and the one after
            self.sources.keep(with_rest(matrix[None], len(self.sources.checkpoints))[0, :, 0])

    @cached_property
    def sources(self) -> Sources:
        """The ingredients as what candidates are mixed from."""
        return Sources(self.zoo, self.model, [*self.numels])

    @cached_property
    def passes(self) -> Passes:
        """What runs many models over images."""
        return Passes(self.model, batch_size=self.eval_batch_size, room=self.room)

    def once(self, name: str, find: Callable[[], Found]) -> Found:
        """What `find` finds, once in a run; its forward passes and seconds are counted every time.

        On some of *select* it is found again.
        """
        if self.rows is not None:
            return find()
        self.passes.begin()  # the bits of what is found hang on nothing before it,
        if name not in self.found:
            forward, shared, start = self.examples_forward, self.shared_seconds, perf_counter()
            value = find()
            seconds = self.shared_seconds - shared + perf_counter() - start
            self.found[name] = (value, self.examples_forward - forward, seconds)
        else:
            value, forward, seconds = self.found[name]
            self.examples_forward += forward
            self.shared_seconds += seconds
        self.passes.begin()  # and those of what follows not on whether it was found now
        return value

    def release(self) -> None:
        """Give back the memory that evaluating keeps for the next time."""
        for kept in ("sources", "passes"):
            if kept in vars(self):  # else there is nothing yet
                getattr(self, kept).release()

    def room(self) -> int:
        """Bytes of the budget that evaluating may use."""
        if self.in_use is None:
            held = memory_in_use(self.device) - self.passes.in_memory
            return self.memory_budget - held
        return self.memory_budget - self.in_use - self.sources.in_memory

    def load(self, coefficients: Coefficients) -> None:
        """Give the model the very weights that cooking these coefficients writes."""
        self._load_carried()
        state = self._state()
        first = self.zoo.checkpoints[0]
        sources = [*self.zoo.checkpoints]
        if coefficients.base is not None and self.zoo.base is not None:
            sources.append(self.zoo.base)
        for name in coefficients.tensors:
            if name in state:
                mixed = combine(
                    lambda k, name=name: sources[k].read(self.zoo.stored(sources[k], name)),
                    coefficients.weights(name),
                    dtype=first.tensors[self.zoo.stored(first, name)].dtype,
                )
                state[name].copy_(mixed)
        self.norms.recalibrate()

    def logits(self, images: ImageSet | None = None) -> Float[Tensor, "rows classes"]:
        """The logits on *select*, or on some of it, of the model as it is."""
        images = images or self.select
        self.examples_forward += len(images)
        return predict(self.model, images, batch_size=self.eval_batch_size)

    def accuracy(self, images: ImageSet | None = None) -> float:
        """The accuracy on *select*, or on some of it, of the model as it is."""
        images = images or self.select
        return (self.logits(images).argmax(1) == images.labels).double().mean().item()

    def probe(self, count: int) -> ImageSet:
        """The first `count` images of *select*."""
        return self.select.subset(torch.arange(min(count, len(self.select))))

    def whole_model(self) -> Groups:
        """All mixed tensors as one group."""
        return group_tensors(self.numels, "model")

    def ingredient_accuracies(self) -> list[float]:
        """Each ingredient's own accuracy on *select*: measured once in a run, counted once by every
        learner that asks for it, as if it had run alone."""
        right = self.ingredients.right
        if self.rows is not None and right is None:
            raise SoupError(
                f"learners.{self.row}: the ingredients' accuracies on some of select are asked "
                "for, and whether they are right on each image is not known; measure them with "
                "Run.score_ingredients before"
            )
        if not self.asked_for_ingredients:
            images = len(self.select) if right is None else right.shape[1]
            self.examples_forward += images * len(self.zoo.checkpoints)
            self.shared_seconds += self.ingredients.seconds
            self.asked_for_ingredients = True
        if self.rows is None or right is None:
            return list(self.ingredients.accuracies)
        return right[:, self.rows].double().mean(1).tolist()

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled pass over *select* on the model's device, counted forward and back."""
        if self.train_mode:  # dropout draws from torch's own stream
            torch.manual_seed(generator.initial_seed())
        for images, labels in self.select.batches(batch_size, generator=generator):
            self.examples_forward += len(labels)
            self.examples_backward += len(labels)
            self.steps += 1
            yield images.to(self.device), labels.to(self.device)

    def _hold(self) -> bool:
        """Have the ingredients in memory, if that leaves as much room again; whether they are."""
        if (
            not self.sources.held
            and 2 * self.sources.nbytes <= self.room() + self.sources.in_memory
        ):
            self.sources.hold()
        return self.sources.held

    def _score(self, models: Candidates, images: ImageSet) -> Scores:
        self.examples_forward += len(models) * len(images)
        return evaluate(self.chunks, models, images)

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def _load_carried(self) -> None:
        """Put what is not mixed in place: from the base, else from the first ingredient."""
        sources = [c for c in (self.zoo.base, self.zoo.checkpoints[0]) if c is not None]
        for name, tensor in self._state().items():
            if name in self.zoo.preflight.carried:
                holder = next((c for c in sources if self.zoo.stored(c, name)), None)
                if holder is not None:
                    tensor.copy_(holder.read(self.zoo.stored(holder, name)))

    def _with_tied(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names that the checkpoints have for these tensors, tied ones included."""
        known = set(self.zoo.preflight.mixed)
        return tuple(
            n for name in names for n in (name, *self.zoo.tied.get(name, ())) if n in known
        )
