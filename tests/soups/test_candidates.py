"""The weights of many candidates: as cooked, read once, shared where they agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge.checkpoints import Checkpoint
from soups.candidates import PASS_COST, Candidates, Files, families, with_rest
from soups.errors import SoupError
from soups.kitchen import cook_soup
from soups.learners.registry import MehlLayerwise
from soups.session import Session
from tests.soups.conftest import open_session


def draw(session: Session, grouping: Any, count: int, *, seed: int = 0, rest: float = 0.0):
    """Groups, and candidates around the simplex whose columns leave `rest` to the base."""
    groups = session.groups(MehlLayerwise(groups=grouping))
    draws = np.random.default_rng(seed)
    shape = (count, len(session.zoo.checkpoints), len(groups))
    matrices = 0.3 * draws.normal(size=shape)
    matrices += (1 - rest - matrices.sum(axis=1, keepdims=True)) / shape[1]
    return groups, matrices


def whole(weights, member: int) -> dict[str, torch.Tensor]:
    """One model's tensors."""
    return weights.shared | {name: tensor[member] for name, tensor in weights.stacked.items()}


@pytest.mark.parametrize("rest", [0.0, 0.25])
@pytest.mark.parametrize("grouping", ["model", "layer", "tensor"])
def test_weights_are_the_formula_in_float64(kitchen: Path, tmp_path: Path, grouping, rest):
    session = open_session(kitchen, tmp_path, norm_buffers="convex")
    groups, matrices = draw(session, grouping, 3, rest=rest)
    models = Candidates(matrices, groups, session.sources, session.norms)
    weights = models.weights([2, 0])
    sources = [*session.zoo.checkpoints, session.zoo.base]
    for place, m in enumerate([2, 0]):
        coefficients = session.coefficients(
            groups, matrices[m], MehlLayerwise(), with_base=bool(rest)
        )
        for name, found in whole(weights, place).items():
            column = coefficients.column(name)
            parts = [*column, 1 - column.sum()]
            wanted = sum(a * s.read(name).double() for a, s in zip(parts, sources, strict=True))
            torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-7, msg=name)
    assert set(weights.stacked) == {*session.numels, *session.norms.names}


@pytest.mark.parametrize("rule", ["uniform", "convex", "recalibrate"])
def test_weights_are_those_that_cooking_writes(kitchen: Path, tmp_path: Path, rule):
    session = open_session(kitchen, tmp_path, norm_buffers=rule)
    groups, matrices = draw(session, "layer", 2)
    found = whole(Candidates(matrices, groups, session.sources, session.norms).weights([0, 1]), 1)
    coefficients = session.coefficients(groups, matrices[1], MehlLayerwise())
    cook_soup(session, coefficients, tmp_path / "soup.safetensors", memory_budget=2**28)
    cooked = load_file(tmp_path / "soup.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, cooked[name], rtol=2e-5, atol=2e-6, msg=name)


def test_an_ingredient_alone_is_itself_bit_for_bit(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    models = session.ingredient_models()
    for k, checkpoint in enumerate(session.zoo.checkpoints):
        found = whole(models.weights([k]), 0)
        for name, tensor in found.items():
            assert tensor.equal(checkpoint.read(name)), name


def test_held_and_read_again_give_the_same_bits(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "tensor", 4)
    models = Candidates(matrices, groups, session.sources, session.norms)
    read = models.weights([0, 1, 2, 3])
    assert not session.sources.held
    session.sources.hold()
    assert (
        session.sources.in_memory == session.sources.nbytes == 6 * 4 * sum(session.numels.values())
    )
    held = models.weights([0, 1, 2, 3])
    assert all(held.stacked[name].equal(tensor) for name, tensor in read.stacked.items())
    session.sources.release()
    assert session.sources.in_memory == 0


def test_slices_do_not_change_what_is_mixed(kitchen: Path, tmp_path: Path, monkeypatch):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 3)
    models = Candidates(matrices, groups, session.sources, session.norms)
    whole_tensors = models.weights([0, 1, 2]).stacked
    monkeypatch.setattr("soups.sources.SLICE_BYTES", 7 * 4 * 8)
    for name, tensor in models.weights([0, 1, 2]).stacked.items():
        torch.testing.assert_close(tensor, whole_tensors[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, str, int]]:
    """Every read of a checkpoint: file, tensor, elements."""
    found = []

    def read(self, name, *, out=None, start=0, stop=None, original=Checkpoint.read):
        result = original(self, name, out=out, start=start, stop=stop)
        found.append((Path(self.path).stem, name, result.numel()))
        return result

    monkeypatch.setattr(Checkpoint, "read", read)
    return found


def test_each_source_is_read_once_for_all_candidates(kitchen: Path, tmp_path: Path, reads):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 7)
    models = Candidates(matrices, groups, session.sources, session.norms)
    reads.clear()
    models.weights(range(7))
    assert {file for file, _, _ in reads} == {"00", "01", "02", "03", "04"}  # no base is needed
    assert sum(numel for _, _, numel in reads) == 5 * sum(session.numels.values())


