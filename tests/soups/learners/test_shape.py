"""How numbers become coefficients, against formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.learners.shape import LADDER, WAVES, Shape

LEVELS = st.sampled_from(["ingredient", "depth", "group"])


def groups_of(count):
    return {f"g{g}": (f"t{g}",) for g in range(count)}


def features_by_hand(level, count):
    """Each group's features, one after another."""
    rows = [[1.0] * count]
    if level != "ingredient" and count > 1:
        depth = [g / (count - 1) for g in range(count)]
        rows += [[np.cos(np.pi * r * d) for d in depth] for r in range(1, WAVES + 1)]
    if level == "group" and count > 1:
        rows += [[float(g == own) for g in range(count)] for own in range(count)]
    return np.array(rows)


@settings(max_examples=50, deadline=None)
@given(level=LEVELS, count=st.integers(1, 12))
def test_the_levels_are_ones_waves_and_each_group(level, count):
    shape = Shape.of(level, groups_of(count))
    wanted = features_by_hand(level, count)
    assert shape.numbers == len(wanted)
    np.testing.assert_allclose(shape.features.numpy(), wanted, atol=2e-6)
    waves = WAVES if level != "ingredient" and count > 1 else 0
    ladder = [1.0] + [LADDER["depth"]] * waves
    ladder += [LADDER["group"]] * (shape.numbers - len(ladder))
    assert shape.ladder.tolist() == ladder
    assert shape.own_groups == shape.numbers - 1 - waves


@settings(max_examples=50, deadline=None)
@given(level=LEVELS)
def test_one_group_has_one_number_for_each_ingredient(level):
    shape = Shape.of(level, groups_of(1))
    assert (shape.numbers, shape.own_groups) == (1, 0)
    assert shape.spread(torch.tensor([[2.0], [3.0]])).tolist() == [[2.0], [3.0]]


@settings(max_examples=50, deadline=None)
@given(
    level=LEVELS, count=st.integers(1, 9), ingredients=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_gather_is_the_adjoint_of_spread(level, count, ingredients, seed):
    shape, stream = Shape.of(level, groups_of(count)), torch.Generator().manual_seed(seed)
    numbers = torch.randn(ingredients, shape.numbers, generator=stream, dtype=torch.float64)
    gradient = torch.randn(ingredients, count, generator=stream, dtype=torch.float64)
    one = (shape.spread(numbers) * gradient).sum().item()
    other = (numbers * shape.gather(gradient)).sum().item()
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    level=LEVELS, count=st.integers(1, 9), ingredients=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_a_soup_is_what_the_numbers_say_and_keeps_the_columns_sums(level, count, ingredients, seed):
    shape, stream = Shape.of(level, groups_of(count)), np.random.default_rng(seed)
    start = stream.normal(size=(ingredients, count))
    numbers = torch.from_numpy(stream.normal(size=(ingredients, shape.numbers)))
    soup = shape.soup(start, numbers)
    np.testing.assert_allclose(soup.sum(0), start.sum(0), atol=1e-12)
    moved = numbers.numpy() @ features_by_hand(level, count)
    np.testing.assert_allclose(soup - start, moved - moved.mean(0), atol=1e-5)
    # What all ingredients have in common moves nothing.
    shifted = shape.soup(start, numbers + torch.from_numpy(stream.normal(size=shape.numbers)))
    np.testing.assert_allclose(shifted, soup, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    level=LEVELS, count=st.integers(1, 9), ingredients=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_the_pull_is_the_ladder_times_relative_squared_lengths(level, count, ingredients, seed):
    shape, stream = Shape.of(level, groups_of(count)), np.random.default_rng(seed)
    squares = stream.gamma(1.0, size=(ingredients, count))
    found = shape.pull(torch.from_numpy(squares))
    mean = squares.sum() / ingredients
    for k in range(ingredients):
        wanted = [squares[k].sum() / mean]
        if shape.numbers > 1:
            wanted += [LADDER["depth"] * squares[k].sum() / mean] * WAVES
        if shape.own_groups:
            wanted += [LADDER["group"] * squares[k, g] / mean for g in range(count)]
        np.testing.assert_allclose(found[k].numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("level", ["ingredient", "depth", "group"])
def test_ingredients_that_are_all_the_same_are_pulled_by_nothing(level):
    shape = Shape.of(level, groups_of(4))
    assert shape.pull(torch.zeros(3, 4)).tolist() == [[0.0] * shape.numbers] * 3
