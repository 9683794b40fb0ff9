"""What a text encoder's lower layers make of a token, looked up by the tokens around it.

The approximate form of the feature cache (HMI, 2504.17449). A token's context is itself, its left
neighbour, its right one, the second to the left, and so on; contexts are the nodes of a tree, each
with the mean output of the tokens that were seen in it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from fleet.errors import FleetError
from fleet.serving.bound import BoundModel
from fleet.serving.catalogue import Catalogue
from fleet.serving.features import FeatureCache, reached
from fleet.serving.inputs import IDS, MASK, InputReader, Together
from fleet.serving.owned import Layout
from inputs.budget import format_bytes

logger = logging.getLogger(__name__)

__all__ = ["NGrams"]

# A node of a tree is known by its parent's number times this, plus its token.
RADIX = 1 << 32
ROWS = 256


@dataclass(frozen=True)
class NGrams:
    """What is looked up instead of computed: contexts of `shortest` to `longest` tokens.

    `sentences` are rows of token numbers by the store's node whose tenants they are typical of;
    those of "base" are everybody's. Each node's tree gets an equal part of `budget` bytes (None:
    no limit) and keeps the contexts that are seen most often. Places outside of a sentence count
    as tokens of its contexts.
    """

    sentences: Mapping[str, Sequence[Int[Tensor, " _"]]]
    budget: int | None
    longest: int = 5
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or (self.budget or 0) < 0:
            raise FleetError(
                f"n-grams of {self.shortest} to {self.longest} tokens in {self.budget} bytes; "
                "wanted 1 <= shortest <= longest, and bytes, or None for no limit"
            )
        empty = [node for node, rows in self.sentences.items() if not rows]
        if empty or not self.sentences:
            of = f" of {empty[0]!r}" if empty else ""
            raise FleetError(f"n-grams{of}: no sentences; give rows of token numbers")


class NGramCache(FeatureCache):
    """Takes the place of a FeatureCache: a row whose tokens are all found is looked up.

    A token is looked up in the tree of its tenant's node, then in those of the nodes above it; a
    row with a token that is in none of them is computed. `hits` and `misses` count the tokens of
    such rows. Trees are made when the first batch is computed.
    """

    def __init__(self, bound: BoundModel, ngrams: NGrams) -> None:
        super().__init__(bound, 0)
        if not {IDS, MASK} <= inspect.signature(bound.model.forward).parameters.keys():
            raise FleetError(
                f"approximate: {type(bound.model).__name__} does not take {IDS!r} and {MASK!r}; "
                "n-grams are for text encoders, leave them out"
            )
        self._ngrams = ngrams
        self._trees: dict[str, Tree] = {}

    def _is_for(self, inputs: Together) -> bool:
        return inputs.kwargs.keys() <= {IDS, MASK}

    def _begin(self, module: str, catalogue: Catalogue) -> None:
        unknown = sorted(self._ngrams.sentences.keys() - catalogue.nodes.keys())
        if unknown:
            raise FleetError(
                f"n-grams of {unknown[0]!r}: the store has no such node, only "
                f"{', '.join(map(repr, catalogue.nodes))}"
            )
        given, budget = self._ngrams.sentences, self._ngrams.budget
        share = None if budget is None else budget // len(given)
        self._trees = {
            node: grown(self._bound, module, node, rows, share, self._ngrams.longest)
            for node, rows in given.items()
        }
        self.nbytes = sum(tree.nbytes for tree in self._trees.values())
        for node, tree in self._trees.items():
            size = format_bytes(tree.nbytes)
            logger.info("n-grams of %r at %r: %d, %s", node, module, len(tree.keys), size)

    def _features(
        self, module: str, inputs: Together, layout: Layout, catalogue: Catalogue
    ) -> Float[Tensor, "rows tokens width"]:
        elements = _elements(inputs)
        width = next(iter(self._trees.values())).values.shape[1]
        shape = (*elements.shape, width)
        features = torch.zeros(shape, dtype=self._bound.dtype, device=elements.device)
        missing = elements > 0
        for node, start, stop in _stretches(layout):
            for tree in self._trees_of(node, catalogue):
                wanted = missing[start:stop]
                place = tree.find(elements[start:stop], self._ngrams.longest, self._ngrams.shortest)
                found = wanted & (place >= 0)
                features[start:stop][found] = tree.values[place[found]]
                wanted &= ~found
        new = missing.any(1)
        self.hits += int((elements[~new] > 0).sum())
        self.misses += int((elements[new] > 0).sum())
        if new.any():
            rows = new.nonzero().flatten()
            features[rows] = reached(self._bound, module, inputs.select(rows))
        return features

    def _trees_of(self, node: str, catalogue: Catalogue) -> Iterator[Tree]:
        """Those of a node and of the nodes above it, the nearest first."""
        here: str | None = node
        while here is not None:
            if here in self._trees:
                yield self._trees[here]
            here = catalogue.nodes[here].parent


@dataclass(frozen=True)
class Tree:
    """Contexts in the order of their keys, parents before children, and the mean output in each.

    The key of a context is the number of the one that is a token shorter (from 1; 0: none) times
    RADIX, plus its last token's number + 1, or 0 outside of the sentence.
    """

    keys: Int64[Tensor, " contexts"]
    values: Float[Tensor, "contexts width"]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def find(
        self, elements: Int64[Tensor, "rows tokens"], longest: int, shortest: int
    ) -> Int64[Tensor, "rows tokens"]:
        """The place of each token's longest context that is here; −1 where none is."""
        found = torch.full_like(elements, -1)
        for length, place in enumerate(walk(self.keys, elements, longest), 1):
            if length >= shortest:
                found = torch.where(place >= 0, place, found)
        return found