def test_only_the_sources_that_are_used_are_read(kitchen: Path, tmp_path: Path, reads):
    session = open_session(kitchen, tmp_path)
    models = session.ingredient_models()
    reads.clear()
    models.weights([3, 1])
    assert {file for file, _, _ in reads} == {"01", "03"}


def test_a_soup_that_is_kept_is_not_read_again(kitchen: Path, tmp_path: Path, reads):
    session = open_session(kitchen, tmp_path)
    members = np.array([1, 0, 1, 1, 0, 0]) / 3
    grown = np.zeros((2, 5, 1))
    grown[:, [0, 2, 3]] = 1 / 4
    grown[0, 1] = grown[1, 4] = 1 / 4
    models = Candidates(grown, session.whole_model(), session.sources, session.norms)
    plain = models.weights([0, 1]).stacked
    session.sources.keep(members)
    assert session.sources.in_memory == 4 * sum(session.numels.values())
    reads.clear()
    session.sources.keep(members)
    assert not reads
    again = models.weights([0, 1]).stacked
    assert {file for file, _, _ in reads} == {"01", "04"}
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7, msg=name)
    session.sources.keep(np.append(grown[0, :, 0], 0.0))
    other = np.array([[0.5, 0, 0.2, 0.3, 0.0]])[:, :, None]  # not in the soup's proportions
    found = Candidates(other, session.whole_model(), session.sources, session.norms).weights([0])
    session.sources.release()
    wanted = Candidates(other, session.whole_model(), session.sources, session.norms).weights([0])
    for name, tensor in wanted.stacked.items() or wanted.shared.items():
        assert tensor.equal((found.stacked or found.shared)[name]), name


def test_tensors_take_the_place_of_those_before(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 4)
    models = Candidates(matrices, groups, session.sources, session.norms)
    before = models.weights([0, 1])
    first = before.stacked
    second = models.weights([2, 3], reuse=before.buffers).stacked
    for name in session.numels:
        assert second[name].data_ptr() == first[name].data_ptr()
    for name, tensor in models.weights([2, 3]).stacked.items():
        assert second[name].equal(tensor)


def test_what_candidates_agree_on_is_shared(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path, norm_buffers="convex")
    groups, matrices = draw(session, "layer", 3)
    matrices[1:, :, [0, 1]] = matrices[0, :, [0, 1]].T
    models = Candidates(matrices, groups, session.sources, session.norms)
    weights = models.weights([0, 1, 2])
    prefix = {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert set(weights.shared) == prefix
    for m in range(3):
        alone = whole(models.weights([m]), 0)
        for name, tensor in whole(weights, m).items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-6, atol=1e-7, msg=name)


def test_what_is_frozen_in_the_zoo_is_shared(kitchen: Path, tmp_path: Path):
    first = load_file(kitchen / "zoo" / "00.safetensors")
    paths = []
    for k in range(3):
        tensors = load_file(kitchen / "zoo" / f"{k:02d}.safetensors")
        tensors |= {name: first[name].clone() for name in ("0.weight", "1.bias")}
        paths.append(tmp_path / f"{k}.safetensors")
        save_file(tensors, paths[-1])
    zoo = {"path": tmp_path, "ingredients": [str(path) for path in paths]}
    session = open_session(kitchen, tmp_path / "out", zoo=zoo)
    groups, matrices = draw(session, "tensor", 3)
    weights = Candidates(matrices, groups, session.sources, session.norms).weights([0, 1, 2])
    assert {"0.weight", "1.bias"} <= set(weights.shared)
    assert weights.shared["0.weight"].equal(first["0.weight"])
    assert "1.weight" in weights.stacked


