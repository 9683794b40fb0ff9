import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from inputs.config import SplitConfig
from inputs.errors import InputError
from inputs.splits import take_splits

NAMES = ("fit", "tune", "select", "report")


def _split(source, **size):
    return SplitConfig(source=source, **size)


@given(
    size=st.integers(40, 500),
    shares=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    counted=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 5),
)
def test_splits_are_disjoint_and_of_the_size_asked_for(size, shares, counted, seed):
    fractions = [share / sum(shares) for share in shares]
    splits = {
        name: _split("all", count=max(1, int(fraction * size)))
        if by_count
        else _split("all", fraction=fraction)
        for name, fraction, by_count in zip(NAMES, fractions, counted, strict=True)
    }
    # A share of less than one image would be an empty split.
    assume(all(fraction * size >= 1 for fraction in fractions))
    rows = take_splits(splits, {"all": size}, seed)
    taken = torch.cat(list(rows.values()))
    assert len(taken) == len(taken.unique()) <= size
    assert taken.max() < size
    for name, fraction in zip(NAMES, fractions, strict=True):
        assert abs(len(rows[name]) - fraction * size) <= 1


def test_a_split_does_not_depend_on_those_after_it():
    one = take_splits({"fit": _split("all", count=5)}, {"all": 20}, 0)
    two = take_splits(
        {"fit": _split("all", count=5), "tune": _split("all", count=15)}, {"all": 20}, 0
    )
    assert torch.equal(one["fit"], two["fit"])
    other = take_splits({"fit": _split("all", count=5)}, {"all": 20}, 1)
    assert not torch.equal(one["fit"], other["fit"])


def test_the_whole_of_a_source():
    splits = {"fit": _split("train"), "report": _split("test")}
    rows = take_splits(splits, {"train": 7, "test": 3}, 0)
    assert sorted(rows["fit"].tolist()) == list(range(7))
    assert sorted(rows["report"].tolist()) == list(range(3))
    assert set(take_splits(splits, {"train": 7}, 0)) == {"fit"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"count": 1}),
        ({"count": 6}, {"count": 5}),
        ({"fraction": 0.55}, {"fraction": 0.5}),
        ({"fraction": 0.5}, {"count": 6}),
    ],
)
def test_splits_that_ask_for_more_than_there_is(first, second):
    splits = {"fit": _split("all", **first), "select": _split("all", **second)}
    with pytest.raises(
        InputError, match=r"overlapping splits: 'all' has 10 images, and fit .*select"
    ):
        take_splits(splits, {"all": 10}, 0)


def test_a_split_of_nothing():
    with pytest.raises(InputError, match=r"data\.tune: no image: fraction 0\.01 of the 50 images"):
        take_splits({"tune": _split("all", fraction=0.01)}, {"all": 50}, 0)


def test_fractions_that_make_whole_numbers_give_them():
    for hundredths in range(1, 101):
        rows = take_splits({"fit": _split("all", fraction=hundredths / 100)}, {"all": 100}, 0)
        assert len(rows["fit"]) == hundredths


def test_another_select_leaves_what_the_zoo_was_made_from():
    splits = {name: _split("train", count=20) for name in ("fit", "tune", "select")}
    splits["report"] = _split("test")
    sizes = {"train": 100, "test": 30}
    plain = take_splits(splits, sizes, 3)
    drawn = {seed: take_splits(splits, sizes, 3, seed) for seed in (0, 1)}
    for rows in drawn.values():
        # A report from a source of its own stays in order, so that runs can be compared by image.
        for name in ("fit", "tune", "report"):
            assert torch.equal(rows[name], plain[name])
        taken = torch.cat([rows[name] for name in ("fit", "tune", "select")])
        assert len(taken.unique()) == 60
    selects = [plain["select"], drawn[0]["select"], drawn[1]["select"]]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert set(selects[a].tolist()) != set(selects[b].tolist())
    again = take_splits(splits, sizes, 3, 1)
    assert torch.equal(again["select"], drawn[1]["select"])
    # A smaller select is the beginning of a larger one.
    small = take_splits(splits | {"select": _split("train", count=5)}, sizes, 3, 1)
    assert torch.equal(small["select"], drawn[1]["select"][:5])


def test_another_select_moves_a_report_from_the_same_source():
    splits = {name: _split("all", fraction=0.25) for name in NAMES}
    plain, drawn = (take_splits(splits, {"all": 80}, 0, seed) for seed in (None, 7))
    assert all(torch.equal(plain[name], drawn[name]) for name in ("fit", "tune"))
    assert sorted(torch.cat(list(drawn.values())).tolist()) == list(range(80))
    assert set(plain["report"].tolist()) != set(drawn["report"].tolist())


def test_fit_and_tune_take_theirs_first():
    splits = {name: _split("all", count=5) for name in ("select", "tune", "fit")}
    rows = take_splits(splits, {"all": 20}, 0, 1)
    other = take_splits(splits, {"all": 20}, 0, 2)
    assert torch.equal(rows["fit"], other["fit"])
    assert torch.equal(rows["tune"], other["tune"])
