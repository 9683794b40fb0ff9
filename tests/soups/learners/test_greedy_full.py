"""Selection over all ingredients: a plain loop, planted soups, overfitting, being killed."""

import itertools

import numpy as np
import pytest
import torch

from inputs.randomness import generator
from soups.errors import SoupError
from soups.learners.greedy_full import (
    KnownSoups,
    Trial,
    choose,
    in_lowest_terms,
    neighbours,
    together,
    walk,
)
from soups.learners.registry import Greedy, GreedyFull
from soups.learners.selection import greedy_members
from tests.soups.learners.synthetic import KilledError, Synthetic
from tests.soups.learners.test_learners import learn, session_of


def chance(seed):
    """Right or wrong by a coin that the soup and the image decide: nothing to learn."""

    def formula(candidates, rows):
        right, losses = [], []
        for matrix in candidates:
            counts = np.round(matrix[:, 0] * 27720).astype(int).tolist()
            stream = np.random.default_rng([seed, *counts])
            right.append((stream.random(60) < 0.5)[rows])
            losses.append(stream.random(60)[rows])
        return np.array(right), np.array(losses)

    return formula


by_chance = chance(0)


def near(wanted):
    """The closer to the wanted coefficients, the more images are right, the same in each fold."""

    def formula(candidates, rows):
        away = np.abs(candidates[:, :, 0] - wanted).sum(1)
        ease = np.random.default_rng(3).permutation(60)[rows] / 60
        return 1.2 * ease[None] > away[:, None], np.repeat(away[:, None], len(rows), axis=1)

    return formula


def plain(formula, settings, *, ingredients, seed=0, row="row", images=60):
    """The same by loops, one soup at a time: the walk, its moves, its soup, all walks' curves."""

    def scores(soup):
        matrix = (np.array(soup) / sum(soup))[None, :, None]
        right, losses = formula(matrix, np.arange(images))
        return right[0].astype(float), -losses[0].astype(np.float32).astype(float)

    def key(soup, rows):
        right, loss = (values[rows].mean() for values in scores(soup))
        return (round(right, 9), round(loss, 9))

    def best_moves(starts, rows):
        options, path, best, seen = starts, [], 0, set()
        while options and len(path) <= best + settings.patience:
            path.append(max(options, key=lambda soup: key(soup, rows)))
            if key(path[-1], rows) > key(path[best], rows):
                best = len(path) - 1
            seen.add(tuple(np.array(path[-1]) / sum(path[-1])))
            here, options = path[-1], []
            for change in (1, -1):
                for k in range(ingredients):
                    soup = [*here]
                    soup[k] += change
                    fits = soup[k] in (0, 1) or (settings.replacement and soup[k] >= 0)
                    if fits and sum(soup) and tuple(np.array(soup) / sum(soup)) not in seen:
                        options.append(soup)
        return path[: best + 1]

    def greedy(singles, rows):
        first, *others = sorted(singles, key=lambda soup: -key(soup, rows)[0])
        path = [first]
        for single in others:
            soup = [a + b for a, b in zip(path[-1], single, strict=True)]
            if key(soup, rows)[0] >= key(path[-1], rows)[0]:
                path.append(soup)
        return path

    stream = generator(seed, f"{row}/folds")
    folds = [
        f.numpy() for f in torch.randperm(images, generator=stream).tensor_split(settings.folds)
    ]
    singles = np.eye(ingredients, dtype=int).tolist()
    ways = {
        "greedy": lambda rows: greedy(singles, rows),
        "forward": lambda rows: best_moves(singles, rows),
        "backward": lambda rows: best_moves([[1] * ingredients], rows),
    }
    found = {}
    for kind, way in ways.items():
        paths = [way(np.setdiff1d(np.arange(images), fold)) for fold in folds]
        final = way(np.arange(images))
        outside = [
            [
                key(path[min(n, len(path) - 1)], fold)
                for path, fold in zip(paths, folds, strict=True)
            ]
            for n in range(max(map(len, [*paths, final])))
        ]
        found[kind] = final, np.array(outside)
    best = max(
        ((kind, n) for kind in ways for n in range(len(found[kind][1]))),
        key=lambda c: tuple(found[c[0]][1][c[1]].mean(0).round(9)),
    )
    kind, moves = best
    if settings.rule == "one_se":
        outside = found[kind][1][:, :, 0]
        for n in range(moves):
            worse = outside[moves] - outside[n]
            error = np.std(worse, ddof=1) / len(worse) ** 0.5
            enough = outside[n].mean() >= found["greedy"][1][-1, :, 0].mean() - 1e-9
            if worse.mean() <= error and enough:
                moves = n
                break
    final = found[kind][0]
    moves = min(moves, len(final) - 1)
    curves = {name: outside[:, :, 0].mean(axis=1) for name, (_, outside) in found.items()}
    return kind, moves, final[moves], curves


