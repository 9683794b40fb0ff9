"""Coefficients as a linear function of numbers; what can be dropped; against explicit formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.learners.droppable import _without
from soups.learners.plane import Plane
from soups.learners.shape import LADDER, Shape

SEEDS = st.integers(0, 99)
LEVELS = st.sampled_from(["ingredient", "depth", "group"])


def plane_of(level, count, *, ingredients=4, bounds=(-0.5, 1.5)):
    groups = {f"g{g}": (f"t{g}",) for g in range(count)}
    start = np.full((ingredients, count), 1 / ingredients)
    return Plane(Shape.of(level, groups), start, bounds)


def covariance_of(stream, size):
    root = stream.normal(size=(size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


@settings(max_examples=50, deadline=None)
@given(level=LEVELS, count=st.integers(1, 6), scale=st.sampled_from([0.01, 3.0]), seed=SEEDS)
def test_a_soup_is_linear_in_the_numbers_inside_the_box_and_projected_outside(
    level, count, scale, seed
):
    plane, stream = plane_of(level, count), np.random.default_rng(seed)
    theta = scale * stream.normal(size=plane.numbers)
    soup = plane.soup(theta)
    np.testing.assert_allclose(soup.sum(0), 1, atol=1e-12)
    assert soup.min() >= -0.5 - 1e-9
    assert soup.max() <= 1.5 + 1e-9
    numbers = theta.reshape(4, -1)
    moved = numbers @ plane.shape.features.double().numpy()
    free = plane.start + moved - moved.mean(0)
    if free.min() >= -0.5 and free.max() <= 1.5:
        np.testing.assert_allclose(soup, free, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(level=LEVELS, count=st.integers(1, 6), seed=SEEDS)
def test_penalties_are_one_quadratic_form_for_each_step_of_the_ladder(level, count, seed):
    plane, stream = plane_of(level, count), np.random.default_rng(seed)
    squares = stream.gamma(1.0, size=(4, count))
    forms = plane.penalties(torch.from_numpy(squares))
    theta = stream.normal(size=(4, plane.shape.numbers))
    mean = squares.sum() / 4
    alphas, waves, own = theta[:, 0], theta[:, 1:3], theta[:, 3:]
    rho = squares.sum(1) / mean
    wanted = [(rho * alphas**2).sum()]
    if plane.shape.numbers > 1:
        wanted.append(LADDER["depth"] * (rho[:, None] * waves**2).sum())
    if plane.shape.own_groups:
        wanted.append(LADDER["group"] * (squares / mean * own**2).sum())
    flat = theta.flatten()
    np.testing.assert_allclose([flat @ form @ flat for form in forms], wanted, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(level=LEVELS, count=st.integers(1, 6), seed=SEEDS)
def test_weights_are_means_over_groups_and_their_errors_those_of_the_linear_map(level, count, seed):
    plane, stream = plane_of(level, count), np.random.default_rng(seed)
    theta = 0.01 * stream.normal(size=plane.numbers)
    covariance = 1e-4 * covariance_of(stream, plane.numbers)
    found = plane.weights(["a", "b", "c", "d"], theta, covariance)
    means = plane.soup(theta).mean(1)
    # One column of the map at a time: where a number alone moves the weights.
    columns = [plane.soup(unit).mean(1) - 1 / 4 for unit in 1e-3 * np.eye(plane.numbers)]
    linear = np.stack(columns, axis=1) / 1e-3
    errors = np.sqrt(np.diag(linear @ covariance @ linear.T))
    assert [entry["ingredient"] for entry in found] == ["a", "b", "c", "d"]
    assert sum(entry["weight"] for entry in found) == pytest.approx(1, abs=1e-9)
    for entry, weight, error in zip(found, means, errors, strict=True):
        assert entry["weight"] == pytest.approx(weight, abs=1e-7)
        assert entry["standard_error"] == pytest.approx(error, rel=1e-6)
        assert entry["low"] == pytest.approx(weight - 1.959964 * error, abs=1e-6)
        assert entry["high"] == pytest.approx(weight + 1.959964 * error, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(level=LEVELS, dropped=st.sampled_from([[0], [3], [1, 2], [3, 0, 1]]), seed=SEEDS)
def test_without_some_the_loss_rises_as_the_constrained_minimum_says(level, dropped, seed):
    """Against the solution of the constrained problem's linear equations (KKT)."""
    plane, stream = plane_of(level, 5), np.random.default_rng(seed)
    theta = 0.1 * stream.normal(size=plane.numbers)
    covariance = covariance_of(stream, plane.numbers)
    rise, moved = _without(plane, theta, covariance, dropped)
    hessian = np.linalg.inv(covariance)
    numbers = plane.shape.numbers
    away = np.eye(4) - 1 / 4
    constraints = np.kron(away[dropped], np.eye(numbers))
    wanted = np.zeros((len(dropped), numbers))
    wanted[:, 0] = -1 / 4
    count = len(constraints)
    system = np.block([[hessian, constraints.T], [constraints, np.zeros((count, count))]])
    solution = np.linalg.solve(system, np.concatenate([hessian @ theta, wanted.flatten()]))
    best = solution[: plane.numbers]
    np.testing.assert_allclose(moved, best, atol=1e-7)
    assert rise == pytest.approx(0.5 * (best - theta) @ hessian @ (best - theta), rel=1e-6)
    np.testing.assert_allclose(plane.soup(moved)[dropped], 0, atol=2e-6)


def test_what_has_no_weight_costs_nothing_to_drop():
    plane = plane_of("depth", 5)
    theta = np.zeros((4, plane.shape.numbers))
    theta[:, 0] = [1 / 12, 1 / 12, 1 / 12, -1 / 4]
    rise, moved = _without(plane, theta.flatten(), np.eye(plane.numbers), [3])
    assert rise == pytest.approx(0, abs=1e-20)
    np.testing.assert_allclose(moved, theta.flatten(), atol=1e-12)
