"""What `soups.learn` is told: what stands for what is not said."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from soups.config import LearnConfig, SweepConfig
from tests.soups.conftest import make_config


def test_without_learners_there_are_the_classics_and_pooled(tmp_path: Path):
    given = make_config(tmp_path).model_dump(mode="json", by_alias=True)
    del given["learners"]
    found = LearnConfig.model_validate(given)
    assert {row: settings.type for row, settings in found.learners.items()} == {
        row: row for row in ("best_single", "uniform", "greedy", "pooled")
    }


@pytest.mark.parametrize("value", ["zoo/a", -1, "", None, [1], ".."])
def test_a_value_that_cannot_name_a_folder_is_told_the_remedy(value):
    axis = {"keys": "seed", "values": [1, value]}
    with pytest.raises(ValidationError) as caught:
        SweepConfig.model_validate({"axes": {"a": axis}})
    said = f"{value!r} cannot be the name of a folder; write this axis as a mapping"
    assert said in str(caught.value)


def test_values_that_can_name_a_folder():
    values = [1, 0.5, 1e-05, True, "zoo-a", "resnet10t.a1"]
    found = SweepConfig.model_validate({"axes": {"a": {"keys": "seed", "values": values}}})
    assert [*found.axes["a"]] == ["1", "0.5", "1e-05", "True", "zoo-a", "resnet10t.a1"]