@pytest.mark.parametrize("rule", ["best", "one_se"])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    "formula", [*map(chance, range(4)), near(np.array([0.5, 0.25, 0.25, 0, 0]))]
)
def test_it_chooses_what_a_plain_loop_chooses(tmp_path, formula, replacement, rule):
    settings = GreedyFull(folds=3, patience=2, replacement=replacement, rule=rule)
    session = Synthetic(formula, tmp_path, ingredients=5)
    matrix = learn(session, settings).matrix[:, 0]
    kind, moves, soup, curves = plain(formula, settings, ingredients=5)
    for name, curve in curves.items():
        np.testing.assert_allclose(session.record["curves"][name]["out_of_fold"], curve)
    assert (session.record["walk"], session.record["moves"]) == (kind, moves)
    np.testing.assert_allclose(matrix, np.array(soup) / sum(soup), rtol=1e-15)


def test_a_walk_takes_out_what_greedy_keeps(tmp_path):
    """The best single is not in the best soup."""
    shares = {(0,): 0.6, (1,): 0.55, (2,): 0.5, (0, 1): 0.62, (0, 2): 0.61, (0, 1, 2): 0.7}
    shares |= {(1, 2): 0.9}

    def formula(candidates, rows):
        members = [tuple(np.flatnonzero(matrix[:, 0]).tolist()) for matrix in candidates]
        share = np.array([shares.get(soup, 0.3) for soup in members])[:, None]
        ease = np.random.default_rng(3).permutation(60)[rows] / 60
        return share > ease, np.repeat(1 - share, len(rows), axis=1)

    session = Synthetic(formula, tmp_path, ingredients=4)
    found = learn(session, GreedyFull(rule="best"))
    assert found.matrix[:, 0].tolist() == [0, 0.5, 0.5, 0]
    finals = {kind: c["in_fold"][-1] for kind, c in session.record["curves"].items()}
    assert finals["greedy"] == pytest.approx(0.7)
    assert finals["forward"] == pytest.approx(0.9)


def test_with_replacement_an_ingredient_weighs_more(tmp_path):
    wanted = np.array([0, 0.75, 0, 0.25, 0])
    for replacement in (True, False):
        session = Synthetic(near(wanted), tmp_path / str(replacement), ingredients=5)
        found = learn(session, GreedyFull(rule="best", replacement=replacement)).matrix[:, 0]
        assert np.allclose(found, wanted) == replacement
    assert session.record["members"].keys() <= {"01", "03"}


