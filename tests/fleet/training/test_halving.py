import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet.errors import FleetError
from fleet.training.halving import Halving, Patience, Rungs


@pytest.mark.parametrize(
    "wrong", [{"first_epochs": 0}, {"factor": 1}, {"at_once": 0}, {"factr": 3}]
)
def test_refuses_impossible_settings(wrong: dict):
    with pytest.raises(ValidationError) as error:
        Halving.model_validate(wrong)
    assert [problem["loc"] for problem in error.value.errors()] == [tuple(wrong)]


def test_rungs_lie_at_powers_of_the_factor():
    rungs = Rungs(Halving(first_epochs=2, factor=3))
    for epoch in range(1, 60):
        rungs.stays("good", epoch, 0.9)
    left = [epoch for epoch in range(1, 60) if not rungs.stays("bad", epoch, 0.1)]
    assert left == [2, 6, 18, 54]


def test_the_best_of_those_judged_so_far_stay():
    rungs = Rungs(Halving(factor=3))
    scores = {"a": 0.5, "b": 0.4, "c": 0.6, "d": 0.55, "e": 0.7, "f": 0.65, "g": 0.62}
    stay = {name: rungs.stays(name, 1, score) for name, score in scores.items()}
    # Judged: 1 2 3 4 5 6 7, of which 1 1 1 2 2 2 3 stay.
    expected = {"a": True, "b": False, "c": True, "d": True, "e": True, "f": True, "g": True}
    assert stay == expected
    assert not rungs.stays("h", 1, 0.6)


def test_of_equal_scores_the_earlier_is_better():
    rungs = Rungs(Halving(factor=2))
    assert [rungs.stays(name, 1, 0.5) for name in "abc"] == [True, False, False]


def test_judging_a_model_again_does_not_count_it_twice():
    rungs = Rungs(Halving(factor=2))
    assert rungs.stays("a", 1, 0.5)
    assert rungs.stays("a", 1, 0.5)
    assert not rungs.stays("b", 1, 0.4)


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    factor=st.integers(2, 5),
    cut=st.integers(0, 40),
)
def test_any_order_agrees_with_the_definition_also_when_resumed(scores, factor, cut):
    rungs = Rungs(Halving(factor=factor))
    for place, score in enumerate(scores):
        if place == cut:
            state = json.loads(json.dumps(rungs.state()))
            rungs = Rungs(Halving(factor=factor))
            rungs.load(state)
        better = sum(other >= score for other in scores[:place])
        wanted = better < math.ceil((place + 1) / factor)
        assert rungs.stays(f"model {place}", 1, score / 5) == wanted


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(FleetError, match=r"'?second'?: at epoch 1: the score is not a number"):
        Rungs(Halving()).stays("second", 1, math.nan)
    with pytest.raises(FleetError, match="patience: the score is not a number"):
        Patience(2).stays(math.nan)


def test_patience_counts_epochs_without_a_new_best():
    patience = Patience(2)
    scores = [0.5, 0.4, 0.6, 0.6, 0.5]
    assert [patience.stays(score) for score in scores] == [True, True, True, True, False]


def test_patience_goes_on_from_its_state():
    before, after = Patience(2), Patience(2)
    for score in (0.5, 0.4):
        before.stays(score)
    after.load(json.loads(json.dumps(before.state())))
    assert not after.stays(0.5)


def test_patience_without_a_limit_never_stops():
    patience = Patience(None)
    assert all(patience.stays(-0.1 * epoch) for epoch in range(50))


def test_the_settings_need_no_torch():
    code = "import sys, fleet.training.halving; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
