"""Pooled soups: few numbers for each ingredient, cross-fitted; greedy where they do not help."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from fleet.augment import flip_and_shift
from inputs.files import write_whole
from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.evaluate import even_batch, predict
from soups.learners.conclusion import conclude, warn_of_identical
from soups.learners.descent import finite, soup_loss
from soups.learners.hyperplane import into_box
from soups.learners.registry import Level, Pooled, Start
from soups.learners.shape import Shape
from soups.learners.trials import Folds, Trial, try_starts
from soups.norms import Groups
from soups.session import Session

FILE = "paths.npz"

log = logging.getLogger(__name__)


def pooled(session: Session, settings: Pooled) -> Coefficients:
    """`A[k, g] = w0_k + P(α_k + Σ_r s_{k,r} cos(π r d_g) + δ_{k,g})`, by descent on the loss.

    w0 is the one of `starts` that has the lower loss out of fold (greedy is found again inside
    each fold), d_g the depth of group g from 0 to 1, and P takes the mean over ingredients off, so
    that columns keep their sum: coefficients that are smooth in depth as LiNeS's (2410.17146),
    anisotropic as aTLAS's (2407.02880), and few. What is minimised is the cross-entropy of
    β·f(W(A)) plus `λ/2n · [Σ ρ_k α_k² + 10 Σ ρ_k s_{k,r}² + 100 Σ ρ_{k,g} δ_{k,g}²]`, with ρ the
    ingredient's squared distance from the mean of all, relative to the mean of those distances, so
    that what is penalised is how far weights move.

    For each level (which numbers there are) a descent goes down the `penalties` λ, each from where
    the last one ended, in each of `folds` without one fold of *select*; the soup at each λ is the
    mean of the second half of its steps, projected into the box. Level and λ are those with the
    lowest loss out of fold; the answer is the mean of the folds' coefficients (the start's where no
    descent does better, greedy's where they do not pass the gate: see `conclude`). One backward
    through one model gives the gradient in all coefficients, and no more is in memory than a block
    of ingredients, the mean and the model.
    """
    groups = session.groups(settings)
    warn_of_identical(session)
    folds = Folds(session, settings.folds)
    starts, trials = try_starts(session, groups, folds)
    losses = {trial.name: trial.mean_loss() for trial in trials}
    start = min(settings.starts, key=losses.__getitem__)
    with _Descents(session, settings, groups, folds) as descents:
        paths = len(settings.levels) * len(folds) + settings.refit
        steps = paths * len(settings.penalties) * len(descents.blocks)
        with tqdm(
            total=steps * settings.steps,
            desc=session.row,
            unit="step",
            disable=not session.progress,
        ) as bar:
            for level in settings.levels:
                trials += descents.path(start, level, starts[start][:-1], bar)
            if settings.refit:
                best = min(trials, key=Trial.mean_loss).name
                starts |= descents.refit(best, start, starts[start][-1], bar)
    return conclude(session, settings, groups, trials, starts, weights={})


def trial_name(start: Start, level: Level, penalty: float) -> str:
    """What the trial of a descent is called."""
    return f"{start} + {level}, λ = {penalty:g}"


@dataclass
class _State:
    """Where a descent stands: its numbers [ingredients, numbers] and log β."""

    numbers: Float[Tensor, "ingredients numbers"]
    log_temperature: float = 0.0


class _Descents:
    """The descents of all folds, over the ingredients as rows `w_k − mean`, a block at a time.

    Since the rows sum to zero, `W = mean + Σ_k (w0_k + u_k[g]) · row_k` whatever is taken off each
    column of u: a block's numbers move the weights along its own rows alone.
    """

    def __init__(self, session: Session, settings: Pooled, groups: Groups, folds: Folds) -> None:
        self.session, self.settings, self.groups, self.folds = session, settings, groups, folds
        count = len(session.zoo.checkpoints)
        size = session.block_sizes.get(session.row) or settings.block_size or count
        self.blocks = [range(count)[start : start + size] for start in range(0, count, size)]
        self.mixture = session.mixture(groups, min(size, count))
        self.mixture.start_at_mean(session.zoo.checkpoints)
        # Where all are loaded at once, the centre stays at the mean.
        self._mean = self.mixture.centre.clone() if len(self.blocks) > 1 else None
        self._loaded: int | None = None
        self._squares = torch.cat([self._squared_lengths(b) for b in range(len(self.blocks))])
        if not bool(self._squares.any()):
            log.warning("%s: all ingredients are the same", session.row)
        path = session.folder / FILE if session.folder is not None else None
        self._kept = _Kept(path)

    def __enter__(self) -> _Descents:
        return self

    def __exit__(self, *_: object) -> None:
        self.mixture.close()

    def path(
        self,
        start: Start,
        level: Level,
        soups: Float64[np.ndarray, "folds ingredients groups"],
        bar: tqdm,
    ) -> list[Trial]:
        """A trial for each penalty, from the largest to the smallest."""
        shape = Shape.of(level, self.groups)
        parts = [
            self._path_of_fold(f"{start}/{level}", fold, shape, own, bar)
            for fold, own in enumerate(soups)
        ]
        order = torch.cat(self.folds.held_out).argsort()
        found = []
        for number, penalty in enumerate(self.settings.penalties):
            learned = np.stack([coefficients[number] for coefficients, _ in parts])
            logits = torch.cat([torch.from_numpy(own[number]) for _, own in parts])[order]
            name = trial_name(start, level, penalty)
            labels = self.session.select.labels
            found.append(Trial(name, shape.numbers, learned, logits, labels))
        return found

    def refit(
        self,
        best: str,
        start: Start,
        soup: Float64[np.ndarray, "ingredients groups"],
        bar: tqdm,
    ) -> dict[str, Float64[np.ndarray, "one ingredients groups"]]:
        """The soup of the best trial, if it was learned, learned once more on all of *select*."""
        for level in self.settings.levels:
            for number, penalty in enumerate(self.settings.penalties):
                if best == trial_name(start, level, penalty):
                    shape, key = Shape.of(level, self.groups), f"{start}/{level}/all"
                    soups = self._kept.get(f"{key}/soups")
                    begun = perf_counter()
                    with self.session.on(torch.arange(len(self.session.select)), key) as inner:
                        if soups is None:
                            soups = self._descend_path(inner, shape, soup, bar)
                            self._kept.put(f"{key}/seconds", np.array(perf_counter() - begun))
                            self._kept.put(f"{key}/soups", soups)
                        else:
                            self._count_done(inner, key, bar)
                    return {best: soups[number][None]}
        return {}

    def _path_of_fold(
        self, name: str, fold: int, shape: Shape, start: np.ndarray, bar: tqdm
    ) -> tuple[np.ndarray, np.ndarray]:
        """The soups [penalties, ingredients, groups] and their logits on what is held out."""
        key = f"{name}/{fold}"
        with self.session.on(self.folds.learned_on[fold], key) as inner:
            soups, logits = self._kept.get(f"{key}/soups"), self._kept.get(f"{key}/logits")
            if soups is not None and logits is not None:
                self._count_done(inner, key, bar)
                held_out = len(self.folds.held_out[fold])
                self.session.examples_forward += len(self.settings.penalties) * held_out
                return soups, logits
            begun = perf_counter()
            soups = self._descend_path(inner, shape, start, bar)
        logits = torch.stack([self._held_out(fold, soup) for soup in soups]).numpy()
        self._kept.put(f"{key}/seconds", np.array(perf_counter() - begun))
        self._kept.put(f"{key}/soups", soups)
        return soups, self._kept.put(f"{key}/logits", logits)

    def _descend_path(
        self, inner: Session, shape: Shape, start: np.ndarray, bar: tqdm
    ) -> Float64[np.ndarray, "penalties ingredients groups"]:
        """The soup at each penalty, from the largest to the smallest."""
        state = _State(torch.zeros(len(start), shape.numbers))
        found = []
        for penalty in self.settings.penalties:
            for block in range(len(self.blocks)):
                state = self._descend(inner, shape, start, state, penalty, block, bar)
            soup = shape.soup(start, state.numbers)
            found.append(into_box(soup[None], self.settings.bounds)[0])
        return np.stack(found)

    def _count_done(self, inner: Session, key: str, bar: tqdm) -> None:
        """Count a path that is not run, since it is known from a run that was killed."""
        inner.shared_seconds += float(self._kept.get(f"{key}/seconds") or 0.0)
        settings, rows = self.settings, len(inner.select)
        batch = even_batch(rows, settings.batch_size)
        descents = len(self.blocks) * len(settings.penalties)
        epochs, rest = divmod(settings.steps, -(-rows // batch))
        inner.examples_forward += descents * (epochs * rows + rest * batch)
        inner.examples_backward += descents * (epochs * rows + rest * batch)
        inner.steps += descents * settings.steps
        bar.update(descents * settings.steps)

    def _descend(
        self,
        inner: Session,
        shape: Shape,
        start: np.ndarray,
        state: _State,
        penalty: float,
        block: int,
        bar: tqdm,
    ) -> _State:
        """`steps` steps in the numbers of one block, the others as they are."""
        settings, mixture, members = self.settings, self.mixture, self.blocks[block]
        own = slice(members.start, members.stop)
        self._enter(block, torch.from_numpy(start) + shape.spread(state.numbers.double()))
        numbers = state.numbers[own].to(mixture.weights.device, torch.float32, copy=True)
        numbers.requires_grad_()
        log_temperature = torch.tensor(state.log_temperature, device=numbers.device)
        log_temperature.requires_grad_(settings.temperature)
        parameters = [numbers, *([log_temperature] if settings.temperature else [])]
        optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.95))
        pull = penalty / len(inner.select) * shape.pull(self._squares)[own].to(numbers.device)
        first = torch.from_numpy(start[own]).to(numbers)
        late, late_temperature = torch.zeros_like(numbers.detach()), 0.0
        half = settings.steps // 2
        for step, (images, labels) in enumerate(self._batches(inner, penalty, block)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _rate(step, settings.steps)
            mixture.apply(first + shape.spread(numbers.detach()))
            # Each step: some models cache what they computed from their weights until told.
            self.session.model.train(self.session.train_mode)
            if self.session.norms.rule == "convex":
                whole = state.numbers.double().clone()
                whole[own] = numbers.detach().double().cpu()
                self._follow_norms(shape.soup(start, whole), first_step=step == 0)
            else:
                # A start has ingredients without weight; what is learned from it has not.
                self._follow_norms(np.full_like(start, 1 / len(start)), first_step=step == 0)
            logits = self.session.model(images) * log_temperature.exp()
            loss = soup_loss(logits, labels, settings.label_smoothing)
            value = finite(loss.item(), self.session.row)
            optimizer.zero_grad()
            gradient = shape.gather(mixture.gradient(loss))
            numbers.grad = gradient + pull * numbers.detach()
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([numbers], settings.clip_norm)
            optimizer.step()
            if step >= half:
                late += numbers.detach() / (settings.steps - half)
                late_temperature += log_temperature.item() / (settings.steps - half)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()
        self.session.model.eval()
        moved = state.numbers.clone()
        moved[own] = late.cpu()
        return _State(moved, late_temperature)

    def _batches(
        self, inner: Session, penalty: float, block: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches of what the fold learns on, epoch after epoch."""
        settings, done, epoch = self.settings, 0, 0
        size = even_batch(len(inner.select), settings.batch_size)
        while done < settings.steps:
            stream = generator(inner.seed, f"{inner.row}/{penalty}/{block}/{epoch}")
            for images, labels in inner.epoch(size, stream):
                if settings.flip or settings.shift:
                    images = flip_and_shift(
                        images.cpu(), flip=settings.flip, shift=settings.shift, generator=stream
                    ).to(images.device)
                yield images, labels
                done += 1
                if done == settings.steps:
                    return
            epoch += 1

    def _enter(self, block: int, coefficients: Float64[Tensor, "ingredients groups"]) -> None:
        """Put the centre where the other blocks' coefficients lead, and load the block's rows."""
        if self._mean is None:
            return
        self._give(coefficients)
        self.mixture.fold()
        self._load(block)
        members = self.blocks[block]
        own = coefficients[members.start : members.stop].to(self.mixture.weights)
        self.mixture.apply(-own)
        self.mixture.fold()

    def _give(self, coefficients: Float64[Tensor, "ingredients groups"]) -> None:
        """Give the model the weights `mean + Σ_k coefficients[k] · row_k`."""
        if self._mean is not None:
            self.mixture.centre.copy_(self._mean)
        for number, members in enumerate(self.blocks):
            self._load(number)
            self.mixture.apply(coefficients[members.start : members.stop].to(self.mixture.weights))
            if self._mean is not None:
                self.mixture.fold()

    def _load(self, block: int) -> None:
        if block != self._loaded:
            members = self.blocks[block]
            checkpoints = self.session.zoo.checkpoints[members.start : members.stop]
            self.mixture.load_block(checkpoints, self._mean)
            self._loaded = block

    def _squared_lengths(self, block: int) -> Float[Tensor, "block groups"]:
        self._load(block)
        return self.mixture.row_norms().square().cpu()

    def _held_out(
        self, fold: int, soup: Float64[np.ndarray, "ingredients groups"]
    ) -> Float[Tensor, "rows classes"]:
        """The soup's logits on the images of the fold."""
        self._give(torch.from_numpy(soup))
        self._follow_norms(soup, first_step=True)
        images = self.session.select.subset(self.folds.held_out[fold])
        self.session.examples_forward += len(images)
        size = self.session.eval_batch_size
        return predict(self.session.model, images, batch_size=size)

    def _follow_norms(self, soup: np.ndarray, *, first_step: bool) -> None:
        self.session.norms.follow(self.groups, soup, first_step=first_step)


def _rate(step: int, steps: int) -> float:
    """A short warm-up, a plateau, and half a cosine down over the second half."""
    half = steps // 2
    falling = (
        0.5 * (1 + math.cos(math.pi * (step - half) / (steps - half))) if step >= half else 1.0
    )
    return min(1.0, (step + 1) / 5) * falling


class _Kept:
    """Results of finished folds, by name, in a file that a killed run goes on from."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._arrays: dict[str, Any] = {}
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as saved:
                self._arrays = {name: saved[name] for name in saved.files}

    def get(self, name: str) -> np.ndarray | None:
        return self._arrays.get(name)

    def put(self, name: str, array: np.ndarray) -> np.ndarray:
        self._arrays[name] = array
        if self._path is not None:
            file = io.BytesIO()
            np.savez(file, **self._arrays)
            write_whole(self._path, file.getvalue())
        return array
