"""Softmax regression in few numbers, with a Gaussian prior.

What many weights do to the logits is taken as linear in a few numbers θ,

    z_i(θ, β) = β · (z0_i + J_i (θ − at)),

and θ and the temperature β are found by second-order steps in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from scipy.special import logsumexp, softmax

from soups.errors import SoupError

Vector = Float64[np.ndarray, " numbers"]
Matrix = Float64[np.ndarray, "numbers numbers"]
# Of (θ, log β), or of θ where β is given.
JointVector = Float64[np.ndarray, " joint"]
JointMatrix = Float64[np.ndarray, "joint joint"]

# Eigenvalues below this part of the largest count as zero.
SINGULAR = 1e-10
ROWS_AT_ONCE = 1024
STEPS = 100
TOLERANCE = 1e-8  # of the decrease that is left, per row
ACCEPTED = 1e-4  # of the predicted decrease


@dataclass(frozen=True)
class Problem:
    """Rows with labels, and how their logits move with θ.

    `penalties` are the quadratic forms Q_l of the prior: with strengths λ, θ is Normal(0, Λ⁻¹),
    Λ = Σ_l λ_l Q_l. Where θ = B φ, hand in J·B and Bᵀ Q B. Directions in no Q are free.
    `logits` are those at θ = `at`, 0 if not given. `trust` adds ½ (θ − at)ᵀ trust (θ − at), for
    steps that stay where J holds; the evidence leaves it out. Raises SoupError for no rows, labels
    out of range, and numbers that are not finite.
    """

    logits: Float64[np.ndarray, "rows classes"]
    derivatives: Float64[np.ndarray, "rows classes numbers"]
    labels: Int[np.ndarray, " rows"]
    penalties: Float64[np.ndarray, "levels numbers numbers"]
    at: Vector | None = None
    trust: Matrix | None = None

    def __post_init__(self) -> None:
        classes = self.logits.shape[1]
        if not len(self.labels):
            raise SoupError("softmax regression: found no rows; wanted at least one")
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise SoupError(
                f"softmax regression: labels from {self.labels.min()} to {self.labels.max()}; "
                f"wanted 0 to {classes - 1}"
            )
        for name, values in (("logits", self.logits), ("derivatives", self.derivatives)):
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise SoupError(
                    f"softmax regression: {name} that are not finite, first in row {row}; the "
                    "model at this point is broken: look at its weights and norm buffers"
                )

    @property
    def numbers(self) -> int:
        return self.derivatives.shape[2]

    @property
    def origin(self) -> Vector:
        """Where the logits were taken."""
        return np.zeros(self.numbers) if self.at is None else self.at

    def prior(self, strengths: Float64[np.ndarray, " levels"]) -> Matrix:
        """Λ = Σ_l λ_l Q_l"""
        return np.tensordot(strengths, self.penalties, 1)

    def at_logits(self, theta: Vector, beta: float) -> Float64[np.ndarray, "rows classes"]:
        """z(θ, β)"""
        return beta * (self.logits + self.derivatives @ (theta - self.origin))


@dataclass(frozen=True)
class Fit:
    """The θ and β of the least Σ_i w_i·CE_i + ½ θᵀ Λ θ (+ trust).

    `loss` is the mean cross-entropy over the weighted rows. `curvature` and `slope` are those of
    Σ_i w_i·CE_i in (θ, log β), or in θ where β is given; `rank` is that of the curvature in θ: less
    than its size where some directions do not change the fit, such as those of identical
    ingredients. `log_evidence` is Laplace's, up to what does not depend on the strengths.
    """

    theta: Vector
    beta: float
    strengths: Float64[np.ndarray, " levels"]
    loss: float
    curvature: JointMatrix
    slope: JointVector
    rank: int
    log_evidence: float
    steps: int
    converged: bool


def fit(
    problem: Problem,
    strengths: Sequence[float] | Float64[np.ndarray, " levels"],
    *,
    weights: Float64[np.ndarray, " rows"] | None = None,
    start: Fit | None = None,
    temperature: bool = True,
) -> Fit:
    """The best θ, and with `temperature` the best β (else the start's, or 1), under this prior.

    Damped Newton steps with the exact Hessian (in θ alone it is the Gauss–Newton matrix, and the
    problem is convex). `weights` count the rows; 0 leaves one out. Directions that change neither
    fit nor penalty stay where they start.
    """
    lambdas = _strengths(problem, strengths)
    counts = weights_of(problem, weights)
    prior = problem.prior(lambdas)
    theta = problem.origin.copy() if start is None else start.theta.copy()
    log_beta = 0.0 if start is None else float(np.log(start.beta))
    value = _objective(problem, theta, log_beta, prior, counts)
    damping, steps = 1e-6, 0
    while True:
        local = _local(problem, theta, log_beta, counts)
        quadratic = _penalised(problem, prior, theta, local)
        step, predicted, left = _step(*quadratic, damping, temperature)
        converged = left <= TOLERANCE * float(counts.sum())
        if converged or predicted <= 0 or steps >= STEPS:
            break
        gain = -np.inf
        while gain < ACCEPTED and steps < STEPS:
            steps += 1
            moved = theta + step[:-1], log_beta + float(step[-1])
            new = _objective(problem, *moved, prior, counts)
            gain = (value - new) / predicted if np.isfinite(new) and predicted > 0 else -np.inf
            if gain >= ACCEPTED:
                (theta, log_beta), value = moved, new
            factor = 0.1 if gain > 0.75 else 10.0 if gain < 0.25 else 1.0
            damping = max(damping * factor, 1e-12)
            step, predicted, _ = _step(*quadratic, damping, temperature)
    size = problem.numbers + temperature
    curvature, slope = local.curvature[:size, :size], local.slope[:size]
    return Fit(
        theta=theta,
        beta=float(np.exp(log_beta)),
        strengths=lambdas,
        loss=local.loss / float(counts.sum()),
        curvature=curvature,
        slope=slope,
        rank=_rank(local.curvature[:-1, :-1]),
        log_evidence=_log_evidence(problem, theta, prior, curvature, local.loss),
        steps=steps,
        converged=converged,
    )


def _log_evidence(
    problem: Problem, theta: Vector, prior: Matrix, curvature: JointMatrix, loss: float
) -> float:
    """−loss − ½ θᵀΛθ + ½ log|Λ| − ½ log|curvature + Λ|, where they are not 0."""
    space = penalised_space(problem)
    _, of_prior = inverse_of(space.T @ prior @ space)
    _, of_both = inverse_of(curvature + widened(prior, len(curvature)))
    return float(-loss - 0.5 * theta @ prior @ theta + 0.5 * (of_prior - of_both))


def _rank(matrix: Matrix) -> int:
    values = np.linalg.eigvalsh(matrix)
    return int((values > SINGULAR * max(values.max(initial=0.0), 1e-300)).sum())


@dataclass(frozen=True)
class _Piece:
    """Some rows at one point; `residuals` and `loss` are weighted."""

    derivatives: Float64[np.ndarray, "rows classes numbers"]
    logits: Float64[np.ndarray, "rows classes"]
    probabilities: Float64[np.ndarray, "rows classes"]
    residuals: Float64[np.ndarray, "rows classes"]
    counts: Float64[np.ndarray, " rows"]
    loss: float

    def moved(
        self, factors: Float64[np.ndarray, "rows classes"], beta: float
    ) -> Float64[np.ndarray, "rows classes joint"]:
        """factors · ∂z / ∂(θ, log β)"""
        found = np.empty((*self.logits.shape, self.derivatives.shape[2] + 1))
        np.multiply(self.derivatives, (beta * factors)[:, :, None], out=found[:, :, :-1])
        np.multiply(self.logits, factors, out=found[:, :, -1])
        return found

    def contracted(
        self, factors: Float64[np.ndarray, "rows classes"], beta: float
    ) -> Float64[np.ndarray, "rows joint"]:
        """Σ_c factors · ∂z / ∂(θ, log β)"""
        of_theta = beta * np.matmul(factors[:, None, :], self.derivatives)[:, 0]
        of_beta = (factors * self.logits).sum(1, keepdims=True)
        return np.concatenate([of_theta, of_beta], axis=1)


def pieces_of(
    problem: Problem, theta: Vector, beta: float, counts: Float64[np.ndarray, " rows"]
) -> Iterator[_Piece]:
    """The rows that count, some at a time."""
    away = theta - problem.origin
    for first in range(0, len(counts), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        used, labels, slopes = counts[part], problem.labels[part], problem.derivatives[part]
        logits: np.ndarray = beta * (problem.logits[part] + slopes @ away)
        of_label = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        probabilities = softmax(logits, axis=1)
        residuals = probabilities.copy()
        residuals[np.arange(len(labels)), labels] -= 1
        residuals *= used[:, None]
        loss = float(used @ (logsumexp(logits, axis=1) - of_label))
        yield _Piece(slopes, logits, probabilities, residuals, used, loss)


@dataclass(frozen=True)
class _Local:
    """Σ_i w_i·CE_i at one point: its value, gradient, and Gauss–Newton matrix in (θ, log β)."""

    loss: float
    slope: JointVector
    curvature: JointMatrix


def _local(
    problem: Problem, theta: Vector, log_beta: float, counts: Float64[np.ndarray, " rows"]
) -> _Local:
    beta, size = float(np.exp(log_beta)), problem.numbers + 1
    slope, curvature, loss = np.zeros(size), np.zeros((size, size)), 0.0
    for piece in pieces_of(problem, theta, beta, counts):
        shares = np.sqrt(piece.probabilities * piece.counts[:, None])
        moved = piece.moved(shares, beta).reshape(-1, size)
        mean = piece.contracted(piece.probabilities, beta) * np.sqrt(piece.counts)[:, None]
        curvature += moved.T @ moved - mean.T @ mean
        slope += piece.contracted(piece.residuals, beta).sum(0)
        loss += piece.loss
    return _Local(loss, slope, curvature)


def _objective(
    problem: Problem,
    theta: Vector,
    log_beta: float,
    prior: Matrix,
    counts: Float64[np.ndarray, " rows"],
) -> float:
    logits = problem.at_logits(theta, np.exp(log_beta))
    of_label = np.take_along_axis(logits, problem.labels[:, None], axis=1)[:, 0]
    value = counts @ (logsumexp(logits, axis=1) - of_label) + 0.5 * theta @ prior @ theta
    if problem.trust is not None:
        away = theta - problem.origin
        value += 0.5 * away @ problem.trust @ away
    return float(value)


def _penalised(
    problem: Problem, prior: Matrix, theta: Vector, local: _Local
) -> tuple[JointVector, JointMatrix]:
    """Gradient and Hessian of the objective in (θ, log β)."""
    gradient, hessian = local.slope.copy(), local.curvature.copy()
    hessian[-1, :] += local.slope  # z is bilinear in θ and β
    hessian[:-1, -1] += local.slope[:-1]
    gradient[:-1] += prior @ theta
    hessian[:-1, :-1] += prior
    if problem.trust is not None:
        gradient[:-1] += problem.trust @ (theta - problem.origin)
        hessian[:-1, :-1] += problem.trust
    return gradient, hessian


def _step(
    gradient: JointVector, hessian: JointMatrix, damping: float, temperature: bool
) -> tuple[JointVector, float, float]:
    """A damped Newton step downhill, the decrease that it predicts, and that of one undamped.

    β changes by no more than a factor of e.
    """
    size = len(gradient) if temperature else len(gradient) - 1
    values, vectors = np.linalg.eigh(hessian[:size, :size])
    curvatures = abs(values)
    known = curvatures > SINGULAR * curvatures.max(initial=1e-300)
    curvatures, vectors = curvatures[known], vectors[:, known]
    along = vectors.T @ gradient[:size]
    steps = -along / (curvatures + damping * curvatures.mean()) if known.any() else along
    step = np.zeros(len(gradient))
    step[:size] = vectors @ steps
    part = min(1.0, 1 / max(abs(step[-1]), 1e-300))
    predicted = -part * (along @ steps) - 0.5 * part**2 * (curvatures @ steps**2)
    left = 0.5 * (along**2 / curvatures).sum()
    return part * step, float(predicted), float(left)


def penalised_space(problem: Problem) -> Float64[np.ndarray, "numbers penalised"]:
    """Directions that have a prior."""
    values, vectors = np.linalg.eigh(problem.penalties.sum(axis=0))
    return vectors[:, values > SINGULAR * max(values.max(initial=0.0), 1e-300)]


def inverse_of(matrix: JointMatrix) -> tuple[JointMatrix, float]:
    """The pseudo-inverse of a positive semi-definite matrix, and log |·| where it is not 0."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > SINGULAR * max(values.max(initial=0.0), 1e-300)
    part = vectors[:, kept]
    return (part / values[kept]) @ part.T, float(np.log(values[kept]).sum())


def widened(matrix: Matrix, size: int) -> JointMatrix:
    """With a row and a column of zeros for log β, where the others have one."""
    return np.pad(matrix, (0, size - len(matrix)))


def _strengths(problem: Problem, strengths: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(strengths, dtype=np.float64)
    if values.shape != (len(problem.penalties),) or not (values >= 0).all():
        raise SoupError(
            f"softmax regression: strengths {values.tolist()}; wanted {len(problem.penalties)} "
            "numbers from 0 up, one for each penalty"
        )
    return values


def weights_of(problem: Problem, weights: np.ndarray | None) -> np.ndarray:
    counts = np.ones(len(problem.labels)) if weights is None else weights.astype(np.float64)
    if counts.shape != problem.labels.shape or (counts < 0).any() or not counts.any():
        raise SoupError(
            f"softmax regression: {len(counts)} weights for {len(problem.labels)} rows, the least "
            f"{counts.min(initial=0.0)}; wanted one from 0 up for each, and some above 0"
        )
    return counts
