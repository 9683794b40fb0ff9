"""Random numbers belong to the seed, the names and the place: nothing else changes them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.part import Part

PART = Part("layer.weight", seed=3, models=("one", "two"))


def test_a_share_of_all_is_kept() -> None:
    like, count = torch.empty(1000, 1000), 1_000_000
    for probability in (0.01, 0.3, 0.5, 0.9):
        kept = int(PART.keep(0, probability, like).sum())
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(kept - count * probability) < 4 * deviation


def test_probabilities_of_zero_and_one_are_certain() -> None:
    like = torch.empty(1000)
    assert not PART.keep(0, 0.0, like).any()
    assert PART.keep(0, 1.0, like).all()
    assert PART.keep(0, 1.0, like).dtype == torch.bool


def test_uniform_numbers_are_uniform() -> None:
    numbers = PART.uniform(0, torch.empty(1_000_000))
    assert numbers.dtype == torch.float32
    assert 0 <= float(numbers.min()) < 1e-5
    assert 1 - 1e-5 < float(numbers.max()) < 1
    counts = np.histogram(numbers.numpy(), bins=100, range=(0, 1))[0]
    # Of chi² with 99 degrees of freedom 0.0001 lies above 161.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 161


def test_what_is_kept_are_the_small_numbers() -> None:
    like = torch.empty(10_000)
    kept, numbers = PART.keep(0, 0.25, like), PART.uniform(0, like)
    assert torch.equal(kept, numbers < 0.25)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shape_and_dtype_are_those_asked_for(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    like = torch.empty(shape, dtype=dtype)
    assert PART.keep(0, 0.5, like).shape == like.shape
    found = PART.uniform(0, like)
    assert (found.shape, found.dtype) == (like.shape, dtype)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_slices_give_the_numbers_of_the_whole(start: int, stop: int, model: int) -> None:
    start, stop = min(start, stop), max(start, stop)
    whole, part = torch.empty(2000), replace(PART, start=start)
    like = whole[start:stop]
    assert torch.equal(part.uniform(model, like), PART.uniform(model, whole)[start:stop])
    assert torch.equal(part.keep(model, 0.4, like), PART.keep(model, 0.4, whole)[start:stop])


def test_a_slice_far_away_costs_no_more_than_one_near() -> None:
    far = replace(PART, start=10**15)
    assert far.keep(0, 0.5, torch.empty(100)).numel() == 100


def test_models_go_by_their_names() -> None:
    like = torch.empty(100)
    turned = replace(PART, models=("two", "one"))
    assert torch.equal(PART.uniform(0, like), turned.uniform(1, like))
    assert torch.equal(PART.uniform(1, like), turned.uniform(0, like))
    nameless = Part("layer.weight", seed=3)
    assert not torch.equal(nameless.uniform(0, like), nameless.uniform(1, like))


@pytest.mark.parametrize(
    "other",
    [replace(PART, seed=4), replace(PART, name="layer.bias"), replace(PART, models=("1", "2"))],
    ids=["seed", "name", "models"],
)
def test_streams_are_unrelated(other: Part) -> None:
    like = torch.empty(100_000)
    one, two = (part.uniform(0, like).double().numpy() for part in (PART, other))
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(100_000)


def test_the_numbers_stay_what_they_are_between_versions() -> None:
    found = Part("w", seed=1, models=("a",)).uniform(0, torch.empty(4)) * 2**24
    assert found.tolist() == [3362138, 4354484, 8481408, 557037]
