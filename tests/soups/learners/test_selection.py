"""Greedy selection several trials at once is selection one by one; the line of WiSE-FT."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soups.learners.selection import select_greedily
from tests.soups.learners.test_learners import learn, session_of


def one_by_one(order, first, accuracy, accept) -> tuple[list[int], int]:
    """The published recipe: the members, and how many soups it evaluates."""
    members, best = [order[0]], first
    for k in order[1:]:
        score = accuracy([*members, k])
        if score > best or (accept == "ge" and score == best):
            members, best = [*members, k], score
    return members, len(order) - 1


@given(
    count=st.integers(1, 24),
    accept=st.sampled_from(["gt", "ge"]),
    levels=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_trials_at_once_give_the_members_of_trials_one_by_one(count, accept, levels, seed):
    """Over random tables of accuracies with few levels, so with many ties."""

    def accuracy(members) -> float:
        return np.random.default_rng([seed, *sorted(members)]).integers(levels) / levels

    asked = []

    def score(members, ahead):
        asked.append([[*members, k] for k in ahead])
        return [accuracy(trial) for trial in asked[-1]]

    decided = []
    order = np.random.default_rng(seed).permutation(count).tolist()
    found = select_greedily(order, accuracy(order[:1]), score, accept, decided=decided.append)
    wanted, evaluations = one_by_one(order, accuracy(order[:1]), accuracy, accept)
    assert found == wanted
    assert sum(decided) == evaluations
    scored = sum(map(len, asked))
    assert evaluations <= scored <= evaluations + evaluations // 2


def test_the_width_grows_while_trials_are_rejected_and_falls_when_one_is_kept():
    widths = []

    def score(members, ahead):
        widths.append(len(ahead))
        return [0.9 if k == 15 and 15 not in members else 0.1 for k in ahead]

    assert select_greedily(list(range(30)), 0.5, score, "ge") == [0, 15]
    # 15 is the fourth of six; the two behind it are tried again.
    assert widths == [1, 1, 2, 3, 4, 6, 1, 1, 2, 3, 4, 3]


@pytest.mark.parametrize("accept", ["gt", "ge"])
@pytest.mark.parametrize("twice", [False, True])
def test_greedy_on_a_real_zoo_is_greedy_one_by_one(kitchen, tmp_path, accept, twice):
    """Also where every ingredient is there twice, so that soups tie."""
    files = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in range(5)]
    zoo = {"path": kitchen / "zoo", "ingredients": files * (2 if twice else 1)}
    session, settings = session_of(kitchen, tmp_path, "greedy", {"accept": accept}, zoo=zoo)
    coefficients = learn(session, settings)
    accuracies = session.ingredients.accuracies

    def accuracy(members) -> float:
        matrix = np.zeros((len(accuracies), 1))
        matrix[members] = 1 / len(members)
        session.load(session.coefficients(session.whole_model(), matrix, settings))
        return session.accuracy()

    order = sorted(range(len(accuracies)), key=lambda k: -accuracies[k])
    before = session.examples_forward
    wanted, evaluations = one_by_one(order, accuracies[order[0]], accuracy, accept)
    assert np.flatnonzero(coefficients.matrix[:, 0]).tolist() == sorted(wanted)
    record = session.record
    assert record["evaluated"] - record["evaluated_for_nothing"] == evaluations
    passes = before / len(session.select)
    assert passes == len(accuracies) + record["evaluated"]


def test_greedy_in_little_memory_keeps_its_soup_and_reads_few_files(kitchen, tmp_path, monkeypatch):
    from merge.checkpoints import Checkpoint

    session, settings = session_of(kitchen, tmp_path / "a", "greedy")
    wanted = learn(session, settings)
    session, settings = session_of(kitchen, tmp_path / "b", "greedy")
    weights = 4 * sum(session.numels.values())
    session.in_use = 0
    session.memory_budget = 5 * weights + 8 * session.passes.image_bytes(session.select)
    elements = 0

    def read(self, name, *, original=Checkpoint.read, **how):
        nonlocal elements
        found = original(self, name, **how)
        elements += found.numel() * (name in session.numels)
        return found

    monkeypatch.setattr(Checkpoint, "read", read)
    assert learn(session, settings).to_json() == wanted.to_json()
    assert not session.sources.held
    members = int((wanted.matrix[:, 0] > 0).sum())
    # A trial reads what it adds; a soup that has grown reads that once more.
    most = session.record["evaluated"] + members
    assert elements <= most * sum(session.numels.values())


def test_the_line_is_scored_in_one_pass(kitchen, tmp_path):
    session, settings = session_of(kitchen, tmp_path, "wise_ft", {"alphas": [0, 0.3, 0.6, 1]})
    before = session.examples_forward
    learn(session, settings)
    assert session.examples_forward - before == 4 * len(session.select)
    everyone = np.full((5, 1), 1 / 5)
    for point in session.record["curve"]:
        matrix = point["alpha"] * everyone
        session.load(session.coefficients(session.whole_model(), matrix, settings, with_base=True))
        assert point["select_accuracy"] == session.accuracy()
