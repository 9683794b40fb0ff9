"""Selection over all ingredients at every step, forward and backward, chosen by cross-fitting."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64
from tqdm.auto import tqdm

from inputs.data import ImageSet
from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.errors import SoupError
from soups.evaluate import Scores
from soups.learners.registry import GreedyFull
from soups.learners.score_log import ScoreLog
from soups.session import Session

# How often each ingredient is in a soup.
Soup = tuple[int, ...]
# The soup after each move of a walk, from the one that it begins with.
Path = list[Soup]
# Asks for the scores of soups until it knows its path.
Walk = Generator[list[Soup], None, Path]
# A soup on some folds: the metric, then what decides between equals; larger is better.
Key = tuple[float, float]
Kind = Literal["greedy", "forward", "backward"]

KINDS: tuple[Kind, ...] = ("greedy", "forward", "backward")


def greedy_full(session: Session, settings: GreedyFull) -> Coefficients:
    """The walk, and the number of its moves, that are best on images which it did not see.

    `forward` begins with the best single ingredient, `backward` with all of them; a move is the
    best of all additions and removals that lead to a soup not visited yet. A walk ends at its best,
    after `patience` moves that found none better. Each is found without one fold of *select* in
    turn and scored on that fold; of all walks and numbers of moves the one with the best scores out
    of fold is taken (see `choose` for `rule`), as the walk goes on all of *select*. Greedy's soups
    are among them, so out of fold the choice is at least as good as greedy. All walks go in step:
    what they want to know next is one pass.
    """
    known = KnownSoups(session, settings)
    everywhere = frozenset(range(settings.folds))
    views = [everywhere - {fold} for fold in range(settings.folds)]
    walks = [walk(kind, known, view, settings) for kind in KINDS for view in (*views, everywhere)]
    paths = together(walks, known)
    trials: dict[Kind, Trial] = {}
    for kind in KINDS:
        *in_fold, final = (paths.pop(0) for _ in (*views, everywhere))
        trials[kind] = Trial.of(in_fold, final, known)
    kind, moves = choose(trials, settings.rule)
    final = trials[kind].final
    soup = final[min(moves, len(final) - 1)]
    session.record |= _record(session, known, trials, kind, moves)
    return session.coefficients(session.groups(settings), matrix_of(soup), settings)


class KnownSoups:
    """What is known of soups so far, fold by fold; scores the others, many in one pass."""

    def __init__(self, session: Session, settings: GreedyFull) -> None:
        count = len(session.select)
        if count < settings.folds:
            raise SoupError(
                f"learners.{session.row}.folds: {settings.folds} is more than the {count} images "
                "of select; lower it, or give select more images"
            )
        self.ingredients = len(session.zoo.checkpoints)
        self.metric = settings.metric
        stream = generator(session.seed, f"{session.row}/folds")
        self._rows = torch.randperm(count, generator=stream).tensor_split(settings.folds)
        self._sizes = np.array([len(rows) for rows in self._rows])
        self._score_log = ScoreLog(session, session.whole_model(), self._by_fold)
        self._values: dict[Soup, np.ndarray] = {}
        self._bar = tqdm(desc=session.row, unit="soup", disable=not session.progress)

    @property
    def candidates(self) -> int:
        """How many soups were scored."""
        return len(self._values)

    def knows(self, soups: Iterable[Soup]) -> bool:
        """Whether all of them were scored."""
        return all(in_lowest_terms(soup) in self._values for soup in soups)

    def score(self, soups: Iterable[Soup]) -> None:
        """Score those that are not known, in one pass."""
        unknown = sorted({in_lowest_terms(soup) for soup in soups} - self._values.keys())
        if unknown:
            found = self._score_log(np.stack([matrix_of(soup) for soup in unknown]))
            self._values |= dict(zip(unknown, found, strict=True))
            self._bar.update(len(unknown))

    def key(self, soup: Soup, folds: Iterable[int]) -> Key:
        """The mean of the metric on these folds, and that of the other measure."""
        chosen = sorted(folds)
        right, negative_loss = self._values[in_lowest_terms(soup)].reshape(2, -1)[:, chosen].sum(1)
        images = self._sizes[chosen].sum()
        accuracy, loss = float(right / images), float(negative_loss / images)
        return (accuracy, loss) if self.metric == "accuracy" else (loss, accuracy)

    def right(self, soup: Soup, folds: Iterable[int]) -> int:
        """How many images of these folds are right."""
        return int(self._values[in_lowest_terms(soup)][sorted(folds)].sum())

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _by_fold(self, scores: Scores, images: ImageSet) -> Float64[np.ndarray, "candidates _"]:
        """For each fold the number of images that are right; then minus the sum of the losses."""
        right, losses = scores.right.double(), scores.losses.double()
        columns = [right[:, rows].sum(1) for rows in self._rows]
        columns += [-losses[:, rows].sum(1) for rows in self._rows]
        return np.nan_to_num(torch.stack(columns, dim=1).numpy(), nan=-np.inf, neginf=-np.inf)


def walk(kind: Kind, known: KnownSoups, view: frozenset[int], settings: GreedyFull) -> Walk:
    """One walk on the folds of `view`."""
    count = known.ingredients
    singles = [tuple(int(i == k) for i in range(count)) for k in range(count)]
    if kind == "greedy":
        return _greedy(singles, known, view)
    starts = singles if kind == "forward" else [(1,) * count]
    return _best_moves(starts, known, view, settings)


def _greedy(singles: list[Soup], known: KnownSoups, view: frozenset[int]) -> Walk:
    """Greedy soup (2203.05482, recipe 1) with `ge`; its path is the soups that it kept."""
    yield singles
    first, *others = sorted(singles, key=lambda soup: -known.right(soup, view))
    path = [first]
    for single in others:
        trial = tuple(a + b for a, b in zip(path[-1], single, strict=True))
        yield [trial]
        if known.right(trial, view) >= known.right(path[-1], view):
            path.append(trial)
    return path


def _best_moves(
    starts: list[Soup], known: KnownSoups, view: frozenset[int], settings: GreedyFull
) -> Walk:
    options, path, best = starts, [], 0
    visited: set[Soup] = set()
    while options and len(path) <= best + settings.patience:
        yield options
        path.append(max(options, key=lambda soup: known.key(soup, view)))
        if known.key(path[-1], view) > known.key(path[best], view):
            best = len(path) - 1
        visited.add(in_lowest_terms(path[-1]))
        around = neighbours(path[-1], replacement=settings.replacement)
        options = [soup for soup in around if in_lowest_terms(soup) not in visited]
    return path[: best + 1]


def neighbours(soup: Soup, *, replacement: bool) -> Iterator[Soup]:
    """All soups with one ingredient more, then all with one less."""
    for k, count in enumerate(soup):
        if count == 0 or replacement:
            yield (*soup[:k], count + 1, *soup[k + 1 :])
    for k, count in enumerate(soup):
        if count and sum(soup) > 1:
            yield (*soup[:k], count - 1, *soup[k + 1 :])


def together(walks: Sequence[Walk], known: KnownSoups) -> list[Path]:
    """Lead all walks to their ends; what they ask for at a time is scored in one pass."""
    paths: dict[int, Path] = {}
    asked = {number: next(walk) for number, walk in enumerate(walks)}
    while asked:
        known.score(soup for soups in asked.values() for soup in soups)
        for number in [*asked]:
            try:
                while known.knows(asked[number]):
                    asked[number] = next(walks[number])
            except StopIteration as end:
                paths[number] = end.value
                del asked[number]
    known.close()
    return [paths[number] for number in range(len(walks))]


@dataclass(frozen=True)
class Trial:
    """One kind of walk, cross-fitted; it stays at its end where it has fewer moves than asked.

    `final` is the walk on all of *select*; `inside` and `outside` are the keys [moves, folds, 2]
    on the images that the walk of a fold was found on, and on those of the fold itself.
    """

    final: Path
    inside: Float64[np.ndarray, "moves folds 2"]
    outside: Float64[np.ndarray, "moves folds 2"]

    @classmethod
    def of(cls, paths: Sequence[Path], final: Path, known: KnownSoups) -> Trial:
        """The trial of walks that were each found without one fold, in the order of the folds."""
        folds = frozenset(range(len(paths)))
        inside, outside = [], []
        for moves in range(max(map(len, (*paths, final)))):
            soups = [path[min(moves, len(path) - 1)] for path in paths]
            inside.append([known.key(soup, folds - {f}) for f, soup in enumerate(soups)])
            outside.append([known.key(soup, {f}) for f, soup in enumerate(soups)])
        return cls(final, np.array(inside), np.array(outside))

    def score(self, moves: int) -> Key:
        """The mean over the folds, out of fold."""
        metric, other = self.outside[moves].mean(axis=0).round(12).tolist()
        return metric, other


def choose(trials: Mapping[Kind, Trial], rule: Literal["best", "one_se"]) -> tuple[Kind, int]:
    """The walk and the number of moves with the best score out of fold.

    `one_se`: the fewest moves of that walk that are worse, by the mean of the differences over the
    folds, by no more than its standard error, and no worse than all of greedy: fewer moves are
    fewer choices fitted to *select*. Of equals the first walk, and the fewest moves.
    """
    every: list[tuple[Kind, int]] = [
        (kind, n) for kind in KINDS for n in range(len(trials[kind].outside))
    ]
    kind, best = max(every, key=lambda choice: trials[choice[0]].score(choice[1]))
    if rule == "best":
        return kind, best
    trial, greedy = trials[kind], trials["greedy"]
    least = greedy.score(len(greedy.outside) - 1)[0]
    for moves in range(best):
        worse = trial.outside[best, :, 0] - trial.outside[moves, :, 0]
        error = worse.std(ddof=1) / math.sqrt(len(worse))
        if worse.mean() <= error and trial.score(moves)[0] >= least:
            return kind, moves
    return kind, best


def in_lowest_terms(soup: Soup) -> Soup:
    """The same soup with the smallest counts."""
    divisor = math.gcd(*soup)
    return tuple(count // divisor for count in soup)


def matrix_of(soup: Soup) -> Float64[np.ndarray, "ingredients 1"]:
    """Its coefficients."""
    counts = np.array(soup, dtype=np.float64)
    return (counts / counts.sum())[:, None]


def _record(
    session: Session, known: KnownSoups, trials: Mapping[Kind, Trial], kind: Kind, moves: int
) -> dict[str, Any]:
    final = trials[kind].final[: moves + 1]
    curves = {
        name: {
            "in_fold": trial.inside.mean(axis=1)[:, 0].tolist(),
            "out_of_fold": trial.outside.mean(axis=1)[:, 0].tolist(),
        }
        for name, trial in trials.items()
    }
    named = zip(session.zoo.names, final[-1], strict=True)
    return {
        "candidates": known.candidates,
        "walk": kind,
        "moves": len(final) - 1,
        "out_of_fold": trials[kind].score(moves)[0],
        "members": {name: count for name, count in named if count},
        "begins_with": [n for n, count in zip(session.zoo.names, final[0], strict=True) if count],
        "path": [_move(session, *pair) for pair in pairwise(final)],
        "curves": curves,
    }


def _move(session: Session, before: Soup, after: Soup) -> str:
    changes = zip(session.zoo.names, before, after, strict=True)
    return next(f"{'+' if b > a else '-'} {name}" for name, a, b in changes if a != b)
