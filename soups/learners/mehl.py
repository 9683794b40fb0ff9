"""MEHL-Soup and MEHL-Soup+ (2407.03641): block-coordinate descent on a hyperplane."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.deltas import Mixture, fold_coefficients
from soups.learners.descent import soup_loss, warmup_cosine
from soups.learners.progress import load_progress, save_progress
from soups.learners.registry import MehlSettings
from soups.norms import Groups
from soups.session import Session

LARGE_COEFFICIENT = 1.5

log = logging.getLogger(__name__)


def mehl(session: Session, settings: MehlSettings) -> Coefficients:
    """`c ← c + Σ_b a[b, g] (w_b − c)` for blocks of B ingredients, shuffled in each outer epoch.

    Each block starts at a = 0 with a fresh AdamW and sees *select* `inner_epochs` times. At no
    time is more in memory than B deltas, the centre and one model. After every block the centre
    and the coefficients over the originals are saved; a killed run goes on from there, bit for bit.
    """
    groups = session.groups(settings)
    checkpoints = session.zoo.checkpoints
    blocks = _blocks(session, settings)
    bar = tqdm(
        total=len(blocks) * settings.inner_epochs,
        desc=session.row,
        unit="epoch",
        disable=not session.progress,
    )
    with bar, session.mixture(groups, max(len(block) for block in blocks)) as mixture:
        saved = load_progress(session.folder, mixture)
        if saved is None:
            first = range(len(checkpoints)) if settings.init == "mean_all" else blocks[0]
            mixture.start_at_mean([checkpoints[k] for k in first])
            matrix = np.zeros((len(checkpoints), len(groups)))
            matrix[list(first)] = 1 / len(first)
            done = 0
            largest = displacement = dict.fromkeys(groups, 0.0)
        else:
            matrix, done = saved.matrix, saved.blocks_done
            largest, displacement = saved.largest, saved.displacement
            _count_done(session, settings, done)
            bar.update(done * settings.inner_epochs)
        for number, block in enumerate(blocks[done:], start=done):
            mixture.load_block([checkpoints[k] for k in block])
            for k in [k for following in blocks[number + 1 : number + 2] for k in following]:
                checkpoints[k].prefetch()
            learn = _Block(session, settings, mixture, groups, matrix, block, number)
            coefficients = learn.descend(bar)
            mixture.apply(coefficients)
            largest = _larger(largest, coefficients.abs().amax(dim=0))
            displacement = _larger(displacement, mixture.displacement())
            mixture.fold()
            matrix = fold_coefficients(matrix, block, coefficients)
            save_progress(session.folder, mixture, matrix, number + 1, largest, displacement)
    session.record |= {
        "block_size": max(len(block) for block in blocks),
        "blocks": len(blocks),
        "largest_coefficient": largest,
        "largest_displacement": displacement,
    }
    if max(largest.values()) > LARGE_COEFFICIENT:
        log.warning(
            "%s: a coefficient of %s reached %.2f (1 is the ingredient itself): the soup "
            "extrapolates; lower learners.%s.lr or inner_epochs",
            session.row,
            max(largest, key=largest.__getitem__),
            max(largest.values()),
            session.row,
        )
    return session.coefficients(groups, matrix, settings)


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
                alpha.grad = self.mixture.gradient(loss) * self.scale
                if self.settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([alpha], self.settings.clip_norm)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
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


def _count_done(session: Session, settings: MehlSettings, blocks: int) -> None:
    examples = blocks * settings.inner_epochs * len(session.select)
    session.examples_forward += examples
    session.examples_backward += examples
    session.steps += blocks * settings.inner_epochs * -(-len(session.select) // settings.batch_size)
