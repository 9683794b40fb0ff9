"""Models of one kind: how they are computed, and one step of some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fleet.alike import named_tensors
from fleet.errors import FleetError
from fleet.training.bucket import Bucket, Chunk
from fleet.training.draws import fill
from fleet.training.feed import Batch, load, targets
from fleet.training.jobs import Job
from fleet.training.optimizers import Ascent, clip, gradient_norms
from fleet.training.plan import Manner, kept_bytes, manner_of
from fleet.training.prefix import FeatureStore, plain
from fleet.training.step import Kernel, Outcome, parts_of
from fleet.training.trainee import Trainee
from fleet.training.workers import Workers
from kernels.draws import Draw

READ_BYTES = 32 << 20
FEATURE_BYTES = 1 << 30


@dataclass
class Kind:
    """Models that are computed together, and how; `model` is one of them, with any weights."""

    model: nn.Module
    bucket: Bucket
    manner: Manner
    convolves: bool
    device: torch.device
    features: FeatureStore = field(init=False)
    _version: int = field(init=False, default=0)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        trained: Sequence[str],
        batch: Batch,
        jobs: Sequence[Job],
        *,
        at_once: int,
        threads: int,
        budget: int | None,
    ) -> Kind:
        """The kind of `model`, which is in its modes, as `prepare` leaves it.

        `jobs` are all that may be of this kind, and `batch` is as large as the largest of theirs:
        how they are computed is not to depend on who came first.
        """
        stacked = {name: t.detach()[None] for name, t in named_tensors(model).items()}
        kernel = Kernel(model, parts_of(model, trained))
        used, _ = kernel.probe(batch.pixels, batch.targets, stacked)
        kernel.parts = replace(kernel.parts, trained=used)
        state = {name: tensor[0] for name, tensor in stacked.items()}
        most = max(jobs, key=lambda job: kept_bytes(job.recipe, state, used))
        manner = manner_of(
            kernel,
            stacked,
            batch.pixels,
            batch.targets,
            kept=kept_bytes(most.recipe, state, used),
            models=min(at_once, len(jobs)),
            threads=threads,
            budget=budget,
            name=max(jobs, key=lambda job: job.rows).name,
        )
        room = FEATURE_BYTES if budget is None else budget // 4
        kind = cls(
            model, Bucket(kernel, manner.width), manner, convolves(model), batch.pixels.device
        )
        kind.features = FeatureStore(kernel, room)
        return kind

    def advance(self, workers: Workers) -> list[Trainee]:
        """One step of all these models: their losses are noted and their weights are new."""
        chunks = list(self.bucket.chunks())
        while chunks:
            now = _read_together(chunks)
            workers.run(self._advance, self._with_batches(now), much=self.manner.much)
            del chunks[: len(now)]
        return [*self.bucket.trainees]

    def _with_batches(self, chunks: Sequence[Chunk]) -> list[tuple[Chunk, Batch | None]]:
        """Each chunk with its images, which are read at once; None where features take their
        place."""
        if self.bucket.version != self._version:
            self.features.forget()
            self._version = self.bucket.version
        if all(self._has_features(chunk) for chunk in chunks):
            return [(chunk, None) for chunk in chunks]
        batch = batch_of([t for chunk in chunks for t in chunk.computed], self.device)
        sizes = [chunk.size for chunk in chunks]
        pixels, targets = batch.pixels.split(sizes), batch.targets.split(sizes)
        return list(zip(chunks, map(Batch, pixels, targets), strict=True))

    def _has_features(self, chunk: Chunk) -> bool:
        feeds = [trainee.feed for trainee in chunk.trainees]
        return plain(feeds) and self.features.knows(feeds[0].images, chunk.size, chunk.rows)

    def _advance(self, task: tuple[Chunk, Batch | None]) -> None:
        chunk, batch = task
        outcome = self._outcome(chunk, batch)
        norms = None
        if any(trainee.reaches_point() for trainee in chunk.trainees):
            norms = gradient_norms(outcome.gradients)
        if self.device.type == "cpu":
            losses: Sequence[Tensor | float] = outcome.losses.tolist()
        else:  # on other devices every look waits for all work before it
            losses = outcome.losses.unbind()
        self.bucket.write(chunk, outcome.buffers)
        gradients = {name: g.unbind() for name, g in outcome.gradients.items()}
        outcome.gradients.clear()
        for place, trainee in enumerate(chunk.trainees, start=chunk.skipped):
            trainee.losses.append(losses[place])
            own = {name: g[place] for name, g in gradients.items()}
            if norms is not None:
                trainee.grad_norm = norms[place]
            if not surely_bad(losses[place]):
                if trainee.recipe.clip_norm is not None:
                    clip(list(own.values()), trainee.recipe.clip_norm)
                trainee.update(own)
            else:
                trainee.step += 1

    def _outcome(self, chunk: Chunk, batch: Batch | None) -> Outcome:
        """Losses, gradients and buffers of all slots of a chunk."""
        trainees = chunk.trainees
        outcome = self._computed(chunk, batch)
        if trainees[0].recipe.sam_rho is None:
            return outcome
        ascents = []
        for place, trainee in enumerate(trainees, start=chunk.skipped):
            assert trainee.recipe.sam_rho is not None
            own = {name: g[place] for name, g in outcome.gradients.items()}
            ascents.append(Ascent())
            ascents[-1].climb(trainee.parameters, own, trainee.recipe.sam_rho)
        outcome.gradients.clear()
        higher = self._computed(chunk, batch)
        for ascent in ascents:
            ascent.back()
        return Outcome(outcome.losses, higher.gradients, outcome.buffers)

    def _computed(self, chunk: Chunk, batch: Batch | None) -> Outcome:
        if batch is None:
            return self._from_features(chunk)
        bucket, parts, trainees = self.bucket, self.manner.micro_batches, chunk.computed
        stacked = bucket.views(chunk.slots)
        every = batch.pixels
        if self.convolves:  # the channels of a pixel together
            every = every.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        if every.shape[1] % parts:
            parts = 1  # the rest of an epoch
        total: Outcome | None = None
        for part, (pixels, wanted) in enumerate(
            zip(every.chunk(parts, 1), batch.targets.chunk(parts, 1), strict=True)
        ):
            draws = bucket.kernel.draws(pixels, wanted, stacked, bucket.shared)
            drawn = drawn_by(trainees, draws, part, self.device)
            feeds = [trainee.feed for trainee in trainees]
            if parts == 1 and bucket.shared and plain(feeds):
                # Before the step, so that every step is made of features, the first one too.
                step = pixels, wanted, drawn
                indices = torch.stack([t.feed.indices(t.step) for t in trainees])
                self.features.learn(feeds[0], stacked, bucket.shared, step, indices)
                if self._has_features(chunk):
                    return self._from_features(chunk)
            outcome = bucket.kernel(stacked, bucket.shared, pixels, wanted, drawn)
            total = outcome if total is None else _sum(total, outcome)
        assert total is not None
        return total if parts == 1 else _over(total, parts)

    def _from_features(self, chunk: Chunk) -> Outcome:
        bucket, trainees = self.bucket, chunk.computed
        stacked, feeds = bucket.views(chunk.slots), [trainee.feed for trainee in trainees]
        steps = [trainee.step for trainee in trainees]
        wanted = targets(feeds, steps, trainees[0].dtype).to(self.device)
        none = wanted.new_empty(0)
        draws = bucket.kernel.known_draws((chunk.rows, *feeds[0].shape))
        drawn = drawn_by(trainees, draws, 0, self.device)
        tensors = [*stacked.values(), *bucket.shared.values(), none, wanted, *drawn]
        indices = torch.stack([f.indices(s) for f, s in zip(feeds, steps, strict=True)])
        return self.features.step(feeds[0].images, tensors, indices)


def drawn_by(
    trainees: Sequence[Trainee], draws: Sequence[Draw], part: int, device: torch.device
) -> list[Tensor]:
    """The random numbers of these models' next step, on this part of their batches."""
    return fill(
        draws,
        [trainee.recipe.seed for trainee in trainees],
        [f"{trainee.phase}/{part}" for trainee in trainees],
        [trainee.step for trainee in trainees],
        device,
    )


