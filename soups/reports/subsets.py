"""Soups of fewer ingredients: chosen on *select*, and judged on *report* when learning is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from inputs.data import ImageSet
from inputs.figures import save_figure
from inputs.randomness import generator
from soups.plots.counts import BEST, RANDOM, REMOVED, draw_subsets
from soups.reports.coalitions import Coalition, run_soups
from soups.reports.material import Material
from soups.reports.registry import Subsets
from soups.reports.tables import beside, standard_error, write_csv, write_markdown
from soups.session import Session

# So many soups are judged in one call, which keeps each image's outcome until it is averaged.
AT_ONCE = 256


@dataclass(frozen=True)
class Soup:
    """The `soup` of `count` ingredients, or of all but the `count` best; `members` are by number.

    `of`: the best first, the best removed, or random ones, in the random order of this number.
    """

    of: str
    count: int
    soup: Literal["best_single", "uniform", "greedy"]
    members: Coalition
    order: int | None = None


def choose_subsets(material: Material, settings: Subsets, path: Path) -> list[Path]:
    """Order the ingredients by their accuracy on *select*, and select greedily, there too.

    Greedy selection from the best n begins like that from all, so that one walk is all of these;
    those without the best r go on together, a place in the order at a time. What is found goes
    into the record; nothing is written.
    """
    session, names = material.session, material.session.zoo.names
    accuracies = session.ingredient_accuracies()
    order = sorted(range(len(names)), key=lambda k: -accuracies[k])
    bar = tqdm(total=len(order) - 1, desc=session.row, disable=not session.progress)
    with bar:
        members = greedy_along(
            [order[removed:] for removed in range(len(order))],
            accuracies,
            lambda trials: run_soups(session, trials).accuracies.tolist(),
            settings.accept,
            decided=bar.update,
        )
    stream = generator(session.seed, f"{session.row}/orders")
    orders = [torch.randperm(len(order), generator=stream).tolist() for _ in range(settings.orders)]
    session.record |= {
        "best_first": [names[k] for k in order],
        "greedy_without_the_best": [[names[k] for k in own] for own in members],
        "random_orders": [[names[k] for k in own] for own in orders],
    }
    return []


def greedy_along(
    orders: Sequence[Sequence[int]],
    accuracies: Sequence[float],
    score: Callable[[Sequence[Coalition]], Sequence[float]],
    accept: Literal["gt", "ge"],
    *,
    decided: Callable[[int], object] = lambda places: None,
) -> list[list[int]]:
    """The members that greedy selection (2203.05482, recipe 1) keeps along each of the orders.

    All orders are walked together, so that `score` is asked once for each place: one candidate for
    each order that is so long. `accuracies` are those of the ingredients by themselves.
    """
    members = [[order[0]] for order in orders]
    best = [accuracies[order[0]] for order in orders]
    for place in range(1, max(map(len, orders))):
        going = [walk for walk, order in enumerate(orders) if place < len(order)]
        scores = score([frozenset([*members[walk], orders[walk][place]]) for walk in going])
        for walk, value in zip(going, scores, strict=True):
            if value > best[walk] or (accept == "ge" and value == best[walk]):
                members[walk].append(orders[walk][place])
                best[walk] = value
        decided(1)
    return members


def judge_subsets(
    material: Material, found: Mapping[str, Any], images: ImageSet, path: Path
) -> list[Path]:
    """The accuracy and loss of the chosen soups on `images`, which are those of *report*.

    Each set of members is run once, however many soups it is. Writes a table as CSV (a row for
    each soup) and Markdown (a row for each count), and a picture.
    """
    session = material.session
    soups = [*soups_of(found, session.zoo.names)]
    scores = _scores(session, [soup.members for soup in soups], images)
    rows = [
        {
            "of": soup.of,
            "count": soup.count,
            "soup": soup.soup,
            "order": "" if soup.order is None else soup.order,
            "members": len(soup.members),
            **scores[soup.members],
        }
        for soup in soups
    ]
    remark = material.judged_remark(images)
    return [
        write_csv(beside(path, ".csv"), rows),
        write_markdown(
            beside(path, ".md"),
            "Accuracy against the number of ingredients",
            ["n", *(f"{name}, {of}" for of, name in _COLUMNS), "uniform, random n"],
            [_line(rows, count) for count in range(len(session.zoo.names) + 1)],
            f"In percent, on {remark}. “Best n”: soups of the n ingredients that are best on "
            "*select*; “without n”: of all but those. Random: the mean over "
            f"{len(found['random_orders'])} orders, from the least to the largest.",
        ),
        *save_figure(draw_subsets(rows, remark), beside(path, ".png")),
    ]


def soups_of(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[Soup]:
    """All soups that follow from what was found on *select*."""
    number = {name: k for k, name in enumerate(names)}
    order = [number[name] for name in found["best_first"]]
    kept = [[number[name] for name in own] for own in found["greedy_without_the_best"]]
    of_all = set(kept[0])
    for count in range(1, len(order) + 1):
        yield Soup(BEST, count, "best_single", frozenset(order[:1]))
        yield Soup(BEST, count, "uniform", frozenset(order[:count]))
        yield Soup(BEST, count, "greedy", frozenset(of_all & set(order[:count])))
    for removed in range(len(order)):
        yield Soup(REMOVED, removed, "best_single", frozenset(order[removed : removed + 1]))
        yield Soup(REMOVED, removed, "uniform", frozenset(order[removed:]))
        yield Soup(REMOVED, removed, "greedy", frozenset(kept[removed]))
    for which, random in enumerate(found["random_orders"]):
        members = [number[name] for name in random]
        for count in range(1, len(members) + 1):
            yield Soup(RANDOM, count, "uniform", frozenset(members[:count]), which)


def _scores(
    session: Session, coalitions: Sequence[Coalition], images: ImageSet
) -> dict[Coalition, dict[str, float]]:
    """Accuracy and loss with their standard errors over the images, of each coalition."""
    different = [*dict.fromkeys(coalitions)]
    found: dict[Coalition, dict[str, float]] = {}
    starts = range(0, len(different), AT_ONCE)
    for start in tqdm(starts, desc=session.row, disable=not session.progress):
        together = different[start : start + AT_ONCE]
        scores = run_soups(session, together, images)
        columns = {
            "accuracy": scores.accuracies,
            "accuracy_error": standard_error(scores.right.double()),
            "loss": scores.mean_losses,
            "loss_error": standard_error(scores.losses),
        }
        for k, coalition in enumerate(together):
            found[coalition] = {name: float(values[k]) for name, values in columns.items()}
    return found


_COLUMNS = [(of, soup) for of in (BEST, REMOVED) for soup in ("best_single", "uniform", "greedy")]


def _line(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """The line of the Markdown table for so many ingredients."""
    of_count = [row for row in rows if row["count"] == count]
    cells = {(row["of"], row["soup"]): f"{100 * row['accuracy']:.2f}" for row in of_count}
    random = [100 * row["accuracy"] for row in of_count if row["of"] == RANDOM]
    ends = f"{np.mean(random):.2f} [{min(random):.2f}, {max(random):.2f}]" if random else ""
    return [str(count), *(cells.get(column, "") for column in _COLUMNS), ends]
