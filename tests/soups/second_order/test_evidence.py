"""The evidence against the integral; the intervals against simulated truth."""

import numpy as np
import pytest
from scipy.optimize import minimize

from soups.second_order import evidence
from soups.second_order.evidence import fit_by_evidence, intervals, sandwich, uncertainty
from soups.second_order.softmax_regression import Problem, fit
from tests.soups.second_order.regressions import made


def test_evidence_is_the_integral():
    """In one number, against quadrature."""
    random = np.random.default_rng(3)
    logits, derivatives = random.normal(size=(80, 3)), random.normal(size=(80, 3, 1))
    labels = (logits + 0.5 * derivatives[:, :, 0] + random.gumbel(size=(80, 3))).argmax(1)
    problem = Problem(logits, derivatives, labels, np.ones((1, 1, 1)))
    thetas = np.linspace(-3, 3, 6001)
    z = logits[:, :, None] + derivatives * thetas
    likelihood = np.take_along_axis(z, labels[:, None, None], 1)[:, 0] - np.log(np.exp(z).sum(1))
    log_likelihood = likelihood.sum(0)

    def integral(strength):
        density = np.sqrt(strength / (2 * np.pi)) * np.exp(-0.5 * strength * thetas**2)
        return np.log((np.exp(log_likelihood) * density).sum() * 1e-3)

    grid = np.exp(np.linspace(-2, 6, 33))
    exact = np.array([integral(s) for s in grid])
    laplace = np.array([fit(problem, [s], temperature=False).log_evidence for s in grid])
    np.testing.assert_allclose(laplace - laplace[0], exact - exact[0], atol=0.02)
    found = fit_by_evidence(problem, temperature=False)
    assert abs(np.log(found.strengths[0] / grid[exact.argmax()])) < 0.3


def test_evidence_switches_off_a_level_that_explains_nothing():
    """And its strength for the other is near that of the prior it was drawn from."""
    random = np.random.default_rng(5)
    truth = np.concatenate([random.normal(size=30) / 2, np.zeros(10)])
    levels = np.stack([np.diag(np.arange(40) < 30), np.diag(np.arange(40) >= 30)]).astype(float)
    problem = made(rows=3000, classes=4, numbers=40, truth=truth, seed=7, penalties=levels)
    found = fit_by_evidence(problem)
    assert 2 < found.strengths[0] < 8
    assert found.strengths[1] > 300
    by_hand = fit(problem, [4.0, 1.0])
    assert found.log_evidence > by_hand.log_evidence
    rested = fit_by_evidence(problem, start=found)
    np.testing.assert_allclose(np.log(rested.strengths), np.log(found.strengths), atol=0.05)


def test_evidence_gradient_is_exact(monkeypatch):
    """The maximum over log λ of the quadratic model is at least as good as all of a grid."""
    problem = made(rows=200, truth=np.array([1.0, 0.5, 0, 0]))
    at = fit(problem, [1.0, 1.0])
    seen = {}

    def spy(function, start, **settings):
        _, gradient = function(start)
        step = 1e-5
        for level in range(2):
            up, down = start.copy(), start.copy()
            up[level], down[level] = up[level] + step, down[level] - step
            seen[level] = (function(up)[0] - function(down)[0]) / (2 * step), gradient[level]
        return minimize(function, start, **settings)

    monkeypatch.setattr(evidence, "minimize", spy)
    evidence._best_strengths(problem, at, np.array([0.3, 2.0]), (-7.0, 9.0))
    for numeric, analytic in seen.values():
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def covers(values, low, high, truth):
    del values
    return ((low <= truth) & (truth <= high)).mean()


