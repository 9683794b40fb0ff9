"""Shapley values against their definition, and the laws that make them what they are."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs.randomness import generator
from soups.evaluate import Scores
from soups.reports.coalitions import Game
from soups.reports.shapley import chance, exact_weights, paired_orders, walk


def toy_game(values, players: int, known=None) -> Game:
    """A game on one image, in which a coalition's loss, and accuracy, is `values(coalition)`."""

    def run(coalitions):
        assert len(set(coalitions)) == len(coalitions)
        run.passes.append(list(coalitions))
        losses = torch.tensor([[values(c)] for c in coalitions], dtype=torch.float64)
        return Scores(losses > 0.5, losses)

    run.passes = []
    game = Game(players, run, known)
    game.passes = run.passes
    return game


def random_values(seed: int):
    """A value for each coalition, whatever the order in which it is asked for."""

    def value(coalition) -> float:
        return np.random.default_rng([seed, *sorted(coalition)]).uniform()

    return value


def by_definition(values, players: int) -> list[float]:
    """The mean over all K! orders of what a player changes as it joins."""
    totals = [0.0] * players
    for order in itertools.permutations(range(players)):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            totals[player] += values(before | {player}) - values(before)
    return [total / math.factorial(players) for total in totals]


def all_coalitions(players: int):
    return [
        frozenset(c)
        for size in range(players + 1)
        for c in itertools.combinations(range(players), size)
    ]


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_exact_values_are_those_of_the_definition(players):
    values = random_values(players)
    coalitions = all_coalitions(players)[::-1]
    v = np.array([values(c) for c in coalitions])
    found = exact_weights(coalitions, players) @ v
    np.testing.assert_allclose(found, by_definition(values, players), rtol=0, atol=1e-14)


