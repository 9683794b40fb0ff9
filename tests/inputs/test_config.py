import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from inputs.config import (
    ByteSize,
    DataConfig,
    ModelConfig,
    Settings,
    SplitConfig,
    TimmModel,
    load_config,
)
from inputs.errors import InputError


class Mehl(Settings):
    outer_epochs: PositiveInt = 1
    init: Literal["mean_all", "first_block"] = "mean_all"
    groups: Literal["layer", "tensor"] | ByteSize = "tensor"


def _learner(value):
    return Mehl.model_validate(value)


class Whole(Settings):
    name: str
    model: ModelConfig
    split: SplitConfig | None = None
    learners: dict[str, Annotated[Any, BeforeValidator(_learner)]] = Field(default={})
    memory_budget: ByteSize = ByteSize(1)
    lr: float = 1.0

    @field_validator("name")
    @classmethod
    def _short_name(cls, name: str) -> str:
        if len(name) > 20:
            raise ValueError("a name has at most 20 letters")
        return name


TEXT = """
name: soup
model: {source: timm, name: resnet10t, kwargs: {depths: [1, 2]}}
learners: {mehl: {outer_epochs: 2}}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load_config(file, overrides, Whole)

    return load


@pytest.fixture
def problems(load, tmp_path):
    def problems(text, *overrides):
        with pytest.raises(InputError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return problems


def test_a_config_with_overrides_and_interpolation(load):
    config = load(
        TEXT + "lr: 1e-3\nsplit: {from: '${name}-train', count: 3}",
        "memory_budget=4GiB",
        "learners.mehl.outer_epochs=5",
        "model.name=vit",
    )
    assert config.lr == 1e-3
    assert config.memory_budget == 4 * 2**30
    assert config.learners == {"mehl": Mehl(outer_epochs=5)}
    assert config.model.name == "vit"
    assert config.model.kwargs == {"depths": [1, 2]}
    assert config.split == SplitConfig(source="soup-train", count=3)


def test_numbers_without_a_point_are_numbers(load):
    assert load(TEXT + "lr: 1e-3").lr == 0.001
    assert load(TEXT, "lr=2e-3").lr == 0.002


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nam: x", "nam: unknown key; did you mean 'name'?"),
        ("zzz: x", "zzz: unknown key; known: 'name', 'model', 'split', 'learners', "),
        (
            "learners: {mehl: {outer_epoch: 3}}",
            "learners.mehl.outer_epoch: unknown key; did you mean 'outer_epochs'?",
        ),
        ("split: {from: a, cout: 3}", "split.cout: unknown key; did you mean 'count'?"),
        ("split: {form: a}", "split.form: unknown key; did you mean 'from'?"),
        ("split: {}", "split.from: missing; this key is required"),
        ("model: {name: x}", "model.source: missing; this key is required"),
        (
            "model: {source: tim, name: x}",
            "model.source: found 'tim'; wanted 'timm', 'open_clip', 'factory'; did y",
        ),
        ("model: {source: timm, nme: x}", "model.nme: unknown key; did you mean 'name'?"),
        (
            "learners: {mehl: {init: mean}}",
            "learners.mehl.init: found 'mean'; wanted 'mean_all' or 'first_block'; "
            "did you mean 'mean_all'?",
        ),
        (
            "learners: {mehl: {groups: tensors}}",
            "learners.mehl.groups: found 'tensors'; wanted 'la",
        ),
        (
            "learners: {mehl: {outer_epochs: 0}}",
            "learners.mehl.outer_epochs: found 0; wanted a num",
        ),
        ("split: {from: a, count: many}", "split.count: found 'many'; wanted a valid integer"),
        ("split: {from: a, fraction: 2}", "split.fraction: found 2; wanted a number less than or"),
        ("split: {from: a, count: 1, fraction: 1}", "split: give `count` or `fraction`, not both"),
        ("memory_budget: 4 Gx", "memory_budget: found '4 Gx'; wanted bytes, such as 4GiB"),
        (f"name: {'long' * 20}", "name: a name has at most 20 letters (found 'longlong"),
        ("name: ${other.key}", "name: Interpolation key 'other.key' not found"),
        ("name: ${name}", "name: Recursive interpolation detected"),
        ("name: ???", "name: Missing mandatory value: name"),
    ],
)
def test_a_wrong_key_or_value_is_named(problems, text, line):
    key = text.split(":")[0]
    kept = "\n".join(row for row in TEXT.split("\n") if not row.startswith(f"{key}:"))
    lines = [found for found in problems(f"{kept}\n{text}") if line in found]
    assert lines
    assert lines[0].startswith(f"config.yaml: {line}")


def test_all_problems_come_at_once(problems):
    lines = problems(
        "nam: x\nmodel: {source: tim}\nlr: ${gone}\nsplit: {from: a, cout: 1}",
        "learners",
        "memory_budget=[1",
        "split.fraction=7",
    )
    assert [line.split(": ")[1] for line in lines if line.startswith("config")] == [
        "lr",
        "name",
        "model.source",
        "split.cout",
        "nam",
    ]
    assert lines[0] == "override 'learners': wanted key=value"
    assert lines[1].startswith("override 'memory_budget=[1': while parsing")
    assert any(line.startswith("override 'split.fraction=7': split.fraction: f") for line in lines)
    assert len(lines) == 8


def test_a_part_that_only_an_override_has_is_the_override_s(problems):
    assert problems(TEXT, "splt.fraction=0.5")[0].startswith("override 'splt.fraction=0.5': splt: ")


@pytest.mark.parametrize("override", ["=3", ".=3", "name", ""])
def test_an_override_that_is_no_assignment(problems, override):
    assert problems(TEXT, override) == [f"override {override!r}: wanted key=value"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "config.yaml, line 1, column 6: is not YAML: expected ',' or ']'"),
        ("a: 1\na: 2", "config.yaml, line 2, column 1: is not YAML: found duplicate key a"),
        ("- a", "config.yaml: wanted a mapping of `key: value` lines, found a sequence"),
        ("hello", "config.yaml: wanted a mapping of `key: value` lines, found a scalar"),
        ("a: !!python/object:os.system {}", "config.yaml, line 1, column 4: is not YAML"),
        ("", "config.yaml: name: missing; this key is required"),
    ],
)
def test_text_that_is_no_mapping(problems, text, line):
    assert problems(text)[0].startswith(line)


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "digits.yaml").write_text(TEXT)
    with pytest.raises(
        InputError, match=r"digit\.yaml: no such config file; did you .*digits\.yaml"
    ):
        load_config(tmp_path / "digit.yaml", [], Whole)
    with pytest.raises(InputError, match=r"is a folder, wanted a YAML file; known: .*digits\.yaml"):
        load_config(tmp_path, [], Whole)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"x\.yaml: is not a text file in UTF-8"):
        load_config(tmp_path / "x.yaml", [], Whole)


def test_mean_and_std_fit_the_channels(data_config):
    assert data_config("digits", channels=1, mean=[0.2], std=[0.3]).mean == (0.2,)
    assert data_config("digits", mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="`std` has 2 numbers; wanted 1, or one for each of the 3"):
        data_config("digits", std=[1, 1])


def test_settings_are_frozen(data_config):
    config = data_config("digits")
    assert isinstance(config, DataConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.path = "other"


def test_a_config_is_read_without_torch():
    code = (
        "import sys, inputs.config, inputs.budget; "
        "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_override_replaces_a_whole_mapping(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("source: timm\nname: vit\nkwargs: {depth: 2, dim: 8}\n")
    assert load_config(file, ["kwargs={depth: 3}"], TimmModel).kwargs == {"depth": 3}
    assert load_config(file, ["kwargs={}"], TimmModel).kwargs == {}
    assert load_config(file, ["kwargs.depth=3"], TimmModel).kwargs == {"depth": 3, "dim": 8}


def test_bytes_that_cannot_be_read_show_how_they_are_written(tmp_path):
    class Budget(Settings):
        memory_budget: ByteSize

    file = tmp_path / "config.yaml"
    file.write_text("memory_budget: lots\n")
    with pytest.raises(InputError, match="found 'lots'; wanted bytes, such as 4GiB"):
        load_config(file, [], Budget)
