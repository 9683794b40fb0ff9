"""How strong a prior should be, and how sure a fit is: Laplace and the sandwich."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize
from scipy.stats import norm

from soups.second_order.softmax_regression import (
    Fit,
    Matrix,
    Problem,
    fit,
    inverse_of,
    penalised_space,
    pieces_of,
    weights_of,
    widened,
)

STRENGTHS = (1e-3, 1e7)
ROUNDS = 30


def fit_by_evidence(
    problem: Problem,
    *,
    weights: Float64[np.ndarray, " rows"] | None = None,
    start: Fit | None = None,
    temperature: bool = True,
    within: tuple[float, float] = STRENGTHS,
) -> Fit:
    """`fit` at the strengths of the largest evidence (Laplace's approximation; MacKay 1992).

    In turn: the fit; the strengths in `within` that maximise, exactly, the evidence of the
    quadratic model of the likelihood there, from several starts. It ends where log λ moves by less
    than 0.01; a level that explains nothing ends at the upper bound.
    """
    low, high = np.log(within)
    levels = len(problem.penalties)
    now = np.full(levels, (low + high) / 2) if start is None else np.log(start.strengths)
    found = start
    best: Fit | None = None
    for _ in range(ROUNDS):
        found = fit(problem, np.exp(now), weights=weights, start=found, temperature=temperature)
        if best is None or found.log_evidence > best.log_evidence:
            best = found
        following = _best_strengths(problem, found, now, (low, high))
        moved = abs(following - now).max(initial=0.0)
        now = following
        if moved < 0.01:
            break
    if best is None:
        raise AssertionError("there is at least one round")
    return best


def _best_strengths(
    problem: Problem,
    at: Fit,
    now: Float64[np.ndarray, " levels"],
    bounds: tuple[float, float],
) -> Float64[np.ndarray, " levels"]:
    """The log strengths of the largest evidence where the likelihood is quadratic, as at this fit:

    log Z(λ) = ½ log|Λ| − ½ log|C + Λ| + ½ bᵀ(C + Λ)⁻¹b,  b = C·θ̂ − slope
    """
    levels, size = len(now), len(at.curvature)
    center = np.zeros(size)
    center[: problem.numbers] = at.theta  # of log β only differences count
    pull = at.curvature @ center - at.slope
    space = penalised_space(problem)
    forms = [widened(form, size) for form in problem.penalties]
    inner = [space.T @ form @ space for form in problem.penalties]

    def minus_evidence(logs: np.ndarray) -> tuple[float, np.ndarray]:
        strengths = np.exp(logs)
        prior = np.tensordot(strengths, inner, 1)
        inverse, log_det = inverse_of(at.curvature + np.tensordot(strengths, forms, 1))
        theta = inverse @ pull
        of_prior, prior_log_det = inverse_of(prior)
        value = 0.5 * (prior_log_det - log_det + pull @ theta)
        slopes = [
            0.5 * s * ((of_prior * q).sum() - (inverse * form).sum() - theta @ form @ theta)
            for s, q, form in zip(strengths, inner, forms, strict=True)
        ]
        return -float(value), -np.array(slopes)

    if not levels:
        return now
    starts = [now, *(np.full(levels, b) for b in np.linspace(*bounds, 5))]
    tried = [
        minimize(minus_evidence, s, jac=True, method="L-BFGS-B", bounds=[bounds] * levels)
        for s in starts
    ]
    return min(tried, key=lambda result: result.fun).x


@dataclass(frozen=True)
class Uncertainty:
    """Two covariances of θ, β accounted for.

    `posterior` = H⁻¹, of Laplace's approximation, H = curvature + Λ: it is right where model and
    prior are. `sandwich` = H⁻¹ S H⁻¹ with S = Σ_i w_i² s_i s_iᵀ of the rows' scores: how the fit
    would change with other rows, right or wrong the model (its shrinkage is not in it); times
    n/(n − p), p = tr(H⁻¹·curvature) the effective numbers (HC1, MacKinnon & White 1985).
    """

    posterior: Matrix
    sandwich: Matrix


def uncertainty(
    problem: Problem, fitted: Fit, *, weights: Float64[np.ndarray, " rows"] | None = None
) -> Uncertainty:
    """The covariances of θ at a fit that was made with these weights."""
    counts = weights_of(problem, weights)
    size, numbers = len(fitted.curvature), problem.numbers
    inverse, _ = inverse_of(fitted.curvature + widened(problem.prior(fitted.strengths), size))
    pieces = pieces_of(problem, fitted.theta, fitted.beta, counts)
    scores = [piece.contracted(piece.residuals, fitted.beta)[:, :size] for piece in pieces]
    free = np.count_nonzero(counts) - (inverse * fitted.curvature).sum()
    scale = np.count_nonzero(counts) / max(free, 1.0)
    spread = scale * sandwich(inverse, np.concatenate(scores))
    return Uncertainty(inverse[:numbers, :numbers], spread[:numbers, :numbers])


def sandwich(
    inverse_hessian: Float64[np.ndarray, "*batch numbers numbers"],
    scores: Float64[np.ndarray, "*batch rows numbers"],
) -> Float64[np.ndarray, "*batch numbers numbers"]:
    """H⁻¹ (Σ_i s_i s_iᵀ) H⁻¹ (Huber 1967; White 1982)"""
    return inverse_hessian @ (scores.swapaxes(-1, -2) @ scores) @ inverse_hessian


def intervals(
    estimates: Float64[np.ndarray, "*batch numbers"],
    covariance: Float64[np.ndarray, "*batch numbers numbers"],
    *,
    linear: Float64[np.ndarray, "wanted numbers"] | None = None,
    level: float = 0.95,
) -> tuple[
    Float64[np.ndarray, "*batch wanted"],
    Float64[np.ndarray, "*batch wanted"],
    Float64[np.ndarray, "*batch wanted"],
    Float64[np.ndarray, "*batch wanted"],
]:
    """Values, standard errors, and low and high ends, of `linear`·θ, or of θ; Gaussian."""
    rows = np.eye(estimates.shape[-1]) if linear is None else linear
    values = estimates @ rows.T
    variances = np.einsum("wi,...ij,wj->...w", rows, covariance, rows)
    errors = np.sqrt(np.maximum(variances, 0.0))
    reach = norm.ppf(0.5 + level / 2) * errors
    return values, errors, values - reach, values + reach
