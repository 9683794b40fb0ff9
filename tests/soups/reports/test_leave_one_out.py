"""A soup without one ingredient, against direct evaluation."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.learners.registry import LEARNERS, Uniform
from soups.reports.leave_one_out import leave_one_out, without
from soups.reports.material import Material
from soups.reports.registry import LeaveOneOut
from tests.soups.conftest import load_checkpoint, open_session


def test_a_mean_becomes_the_mean_of_the_others():
    mean = np.full((4, 2), 0.25)
    for k in range(4):
        found = without(mean, k, base_known=False)
        assert (found[k] == 0).all()
        np.testing.assert_allclose(np.delete(found, k, axis=0), 1 / 3, rtol=1e-15)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 100), st.booleans())
def test_shares_go_to_the_others_in_proportion(ingredients, groups, seed, base_known):
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0.01, 1, (ingredients, groups))
    for k in range(ingredients):
        found = without(matrix, k, base_known=base_known)
        others = np.delete(matrix, k, axis=0)
        wanted = others * matrix.sum(axis=0) / others.sum(axis=0)
        np.testing.assert_allclose(np.delete(found, k, axis=0), wanted, rtol=1e-12)


@pytest.mark.parametrize("base_known", [True, False])
def test_negative_coefficients_keep_the_sum_and_stay_small(base_known):
    """The others nearly cancel each other, so that dividing by their sum would blow them up."""
    matrix = np.array([[1.0, 0.2], [0.5, 0.3], [-0.5 + 1e-9, 0.5]])
    for k in range(3):
        found = without(matrix, k, base_known=base_known)
        np.testing.assert_allclose(found.sum(axis=0), matrix.sum(axis=0), rtol=0, atol=1e-15)
        assert np.abs(found).max() <= 1.5


def test_who_is_alone_leaves_it_to_the_base_or_to_all_others():
    matrix = np.array([[0.0, 0.5], [1.0, 0.0], [0.0, 0.5]])
    of_base = without(matrix, 1, base_known=True)
    np.testing.assert_array_equal(of_base, [[0.0, 0.5], [0.0, 0.0], [0.0, 0.5]])
    of_others = without(matrix, 1, base_known=False)
    np.testing.assert_array_equal(of_others, [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]])


def direct(session, matrix, groups):
    """Correctness and loss on each image of the soup, loaded and run by itself."""
    session.load(session.coefficients(groups, matrix, Uniform()))
    logits, labels = session.logits(), session.select.labels
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (logits.argmax(1) == labels).double().numpy(), losses.double().numpy()


def test_the_table_is_what_direct_evaluation_gives(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    groups = session.whole_model()
    # Ingredient 2 has no part in the soup.
    matrix = np.array([[0.4], [0.3], [0.0], [0.2], [0.1]])
    soups = {"row": session.coefficients(groups, matrix, Uniform())}
    session.begin("report/loo", tmp_path)
    path = tmp_path / "reports" / "loo.v1"
    files = leave_one_out(Material(session, soups), LeaveOneOut(of="row"), path)
    assert [file.name for file in files] == ["loo.v1.csv", "loo.v1.md", "loo.v1.png", "loo.v1.svg"]
    # The soup, and it without each of its four ingredients.
    assert session.examples_forward == 5 * len(session.select)
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    right, losses = direct(session, matrix, groups)
    for k, row in enumerate(rows):
        rest = np.delete(matrix, k, axis=0)
        rest = np.insert(rest / rest.sum(), k, 0.0, axis=0)
        without_k = direct(session, rest, groups) if k != 2 else (right, losses)
        assert row["ingredient"] == f"{k:02d}"
        assert float(row["share"]) == pytest.approx(matrix[k, 0])
        for metric, before, after in zip(
            ("accuracy", "loss"), (right, losses), without_k, strict=True
        ):
            apart = after - before
            error = apart.std(ddof=1) / len(apart) ** 0.5
            assert float(row[metric]) == pytest.approx(after.mean(), abs=2e-5)
            assert float(row[f"{metric}_change"]) == pytest.approx(apart.mean(), abs=2e-5)
            assert float(row[f"{metric}_change_error"]) == pytest.approx(error, abs=2e-5)
            low, high = (float(row[f"{metric}_change_{end}"]) for end in ("low", "high"))
            assert high - low == pytest.approx(2 * 1.96 * error, abs=1e-4)
    assert float(rows[2]["loss_change"]) == 0
    text = files[1].read_text()
    assert text.startswith("## row without one ingredient")
    assert text.count("\n| 0") == 5


def test_a_soup_of_one_falls_to_the_base(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    groups = session.whole_model()
    single = np.eye(5)[:, [3]]
    soups = {"best": session.coefficients(groups, single, LEARNERS["best_single"].settings())}
    session.begin("report/loo", tmp_path)
    leave_one_out(Material(session, soups), LeaveOneOut(of="best"), tmp_path / "loo")
    found = session.record["ingredients"]
    load_checkpoint(session, session.zoo.base)
    assert found[3]["accuracy"] == pytest.approx(session.accuracy(), abs=1 / 400)
    assert all(row["accuracy_change"] == 0 for row in found if row["ingredient"] != "03")