def walk(
    keys: Int64[Tensor, " contexts"], elements: Int64[Tensor, "rows tokens"], longest: int
) -> Iterator[Int64[Tensor, "rows tokens"]]:
    """For growing contexts of each token, its place among `keys`; −1 once it is not there."""
    place = torch.full_like(elements, -1)
    there = elements > 0
    for step in range(longest):
        if not len(keys) or not there.any():
            return
        key = (place + 1) * RADIX + neighbour(elements, step)
        place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        there = there & (keys[place] == key)
        place = torch.where(there, place, -1)
        yield place


def neighbour(elements: Int64[Tensor, "rows tokens"], step: int) -> Int64[Tensor, "rows tokens"]:
    """Each token itself, its left neighbour, its right one, the second to the left, …; or 0."""
    far, tokens = (step + 1) // 2, elements.shape[1]
    if step % 2:
        return F.pad(elements, (far, 0))[:, :tokens]
    return F.pad(elements, (0, far))[:, far:]


def grown(
    bound: BoundModel,
    module: str,
    node: str,
    rows: Sequence[Int[Tensor, " _"]],
    budget: int | None,
    longest: int,
) -> Tree:
    """The tree of the most frequent contexts in `rows`, within `budget` bytes.

    Values are the means of what `module` is given for tokens in that context.
    """
    reader = InputReader(bound.model, bound.dtype, bound.device)
    asked = [reader.read(place, node, {IDS: row}) for place, row in enumerate(rows)]
    asked.sort(key=lambda one: one.tokens or 0)
    batches = [reader.together(asked[k : k + ROWS]) for k in range(0, len(asked), ROWS)]
    with torch.inference_mode():
        width, itemsize = _width(bound, module, batches[0]), bound.dtype.itemsize
        most = None if budget is None else budget // (width * itemsize + 8)
        keys = frequent([_elements(batch) for batch in batches], longest, most)
        wide = torch.promote_types(bound.dtype, torch.float32)
        sums = torch.zeros(len(keys), width, dtype=wide, device=keys.device)
        counts = torch.zeros_like(keys)
        for batch in batches if len(keys) else ():
            outputs = reached(bound, module, batch).to(wide)
            for place in walk(keys, _elements(batch), longest):
                here = place >= 0
                sums.index_add_(0, place[here], outputs[here])
                counts += place[here].bincount(minlength=len(keys))
        return Tree(keys, sums.div_(counts[:, None]).to(bound.dtype))


def frequent(
    batches: Sequence[Int64[Tensor, "_ _"]], longest: int, most: int | None
) -> Int64[Tensor, " contexts"]:
    """The keys of the `most` frequent contexts; of equally frequent ones, the shorter.

    A context that is seen once is not made longer: its token's output is known exactly.
    """
    growing = [batch > 0 for batch in batches]
    parents = torch.cat(
        [batch.new_zeros(int(g.sum())) for batch, g in zip(batches, growing, strict=True)]
    )
    levels: list[Tensor] = []
    counts: list[Tensor] = []
    numbered = 0
    for step in range(longest):
        if not len(parents):
            break
        last = [neighbour(e, step)[g] for e, g in zip(batches, growing, strict=True)]
        keys, place, seen = (parents * RADIX + torch.cat(last)).unique(
            return_inverse=True, return_counts=True
        )
        levels.append(keys)
        counts.append(seen)
        again = seen[place] > 1
        parents = (numbered + 1 + place)[again]
        for mine, kept in zip(growing, again.split([len(one) for one in last]), strict=True):
            mine[mine.clone()] = kept
        numbered += len(keys)
    every = torch.cat(levels)
    often = torch.cat(counts).sort(descending=True, stable=True).indices
    # A parent is as frequent as its child and comes before it, so it is kept where the child is.
    kept = often[: len(often) if most is None else most].sort().values
    number = every.new_zeros(len(every) + 1)
    number[kept + 1] = torch.arange(1, len(kept) + 1, device=kept.device)
    return number[every[kept] // RADIX] * RADIX + every[kept] % RADIX


def _elements(inputs: Together) -> Int64[Tensor, "rows tokens"]:
    """Token numbers + 1; 0 where the mask hides them."""
    elements = inputs.kwargs[IDS] + 1
    mask = inputs.kwargs.get(MASK)
    return elements if mask is None else elements * mask.bool()


def _width(bound: BoundModel, module: str, inputs: Together) -> int:
    outputs = reached(bound, module, inputs.select(torch.arange(1)))
    if outputs.dim() != 3 or outputs.shape[:2] != (1, inputs.tokens):
        raise FleetError(
            f"n-grams at {module!r}: it is given {list(outputs.shape)} for one row of "
            f"{inputs.tokens} tokens, wanted [rows, tokens, width]; leave approximate out"
        )
    return outputs.shape[2]


def _stretches(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Node, first row and end of neighbouring segments of one node."""
    segments = zip(layout.nodes, layout.edges, strict=True)
    for node, neighbours in groupby(segments, key=itemgetter(0)):
        edges = [edge for _, edge in neighbours]
        yield node, edges[0][0], edges[-1][1]