def batch_of(trainees: Sequence[Trainee], device: torch.device) -> Batch:
    """The next batches of these models."""
    steps = [trainee.step for trainee in trainees]
    batch = load([trainee.feed for trainee in trainees], steps, dtype=trainees[0].dtype)
    return Batch(
        batch.pixels.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
    )


def _read_together(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The first of these chunks, as many as have equal rows and are read at once."""
    first = chunks[0].trainees[0]
    image_bytes = math.prod(first.feed.shape) * first.dtype.itemsize
    room = max(1, READ_BYTES // (first.rows * image_bytes))
    found: list[Chunk] = []
    for chunk in chunks:
        room -= chunk.size
        if found and (room < 0 or chunk.trainees[0].rows != first.rows):
            break
        found.append(chunk)
    return found


def convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def prepare(model: nn.Module, trainee: Trainee) -> list[str]:
    """Set the modes for this phase of training; the names of the tensors that are trained.

    What is frozen as a whole is in evaluation mode, so that its norms keep their buffers: modules
    whose parameters are all frozen, and all but the head while the head alone is trained.
    FleetError for patterns that freeze nothing, and where nothing is left to train.
    """
    named = dict(model.named_parameters())
    patterns = trainee.recipe.frozen
    idle = [pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in named)]
    if idle:
        near = get_close_matches(idle[0].strip("*"), named, n=1, cutoff=0.3)
        hint = f"such as '{near[0]}'" if near else f"such as '{next(iter(named))}'"
        raise FleetError(
            f"{trainee.name}: frozen: '{idle[0]}' matches no parameter; use names or patterns of "
            f"the model's parameters, {hint}"
        )
    head = None
    if trainee.phase == "head":
        head = {id(parameter) for parameter in classifier_head(model, trainee.name).parameters()}
    trained = [
        name
        for name, parameter in named.items()
        if parameter.requires_grad
        and not any(fnmatchcase(name, pattern) for pattern in patterns)
        and (head is None or id(parameter) in head)
    ]
    if not trained:
        raise FleetError(f"{trainee.name}: every parameter is frozen; leave some to be trained")
    learning = {id(named[name]) for name in trained}
    model.train(head is None)
    if head is not None:
        classifier_head(model, trainee.name).train()
    for module in model.modules():
        parameters = {id(parameter) for parameter in module.parameters()}
        if parameters and parameters.isdisjoint(learning):
            module.eval()
    return trained


def classifier_head(model: nn.Module, name: str = "model") -> nn.Module:
    """What timm's get_classifier() names, else the last linear layer.

    FleetError, which calls the model `name`, where there is none.
    """
    named = getattr(model, "get_classifier", None)
    head = named() if callable(named) else None
    if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
        return head
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise FleetError(
            f"{name}: {type(model).__name__} has neither get_classifier() nor a linear layer, so "
            "its head cannot be trained first; set head_epochs: 0"
        )
    return linear[-1]


def surely_bad(loss: Tensor | float) -> bool:
    """Whether a number, not one that is still being computed elsewhere, is not finite."""
    return isinstance(loss, float) and not math.isfinite(loss)


def _sum(one: Outcome, other: Outcome) -> Outcome:
    """Two parts of a batch; buffers are those after the last."""
    for name, gradient in other.gradients.items():
        one.gradients[name].add_(gradient)
    return Outcome(one.losses + other.losses, one.gradients, other.buffers)


def _over(total: Outcome, parts: int) -> Outcome:
    for gradient in total.gradients.values():
        gradient.div_(parts)
    return Outcome(total.losses / parts, total.gradients, total.buffers)
