import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.recipes import Recipe
from fleet.training.schedules import lr_factor


def factors(steps: int, **settings) -> list[float]:
    recipe = Recipe(**settings)
    return [lr_factor(step, steps, recipe) for step in range(steps)]


def test_linear_warms_up_then_falls_evenly():
    found = factors(10, schedule="linear", warmup=0.2)
    assert found == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_follows_half_a_wave():
    found = factors(4, schedule="cosine", warmup=0.0)
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])


def test_constant_stays():
    assert factors(8, schedule="constant", warmup=0.25) == [0.5] + [1.0] * 7


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["linear", "cosine"]),
)
def test_falling_schedules_end_near_zero_and_never_rise_after_warmup(steps, warmup, schedule):
    recipe = Recipe(schedule=schedule, warmup=warmup)
    warm = round(warmup * steps)
    after = [lr_factor(step, steps, recipe) for step in range(warm, steps)]
    assert after == sorted(after, reverse=True)
    assert all(0 < factor <= 1 for factor in after)
    if after:
        assert after[0] == 1
        assert after[-1] <= math.pi / (steps - warm)


@given(steps=st.integers(2, 300), warmup=st.floats(0, 0.99))
def test_linear_and_cosine_meet_halfway(steps, warmup):
    warm = round(warmup * steps)
    half, odd = divmod(steps - warm, 2)
    if odd or not half:
        return
    linear, cosine = (
        lr_factor(warm + half, steps, Recipe(schedule=schedule, warmup=warmup))
        for schedule in ("linear", "cosine")
    )
    assert linear == pytest.approx(0.5)
    assert cosine == pytest.approx(0.5)
