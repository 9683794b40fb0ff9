"""The fit against autograd and scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from soups.errors import SoupError
from soups.second_order import softmax_regression as regression
from soups.second_order.softmax_regression import Problem, fit
from tests.soups.second_order.regressions import made


def by_autograd(problem, theta, log_beta, counts):
    """Value, gradient and Hessian of Σ w·CE in (θ, log β)."""

    def loss(x):
        moved = torch.from_numpy(problem.derivatives) @ (x[:-1] - torch.from_numpy(problem.origin))
        logits = x[-1].exp() * (torch.from_numpy(problem.logits) + moved)
        losses = F.cross_entropy(logits, torch.from_numpy(problem.labels), reduction="none")
        return (torch.from_numpy(counts) * losses).sum()

    x = torch.from_numpy(np.append(theta, log_beta))
    return (
        loss(x).item(),
        torch.func.grad(loss)(x).numpy(),
        torch.func.hessian(loss)(x).numpy(),
    )


def test_derivatives_equal_autograd(monkeypatch):
    monkeypatch.setattr(regression, "ROWS_AT_ONCE", 17)
    problem = made(at=np.array([0.1, 0.0, -0.2, 0.3]))
    random = np.random.default_rng(1)
    theta, counts = random.normal(size=4), random.uniform(0, 2, size=60)
    value, gradient, hessian = by_autograd(problem, theta, 0.4, counts)
    local = regression._local(problem, theta, 0.4, counts)
    none = np.zeros((4, 4))
    g, h = regression._penalised(problem, none, theta, local)
    assert local.loss == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(g, gradient, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(h, hessian, rtol=1e-10, atol=1e-10)
    assert np.linalg.eigvalsh(local.curvature).min() > 0


@pytest.mark.parametrize("temperature", [True, False])
@pytest.mark.parametrize("trust", [None, 30 * np.eye(4)])
def test_fit_is_the_minimum_that_scipy_finds(temperature, trust):
    problem = made(truth=np.array([1.0, -1, 0.5, 0]), beta=2.0, at=np.full(4, 0.3), trust=trust)
    counts = np.random.default_rng(1).uniform(0, 2, size=60)
    strengths = np.array([0.5, 3.0])
    prior = problem.prior(strengths)

    def objective(x):
        theta, log_beta = x[:4], x[4] if temperature else 0.0
        return regression._objective(problem, theta, log_beta, prior, counts)

    found = fit(problem, strengths, weights=counts, temperature=temperature)
    wanted = minimize(objective, np.zeros(5 if temperature else 4), method="BFGS", tol=1e-9)
    np.testing.assert_allclose(found.theta, wanted.x[:4], atol=1e-4)
    if temperature:
        assert np.log(found.beta) == pytest.approx(wanted.x[4], abs=1e-4)
    else:
        assert found.beta == 1
    assert found.converged
    assert found.steps < 20


def test_fit_recovers_what_the_labels_were_drawn_from():
    truth = np.array([0.8, -0.5, 0.3, 0.0])
    problem = made(rows=20_000, truth=truth, beta=2.0)
    found = fit(problem, [1e-6, 1e-6])
    np.testing.assert_allclose(found.theta, truth, atol=0.05)
    assert found.beta == pytest.approx(2.0, abs=0.05)
    assert found.rank == 4
    logits = torch.from_numpy(problem.at_logits(found.theta, found.beta))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(problem.labels))
    assert found.loss == pytest.approx(loss.item())


def test_rows_of_weight_zero_are_left_out():
    problem = made()
    kept = np.arange(60) % 3 > 0
    alone = Problem(
        problem.logits[kept], problem.derivatives[kept], problem.labels[kept], problem.penalties
    )
    found = fit(problem, [1.0, 1.0], weights=kept.astype(float))
    np.testing.assert_allclose(found.theta, fit(alone, [1.0, 1.0]).theta, atol=1e-6)


def test_directions_that_change_nothing_stay_and_are_counted():
    problem = made(truth=np.array([0.5, 0, 0, 0]))
    derivatives = np.concatenate([problem.derivatives, problem.derivatives[:, :, :1]], axis=2)
    twice = Problem(problem.logits, derivatives, problem.labels, np.zeros((1, 5, 5)))
    found = fit(twice, [0.0])
    assert found.rank == 4
    single = fit(
        Problem(problem.logits, problem.derivatives, problem.labels, np.zeros((1, 4, 4))), [0.0]
    )
    assert found.theta[0] == pytest.approx(found.theta[4], abs=1e-6)
    assert found.theta[0] + found.theta[4] == pytest.approx(single.theta[0], abs=1e-4)


def test_labels_that_are_all_right_have_a_bounded_fit_under_a_prior():
    random = np.random.default_rng(0)
    derivatives = random.normal(size=(30, 3, 4))
    labels = (derivatives @ np.array([2.0, 1, -1, 0])).argmax(1)
    problem = Problem(np.zeros((30, 3)), derivatives, labels, np.eye(4)[None])
    found = fit(problem, [0.1], temperature=False)
    assert np.isfinite(found.theta).all()
    assert found.loss < 0.3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.array([0, 3])}, "wanted 0 to 2"),
        ({"labels": np.array([0, -1])}, "from -1 to 0"),
        ({"logits": np.array([[0, 1, 2], [0, np.nan, 0]])}, "logits .* first in row 1"),
        ({"derivatives": np.full((2, 3, 4), np.inf)}, "derivatives .* first in row 0"),
    ],
)
def test_bad_problems(changes, words):
    given = {
        "logits": np.zeros((2, 3)),
        "derivatives": np.zeros((2, 3, 4)),
        "labels": np.array([0, 1]),
        "penalties": np.ones((1, 4, 4)),
    }
    with pytest.raises(SoupError, match=words):
        Problem(**given | changes)


def test_bad_settings():
    problem = made()
    with pytest.raises(SoupError, match="2 numbers from 0 up"):
        fit(problem, [1.0])
    with pytest.raises(SoupError, match="2 numbers from 0 up"):
        fit(problem, [1.0, -1.0])
    with pytest.raises(SoupError, match="some above 0"):
        fit(problem, [1.0, 1.0], weights=np.zeros(60))
