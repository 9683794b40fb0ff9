"""Second-order steps: derivatives against float64 differences, predictions, intervals."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint
from soups.learners import pooled_newton as module
from soups.learners.hyperplane import into_box
from soups.learners.plane import Plane
from soups.learners.pooled_newton import _trusted, linearised
from soups.learners.shape import Shape
from soups.second_order.evidence import fit_by_evidence
from soups.statistics import fit_temperature, negative_log_likelihood
from tests.soups.learners.float64 import soup_logits, squared_lengths
from tests.soups.learners.test_learners import learn, session_of
from tests.soups.learners.test_pooled import zoo_of

# In this zoo the best soup is far outside the usual box: it ends where there is no loss to gain.
QUICK = {
    "groups": "layer",
    "level": "depth",
    "folds": 2,
    "gate": 0.0,
    "linearisations": 1,
    "bounds": (-20.0, 20.0),
}
TIGHT = (-0.5, 1.5)


def begun(kitchen, tmp_path, *, zoo=None, rule="uniform", **settings):
    """A session begun for `pooled_newton` with quick settings, and these."""
    changes = {"norm_buffers": rule} | ({"zoo": zoo} if zoo else {})
    return session_of(kitchen, tmp_path, "pooled_newton", QUICK | settings, **changes)


def plane_of(session, settings):
    """The groups, and the plane around the uniform soup."""
    groups = session.groups(settings)
    count = len(session.zoo.checkpoints)
    start = np.full((count, len(groups)), 1 / count)
    return groups, Plane(Shape.of(settings.level, groups), start, settings.bounds)


def differences(session, groups, plane, theta, images):
    """The derivatives of the logits by central differences in float64."""

    def logits(moved):
        return soup_logits(session, groups, torch.from_numpy(plane.soup(moved)), images).detach()

    steps = 1e-6 * np.eye(plane.numbers)
    parts = [(logits(theta + h) - logits(theta - h)) / 2e-6 for h in steps]
    return logits(theta).numpy(), torch.stack(parts, dim=2).numpy()


@pytest.mark.parametrize("level", ["ingredient", "depth", "group"])
@pytest.mark.parametrize(
    "rule",
    [
        "uniform",
        "convex",
    ],
)
def test_the_derivatives_are_those_of_the_soups_logits(kitchen, tmp_path, level, rule):
    session, settings = begun(kitchen, tmp_path, level=level, rule=rule)
    groups, plane = plane_of(session, settings)
    for theta in (
        np.zeros(plane.numbers),
        0.05 * np.random.default_rng(0).normal(size=plane.numbers),
    ):
        with session.on(torch.arange(0, 449, 30), "some") as inner:
            problem = linearised(inner, settings, groups, plane, theta)
            logits, wanted = differences(session, groups, plane, theta, inner.select)
        np.testing.assert_allclose(problem.logits, logits, atol=1e-4)
        assert problem.derivatives.shape == wanted.shape
        assert np.abs(problem.derivatives - wanted).max() < 1e-3 * np.abs(wanted).max()
        assert np.array_equal(problem.origin, theta)
        of_penalties = plane.penalties(squared_lengths(session, groups))
        np.testing.assert_allclose(problem.penalties, of_penalties, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("linearisations", "near"), [(1, 0.5), (3, 0.1)])
def test_the_loss_is_nearly_the_one_that_was_predicted(
    second_kitchen, tmp_path, linearisations, near
):
    """The further the steps have come, the nearer."""
    session, settings = begun(second_kitchen, tmp_path, linearisations=linearisations)
    found = learn(session, settings)
    assert session.record["gate"]["kept"] == "newton"
    session.load(found)
    labels = session.select.labels.numpy()
    real = _loss(session.logits().numpy(), labels)
    session.load(session.coefficients(session.whole_model(), np.full((5, 1), 0.2), settings))
    before = _loss(session.logits().numpy(), labels)
    predicted = session.record["predicted_loss"]
    assert real < before
    assert real == pytest.approx(predicted, abs=near * (before - predicted))


def _loss(logits, labels):
    return negative_log_likelihood(fit_temperature(logits, labels) * logits, labels)


def test_weights_sum_to_one_and_their_intervals_hold_them(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path)
    found = learn(session, settings)
    assert session.record["gate"]["kept"] == "newton"
    weights = session.record["weights"]
    assert sum(entry["weight"] for entry in weights) == pytest.approx(1, abs=1e-9)
    columns = found.matrix[:, : len(found.groups) - 1]
    np.testing.assert_allclose(columns.sum(0), 1, atol=1e-12)
    for entry, own in zip(weights, columns.mean(1), strict=True):
        assert entry["low"] < entry["weight"] < entry["high"]
        assert entry["standard_error"] > 0
        assert entry["weight"] == pytest.approx(own, abs=1e-9)
    assert len(session.record["strengths"]) == 2  # of α and of the waves
    assert session.record["numbers"] == 5 * 3
    # What all ingredients have in common moves nothing: one direction for each number.
    assert session.record["rank"] <= 4 * 3


def test_the_weights_on_record_are_those_of_the_soup_in_a_box_that_binds(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path, bounds=TIGHT)
    found = learn(session, settings)
    columns = found.matrix[:, : len(found.groups) - 1]
    assert columns.min() >= -0.5
    assert columns.max() <= 1.5
    assert min(columns.min() + 0.5, 1.5 - columns.max()) < 0.01
    weights = [entry["weight"] for entry in session.record["weights"]]
    np.testing.assert_allclose(weights, columns.mean(1), atol=1e-6)


def test_steps_go_on_along_a_box_that_binds(kitchen, tmp_path, caplog):
    """Down the gradient in the coefficients, projected into the box, there is little to gain."""
    session, settings = begun(kitchen, tmp_path, bounds=TIGHT, linearisations=3)
    found = learn(session, settings)
    assert session.record["gate"]["kept"] == "newton"
    groups, plane = plane_of(session, settings)
    features = plane.shape.features.double()
    soup = torch.from_numpy(found.matrix[:, : len(groups)].copy())
    beta = found.temperature
    labels = session.select.labels
    losses = []
    for step in range(25):
        soup.requires_grad_()
        logits = soup_logits(session, groups, soup, session.select, fixed_buffers=True)
        loss = torch.nn.functional.cross_entropy(beta * logits, labels)
        losses.append(_loss(logits.detach().numpy(), labels.numpy()))
        (gradient,) = torch.autograd.grad(loss, soup)
        # In the numbers' own directions: what waves over depth can say.
        moved = (gradient - gradient.mean(0)) @ features.T @ features
        ahead = soup.detach() - 0.1 * (1 - step / 25) * moved / moved.abs().max()
        soup = torch.from_numpy(into_box(ahead.numpy()[None], TIGHT)[0])
    assert losses[0] - min(losses) < 0.01


def test_in_whatever_blocks_the_coefficients_are_the_same(second_kitchen, tmp_path):
    found = []
    for size in (1, 2, 5):
        session, settings = begun(second_kitchen, tmp_path / str(size), block_size=size)
        assert session.block_sizes == {"pooled_newton": size}
        soup = learn(session, settings)
        found.append((soup.matrix, session.record["gate"]["kept"], session.examples_backward))
    for matrix, kept, _ in found:
        assert kept == "newton"
        np.testing.assert_allclose(matrix, found[0][0], rtol=1e-5, atol=1e-6)
    # A backward for each class and block, and nothing else.
    assert [backward for *_, backward in found] == [449 * 10 * blocks for blocks in (5, 3, 1)]


def test_twins_lower_the_rank_and_share_their_weight(kitchen, tmp_path, caplog):
    (tmp_path / "twin.safetensors").write_bytes((kitchen / "zoo" / "01.safetensors").read_bytes())
    zoo = zoo_of(kitchen, 0, 1, 3, tmp_path / "twin.safetensors")
    session, settings = begun(kitchen, tmp_path / "out", zoo=zoo)
    with caplog.at_level(logging.WARNING):
        found = learn(session, settings)
    assert "01, twin are the same model" in caplog.text
    assert np.isfinite(found.matrix).all()
    # Three different ones span what two numbers less their mean do.
    assert session.record["rank"] <= 2 * 3 < session.record["numbers"]
    if session.record["gate"]["kept"] == "newton":
        columns = found.matrix[:, : len(found.groups) - 1]
        np.testing.assert_allclose(columns[1], columns[3], atol=1e-6)
    for entry in session.record["weights"]:
        assert np.isfinite([entry["weight"], entry["low"], entry["high"]]).all()


def test_one_of_twins_can_be_dropped(second_kitchen, tmp_path):
    """What it has to say the other one says."""
    (tmp_path / "twin.safetensors").write_bytes(
        (second_kitchen / "zoo" / "03.safetensors").read_bytes()
    )
    zoo = zoo_of(second_kitchen, 0, 1, 3, tmp_path / "twin.safetensors")
    session, settings = begun(second_kitchen, tmp_path / "out", zoo=zoo)
    learn(session, settings)
    dropped = session.record["droppable"]
    assert {"03", "twin"} & set(dropped["ingredients"])
    assert not {"03", "twin"} <= set(dropped["ingredients"])
    assert dropped["loss_change"] <= dropped["standard_error"]


def test_nothing_is_dropped_without_which_the_loss_rises(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path, linearisations=2)
    learn(session, settings)
    # What the intervals find far from 0 stays.
    sure = {e["ingredient"] for e in session.record["weights"] if e["low"] > 1 or e["high"] < -1}
    assert sure
    assert not sure & set(session.record["droppable"]["ingredients"])


def test_a_useless_ingredient_can_be_dropped(second_kitchen, tmp_path, monkeypatch):
    """Weights far off, across a barrier: its interval holds 0, or it is said to be droppable."""
    stream = torch.Generator().manual_seed(0)
    with open_checkpoint(second_kitchen / "zoo" / "02.safetensors") as good:
        useless = {name: good.read(name) for name in good.tensors}
    for name, tensor in useless.items():
        if name.endswith("weight") and tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=stream)
            useless[name] = tensor + tensor.std() * noise
    save_file(useless, tmp_path / "useless.safetensors")
    zoo = zoo_of(second_kitchen, 0, 1, 3, 4, tmp_path / "useless.safetensors")
    found, weights = [], Plane.weights

    def kept(self, names, theta, covariance):
        found.append(weights(self, names, theta, covariance))
        return found[-1]

    monkeypatch.setattr(Plane, "weights", kept)
    changes = {"linearisations": 3, "bounds": TIGHT}
    session, settings = begun(second_kitchen, tmp_path / "out", zoo=zoo, **changes)
    learn(session, settings)
    own = next(entry for entry in found[0] if entry["ingredient"] == "useless")
    dropped = session.record["droppable"]["ingredients"]
    assert own["low"] <= 0 <= own["high"] or "useless" in dropped


# --- steps that are shortened --------------------------------------------------------------------


def linear_problem(kitchen, tmp_path):
    session, settings = begun(kitchen, tmp_path)
    groups, plane = plane_of(session, settings)
    problem = linearised(session, settings, groups, plane, np.zeros(plane.numbers))
    return session, groups, plane, problem, fit_by_evidence(problem)


def test_a_step_is_taken_whole_where_the_prediction_holds(kitchen, tmp_path):
    session, groups, plane, problem, fitted = linear_problem(kitchen, tmp_path)
    found, solved = _trusted(session, groups, plane, problem, fitted)
    assert found is fitted
    assert solved is problem


@pytest.mark.parametrize("wrong", [1, 3])
def test_a_step_is_shortened_until_the_prediction_holds(kitchen, tmp_path, monkeypatch, wrong):
    session, groups, plane, problem, fitted = linear_problem(kitchen, tmp_path)
    plain, tried = module.logits_of, []

    def mistaken(session, groups, soup, images):
        tried.append(np.linalg.norm(soup - 1 / 5))
        logits = plain(session, groups, soup, images)
        return -logits if len(tried) <= wrong else logits

    monkeypatch.setattr(module, "logits_of", mistaken)
    found, solved = _trusted(session, groups, plane, problem, fitted)
    assert len(tried) == wrong + 1
    assert all(later < earlier for earlier, later in pairwise(tried))
    assert np.linalg.norm(found.theta) < np.linalg.norm(fitted.theta)
    # It is where the loss with its prior and what holds the step back is least.
    assert solved.trust is not None
    assert found.loss > fitted.loss
    assert np.array_equal(found.strengths, fitted.strengths)


def test_no_step_is_taken_where_no_prediction_holds(kitchen, tmp_path, monkeypatch, caplog):
    session, groups, plane, problem, fitted = linear_problem(kitchen, tmp_path)
    plain = module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda *arguments: -plain(*arguments))
    with caplog.at_level(logging.WARNING):
        found, _ = _trusted(session, groups, plane, problem, fitted)
    assert "no step is taken" in caplog.text
    np.testing.assert_allclose(plane.soup(found.theta), 1 / 5, atol=1e-5)
