"""Learners that only need scores: known optima, a real zoo, bounds, going on when killed."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from soups.evaluate import Scores
from soups.learners.hyperplane import Hyperplane, into_box
from soups.learners.metrics import METRICS, judged_by
from soups.learners.registry import LEARNERS, CmaEs, Metric, RandomSearch, ZerothOrder
from soups.learners.zeroth_order import orthogonal_directions, two_point_gradient
from soups.session import Session
from tests.soups.learners.synthetic import KilledError, Synthetic
from tests.soups.learners.test_learners import learn, session_of

SEARCHES = ["random_search", "cmaes", "zeroth_order"]
OPTIMUM = np.array([[0.9, -0.2], [0.3, 0.1], [-0.3, 0.4], [0.0, 0.5], [0.1, 0.2]])
STRETCH = np.array([1.0, 2.0, 3.0, 2.0, 1.0])[:, None]


def bowl(candidates, rows):
    """Least at OPTIMUM, on average over all images; each image has its own tilt."""
    noise = np.random.default_rng(0).standard_normal((60, *OPTIMUM.shape))
    tilts = 0.1 * (noise - noise.mean(0))[rows]
    away = candidates - OPTIMUM
    losses = (STRETCH * away**2).sum((1, 2))[:, None] + np.einsum("mkg,nkg->mn", away, tilts)
    return np.zeros(losses.shape, dtype=bool), losses


def wrong_by_class(candidates, rows):
    """Image n is right if |A[n mod 2] − 0.5| is small enough: no gradient anywhere."""
    away = np.abs(candidates[:, :2, 0] - 0.5)[:, rows % 2]
    return away < 0.02 + 0.4 * (rows // 2) / 30, np.zeros(away.shape)


# --- the hyperplane ------------------------------------------------------------------------------


@given(
    ingredients=st.integers(1, 9),
    groups=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    low=st.sampled_from([0.0, -0.5]),
    seed=st.integers(0, 1000),
)
def test_the_projection_is_the_nearest_point_in_the_box(ingredients, groups, scale, low, seed):
    """It is `clip(a − τ)` for one τ per column, which is what makes it the nearest."""
    high = 1 - low
    points = scale * np.random.default_rng(seed).standard_normal((4, ingredients, groups))
    found = into_box(points, (low, high))
    assert np.abs(found.sum(axis=1) - 1).max() <= 1e-9
    assert (found >= low - 1e-9).all()
    assert (found <= high + 1e-9).all()
    columns = zip(points.swapaxes(1, 2), found.swapaxes(1, 2), strict=True)
    for point, near in ((p, n) for many in columns for p, n in zip(*many, strict=True)):
        moved = point - near
        free = (near > low + 1e-9) & (near < high - 1e-9)
        if free.any():
            shifted = np.clip(point - moved[free].mean(), low, high)
            np.testing.assert_allclose(near, shifted, rtol=0, atol=1e-9)
        else:
            at_low, at_high = moved[near < high - 1e-9], moved[near > low + 1e-9]
            assert at_low.max(initial=-np.inf) <= at_high.min(initial=np.inf) + 1e-9


def test_a_candidate_in_the_box_stays_and_lengths_are_kept():
    start = np.full((7, 3), 1 / 7)
    plane = Hyperplane(start, (-0.5, 1.5))
    points = 0.1 * np.random.default_rng(0).standard_normal((5, plane.dimensions))
    candidates = plane.candidates(points)
    assert candidates.shape == (5, 7, 3)
    np.testing.assert_allclose(candidates.sum(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plane.points(candidates), points, rtol=0, atol=1e-12)
    distances = np.linalg.norm(candidates - start, axis=(1, 2))
    np.testing.assert_allclose(distances, np.linalg.norm(points, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(plane.candidates(np.zeros((1, 18)))[0].round(15), start.round(15))


# --- estimates and metrics -----------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dimensions"), [(3, 7), (7, 7), (10, 4), (1, 1)])
def test_directions_are_orthogonal_in_runs(count, dimensions):
    directions = orthogonal_directions(np.random.default_rng(0), count, dimensions)
    assert directions.shape == (count, dimensions)
    for begin in range(0, count, dimensions):
        run = directions[begin : begin + dimensions]
        np.testing.assert_allclose(run @ run.T, dimensions * np.eye(len(run)), atol=1e-12)


def test_a_whole_set_of_directions_gives_the_gradient_of_a_quadratic():
    stream = np.random.default_rng(1)
    half, slope, here = stream.standard_normal((6, 6)), stream.standard_normal(6), np.ones(6)

    def f(x):
        return np.sum((x @ half) ** 2, axis=-1) + x @ slope

    directions = orthogonal_directions(stream, 6, 6)
    scores = f(np.concatenate([here + 0.3 * directions, here - 0.3 * directions]))
    found = two_point_gradient(directions, scores, 0.3)
    np.testing.assert_allclose(found, 2 * half @ half.T @ here + slope, rtol=1e-10)


def test_a_few_directions_are_right_on_average_and_what_is_not_finite_says_nothing():
    stream = np.random.default_rng(2)
    slope = stream.standard_normal(5)
    many = []
    for _ in range(4000):
        directions = orthogonal_directions(stream, 2, 5)
        scores = np.concatenate([directions @ slope, -directions @ slope])
        many.append(two_point_gradient(directions, scores, 1.0))
    error = np.std(many, axis=0) / np.sqrt(len(many))
    assert (np.abs(np.mean(many, axis=0) - slope) < 4 * error).all()
    directions = orthogonal_directions(stream, 2, 5)
    found = two_point_gradient(directions, np.array([-np.inf, 1.0, 3.0, 0.5]), 0.5)
    np.testing.assert_allclose(found, directions[1] * 0.5 / 2, rtol=1e-12)


def test_metrics_by_hand():
    right = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    labels = torch.tensor([0, 0, 2, 2, 2, 5])
    losses = torch.arange(12.0).reshape(2, 6)
    scores = Scores(right, losses)
    assert METRICS["accuracy"](scores, labels).tolist() == [4 / 6, 4 / 6]
    assert METRICS["worst_class"](scores, labels).tolist() == [1 / 3, 1 / 2]
    assert METRICS["loss"](scores, labels).tolist() == [-2.5, -8.5]
    assert set(METRICS) == set(get_args(Metric))


def test_what_is_not_a_number_counts_as_the_worst(tmp_path):
    scores = Scores(torch.ones(2, 2).bool(), torch.tensor([[1.0, 1.0], [float("nan"), 1.0]]))
    images = Synthetic(bowl, tmp_path, ingredients=2, images=2).select
    assert judged_by("loss")(scores, images)[:, 0].tolist() == [-1.0, -np.inf]


# --- optima that are known -----------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("images", [None, 40])
def test_cmaes_finds_the_bottom_of_a_bowl(tmp_path, covariance, images):
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    settings = CmaEs(evaluations=2500, covariance=covariance, images=images, population=24)
    found = learn(session, settings).matrix
    assert np.abs(found - OPTIMUM).max() < (0.005 if images is None else 0.05)
    assert session.record["found"]["loss"] <= session.record["start"]["loss"] - 1


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 80, "directions": 8, "images": None, "lr": 0.05},
        {"steps": 100, "directions": 4, "images": 20, "lr": 0.05},
        {"steps": 60, "directions": 8, "images": 20, "optimizer": "sgd", "lr": 0.05},
    ],
)
def test_zeroth_order_finds_the_bottom_of_a_bowl(tmp_path, settings):
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    found = learn(session, ZerothOrder(**settings)).matrix
    assert np.abs(found - OPTIMUM).max() < 0.03


def test_cmaes_needs_no_gradient(tmp_path):
    """From no class right at all to both classes, by accuracy alone."""
    session = Synthetic(wrong_by_class, tmp_path, ingredients=4)
    settings = CmaEs(metric="accuracy", evaluations=600, sigma=0.5)
    found = learn(session, settings).matrix
    assert session.record["start"]["accuracy"] < 0.5
    assert np.abs(found[:2, 0] - 0.5).max() < 0.02


def test_random_search_finds_a_sparse_and_a_dense_soup(tmp_path):
    for name, wanted in (
        ("sparse", [1.0, 0, 0, 0, 0, 0]),
        ("dense", [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]),
    ):
        optimum = np.array(wanted)[:, None]

        def away(candidates, rows, optimum=optimum):
            losses = ((candidates - optimum) ** 2).sum((1, 2))[:, None].repeat(len(rows), 1)
            return np.zeros(losses.shape, dtype=bool), losses

        session = Synthetic(away, tmp_path / name, ingredients=6)
        found = learn(session, RandomSearch(evaluations=1500)).matrix
        assert np.abs(found - optimum).max() < 0.015  # without steps from the best: 0.03
        assert (found >= 0).all()


@pytest.mark.parametrize("row", ["cmaes", "zeroth_order"])
def test_the_best_stays_inside_the_bounds(tmp_path, row):
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    settings = LEARNERS[row].settings.model_validate({"type": row, "bounds": [-0.1, 1.0]})
    found = learn(session, settings)
    candidates = np.concatenate([c for c, _ in session.seen])
    assert candidates.min() >= -0.1 - 1e-9
    assert candidates.max() <= 1 + 1e-9
    assert np.abs(candidates.sum(axis=1) - 1).max() <= 1e-9
    assert found.matrix[2, 0] == pytest.approx(-0.1, abs=5e-3)  # it would be −0.3


@pytest.mark.parametrize("row", SEARCHES)
@pytest.mark.parametrize("ingredients", [1, 2])
def test_one_ingredient_and_two(tmp_path, row, ingredients):
    def first_is_best(candidates, rows):
        losses = (candidates[:, 0, :].sum(1) - 0.8)[:, None] ** 2 * np.ones(len(rows))
        return np.zeros(losses.shape, dtype=bool), losses

    session = Synthetic(first_is_best, tmp_path, ingredients=ingredients)
    found = learn(session, LEARNERS[row].settings.model_validate({"type": row})).matrix
    wanted = [[1.0]] if ingredients == 1 else [[0.8], [0.2]]
    np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize("row", SEARCHES)
def test_a_search_that_finds_nothing_returns_its_start(tmp_path, row):
    def start_is_best(candidates, rows):
        losses = np.abs(candidates - 0.25).sum((1, 2))[:, None] * np.ones(len(rows))
        return np.zeros(losses.shape, dtype=bool), losses

    session = Synthetic(start_is_best, tmp_path, ingredients=4)
    found = learn(session, LEARNERS[row].settings.model_validate({"type": row})).matrix
    assert (found == 0.25).all()


@pytest.mark.parametrize("row", SEARCHES)
def test_populations_are_scored_whole_and_counted(tmp_path, row):
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    settings = {"type": row, "images": 20}
    settings |= {"steps": 7} if row == "zeroth_order" else {"evaluations": 50, "population": 10}
    learn(session, LEARNERS[row].settings.model_validate(settings))
    *passes, last = session.seen
    assert {(len(c), images) for c, images in passes} == {(32 if row == "zeroth_order" else 10, 20)}
    assert len(passes) == (7 if row == "zeroth_order" else 5)
    assert last[1] == 60
    assert session.record["candidates"] == sum(len(c) for c, _ in session.seen)
    assert session.examples_forward == sum(len(c) * images for c, images in session.seen)


def test_cmaes_stops_when_its_candidates_do_not_differ(tmp_path):
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    learn(session, CmaEs(evaluations=100_000, tolerance=0.01))
    assert session.record["candidates"] < 2000
    assert np.ptp(session.seen[-2][0], axis=0).max() < 0.01


def test_bounds_must_hold_every_ingredient():
    with pytest.raises(ValidationError, match="low at most 0, high at least 1"):
        CmaEs(bounds=(0.1, 1.5))


def test_settings_that_would_do_nothing_or_fail_are_refused():
    with pytest.raises(ValidationError, match="first must be at most the second"):
        RandomSearch(concentration=(5, 0.1))
    with pytest.raises(ValidationError, match="bounds"):  # from a convex start all are convex
        RandomSearch.model_validate({"bounds": [-0.5, 1.5]})


# --- killed, and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("row", SEARCHES)
@pytest.mark.parametrize("kill_at", [0, 1, 4])
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, row, kill_at):
    settings = {"type": row, "images": 30}
    settings |= {"steps": 6} if row == "zeroth_order" else {"evaluations": 60, "population": 10}
    settings = LEARNERS[row].settings.model_validate(settings)
    whole = Synthetic(bowl, tmp_path / "whole", ingredients=5, groups=2)
    wanted = learn(whole, settings)
    killed = Synthetic(bowl, tmp_path / "killed", ingredients=5, groups=2)
    killed.kill_at = kill_at
    with pytest.raises(KilledError):
        learn(killed, settings)
    again = Synthetic(bowl, tmp_path / "killed", ingredients=5, groups=2)
    assert learn(again, settings).to_json() == wanted.to_json()
    assert again.calls == whole.calls - kill_at
    assert again.examples_forward == whole.examples_forward
    assert again.record == whole.record


def test_scores_of_other_candidates_are_not_taken(tmp_path, caplog):
    first = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    learn(first, CmaEs(evaluations=60, population=10))
    other = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    found = learn(other, CmaEs(evaluations=60, population=10, sigma=0.1))
    assert other.calls == first.calls
    assert "from pass 1 on" in caplog.text
    fresh = Synthetic(bowl, tmp_path / "fresh", ingredients=5, groups=2)
    wanted = learn(fresh, CmaEs(evaluations=60, population=10, sigma=0.1))
    assert found.to_json() == wanted.to_json()


def test_a_search_without_a_folder_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    session.folder = None
    learn(session, CmaEs(evaluations=20, population=10))
    assert not [*tmp_path.iterdir()]


def test_the_seconds_of_a_killed_search_count(tmp_path):
    settings = CmaEs(evaluations=60, population=10)
    killed = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    killed.kill_at, killed.slow_seconds = 3, 0.02
    with pytest.raises(KilledError):
        learn(killed, settings)
    again = Synthetic(bowl, tmp_path, ingredients=5, groups=2)
    learn(again, settings)
    assert again.shared_seconds >= 3 * 0.02


# --- a real zoo ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "gain"),
    [
        # What chance alone gains: 6% with as many candidates, 12% with as many steps.
        ("random_search", {"evaluations": 96, "population": 16}, 0.08),
        ("cmaes", {"evaluations": 96, "population": 8}, 0.15),
        ("zeroth_order", {"steps": 12, "directions": 4, "lr": 0.12}, 0.15),
    ],
)
def test_searches_improve_a_real_zoo(kitchen, tmp_path, row, settings, gain):
    session, settings = session_of(kitchen, tmp_path, row, settings)
    coefficients = learn(session, settings)
    start, found = session.record["start"], session.record["found"]
    assert start != found
    assert found["loss"] <= (1 - gain) * start["loss"]
    session.load(coefficients)
    logits = session.logits()
    loss = torch.nn.functional.cross_entropy(logits.double(), session.select.labels).item()
    assert loss == pytest.approx(found["loss"], rel=1e-4)


@pytest.mark.parametrize("row", SEARCHES)
def test_from_greedy_a_search_is_no_worse_than_greedy(kitchen, tmp_path, row):
    quick = {"steps": 2} if row == "zeroth_order" else {"evaluations": 8, "population": 8}
    session, settings = session_of(
        kitchen, tmp_path / "a", row, {**quick, "start": "greedy", "metric": "accuracy"}
    )
    session.load(learn(session, settings))
    found = session.accuracy()
    session, settings = session_of(kitchen, tmp_path / "b", "greedy")
    session.load(learn(session, settings))
    assert found >= session.accuracy()


def test_a_population_is_one_call_of_a_real_session(kitchen, tmp_path, monkeypatch):
    sizes = []
    evaluate = Session.evaluate

    def counted(self, candidates, groups, images=None):
        sizes.append(len(candidates))
        return evaluate(self, candidates, groups, images)

    monkeypatch.setattr(Session, "evaluate", counted)
    learn(*session_of(kitchen, tmp_path, "cmaes", {"evaluations": 16, "population": 8}))
    assert sizes == [8, 8, 3]


SHORT = {
    "zeroth_order": {"steps": 4, "directions": 4, "images": 64},
    "random_search": {"evaluations": 24, "population": 8},
}


@pytest.fixture
def recording_pays_late(monkeypatch):
    """Some passes in, candidates are run in another way than in the first ones."""
    monkeypatch.setattr("soups.evaluate.WORTH_RECORDING_BATCHES", 3)
    monkeypatch.setattr("soups.evaluate.WORTH_RECORDING_BYTES", 1)
    monkeypatch.setattr("soups.evaluate.WORTH_SHARING", 2.0)


def both_rows(kitchen, folder):
    session, settings = session_of(kitchen, folder, "zeroth_order", SHORT["zeroth_order"])
    session.in_use = 0
    return session, settings, RandomSearch.model_validate(SHORT["random_search"])


@pytest.mark.usefixtures("recording_pays_late")
def test_a_search_does_not_depend_on_what_ran_before_it(kitchen, tmp_path):
    session, settings, _ = both_rows(kitchen, tmp_path / "a")
    alone = learn(session, settings)
    session, settings, before = both_rows(kitchen, tmp_path / "b")
    session.begin("random_search", tmp_path / "b" / "before")
    learn(session, before)
    session.begin("zeroth_order", tmp_path / "b" / "work")
    assert np.array_equal(learn(session, settings).matrix, alone.matrix)


@pytest.mark.usefixtures("recording_pays_late")
def test_a_resumed_search_gives_the_same_bits_on_a_real_zoo(kitchen, tmp_path, monkeypatch):
    session, settings, _ = both_rows(kitchen, tmp_path / "whole")
    whole = learn(session, settings)
    evaluate, calls = Session.evaluate, []

    def killed(self, *arguments):
        calls.append(self)
        if len(calls) == 3:
            raise KilledError
        return evaluate(self, *arguments)

    monkeypatch.setattr(Session, "evaluate", killed)
    session, settings, _ = both_rows(kitchen, tmp_path / "killed")
    with pytest.raises(KilledError):
        learn(session, settings)
    monkeypatch.undo()
    monkeypatch.setattr("soups.evaluate.WORTH_RECORDING_BATCHES", 3)
    monkeypatch.setattr("soups.evaluate.WORTH_RECORDING_BYTES", 1)
    monkeypatch.setattr("soups.evaluate.WORTH_SHARING", 2.0)
    session, settings, _ = both_rows(kitchen, tmp_path / "killed")
    assert np.array_equal(learn(session, settings).matrix, whole.matrix)