def test_the_bits_of_a_soup_do_not_depend_on_what_else_is_mixed(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    groups = session.whole_model()
    matrices = np.zeros((6, 5, 1))
    matrices[:, 3], matrices[:, 4] = 0.3, 0.7  # without the first ingredients
    matrices[0] = 0.2
    matrices[1] = [[0.0], [1.0], [0.0], [0.0], [0.0]]
    together = Candidates(matrices, groups, session.sources, session.norms).weights(range(6))
    some = Candidates(matrices[1:5], groups, session.sources, session.norms).weights(range(4))
    second = session.zoo.checkpoints[1]
    for name in session.numels:
        assert together.stacked[name][1].equal(second.read(name)), name
        assert together.stacked[name][1:5].equal(some.stacked[name]), name


def test_files_are_as_they_are_and_share_what_is_equal(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    tensors = load_file(kitchen / "zoo" / "01.safetensors")
    first = load_file(kitchen / "zoo" / "00.safetensors")
    save_file(tensors | {"0.weight": first["0.weight"]}, tmp_path / "other.safetensors")
    paths = [kitchen / "zoo" / "00.safetensors", tmp_path / "other.safetensors"]
    weights = Files(session.model, paths, session.zoo.tied).weights([0, 1])
    assert "0.weight" in weights.shared
    for place, path in enumerate(paths):
        wanted = load_file(path)
        found = whole(weights, place)
        assert found.keys() == wanted.keys()
        assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


# --- what is refused ------------------------------------------------------------------------------


def test_wrong_candidates_are_named(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 3)

    def refused(matrices, groups, message):
        with pytest.raises(SoupError, match=message):
            Candidates(matrices, groups, session.sources, session.norms)

    wrong = matrices.copy()
    wrong[1, 4, 2] = np.nan
    refused(wrong, groups, "candidate 1 has nan for ingredient 4 in group '3'; wanted finite")
    refused(matrices[:, :4], groups, r"shape \[3, 4, 5\], wanted \[candidates, 5 ingredients, 5")
    refused(matrices[:, :, :4], groups, r"shape \[3, 5, 4\]")
    refused(matrices[:0], groups, "at least one candidate")
    fewer = {name: tensors for name, tensors in groups.items() if name != "4"}
    refused(matrices[:, :, :4], fewer, "'4.bias' is in no group")
    refused(matrices, groups | {"4": ("4.weight", "4.bias", "5.bias")}, "'5.bias' is no tensor")
    twice = groups | {"4": ("4.weight", "4.bias", "3.weight")}
    refused(matrices, twice, "'3.weight' is in two groups")


def test_columns_that_leave_a_rest_need_a_base(kitchen: Path, tmp_path: Path):
    zoo = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in range(3)]
    settings = {"path": kitchen / "zoo", "ingredients": zoo}
    session = open_session(kitchen, tmp_path, zoo=settings)
    assert session.zoo.base is None
    matrices = np.full((2, 3, 1), 1 / 3)
    Candidates(matrices, session.whole_model(), session.sources, session.norms)
    matrices[1, 2] = 0.1
    with pytest.raises(SoupError, match=r"candidate 1 sums to 0\.7666\d* in group 'model'.*base"):
        Candidates(matrices, session.whole_model(), session.sources, session.norms)


# --- families -------------------------------------------------------------------------------------


@given(st.data())
def test_families_are_a_partition_that_costs_no_more_than_one(data):
    count = data.draw(st.integers(1, 12))
    tensors = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    values = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count * 4, max_size=count * 4)
    columns = np.array(data.draw(values)).reshape(count, 1, 4)

    def cost(members: list[int]) -> float:
        agreeing = [len(set(columns[members, 0, g])) == 1 for g in tensors]
        # A group counts from its first tensor on, in the order in which groups begin.
        order = list(dict.fromkeys(tensors))
        prefix = 0
        for g in order:
            if not agreeing[tensors.index(g)]:
                break
            prefix += tensors.count(g)
        share = prefix / len(tensors)
        return PASS_COST + share + len(members) * (1 - share)

    found = families(columns, tensors)
    assert sorted(m for family in found for m in family) == list(range(count))
    assert sum(map(cost, found)) <= cost(list(range(count))) + 1e-9


def test_two_lines_that_part_early_are_two_families():
    columns = np.zeros((16, 2, 4))
    columns[::2, 0, :3] = 1.0  # the even ones share the first three groups, as do the odd ones
    columns[:, 1, 3] = np.arange(16)
    assert families(columns, [0, 1, 2, 3]) == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    columns[:, 1, 0] = np.arange(16)
    assert [sorted(family) for family in families(columns, [0, 1, 2, 3])] == [list(range(16))]


def test_the_base_has_what_is_left():
    matrices = np.array([[[0.25, 1.0], [0.25, 1e-9]]])
    found = with_rest(matrices, 3)
    np.testing.assert_array_equal(found[0, 2], [0.5, 0.0])  # rounding is not a part of the base
    assert with_rest(matrices, 2) is matrices
