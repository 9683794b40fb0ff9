"""MEHL-Soup and MEHL-Soup+ (2407.03641): block-coordinate descent on a hyperplane."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.deltas import Mixture, fold_coefficients
from soups.learners.descent import finite, soup_loss, warmup_cosine
from soups.learners.progress import Findings, Progress, load_progress, save_progress
from soups.learners.registry import MehlSettings
from soups.norms import Groups
from soups.session import Session

LARGE_COEFFICIENT = 1.5

log = logging.getLogger(__name__)


def mehl(session: Session, settings: MehlSettings) -> Coefficients:
    """`c ← c + Σ_b a[b, g] (w_b − c)` for blocks of B ingredients, shuffled in each outer epoch.

    Each block starts at a = 0 with a fresh AdamW and sees *select* `inner_epochs` times. At no
    time is more in memory than B deltas, the centre and one model. Where the deltas are held in
    fewer bits (`precision`), the loss and its gradient are those of what is held, and the centre
    moves by the ingredients themselves, which are read once more. After every block the centre
    and the coefficients over the originals are saved; a killed run goes on from there, bit for bit.
    """
    begun = perf_counter()
    groups = session.groups(settings)
    checkpoints = session.zoo.checkpoints
    blocks = _blocks(session, settings)
    bar = tqdm(
        total=len(blocks) * settings.inner_epochs,
        desc=session.row,
        unit="epoch",
        disable=not session.progress,
    )
    capacity = max(len(block) for block in blocks)
    with bar, session.mixture(groups, capacity, settings.precision) as mixture:
        saved = load_progress(session.folder, mixture)
        if saved is None:
            first = range(len(checkpoints)) if settings.init == "mean_all" else blocks[0]
            mixture.start_at_mean([checkpoints[k] for k in first])
            matrix = np.zeros((len(checkpoints), len(groups)))
            matrix[list(first)] = 1 / len(first)
            done = 0
            nothing = dict.fromkeys(groups, 0.0)
            findings = Findings(nothing, nothing, nothing)
        else:
            matrix, done, findings = saved.matrix, saved.blocks_done, saved.findings
            _count_done(session, settings, saved)
            bar.update(done * settings.inner_epochs)
        for number, block in enumerate(blocks[done:], start=done):
            mixture.load_block([checkpoints[k] for k in block])
            for k in [k for following in blocks[number + 1 : number + 2] for k in following]:
                checkpoints[k].prefetch()
            learn = _Block(session, settings, mixture, groups, matrix, block, number)
            coefficients = learn.descend(bar)
            matrix = fold_coefficients(matrix, block, coefficients)
            mixture.apply(coefficients)
            compressed = None
            if mixture.rounded:
                if number + 1 == len(blocks):
                    compressed = _accuracy(session, groups, matrix)
                mixture.apply_originals([checkpoints[k] for k in block], coefficients)
            findings = Findings(
                _larger(findings.coefficient, coefficients.abs().amax(dim=0)),
                _larger(findings.displacement, mixture.displacement()),
                _larger(findings.row_error, mixture.row_errors()),
                compressed,
            )
            mixture.fold()
            seconds = session.shared_seconds + perf_counter() - begun
            progress = Progress(matrix, number + 1, findings, seconds)
            save_progress(session.folder, mixture, progress)
        row_bytes = mixture.row_bytes
    session.record |= {
        "block_size": capacity,
        "blocks": len(blocks),
        "precision": settings.precision,
        "row_bytes": row_bytes,
        "largest_coefficient": findings.coefficient,
        "largest_displacement": findings.displacement,
    }
    soup = session.coefficients(groups, matrix, settings)
    if findings.compressed is not None:
        _report_precision(session, findings.compressed, findings.row_error, soup)
    largest = findings.coefficient
    if max(largest.values()) > LARGE_COEFFICIENT:
        log.warning(
            "%s: a coefficient of %s reached %.2f (1 is the ingredient itself): the soup "
            "extrapolates; lower learners.%s.lr or inner_epochs",
            session.row,
            max(largest, key=largest.__getitem__),
            max(largest.values()),
            session.row,
        )
    return soup


def _report_precision(
    session: Session, compressed: float, row_error: dict[str, float], soup: Coefficients
) -> None:
    """Record what holding the rows in fewer bits has changed, and say so.

    The originals are those that are cooked, rounded as they are stored.
    """
    session.load(soup)
    originals = session.accuracy()
    log.info(
        "%s: %.2f%% on *select* with the rows as they were held, %.2f%% with the originals",
        session.row,
        100 * compressed,
        100 * originals,
    )
    session.record |= {
        "largest_row_error": row_error,
        "compressed_select_accuracy": compressed,
        "originals_select_accuracy": originals,
        "originals_minus_compressed": originals - compressed,
    }


def _accuracy(session: Session, groups: Groups, matrix: np.ndarray) -> float:
    """The accuracy of the weights in the model, their norm buffers by the run's rule."""
    session.norms.follow(groups, matrix, first_step=True)
    return session.accuracy()