@pytest.mark.parametrize("truncate", [0.0, 1e-9])
@pytest.mark.parametrize("players", [1, 2, 4])
def test_walks_over_all_orders_are_exact(players, truncate):
    anything = random_values(17)

    def values(coalition) -> float:
        """Only all together are accurate (above 0.5), so that no order is cut short."""
        return (anything(coalition) + (len(coalition) == players)) / 2

    game = toy_game(values, players)
    walks = walk(game, np.array(list(itertools.permutations(range(players)))), truncate)
    losses = game.scores.mean_losses
    wanted = by_definition(values, players)
    np.testing.assert_allclose(walks.contributions(losses).mean(0), wanted, atol=1e-14)
    np.testing.assert_allclose(walks.weights(len(losses)) @ losses, wanted, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    players=st.integers(2, 9),
    pairs=st.integers(1, 5),
    seed=st.integers(0, 1000),
    truncate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_values_of_every_order_sum_to_the_gain(players, pairs, seed, truncate):
    values = random_values(seed)
    game = toy_game(values, players)
    walks = walk(game, paired_orders(players, 2 * pairs, generator(seed, "x")), truncate)
    gain = values(frozenset(range(players))) - values(frozenset())
    sums = walks.contributions(game.scores.mean_losses).sum(axis=1)
    np.testing.assert_allclose(sums, gain, rtol=0, atol=1e-12)


def test_orders_come_in_pairs_of_reverses_and_the_same_seed_gives_the_same():
    orders = paired_orders(7, 10, generator(3, "orders"))
    assert orders.shape == (10, 7)
    assert (np.sort(orders, axis=1) == np.arange(7)).all()
    np.testing.assert_array_equal(orders[0::2], orders[1::2, ::-1])
    assert len({tuple(order) for order in orders}) > 2
    np.testing.assert_array_equal(orders, paired_orders(7, 10, generator(3, "orders")))
    # More orders begin with those that fewer would be.
    np.testing.assert_array_equal(orders, paired_orders(7, 20, generator(3, "orders"))[:10])


def test_equal_players_are_equal_and_one_without_effect_has_nothing():
    """Players 0 and 1 are the same ingredient; 2 changes nothing wherever it joins."""

    def value(coalition) -> float:
        copies = len(coalition & {0, 1})
        return math.sqrt(copies) + (3 in coalition) * (1 + copies)

    exact = exact_weights(all_coalitions(4), 4) @ [value(c) for c in all_coalitions(4)]
    assert exact[0] == pytest.approx(exact[1], abs=1e-14)
    assert exact[2] == pytest.approx(0, abs=1e-14)
    assert exact[3] > exact[0] > 0
    game = toy_game(value, 4)
    walks = walk(game, paired_orders(4, 8, generator(0, "x")))
    contributions = walks.contributions(game.scores.mean_losses)
    np.testing.assert_allclose(contributions[:, 2], 0, atol=1e-14)
    # Nobody gains from joining beside a copy what the copy took first.
    assert (contributions[:, 3] >= 1).all()


def test_monte_carlo_is_within_its_own_intervals():
    players, values = 8, random_values(5)
    coalitions = all_coalitions(players)
    exact = exact_weights(coalitions, players) @ [values(c) for c in coalitions]
    inside = 0
    for seed in range(20):
        game = toy_game(values, players)
        walks = walk(game, paired_orders(players, 40, generator(seed, "x")))
        losses = game.scores.mean_losses
        found = walks.weights(len(losses)) @ losses
        inside += (np.abs(found - exact) <= 1.96 * walks.error(losses)).sum()
    # 160 intervals, of which 95% should hold the truth.
    assert 140 <= inside <= 159


def test_without_truncation_all_is_played_in_one_pass_and_nothing_twice():
    game = toy_game(random_values(0), 6)
    orders = paired_orders(6, 12, generator(0, "x"))
    walk(game, orders)
    (played,) = game.passes
    wanted = {frozenset(order[:size]) for order in orders.tolist() for size in range(7)}
    assert len(played) == len(wanted)
    assert set(played) == wanted
    walk(game, orders)
    assert len(game.passes) == 1


def test_orders_are_cut_where_nothing_is_left_to_gain():
    """From two players on every soup is as accurate as that of all."""
    game = toy_game(lambda c: float(len(c) >= 2), 7)
    walks = walk(game, paired_orders(7, 6, generator(0, "x")), truncate=0.01)
    assert max(map(len, (c for c in game.coalitions if len(c) < 7))) == 2
    contributions = walks.contributions(game.scores.accuracies)
    np.testing.assert_allclose(contributions.sum(axis=1), 1)
    np.testing.assert_allclose(np.sort(contributions, axis=1)[:, -1], 1)
    whole = toy_game(lambda c: float(len(c) >= 2), 7)
    same = walk(whole, paired_orders(7, 6, generator(0, "x")))
    np.testing.assert_allclose(same.contributions(whole.scores.accuracies), contributions)


def test_those_who_are_left_share_what_is_left():
    values = {0: 0.0, 1: 0.6, 2: 0.7, 3: 0.9}
    game = toy_game(lambda c: values[len(c)], 3)
    walks = walk(game, np.array([[2, 0, 1], [1, 0, 2]]), truncate=0.5)
    # By accuracy (a loss above 0.5) the first player is as good as all.
    found = walks.contributions(game.scores.mean_losses)
    np.testing.assert_allclose(found, [[0.15, 0.15, 0.6], [0.15, 0.6, 0.15]])


def test_a_known_coalition_is_not_run():
    labels = torch.tensor([2, 0, 2, 2, 1])
    known = {frozenset[int](): chance(labels)}
    game = Game(2, lambda c: Scores(torch.ones(len(c), 5) > 0, torch.zeros(len(c), 5)), known)
    walk(game, np.array([[0, 1], [1, 0]]))
    assert game.coalitions[frozenset()] == 0
    assert game.scores.accuracies[0] == pytest.approx(3 / 5)


def test_chance_is_the_best_prediction_without_an_image():
    labels = torch.tensor([2, 0, 2, 2, 4])
    scores = chance(labels)
    assert scores.right.tolist() == [[True, False, True, True, False]]
    entropy = -sum(p * math.log(p) for p in (0.2, 0.6, 0.2))
    assert scores.mean_losses[0] == pytest.approx(entropy, abs=1e-6)
