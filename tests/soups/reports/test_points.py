"""Points by name, the common refinement of their groups, and what is said about wrong names."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from soups.errors import SoupError
from soups.learners.registry import Uniform
from soups.reports.points import point_columns, report_problems, shared_groups
from tests.soups.conftest import make_config, open_session


def test_shared_groups_are_the_common_refinement():
    a = np.array([[1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]])
    b = np.array([[0.5, 0.5, 0.5, 0.0, 0.5], [0.5, 0.5, 0.5, 1.0, 0.5]])
    groups, matrices = shared_groups(["p", "q", "r", "s", "t"], np.stack([a, b]))
    assert groups == {"p": ("p", "q", "t"), "r": ("r",), "s": ("s",)}
    np.testing.assert_array_equal(matrices[0], [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(matrices[1], [[0.5, 0.5, 0], [0.5, 0.5, 1]])


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 100),
)
def test_shared_groups_say_the_same_with_the_fewest(points, ingredients, tensors, seed):
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, 2, (points, ingredients, tensors)).astype(float)
    columns *= rng.choice([-1.0, 1.0], columns.shape)
    names = [f"t{i}" for i in range(tensors)]
    groups, matrices = shared_groups(names, columns)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    for g, members in enumerate(groups.values()):
        for name in members:
            np.testing.assert_array_equal(matrices[:, :, g], columns[:, :, names.index(name)])
    assert len({tuple(matrices[:, :, g].ravel() + 0.0) for g in range(len(groups))}) == len(groups)


def test_points_are_the_soup_the_ingredient_and_the_base(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    rng = np.random.default_rng(0)
    groups = session.groups(Uniform())
    layers = {f"g{i}": (name,) for i, name in enumerate(session.numels)}
    matrix = rng.uniform(size=(5, len(layers)))
    matrix /= matrix.sum(axis=0)
    soups = {
        "mean": session.coefficients(groups, np.full((5, 1), 0.2), Uniform()),
        "layers": session.coefficients(layers, matrix, Uniform()),
    }
    np.testing.assert_array_equal(point_columns("layers", session, soups), matrix)
    assert (point_columns("mean", session, soups) == 0.2).all()
    assert (point_columns("base", session, soups) == 0).all()
    single = point_columns("03", session, soups)
    assert (single[3] == 1).all()
    assert single.sum() == len(session.numels)


def problems(kitchen, reports, *, base_known=True, **changes):
    learners = {"uniform": {}, "mehl_layerwise": {}}
    config = make_config(kitchen, reports=reports, learners=learners, **changes)
    return report_problems(config, base_known=base_known)


def test_right_names_are_no_problem(kitchen):
    right = {
        "leave_one_out": {},
        "shapley": {},
        "line": {"between": [["base", "uniform"], ["00", "mehl_layerwise"]]},
        "plane": {"through": ["base", "04", "uniform"]},
    }
    assert problems(kitchen, right) == []
    listed = {"path": kitchen / "zoo", "ingredients": ["00.safetensors", "04.safetensors"]}
    assert problems(kitchen, right, zoo=listed) == []


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"line": {"between": [["base", "unifrom"]]}}, ["line.between.0.1", "'uniform'?"]),
        ({"line": {"between": [["uniform", "05"]]}}, ["'05' is neither", "ingredient"]),
        ({"plane": {"through": ["00", "mehl_layerwize", "01"]}}, ["through.1", "mehl_layerwise"]),
        ({"leave_one_out": {"of": "greedy"}}, ["leave_one_out.of", "'greedy'", "uniform"]),
        ({"loo": {"type": "leave_one_out", "of": "03"}}, ["reports.loo.of", "learner's row"]),
    ],
)
def test_wrong_names_are_told_the_nearest(kitchen, report, words):
    (problem,) = problems(kitchen, report)
    assert all(word in problem for word in words), problem


def test_a_base_that_is_not_known(kitchen):
    reports = {"shapley": {"empty": "base"}, "line": {"between": [["base", "uniform"]]}}
    found = problems(kitchen, reports, base_known=False)
    assert len(found) == 2
    assert all("the base is not known" in problem for problem in found)


def test_a_row_that_is_called_like_an_ingredient(kitchen):
    config = make_config(
        kitchen,
        learners={"00": {"type": "uniform"}, "uniform": {}},
        reports={"line": {"between": [["00", "uniform"]]}},
    )
    (problem,) = report_problems(config, base_known=True)
    assert "rename the row" in problem


def test_names_are_checked_before_the_zoo_is_made(kitchen, tmp_path):
    zoo = make_config(kitchen).zoo.model_dump() | {"path": tmp_path / "zoo"}
    with pytest.raises(SoupError, match=r"reports\.plane\.through\.2: '5' is neither"):
        open_session(kitchen, tmp_path, zoo=zoo, reports={"plane": {"through": ["00", "04", "5"]}})
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"line": {"between": [[0, "uniform"]]}}, "put names such as '00' in quotes"),
        ({"line": {"between": [["uniform", "uniform"]]}}, "ends where it starts"),
        ({"line": {"between": []}}, "at least 1 item"),
        ({"line": {}}, "between"),
        ({"plane": {"through": ["a", "b"]}}, "through"),
        ({"plane": {"through": ["a", "b", "a"]}}, "three different points"),
        ({"shapley": {"permutations": 5}}, "multiple of 2"),
        ({"shapley": {"permutation": 8}}, "did you mean 'permutations'"),
        ({"shaply": {}}, "shaply"),
    ],
)
def test_settings_that_are_refused(kitchen, report, words):
    with pytest.raises(ValidationError, match=words):
        make_config(kitchen, reports=report)


def test_columns_of_a_soup_are_what_is_loaded(kitchen, tmp_path):
    """A point's columns, evaluated over their shared groups, are the soup itself."""
    session = open_session(kitchen, tmp_path)
    tensors = list(session.numels)
    layers = {"first": tuple(tensors[:3]), "rest": tuple(tensors[3:])}
    matrix = np.array([[0.7, 0.1], [0.1, 0.1], [0.1, 0.1], [0.1, 0.2], [0.0, 0.5]])
    soup = session.coefficients(layers, matrix, Uniform())
    session.load(soup)
    wanted = session.logits()
    columns = point_columns("x", session, {"x": soup})
    groups, matrices = shared_groups([*session.numels], columns[None])
    assert len(groups) == 2
    scores = session.evaluate(matrices, groups)
    labels = session.select.labels
    losses = torch.nn.functional.cross_entropy(wanted, labels, reduction="none")
    torch.testing.assert_close(scores.losses[0], losses, rtol=1e-4, atol=1e-4)
