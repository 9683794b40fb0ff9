"""What `soups.learn` is told: what stands for what is not said."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from inputs.config import checked, read_config
from soups.config import LearnConfig, SweepConfig
from soups.sweeps.sweep import is_sweep, plan_sweep
from tests.soups.conftest import make_config

ROOT = Path(__file__).parent.parent.parent


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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(path: Path):
    read = read_config(path, [])
    found = plan_sweep(read).cells if is_sweep(read) else [checked(read, LearnConfig)]
    assert found
    assert f"configs/{path.name}" in path.read_text(encoding="utf-8")


def test_the_config_in_the_readme_is_ten_lines_and_valid():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    (first,) = [block for block in blocks if block.startswith("name: my\n")]
    (learners,) = [block for block in blocks if block.startswith("learners:\n")]
    assert len(first.splitlines()) == 10
    LearnConfig.model_validate(yaml.safe_load(first))
    LearnConfig.model_validate(yaml.safe_load(first + learners))


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").iterdir())]
)
def test_configs_that_a_page_names_are_there(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [
        name for name in re.findall(r"configs/[\w/]+\.yaml", text) if not (ROOT / name).is_file()
    ] == []