def test_intervals_cover_on_a_quadratic_problem():
    """1,000 runs y = X θ* + noise: the sandwich without a prior, the posterior with θ* from it."""
    random = np.random.default_rng(0)
    runs, rows, numbers, noise = 1000, 150, 5, 0.7
    x = random.normal(size=(runs, rows, numbers)) @ np.diag([1.0, 2, 0.5, 1, 3])
    scale = 0.5 + random.uniform(size=(runs, rows))  # not the same for all rows
    truth = np.array([0.5, -1, 2, 0, 0.1])
    y = np.einsum("trn,n->tr", x, truth) + scale * random.normal(size=(runs, rows))
    inverse = np.linalg.inv(x.swapaxes(1, 2) @ x)
    found = np.einsum("tij,trj,tr->ti", inverse, x, y)
    residuals = np.einsum("trn,tn->tr", x, found) - y
    covariance = sandwich(inverse, residuals[:, :, None] * x)
    mixes = np.array([[1.0, 1, 0, 0, 0], [0, 0, 1, -1, 0.5]])
    assert 0.93 < covers(*_ends(found, covariance), truth) < 0.97
    assert 0.93 < covers(*_ends(found, covariance, mixes), mixes @ truth) < 0.97

    drawn = random.normal(size=(runs, numbers)) / np.sqrt(30)
    y = np.einsum("trn,tn->tr", x[:, :20], drawn) + noise * random.normal(size=(runs, 20))
    hessian = x[:, :20].swapaxes(1, 2) @ x[:, :20] / noise**2 + 30 * np.eye(numbers)
    posterior = np.linalg.inv(hessian)
    found = np.einsum("tij,trj,tr->ti", posterior, x[:, :20], y) / noise**2
    assert 0.93 < covers(*_ends(found, posterior), drawn) < 0.97
    # The check can fail: without the prior's part the same intervals are too wide.
    wide = np.linalg.inv(hessian - 30 * np.eye(numbers))
    assert covers(*_ends(found, wide), drawn) > 0.97


def _ends(found, covariance, linear=None):
    values, _, low, high = intervals(found, covariance, linear=linear)
    return values, low, high


def test_intervals_cover_in_softmax_regression():
    truth, runs = np.array([0.6, -0.4, 0.0, 0.2]), 400
    hits = {"posterior": [], "sandwich": []}
    for run in range(runs):
        problem = made(200, 3, 4, run, truth, beta=1.5, penalties=np.zeros((0, 4, 4)))
        found = fit(problem, [])
        covariances = uncertainty(problem, found)
        for name, of in hits.items():
            _, _, low, high = intervals(found.theta, getattr(covariances, name))
            of.append((low <= truth) & (truth <= high))
    for name, of in hits.items():
        assert 0.93 < np.mean(of) < 0.97, name


def test_posterior_is_the_inverse_hessian_and_counts_beta():
    problem = made(truth=np.array([1.0, 0, 0, 0]))
    found = fit(problem, [1.0, 1.0])
    hessian = found.curvature.copy()
    hessian[:4, :4] += problem.prior(found.strengths)
    wanted = np.linalg.inv(hessian)[:4, :4]
    np.testing.assert_allclose(uncertainty(problem, found).posterior, wanted, rtol=1e-8)
    fixed = uncertainty(problem, fit(problem, [1.0, 1.0], temperature=False)).posterior
    assert fixed.shape == (4, 4)


def test_directions_that_change_nothing_have_no_variance():
    problem = made(numbers=3)
    twice = np.concatenate([problem.derivatives, problem.derivatives[:, :, :1]], axis=2)
    same = Problem(problem.logits, twice, problem.labels, np.zeros((0, 4, 4)))
    covariance = uncertainty(same, fit(same, [])).posterior
    alone = uncertainty(problem, fit(problem, [0.0, 0.0])).posterior
    of_sum = np.array([[1.0, 0, 0, 1]])
    assert (of_sum @ covariance @ of_sum.T).item() == pytest.approx(alone[0, 0], rel=1e-3)
    of_difference = np.array([[1.0, 0, 0, -1]])
    assert (of_difference @ covariance @ of_difference.T).item() == pytest.approx(0, abs=1e-8)
