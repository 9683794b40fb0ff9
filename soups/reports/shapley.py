"""Shapley values: each ingredient's part in what the soup of all gains over the empty soup."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int

from inputs.figures import save_figure
from inputs.randomness import generator
from soups.evaluate import Scores
from soups.plots.effects import best_first, draw_shapley
from soups.reports.coalitions import Coalition, Game, run_soups
from soups.reports.material import Material
from soups.reports.registry import Shapley
from soups.reports.tables import Effects, beside, standard_error, write_csv, write_markdown

Values = Float64[np.ndarray, " coalitions"]


@dataclass(frozen=True)
class Walks:
    """Who joined when: player k of an order moves the value from one coalition to another.

    The contribution of player k in order p is `share · (v[after] − v[before])`; over the players
    of an order these sum to `v(all) − v(empty)`.
    """

    before: Int[np.ndarray, "orders players"]
    after: Int[np.ndarray, "orders players"]
    share: Float64[np.ndarray, "orders players"]

    def contributions(self, values: Values) -> Float64[np.ndarray, "orders players"]:
        """What each player contributes in each order."""
        return self.share * (values[self.after] - values[self.before])

    def weights(self, coalitions: int) -> Float64[np.ndarray, "players coalitions"]:
        """How the mean contributions follow from the values: `φ = weights @ v`."""
        orders, players = self.share.shape
        weights = np.zeros((players, coalitions))
        of_player = np.broadcast_to(np.arange(players), self.share.shape)
        np.add.at(weights, (of_player, self.after), self.share / orders)
        np.add.at(weights, (of_player, self.before), -self.share / orders)
        return weights

    def error(self, values: Values) -> Float64[np.ndarray, " players"]:
        """The standard error that comes from the choice of orders, which are pairs of reverses."""
        pairs = self.contributions(values).reshape(-1, 2, self.share.shape[1]).mean(axis=1)
        return standard_error(pairs.T)


def exact_weights(
    coalitions: Iterable[Coalition], players: int
) -> Float64[np.ndarray, "players coalitions"]:
    """How Shapley values follow from the values of all coalitions: `φ = weights @ v`.

    `φ_k = Σ_{S ∌ k} |S|!·(K − |S| − 1)! / K! · (v(S ∪ k) − v(S))`.
    """
    columns = []
    for coalition in coalitions:
        size = len(coalition)
        joined = 1 / (size * math.comb(players, size)) if size else 0.0
        missed = 1 / ((size + 1) * math.comb(players, size + 1)) if size < players else 0.0
        columns.append([joined if k in coalition else -missed for k in range(players)])
    return np.array(columns).T


def paired_orders(
    players: int, count: int, stream: torch.Generator
) -> Int[np.ndarray, "orders players"]:
    """`count` orders of the players, each random one followed by its reverse (2104.12199)."""
    orders = [torch.randperm(players, generator=stream).numpy() for _ in range(count // 2)]
    return np.array([order for drawn in orders for order in (drawn, drawn[::-1])])


def walk(game: Game, orders: Int[np.ndarray, "orders players"], truncate: float = 0.0) -> Walks:
    """Let the players join in these orders; coalitions that were not played before are now.

    Without `truncate` in one pass. With it in one for each size, and an order ends where its
    accuracy is within `truncate` of that of all (1904.02868): the players who are left then share
    what is left evenly.
    """
    last = game.players - 1
    sizes = [0, game.players, *range(1, game.players)]
    prefixes = [[frozenset(o[:size]) for size in range(len(o) + 1)] for o in orders.tolist()]
    everyone = frozenset(range(game.players))
    # From this size on the players of an order share; the last one has what the others leave.
    ends = np.full(len(orders), last)
    for together in [sizes[:3], *([size] for size in sizes[3:])] if truncate else [sizes]:
        going = np.flatnonzero(ends == last)
        game.play(prefixes[p][size] for p in going for size in together)
        accuracies, size = game.scores.accuracies, together[-1]
        reached = accuracies[[game.coalitions[prefixes[p][size]] for p in going]]
        close = np.abs(reached - accuracies[game.coalitions[everyone]]) < truncate
        ends[going[close]] = min(size, last)
    before, after = np.empty_like(orders), np.empty_like(orders)
    share = np.ones(orders.shape)
    for p, (order, own, end) in enumerate(zip(orders, prefixes, ends, strict=True)):
        visited = [game.coalitions[coalition] for coalition in [*own[: end + 1], everyone]]
        before[p, order] = [visited[min(place, end)] for place in range(len(order))]
        after[p, order] = [visited[min(place, end) + 1] for place in range(len(order))]
        share[p, order[end:]] = 1 / (len(order) - end)
    return Walks(before, after, share)


def shapley(material: Material, settings: Shapley, path: Path) -> list[Path]:
    """Shapley values of accuracy and loss on *select*, with 95% intervals.

    Their errors join two parts: the choice of orders, and the choice of images. Values are linear
    in the scores, so each image has its own, and the error over images is that of their mean.
    Writes a table as CSV (in the zoo's order) and Markdown (the largest gain first), and a
    picture.
    """
    session, players = material.session, len(material.session.zoo.names)
    empty = settings.empty or ("base" if session.zoo.base else "chance")
    known = {frozenset[int](): chance(session.select.labels)} if empty == "chance" else {}
    game = Game(players, lambda coalitions: run_soups(session, coalitions), known)
    walks = None
    if 2**players <= settings.permutations * (players - 1) + 2:
        sizes = range(players + 1)
        game.play(frozenset(c) for size in sizes for c in combinations(range(players), size))
        weights = exact_weights(game.coalitions, players)
    else:
        stream = generator(session.seed, f"{session.row}/orders")
        walks = walk(game, paired_orders(players, settings.permutations, stream), settings.truncate)
        weights = walks.weights(len(game.coalitions))
    scores = game.scores
    effects, gains = {}, {}
    for metric, values, each in (
        ("accuracy", scores.accuracies, scores.right),
        ("loss", scores.mean_losses, scores.losses),
    ):
        of_images = standard_error((torch.from_numpy(weights).float() @ each.float()).numpy())
        of_orders = walks.error(values) if walks else np.zeros(players)
        effects[metric] = Effects(weights @ values, np.hypot(of_images, of_orders))
        nobody, everyone = game.coalitions[frozenset()], game.coalitions[frozenset(range(players))]
        gains[metric] = {"empty": float(values[nobody]), "all": float(values[everyone])}
    session.record |= gains | {
        "of_the_empty_soup": empty,
        "exact": walks is None,
        "soups": len(game.coalitions),
        "orders": settings.permutations if walks else None,
        "orders_cut_short": int((walks.share < 1).any(axis=1).sum()) if walks else None,
    }
    return _write(material, effects, path)


def chance(labels: Int[torch.Tensor, " rows"]) -> Scores:
    """The scores of one who knows the classes' shares among the labels and sees no image."""
    shares = torch.bincount(labels).double() / len(labels)
    return Scores.of(shares.log().float().expand(1, len(labels), -1), labels)


def _write(material: Material, effects: dict[str, Effects], path: Path) -> list[Path]:
    names, record = material.session.zoo.names, material.session.record
    accuracy, loss = effects["accuracy"], effects["loss"]
    empty = {"base": "the base", "chance": "the classes' shares alone"}[record["of_the_empty_soup"]]
    how = (
        f"Exact, over all {record['soups']:,} subsets; 95% intervals are over the images."
        if record["exact"]
        else f"Over {record['orders']:,} orders of joining, in pairs of reverses "
        f"({record['soups']:,} soups, {record['orders_cut_short']:,} orders cut short); 95% "
        "intervals are over the orders and the images."
    )
    return [
        write_csv(
            beside(path, ".csv"),
            [
                {"ingredient": name} | accuracy.record("accuracy", k) | loss.record("loss", k)
                for k, name in enumerate(names)
            ],
        ),
        write_markdown(
            beside(path, ".md"),
            "Shapley values of the ingredients",
            ["ingredient", "accuracy, points [95%]", "loss, nats [95%]"],
            [
                [names[k], accuracy.cell(k, scale=100.0), loss.cell(k, digits=4)]
                for k in best_first(accuracy, loss)
            ],
            "What an ingredient changes as it joins a uniform soup, on average over the orders of "
            f"joining. The values sum to what the soup of all is apart from {empty}: accuracy "
            f"{100 * record['accuracy']['empty']:.2f}% → {100 * record['accuracy']['all']:.2f}%, "
            f"loss {record['loss']['empty']:.4f} → {record['loss']['all']:.4f}. {how} "
            f"{material.remark}.",
        ),
        *save_figure(draw_shapley(names, accuracy, loss, material.remark), beside(path, ".png")),
    ]
