"""The artefact: what it refuses, its file, its mean and its comparison."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge.checkpoints import open_checkpoint, scan
from merge.coefficients import Coefficients, Ingredient, mean_coefficients
from merge.errors import MergeError

HASHES = [character * 64 for character in "abcdef"]


def artefact(matrix: Any = ((0.25, 1.0), (0.75, 0.0)), **changes: Any) -> Coefficients:
    matrix = np.array(matrix, dtype=np.float64)
    fields: dict[str, Any] = {
        "ingredients": tuple(Ingredient(f"{k:02}", HASHES[k]) for k in range(len(matrix))),
        "groups": {"stem": ("stem.weight", "stem.bias"), "head": ("head.weight",)},
        "matrix": matrix,
        "carried": {"bn.num_batches_tracked": "int64 values are not mixed"},
        "method": "greedy",
        "settings": {"accept": "ge", "epochs": 3},
    }
    return Coefficients(**(fields | changes))


def test_columns_and_weights() -> None:
    found = artefact()
    assert found.column("stem.bias").tolist() == [0.25, 0.75]
    assert found.weights("head.weight").tolist() == [1.0, 0.0]
    assert found.tensors == ("stem.weight", "stem.bias", "head.weight")
    with_base = artefact([[0.25, 1.0], [0.5, 0.0]], base=Ingredient("base", HASHES[5]))
    assert with_base.weights("stem.weight").tolist() == [0.25, 0.5, 0.25]
    assert with_base.weights("head.weight").tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(MergeError, match="'nothing' is unknown"):
        found.column("nothing")
    with pytest.raises(MergeError, match=r"'bn.num_batches_tracked' is carried unmixed \(int64"):
        found.column("bn.num_batches_tracked")


def test_the_matrix_is_a_copy_that_cannot_be_written() -> None:
    matrix = np.array([[0.25, 1.0], [0.75, 0.0]])
    found = artefact(matrix)
    matrix[0, 0] = 9.0
    assert found.matrix[0, 0] == 0.25
    with pytest.raises(ValueError, match="read-only"):
        found.matrix[0, 0] = 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": [[0.5, 1.0], [0.4, 0.0]]}, r"'stem' sums to 0.9, wanted 1 within 1e-06"),
        ({"matrix": [[0.5, 1.0], [math.nan, 0.0]]}, r"non-finite.*ingredient '01' in group 'stem'"),
        ({"matrix": [[1.0], [0.0]]}, r"\[2, 1\], wanted \[ingredients, groups\] = \[2, 2\]"),
        ({"groups": {"a": ("x",), "b": ("y", "x")}}, r"tensor 'x' is in two groups"),
        ({"groups": {"a": ("x",), "b": ()}}, r"group 'b' has no tensors"),
        ({"carried": {"head.weight": "skip"}}, r"'head.weight' is both mixed and carried"),
        ({"norm_buffers": "unifrom"}, r"norm_buffers is 'unifrom', wanted one of uniform, convex"),
        ({"temperature": 0.0}, r"temperature is 0.0"),
        ({"ingredients": (Ingredient("a", HASHES[0]), Ingredient("a", HASHES[1]))}, r"'a' is ther"),
        ({"ingredients": (Ingredient("a", "12"), Ingredient("b", HASHES[1]))}, r"64 hexadecimal"),
        ({"base": Ingredient("base", "G" * 64)}, r"sha256 of 'base'"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        artefact(**changes)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(MergeError) as caught:
        artefact(temperature=-1.0, norm_buffers="", groups={"a": ("x",), "b": ("x",)})
    for part in ("temperature", "norm_buffers", "two groups"):
        assert part in str(caught.value)


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4),
    st.floats(0.01, 100),
)
@settings(max_examples=60, deadline=None)
def test_the_file_keeps_every_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], temperature: float
) -> None:
    path = tmp_path_factory.mktemp("coefficients") / "found.json"
    groups = {"z": ("q", "p"), "a": ("x",), "m": ("ä.β",)}
    found = artefact(
        rows, groups=groups, base=Ingredient("base", HASHES[5]), temperature=temperature
    )
    found.save(path)
    again = Coefficients.load(path)
    assert again == found
    assert again.matrix.tobytes() == found.matrix.tobytes()
    assert list(again.groups.items()) == list(groups.items())
    assert (again.temperature, again.sha256) == (temperature, found.sha256)
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["found.json"]


def test_order_without_meaning_changes_nothing() -> None:
    a = artefact(carried={"x": "1", "y": "2"}, settings={"p": 1, "q": 2})
    b = artefact(carried={"y": "2", "x": "1"}, settings={"q": 2, "p": 1})
    assert a == b
    assert a.sha256 == b.sha256
    assert a != artefact(settings={"p": 1})


def test_the_file_is_readable_by_others(tmp_path: Path) -> None:
    artefact().save(tmp_path / "new folder" / "found.json")
    mode = (tmp_path / "new folder" / "found.json").stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def test_settings_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    for settings_ in ({"a": math.nan}, {"a": object()}):
        with pytest.raises(MergeError, match="settings cannot be stored as JSON"):
            artefact(settings=settings_).save(tmp_path / "found.json")
    assert not list(tmp_path.iterdir())


def change(key: str, value: Any) -> Any:
    def apply(stored: dict[str, Any]) -> dict[str, Any]:
        return stored | {key: value}

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda s: [s], "not a coefficients file"),
        (change("format", "other"), "not a coefficients file"),
        (change("version", 2), "version is 2, wanted 1"),
        (change("matrix", [[0.25, 1.0], [0.75]]), "row 1 has 1 numbers, wanted one for each of 2"),
        (change("matrix", [[0.25, 1.0], ["0.75", 0.0]]), r"matrix.1.0: Input should be a valid"),
        (change("matrix", [[0.25, 1.0], [math.nan, 0.0]]), r"NaN is not JSON"),
        (change("matrix", [[0.25, 1.0], [0.8, 0.0]]), r"'stem' sums to 1.05"),
        (change("ingredients", []), "there are no ingredients"),
        (change("ingredients", [{"name": "a"}]), r"ingredients.0.sha256: Field required"),
        (change("extra", 1), r"extra: Extra inputs are not permitted"),
        (change("norm_buffers", "none"), r"norm_buffers: Input should be"),
        (
            change("groups", [{"name": "a", "tensors": ["x"]}, {"name": "b", "tensors": ["x"]}]),
            "'x' is in two groups",
        ),
        (
            change("groups", [{"name": "a", "tensors": ["x"]}, {"name": "a", "tensors": ["y"]}]),
            "group 'a' is there twice",
        ),
        (
            change("base", {"name": "b", "sha256": "no"}),
            "sha256 of 'b' is 'no', wanted 64 hexadecimal",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, apply: Any, message: str) -> None:
    path = tmp_path / "found.json"
    artefact().save(path)
    path.write_text(json.dumps(apply(json.loads(path.read_text()))))
    with pytest.raises(MergeError, match=message) as caught:
        Coefficients.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "found.json").write_bytes(data)
    with pytest.raises(MergeError, match=r"not valid JSON|nested too deep"):
        Coefficients.load(tmp_path / "found.json")


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_mean_is_rounded_once(entries: list[list[float]]) -> None:
    base = Ingredient("base", HASHES[5])
    many = [artefact(np.array(numbers).reshape(2, 2), base=base) for numbers in entries]
    found = mean_coefficients(many).matrix
    exact = np.array([math.fsum(column) for column in np.array(entries).T]) / len(entries)
    np.testing.assert_allclose(found.reshape(-1), exact, rtol=4e-16, atol=1e-300)
    same = mean_coefficients([many[0]] * 7)
    assert same.matrix.tobytes() == (many[0].matrix + 0.0).tobytes()


def test_the_mean_needs_the_same_ingredients_and_groups() -> None:
    found = mean_coefficients([artefact(temperature=1.0), artefact(temperature=2.0, method="x")])
    assert (found.temperature, found.method) == (1.5, "mean")
    assert len(found.settings["mean_of"]) == 2
    with pytest.raises(MergeError, match="none were given"):
        mean_coefficients([])
    others = (Ingredient("00", HASHES[0]), Ingredient("01", HASHES[3]))
    with pytest.raises(MergeError, match="differ in ingredients"):
        mean_coefficients([artefact(), artefact(ingredients=others)])
    turned = {"head": ("head.weight",), "stem": ("stem.weight", "stem.bias")}
    with pytest.raises(MergeError, match="differ in groups"):
        mean_coefficients([artefact(), artefact(groups=turned)])


def test_the_comparison_has_a_row_per_group() -> None:
    found = artefact().compare(artefact([[0.75, 1.0], [0.25, 0.0]]))
    assert list(found.index) == ["stem", "head"]
    assert found["max_difference"].tolist() == [0.5, 0.0]
    assert found["cosine"].tolist() == pytest.approx([0.6, 1.0])
    assert found["first"].tolist() == ["01", "00"]
    assert found["first_other"].tolist() == ["00", "00"]
    with pytest.raises(MergeError, match="differ in carried"):
        artefact().compare(artefact(carried={}))


def test_other_weights_than_were_learned_over_are_named(tmp_path: Path) -> None:
    for k in range(3):
        save_file({"w": torch.full((3,), float(k))}, tmp_path / f"{k}.safetensors")
    checkpoints = [open_checkpoint(tmp_path / f"{k}.safetensors") for k in range(3)]
    scans = [scan(c) for c in checkpoints]
    found = artefact(
        [[0.4], [0.4]],
        groups={"model": ("w",)},
        carried={},
        ingredients=tuple(Ingredient(f"{k}", scans[k].sha256) for k in range(2)),
        base=Ingredient("base", scans[2].sha256),
    )
    found.check_ingredients(checkpoints[:2], base=checkpoints[2])
    found.check_ingredients(checkpoints[:2], scans, base=checkpoints[2])
    with pytest.raises(MergeError) as caught:
        found.check_ingredients(checkpoints[1::-1], base=checkpoints[2])
    for part in ("0.safetensors", "'0'", "'1'", scans[0].sha256, scans[1].sha256):
        assert part in str(caught.value)
    with pytest.raises(MergeError, match=r"2.safetensors: SHA-256.*'base' was"):
        found.check_ingredients(checkpoints[:2], [*scans[:2], scans[0]], base=checkpoints[2])
    with pytest.raises(MergeError, match="1 checkpoints were given, wanted 2: '0', '1'"):
        found.check_ingredients(checkpoints[:1], base=checkpoints[2])
    with pytest.raises(MergeError, match="no base was given, wanted 'base'"):
        found.check_ingredients(checkpoints[:2])
    with pytest.raises(MergeError, match="2 scans were given, wanted one for each of 3"):
        found.check_ingredients(checkpoints[:2], scans[:2], base=checkpoints[2])
