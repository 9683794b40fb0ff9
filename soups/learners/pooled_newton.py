"""Pooled soups by second-order steps: the penalty by evidence, and an interval for each weight."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from merge.coefficients import Coefficients
from soups.learners.conclusion import conclude, warn_of_identical
from soups.learners.droppable import droppable
from soups.learners.plane import Plane
from soups.learners.registry import PooledNewton
from soups.learners.shape import Shape
from soups.learners.trials import Folds, Trial, logits_of, logits_of_folds, try_starts
from soups.norms import Groups
from soups.second_order.evidence import fit_by_evidence, uncertainty
from soups.second_order.softmax_regression import Fit, Problem, fit
from soups.second_order.tangents import ingredient_directions, logit_derivatives
from soups.session import Session
from soups.statistics import fit_temperature, negative_log_likelihood

# A step is taken where the loss falls by this part of what was predicted, or more.
TRUSTED = 0.25
SHORTER_STEPS = 8
# What is no step any more, in nats.
NO_STEP = 1e-5
# How much stronger a prior becomes at most for the box, and how often the least is halved for.
STRONGEST, HALVINGS = 4.0**10, 8
NAME = "newton"

log = logging.getLogger(__name__)


def pooled_newton(session: Session, settings: PooledNewton) -> Coefficients:
    """The numbers of `pooled`, by damped Gauss–Newton steps from the uniform soup.

    The logits are taken as linear in the numbers; their derivatives are exact and from one pass
    over *select*. In them the cross-entropy of β·f(W(A)) with its Gaussian prior is minimised in
    float64, the strength of each level by evidence (Laplace; MacKay 1992), so there is no grid, and
    the folds need no pass of their own. A step is shortened until the true loss on *select* falls
    by a quarter of what was predicted; `linearisations` such steps are made, the folds only the
    first of them, whose point depends on no label. Where the box binds, the prior is made stronger
    until it does not. Norm buffers move along by the rule `convex`; by `recalibrate` the
    derivatives leave them out.

    The answer is the fit on all of *select*, with a 95% interval for each ingredient's weight from
    the posterior covariance, and the ingredients that it can do without; it is greedy's where the
    fit does not pass the gate (see `conclude`).
    """
    groups = session.groups(settings)
    warn_of_identical(session)
    folds = Folds(session, settings.folds)
    starts, trials = try_starts(session, groups, folds)
    plane = Plane(Shape.of(settings.level, groups), starts["uniform"][-1], settings.bounds)
    fitted, problem, fits = _steps(session, settings, groups, plane, folds)
    of_folds = np.stack([plane.soup(own.theta) for own in fits])
    logits = logits_of_folds(session, groups, folds, of_folds)
    trials.append(Trial(NAME, plane.shape.numbers, of_folds, logits, session.select.labels))
    covariance = uncertainty(problem, fitted).posterior
    # The box makes the prior stronger, which makes no weight surer.
    free = replace(fitted, strengths=fit_by_evidence(problem, start=fitted).strengths)
    session.record |= {
        "strengths": fitted.strengths.tolist(),
        "rank": fitted.rank,
        "numbers": problem.numbers,
        "predicted_loss": fitted.loss,
        # Of this fit, also where another soup is taken.
        "droppable": {"of": NAME} | droppable(session, groups, plane, fitted.theta, covariance),
    }
    of_weights = uncertainty(problem, free).posterior
    weights = plane.weights(session.zoo.names, fitted.theta, of_weights)
    finished = starts | {NAME: plane.soup(fitted.theta)[None]}
    return conclude(session, settings, groups, trials, finished, weights={NAME: weights})


def _steps(
    session: Session, settings: PooledNewton, groups: Groups, plane: Plane, folds: Folds
) -> tuple[Fit, Problem, list[Fit]]:
    """The fit after all steps, the problem that it solves, and the fits of the folds."""
    fitted: Fit | None = None
    problem: Problem | None = None
    of_folds: list[Fit] = []
    for _ in tqdm(
        range(settings.linearisations), desc=session.row, unit="step", disable=not session.progress
    ):
        theta = np.zeros(plane.numbers) if fitted is None else fitted.theta
        problem = None  # its derivatives make room for the next ones
        problem = linearised(session, settings, groups, plane, theta)
        found = in_the_box(plane, problem, fit_by_evidence(problem, start=fitted))
        fitted, problem = _trusted(session, groups, plane, problem, found)
        # Later steps begin where all of *select* has led.
        of_folds = of_folds or _fits_of_folds(plane, problem, folds, fitted)
    if fitted is None or problem is None:
        raise AssertionError("there is at least one linearisation")
    return fitted, problem, of_folds


def linearised(
    session: Session,
    settings: PooledNewton,
    groups: Groups,
    plane: Plane,
    theta: Float64[np.ndarray, " numbers"],
) -> Problem:
    """The logits on *select* at θ and their derivatives, with the penalties of the levels.

    The derivatives are those in so many ingredients at a time as fit; one forward for each
    ingredient and one for all, and a backward through the activations for each class.
    """
    session.load(session.coefficients(groups, plane.soup(theta), settings))
    session.model.eval()
    features = plane.shape.features
    of_buffers, buffers = _moving_buffers(session, groups, plane.start)
    profiles = {
        name: features[:, g].tolist()
        for g, (group, names) in enumerate(groups.items())
        for name in (*names, *of_buffers.get(group, ()))
    }
    count, rows = len(session.zoo.checkpoints), len(session.select)
    size = session.block_sizes.get(session.row) or settings.block_size or count
    derivatives, squares, logits = [], [], torch.empty(0)
    for start in range(0, count, size):
        chosen = range(count)[start : start + size]
        directions = ingredient_directions(session.sources, chosen)
        squares.append(_squared_lengths(directions, groups))
        directions |= {name: buffers[name][list(chosen)] for name in buffers}
        parts = []
        for images, _ in session.select.batches(session.eval_batch_size):
            images = images.to(session.device)
            parts.append(logit_derivatives(session.model, directions, images, profiles=profiles))
        logits = torch.cat([own for own, _ in parts]).cpu()
        derivatives.append(torch.cat([own for _, own in parts]).cpu())
        del parts
        classes = logits.shape[1]
        session.examples_forward += rows * (1 + len(next(iter(directions.values()))))
        session.examples_backward += rows * classes
    return Problem(
        logits=logits.double().numpy(),
        derivatives=torch.cat(derivatives, dim=2).flatten(2).double().numpy(),
        labels=session.select.labels.numpy(),
        penalties=plane.penalties(torch.cat(squares)),
        at=theta,
    )


def _moving_buffers(
    session: Session, groups: Groups, start: Float64[np.ndarray, "ingredients groups"]
) -> tuple[Groups, dict[str, Tensor]]:
    """Norm buffers that move with the coefficients of their group, and each ingredient's less the
    mean of all; by other rules than `convex` none does, or not in a way that has derivatives."""
    if session.norms.rule != "convex" or not session.norms.names:
        return {}, {}
    named, _ = session.norms.columns(groups, start)
    of_group = {
        group: names for group in groups if (names := named.get(f"norm buffers of {group}"))
    }
    every = [name for names in of_group.values() for name in names]
    alone = np.eye(len(start), len(session.sources.checkpoints))
    values = session.norms.mix(every, alone)
    return of_group, {name: own - own.mean(dim=0) for name, own in values.items()}


def _squared_lengths(
    directions: dict[str, Tensor], groups: Groups
) -> Float[Tensor, "ingredients groups"]:
    """‖w_k − mean‖² of each ingredient in each group."""
    squares = {name: rows.flatten(1).double().square().sum(1) for name, rows in directions.items()}
    of_groups = [sum(squares[name] for name in names) for names in groups.values()]
    return torch.stack([torch.as_tensor(s) for s in of_groups], dim=1).cpu()


def _trusted(
    session: Session, groups: Groups, plane: Plane, problem: Problem, fitted: Fit
) -> tuple[Fit, Problem]:
    """The fit, held closer to where it began until the true loss falls as it should."""
    labels = problem.labels
    before = _tempered_loss(problem.logits, labels)
    for shorter in range(SHORTER_STEPS):
        logits = logits_of(session, groups, plane.soup(fitted.theta), session.select)
        actual = before - _tempered_loss(logits.numpy(), labels)
        predicted = before - fitted.loss
        if actual >= TRUSTED * predicted or predicted <= NO_STEP:
            return fitted, problem
        numbers = problem.numbers
        closer = 4.0**shorter * fitted.curvature[:numbers, :numbers]
        problem = replace(problem, trust=closer)
        fitted = in_the_box(plane, problem, fit(problem, fitted.strengths, start=fitted))
    log.warning(
        "%s: the logits are not linear in the coefficients anywhere near: no step is taken",
        session.row,
    )
    still = replace(problem, trust=1e9 * np.eye(problem.numbers))
    return fit(still, fitted.strengths), still


def in_the_box(
    plane: Plane,
    problem: Problem,
    fitted: Fit,
    weights: Float64[np.ndarray, " rows"] | None = None,
) -> Fit:
    """The fit, its prior made just so much stronger that all coefficients are in the box."""
    if plane.inside(fitted.theta):
        return fitted
    too_weak, factor = 1.0, 1.0
    stronger = fitted
    while not plane.inside(stronger.theta):
        if factor >= STRONGEST:
            return replace(fitted, theta=problem.origin)  # no step
        too_weak, factor = factor, 4 * factor
        stronger = fit(problem, factor * fitted.strengths, weights=weights, start=fitted)
    for _ in range(HALVINGS):
        between = float(np.sqrt(too_weak * factor))
        tried = fit(problem, between * fitted.strengths, weights=weights, start=stronger)
        if plane.inside(tried.theta):
            factor, stronger = between, tried
        else:
            too_weak = between
    return stronger


def _tempered_loss(
    logits: Float64[np.ndarray, "rows classes"] | Float[np.ndarray, "rows classes"],
    labels: np.ndarray,
) -> float:
    """The mean cross-entropy of β · logits at the best β, in nats."""
    return negative_log_likelihood(fit_temperature(logits, labels) * logits, labels)


def _fits_of_folds(plane: Plane, problem: Problem, folds: Folds, fitted: Fit) -> list[Fit]:
    """The fits without each fold in turn, each with the strengths of its own evidence."""
    found = []
    for held_out in folds.held_out:
        weights = np.ones(len(problem.labels))
        weights[held_out.numpy()] = 0
        own = fit_by_evidence(problem, weights=weights, start=fitted)
        found.append(in_the_box(plane, problem, own, weights))
    return found
