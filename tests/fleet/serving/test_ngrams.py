"""Lower layers looked up by n-grams: exact where all is known, within the budget, in order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fleet.errors import FleetError
from fleet.serving.ngrams import RADIX, NGrams, frequent, neighbour, walk
from fleet.tenants import Tenants
from fleet.variants import Node, Store
from tests.fleet.serving import zoo

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 90}
WIDTH = SIZES["hidden_size"]
LONGEST = 2 * 14 + 1


def sentences(count: int, seed: int, low: int = 1, high: int = 60) -> list[torch.Tensor]:
    """Few different tokens: contexts come again."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=draw).tolist()
    return [torch.randint(low, high, (length,), generator=draw) for length in lengths]


def elements(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([row + 1 for row in rows], batch_first=True)


def context(row: list[int], at: int, length: int) -> tuple[int, ...]:
    """The first `length` tokens around a place, nearest first, 0 outside."""
    steps = [0, *(step for far in range(1, length) for step in (-far, far))][:length]
    return tuple(row[at + s] if 0 <= at + s < len(row) else 0 for s in steps)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A store with tenants below the base and below a domain, all with adapters above layer 2."""
    model = zoo.text_model(**SIZES)
    base = zoo.tensors_of(model)
    # As drawn, a token's neighbours hardly matter to it.
    base |= {name: 8 * t for name, t in base.items() if ".layer." in name and t.dim() == 2}
    store = Store.create(tmp_path_factory.mktemp("served") / "store", base)
    store.add_node(Node("domain", "base", {}), {})
    names = [n for n in store.base.tensors if n.endswith(("query.weight", "value.weight"))]
    upper = [n for n in names if ".layer.2." in n or ".layer.3." in n]
    for place, node in enumerate(("base", "domain", "base", "domain")):
        name = f"{node}{place}"
        zoo.add_lora(store, name, upper, 2 + place, [None, 3][place % 2], place)
        store.add(replace(store.variant(name), node=node), {})

    def opened(ngrams: NGrams | None) -> Tenants:
        return Tenants(
            store, zoo.text_model(**SIZES), memory_budget=None, approximate=ngrams, look_ahead=0
        )

    return opened


@pytest.fixture(scope="module")
def exact(served):
    """All of them computed."""
    with served(None) as tenants:
        yield tenants


def answers(tenants: Tenants, rows: list[torch.Tensor], *names: str) -> list[torch.Tensor]:
    requests = [(names[k % len(names)], {"input_ids": row}) for k, row in enumerate(rows)]
    return tenants.predict(requests)


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_neighbours_alternate():
    row = torch.tensor([[5, 6, 7]])
    found = [neighbour(row, step)[0].tolist() for step in range(5)]
    assert found == [[5, 6, 7], [0, 5, 6], [6, 7, 0], [0, 0, 5], [7, 0, 0]]


@pytest.mark.parametrize("most", [None, 40, 7, 0])
def test_the_tree_is_that_of_the_most_frequent_contexts(most):
    rows, longest = sentences(40, 0, high=6), 5
    keys = frequent([elements(rows[:25]), elements(rows[25:])], longest, most)
    lists = [(row + 1).tolist() for row in rows]
    places = [(row, at) for row in lists for at in range(len(row))]
    counts = Counter(context(*place, n) for n in range(1, longest + 1) for place in places)
    grown = {c: n for c, n in counts.items() if len(c) == 1 or counts[c[:-1]] > 1}
    # The contexts that the keys stand for.
    known: list[tuple[int, ...]] = [()]
    for key in keys.tolist():
        known.append((*known[key // RADIX], key % RADIX))
    assert keys.tolist() == sorted(set(keys.tolist()))
    assert set(known[1:]) <= grown.keys()
    assert len(keys) == (len(grown) if most is None else min(most, len(grown)))
    left = [n for c, n in grown.items() if c not in known]
    assert min((grown[c] for c in known[1:]), default=0) >= max(left, default=0) or not most
    for length, place in enumerate(walk(keys, elements(rows), longest), 1):
        for row, found in zip(lists, place.tolist(), strict=True):
            for at in range(len(row)):
                wanted = context(row, at, length)
                assert found[at] == (known.index(wanted) - 1 if wanted in known else -1)


def test_known_sentences_are_exact(served, exact):
    rows = sentences(24, 1)
    names = ("base0", "domain1", "domain3", "base2")
    ngrams = NGrams({"base": rows}, None, longest=LONGEST)
    with served(ngrams) as tenants:
        assert_close(answers(tenants, rows, *names), answers(exact, rows, *names))
        counts = tenants.statistics
    assert counts.feature_misses == 0
    assert counts.feature_hits == sum(map(len, rows))


def test_short_contexts_are_no_more_than_near(served, exact):
    rows = sentences(24, 1)
    with served(NGrams({"base": rows}, None, longest=2)) as tenants:
        found, wanted = answers(tenants, rows, "base0"), answers(exact, rows, "base0")
        far = max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True))
        assert far > 1e-3
        assert tenants.statistics.feature_misses == 0


@pytest.mark.parametrize("budget", [0, 1000, 10_000, 30_000])
def test_the_budget_is_kept(served, budget):
    rows = sentences(40, 2)
    with served(NGrams({"base": rows, "domain": rows}, budget)) as tenants:
        answers(tenants, rows, "base0", "domain1")
        assert tenants.statistics.feature_bytes <= budget
        trees = tenants._features._trees
        assert all(len(t.keys) == budget // 2 // (4 * WIDTH + 8) for t in trees.values())


def test_nothing_known_is_computed(served, exact):
    rows = sentences(12, 3)
    with served(NGrams({"base": rows}, 0)) as tenants:
        assert_close(answers(tenants, rows, "base0"), answers(exact, rows, "base0"))
        assert tenants.statistics.feature_hits == 0


def test_contexts_that_are_too_short_are_computed(served, exact):
    rows, others = sentences(12, 3), sentences(12, 4)
    with served(NGrams({"base": rows}, None, shortest=5)) as tenants:
        assert_close(answers(tenants, others, "base0"), answers(exact, others, "base0"))
        assert tenants.statistics.feature_misses == sum(map(len, others))


def test_first_the_domain_then_the_base_then_computing(served, exact):
    own, general, new = sentences(6, 5, 1, 30), sentences(6, 6, 30, 60), sentences(6, 7, 60, 90)
    ngrams = NGrams({"base": [*general, *own], "domain": own}, None, longest=LONGEST)
    with served(ngrams) as tenants:
        rows = [*own, *general, *new]
        assert_close(answers(tenants, rows, "domain1"), answers(exact, rows, "domain1"))
        assert tenants.statistics.feature_misses == sum(map(len, new))
        trees = tenants._features._trees
        nan = torch.full_like(trees["base"].values, float("nan"))
        trees["base"] = replace(trees["base"], values=nan)
        assert all(a.isfinite().all() for a in answers(tenants, own, "domain1"))
        assert all(a.isnan().any() for a in answers(tenants, general, "domain1"))
        assert all(a.isnan().any() for a in answers(tenants, own, "base0"))
        assert all(a.isfinite().all() for a in answers(tenants, new, "domain1"))
        mixed = torch.cat([own[0], new[0]])
        assert_close(answers(tenants, [mixed], "domain1"), answers(exact, [mixed], "domain1"))


def test_hidden_tokens_are_not_looked_up(served, exact):
    rows = sentences(8, 8)
    hidden = [torch.cat([row, torch.tensor([89, 88])]) for row in rows]
    masks = [
        torch.ones_like(row).index_fill_(0, torch.tensor([-2, -1]) % len(row), 0) for row in hidden
    ]
    requests = [
        ("base0", {"input_ids": row, "attention_mask": mask})
        for row, mask in zip(hidden, masks, strict=True)
    ]
    ngrams = NGrams({"base": rows}, None, longest=LONGEST)
    with served(ngrams) as tenants:
        assert_close(tenants.predict(requests), exact.predict(requests))
        assert tenants.statistics.feature_misses == 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"shortest": 0}, "n-grams of 0 to 5 tokens"),
        ({"shortest": 3, "longest": 2}, "n-grams of 3 to 2 tokens"),
        ({"budget": -1}, "in -1 bytes; wanted 1 <= shortest"),
        ({"sentences": {}}, "n-grams: no sentences"),
        ({"sentences": {"base": []}}, "n-grams of 'base': no sentences"),
    ],
)
def test_settings_that_cannot_be(settings, problem):
    given = {"sentences": {"base": sentences(2, 0)}, "budget": 10}
    with pytest.raises(FleetError, match=problem):
        NGrams(**given | settings)


def test_a_node_that_is_not_there(served):
    with served(NGrams({"birds": sentences(2, 0)}, None)) as tenants:
        for _ in range(2):
            with pytest.raises(FleetError, match="n-grams of 'birds': the store has no such node"):
                answers(tenants, sentences(1, 0), "base0")


def test_tokens_beyond_the_vocabulary(served):
    with (
        served(NGrams({"base": [torch.tensor([1, 90])]}, None)) as tenants,
        pytest.raises(FleetError, match="found 1 to 90, wanted 0 to 89"),
    ):
        answers(tenants, sentences(1, 0), "base0")


def test_a_model_of_images(tmp_path):
    model = zoo.image_model("vit")
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    with pytest.raises(FleetError, match="VisionTransformer does not take 'input_ids'"):
        Tenants(
            store, model, memory_budget=None, approximate=NGrams({"base": sentences(2, 0)}, None)
        )