@pytest.mark.parametrize("rule", ["best", "one_se"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_out_of_fold_it_is_never_worse_than_greedy(tmp_path, metric, rule):
    for seed in range(5):
        session = Synthetic(chance(seed), tmp_path / str(seed), ingredients=5)
        learn(session, GreedyFull(folds=4, metric=metric, rule=rule))
        greedy = session.record["curves"]["greedy"]["out_of_fold"][-1]
        assert session.record["out_of_fold"] >= greedy - 1e-9


def test_what_is_found_by_chance_is_not_there_out_of_fold(tmp_path):
    gaps = []
    for seed in range(6):
        session = Synthetic(chance(seed), tmp_path / str(seed), ingredients=6)
        learn(session, GreedyFull())
        forward = session.record["curves"]["forward"]
        gaps.append(forward["in_fold"][-1] - forward["out_of_fold"][-1])
    assert np.mean(gaps) > 0.1


def test_the_standard_error_is_that_of_the_differences_between_folds():
    def trial(outside):
        keys = np.stack([np.array(outside), np.zeros((len(outside), 4))], axis=2)
        return Trial([(1, 0)] * len(outside), keys, keys)

    low = trial([[0.1, 0.1, 0.1, 0.1]])
    # Folds differ by much, but every fold gains: the gain is real. Then: by one fold alone.
    real = trial([[0.2, 0.5, 0.7, 0.9], [0.3, 0.6, 0.8, 1.0]])
    lucky = trial([[0.2, 0.5, 0.7, 0.9], [0.6, 0.5, 0.7, 0.9]])
    for forward, moves in ((real, 1), (lucky, 0)):
        trials = {"greedy": low, "forward": forward, "backward": low}
        assert choose(trials, "one_se") == ("forward", moves)
        assert choose(trials, "best") == ("forward", 1)
    trials = {"greedy": trial([[0.7, 0.6, 0.6, 0.65]]), "forward": lucky, "backward": low}
    assert choose(trials, "one_se") == ("forward", 1)  # the shorter one is below greedy


def test_neighbours_and_lowest_terms():
    assert [*neighbours((1, 0, 2), replacement=False)] == [(1, 1, 2), (0, 0, 2), (1, 0, 1)]
    assert (2, 0, 2) in neighbours((1, 0, 2), replacement=True)
    assert [*neighbours((0, 1), replacement=False)] == [(1, 1)]
    assert in_lowest_terms((4, 0, 2)) == (2, 0, 1)


def test_no_soup_is_scored_twice_and_walks_share_their_passes(tmp_path):
    session = Synthetic(by_chance, tmp_path, ingredients=6)
    learn(session, GreedyFull())
    soups = [tuple(matrix[:, 0].round(12)) for many, _ in session.seen for matrix in many]
    assert len(soups) == len(set(soups)) == session.record["candidates"]
    assert len(session.seen) <= 20
    assert session.seen[0][0].shape[0] == 7  # the singles, and all of them


@pytest.mark.parametrize("kill_at", [0, 1, 3])
def test_a_killed_selection_goes_on_to_the_same_result(tmp_path, kill_at):
    whole = Synthetic(by_chance, tmp_path / "whole", ingredients=6)
    wanted = learn(whole, GreedyFull())
    killed = Synthetic(by_chance, tmp_path / "killed", ingredients=6)
    killed.kill_at = kill_at
    with pytest.raises(KilledError):
        learn(killed, GreedyFull())
    again = Synthetic(by_chance, tmp_path / "killed", ingredients=6)
    assert learn(again, GreedyFull()).to_json() == wanted.to_json()
    assert again.calls == whole.calls - kill_at
    assert again.record == whole.record


def test_one_ingredient(tmp_path):
    session = Synthetic(by_chance, tmp_path, ingredients=1)
    assert learn(session, GreedyFull()).matrix.tolist() == [[1.0]]


def test_fewer_images_than_folds_are_refused(tmp_path):
    session = Synthetic(by_chance, tmp_path, ingredients=3, images=4)
    with pytest.raises(SoupError, match="5 is more than the 4 images of select; lower it"):
        learn(session, GreedyFull())


def test_its_greedy_walk_is_greedy_on_a_real_zoo(kitchen, tmp_path):
    session, _ = session_of(kitchen, tmp_path, "greedy_full")
    settings = GreedyFull(folds=2)
    known = KnownSoups(session, settings)
    [path] = together([walk("greedy", known, frozenset({0, 1}), settings)], known)
    members = greedy_members(session, Greedy())
    assert [k for k, count in enumerate(path[-1]) if count] == sorted(members)


def test_the_record_leads_from_the_first_soup_to_the_last(kitchen, tmp_path):
    session, settings = session_of(kitchen, tmp_path, "greedy_full", {"folds": 3, "rule": "best"})
    matrix = learn(session, settings).matrix[:, 0]
    record = session.record
    members = dict.fromkeys(record["begins_with"], 1)
    for sign, name in (move.split(" ", 1) for move in record["path"]):
        members[name] = members.get(name, 0) + (1 if sign == "+" else -1)
    assert {name: count for name, count in members.items() if count} == record["members"]
    assert dict(itertools.compress(zip(session.zoo.names, matrix, strict=True), matrix)) == {
        name: pytest.approx(1 / len(record["members"])) for name in record["members"]
    }