class _Block:
    """Descent in the coefficients of one block."""

    def __init__(
        self,
        session: Session,
        settings: MehlSettings,
        mixture: Mixture,
        groups: Groups,
        matrix: np.ndarray,
        block: Sequence[int],
        number: int,
    ):
        self.session, self.settings, self.mixture = session, settings, mixture
        self.groups, self.matrix, self.block, self.number = groups, matrix, block, number
        norms = mixture.row_norms()
        # A row without length (a frozen group) is left out: its scale and so its gradient are zero.
        unit = norms.clamp_min(torch.finfo(norms.dtype).tiny).reciprocal()
        length = unit if settings.rows == "unit" else torch.ones_like(norms)
        self.scale = torch.where(norms > 0, length, 0.0)
        self.steps = settings.inner_epochs * -(-len(session.select) // settings.batch_size)

    def descend(self, bar: tqdm) -> Float[Tensor, "block groups"]:
        """The block's coefficients in units of the rows: 1 reaches the ingredient."""
        alpha = torch.zeros_like(self.scale, requires_grad=True)
        optimizer = torch.optim.AdamW([alpha], lr=self.settings.lr, weight_decay=0.0)
        schedule = warmup_cosine(optimizer, self.steps, self.settings.warmup)
        model = self.session.model
        for epoch in range(self.settings.inner_epochs):
            name = f"{self.session.row}/{self.number}/{epoch}"
            stream = generator(self.session.seed, name)
            for step, (images, labels) in enumerate(
                self.session.epoch(self.settings.batch_size, stream)
            ):
                coefficients = alpha.detach() * self.scale
                self.mixture.apply(coefficients)
                # Each step: some models cache what they computed from their weights until told.
                model.train(self.session.train_mode)
                self._follow_norms(coefficients, first_step=step == 0)
                loss = soup_loss(model(images), labels, self.settings.label_smoothing)
                value = finite(loss.item(), self.session.row, f" in block {self.number + 1}")
                alpha.grad = self.mixture.gradient(loss) * self.scale
                if self.settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([alpha], self.settings.clip_norm)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()
        model.eval()
        return alpha.detach() * self.scale

    def _follow_norms(self, coefficients: Tensor, *, first_step: bool) -> None:
        norms = self.session.norms
        if norms.rule == "convex":
            norms.follow(
                self.groups,
                fold_coefficients(self.matrix, self.block, coefficients),
                first_step=first_step,
            )
        else:
            everyone = np.full_like(self.matrix, 1 / len(self.matrix))
            norms.follow(self.groups, everyone, first_step=first_step)


def _larger(most: dict[str, float], values: Float[Tensor, " groups"]) -> dict[str, float]:
    """Group → the larger of what was and what is."""
    return {g: max(most[g], v) for g, v in zip(most, values.tolist(), strict=True)}


def _blocks(session: Session, settings: MehlSettings) -> list[list[int]]:
    size = session.block_sizes[session.row]
    blocks: list[list[int]] = []
    for outer in range(settings.outer_epochs):
        stream = generator(session.seed, f"{session.row}/order/{outer}")
        order = torch.randperm(len(session.zoo.checkpoints), generator=stream).tolist()
        blocks += [order[start : start + size] for start in range(0, len(order), size)]
    return blocks


def _count_done(session: Session, settings: MehlSettings, saved: Progress) -> None:
    blocks, passes = saved.blocks_done, saved.blocks_done * settings.inner_epochs
    evaluated = saved.findings.compressed is not None
    session.examples_forward += (passes + evaluated) * len(session.select)
    session.examples_backward += passes * len(session.select)
    session.shared_seconds += saved.seconds
    session.steps += blocks * settings.inner_epochs * -(-len(session.select) // settings.batch_size)
