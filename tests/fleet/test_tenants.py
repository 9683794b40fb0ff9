"""Each tenant's answer in a mixed batch is that of its exported weights alone."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from fleet.errors import FleetError
from fleet.tenants import Tenants
from fleet.variants import Store
from tests.fleet.serving import zoo
from tests.kernels.grouped import unchecked  # noqa: F401

DTYPES = [torch.float64, torch.float32]


def texts(count: int, seed: int, longest: int = 12) -> list[dict[str, torch.Tensor]]:
    lengths = random.Random(seed)
    made = []
    for place in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        ids = torch.randint(1, 512, (lengths.randint(2, longest),), generator=generator)
        made.append({"input_ids": ids})
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_mixed_ranks_and_heads_of_mixed_widths(tmp_path, dtype):
    model = zoo.text_model(dtype, hidden_size=64, intermediate_size=96)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    names = [n for n in store.base.tensors if n.endswith(("query.weight", "value.weight"))]
    assert len(names) == 8
    ranks = [1, 3, 8, 16, 40, 64]
    for place, rank in enumerate(ranks):
        zoo.add_lora(
            store, f"t{place}", names[: 8 - place], rank, [2, 5, 7, None][place % 4], place
        )
    order = [*range(len(ranks)), *random.Random(1).choices(range(len(ranks)), k=8)]
    random.Random(2).shuffle(order)
    requests = [(f"t{k}", text) for k, text in zip(order, texts(14, 3), strict=True)]
    served = zoo.text_model(dtype, hidden_size=64, intermediate_size=96)
    with Tenants(store, served, memory_budget=None) as tenants:
        found = tenants.predict(requests)
        for answer, (name, given) in zip(found, requests, strict=True):
            wanted = zoo.alone(model, store, name, given, tmp_path, dtype)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpt2_whose_layers_are_transposed(tmp_path, dtype):
    model = zoo.gpt2(dtype)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    names = [n for n in store.base.tensors if n.endswith(("c_attn.weight", "c_proj.weight"))]
    for place, rank in enumerate((2, 5, 16)):
        zoo.add_lora(store, f"lora{place}", names, rank, None, place)
    for place, name in enumerate(("low_rank", "int4", "plain")):
        zoo.add_fine_tune(store, name, WAYS[name], seed=place)
    names = [*store.variants] * 3
    random.Random(1).shuffle(names)
    requests = list(zip(names, texts(18, 3), strict=True))
    with Tenants(store, zoo.gpt2(dtype), memory_budget=None) as tenants:
        for answer, (name, given) in zip(tenants.predict(requests), requests, strict=True):
            wanted = zoo.alone(model, store, name, given, tmp_path, dtype)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 0


def images(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [zoo.numbers(3, 32, 32, seed=1000 * seed + k).to(dtype) for k in range(count)]


WAYS = {
    "low_rank": lambda key, value: (
        ("low_rank", {"rank": min(3, *value.shape), "factors": "float64"})
        if value.dim() == 2
        else ("plain", {})
    ),
    "half_rank": lambda key, value: (
        ("low_rank", {"rank": min(2, *value.flatten(1).shape)}) if value.dim() > 1 else None
    ),
    "sign": lambda key, value: (
        ("sign", {"scales": "row"}) if value.dim() > 1 and "embed" not in key else ("plain", {})
    ),
    "int4": lambda key, value: ("int4", {"group": 16}),
    "plain": lambda key, value: ("plain", {}),
    "norms": lambda key, value: ("plain", {}) if "norm" in key or "bn" in key else None,
    "sparse": lambda key, value: ("sparse", {"count": 1 + value.numel() // 10}),
    "changed": lambda key, value: ("changed", {}) if "2" in key else None,
    "head": lambda key, value: ("plain", {}) if key.startswith(("head", "fc")) else None,
}


@pytest.mark.parametrize(
    ("kind", "decoded", "dtype"),
    [
        ("vit", False, torch.float64),
        ("vit", True, torch.float32),
        ("resnet", False, torch.float32),
        ("resnet", True, torch.float64),
        ("convnext", False, torch.float64),
    ],
)
def test_fine_tunes_in_every_encoding(tmp_path, kind, decoded, dtype):
    model = zoo.image_model(kind, dtype)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    for place, (name, ways) in enumerate(WAYS.items()):
        zoo.add_fine_tune(store, name, ways, seed=place)
    names = [*WAYS, "low_rank", "int4", "norms", "low_rank"]
    random.Random(0).shuffle(names)
    requests = list(zip(names, images(len(names), 5, dtype), strict=True))
    served = zoo.image_model(kind, dtype)
    with Tenants(store, served, memory_budget=None, decoded=decoded) as tenants:
        found = tenants.predict(requests)
        for answer, (name, given) in zip(found, requests, strict=True):
            wanted = zoo.alone(model, store, name, given, tmp_path, dtype)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 0


def test_text_fine_tunes_and_padding(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = zoo.text_model(torch.float64, **sizes)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    for place, name in enumerate(("low_rank", "plain", "int4", "changed")):
        zoo.add_fine_tune(store, name, WAYS[name], seed=place)
    given = texts(9, 4)
    given[2]["attention_mask"] = torch.ones_like(given[2]["input_ids"])
    given[3]["attention_mask"] = torch.ones_like(given[3]["input_ids"])
    given[3]["attention_mask"][-1] = 0
    given[4]["token_type_ids"] = torch.ones_like(given[4]["input_ids"])
    names = [["low_rank", "plain", "int4", "changed"][k % 4] for k in range(9)]
    with Tenants(store, zoo.text_model(torch.float64, **sizes), memory_budget=None) as tenants:
        found = tenants.predict(list(zip(names, given, strict=True)))
        for answer, name, text in zip(found, names, given, strict=True):
            wanted = zoo.alone(model, store, name, text, tmp_path, torch.float64)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 0


@pytest.fixture
def vit(tmp_path):
    """A store of tenants below nodes and below the base, and the base's model."""
    model = zoo.image_model("vit", torch.float64)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    keys = [key for key in store.base.tensors if key.startswith("blocks.1") or key == "pos_embed"]
    for place, node in enumerate(("birds", "cars")):
        values = zoo.add_node(store, node, keys, seed=place)
        for n, name in enumerate(("low_rank", "norms", "int4", "head")):
            parent = values if place else None
            zoo.add_fine_tune(
                store,
                f"{node}_{name}",
                WAYS[name],
                10 * place + n,
                node if place else "base",
                parent,
            )
    return store, model


def asked(count: int, names: list[str], seed: int) -> list[tuple[str, torch.Tensor]]:
    chosen = random.Random(seed)
    given = images(count, seed, torch.float64)
    return [(chosen.choice(names), image) for image in given]


def test_nodes_and_merged_vectors(tmp_path, vit):
    store, model = vit
    key = "blocks.1.mlp.fc1.weight"
    base = store.packs.read(store.base.tensors[key].parts["value"])
    unified = 0.05 * zoo.numbers(*base.shape, seed=9).double()
    for place in range(3):
        parent = zoo.moved(key, base, 500)
        value = parent + unified * (zoo.numbers(*base.shape, seed=place) > 0)
        record, own = zoo.encoded("emr", value, parent, unified=unified)
        store.add(zoo.Variant(f"emr{place}", "birds", {key: record}), own)
    names = list(store.variants)
    requests = [
        (name, image) for name, image in zip(names * 2, images(22, 1, torch.float64), strict=True)
    ]
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        found = tenants.predict(requests)
        # Five of the tenants have parts of their own; a node each, and one vector for three.
        assert tenants.statistics.misses == len(names) + 2 + 1
        for answer, (name, given) in zip(found, requests, strict=True):
            wanted = zoo.alone(model, store, name, given, tmp_path, torch.float64)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 0


def test_answers_do_not_depend_on_batch_order_or_residency(vit):
    store, _ = vit
    requests = asked(24, list(store.variants), seed=2)
    largest = max(store.nbytes(name) for name in store.variants)
    nodes = sum(store.packs.nbytes(e.parts["value"]) for e in store.nodes["cars"].tensors.values())
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        wanted = tenants.predict(requests)
    budget = (largest + nodes) * 13 // 10
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=budget) as tenants:
        places = list(range(24))
        for seed in range(3):
            random.Random(seed).shuffle(places)
            found = tenants.predict([requests[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                zoo.assert_as_alone(answer, wanted[place])
        parts = [requests[:1], requests[1:2], requests[2:9], [], requests[9:]]
        streamed = [answer for batch in tenants.stream(parts) for answer in batch]
        for found, expected in zip(streamed, wanted, strict=True):
            zoo.assert_as_alone(found, expected)
        statistics = tenants.statistics
        assert statistics.evictions > 10
        assert statistics.resident_bytes <= budget
        assert statistics.requests == 4 * 24
        assert statistics.bytes_read > 0
        assert 0 <= statistics.hidden <= 1


def test_bottleneck_adapters(tmp_path):
    model = zoo.text_model(torch.float64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    modules = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.output"]
    wanted = {}
    given = texts(8, 6)
    for place, (width, activation) in enumerate([(3, "relu"), (8, "gelu"), (1, "relu")]):
        records, tensors, adapters = {}, {}, {}
        for k, module in enumerate(modules[: 2 - place // 2]):
            seed = 10 * place + k
            made = {
                "down": zoo.numbers(width, 32, seed=seed) / 5,
                "down_bias": zoo.numbers(width, seed=seed + 100),
                "up": zoo.numbers(32, width, seed=seed + 200),
                "up_bias": zoo.numbers(32, seed=seed + 300),
            }
            made = {part: tensor.double() for part, tensor in made.items()}
            records[module], own = zoo.parts("bottleneck", made, {"activation": activation})
            tensors |= own
            adapters[module] = (made, activation)
        store.add(zoo.Variant(f"t{place}", "base", {}, adapters=records), tensors)
        wanted[f"t{place}"] = adapters
    zoo.add_lora(store, "plain", ["bert.encoder.layer.1.output.dense.weight"], 2, 3, 1)
    names = ["t0", "t1", "plain", "t2", "t0", "t1", "plain", "t2"]
    with Tenants(
        store,
        zoo.text_model(torch.float64, hidden_size=32, intermediate_size=48, num_hidden_layers=2),
        memory_budget=None,
    ) as tenants:
        found = tenants.predict(list(zip(names, given, strict=True)))
        assert tenants.statistics.alone == 0
    for answer, name, text in zip(found, names, given, strict=True):
        if name == "plain":
            expected = zoo.alone(model, store, name, text, tmp_path, torch.float64)
        else:
            expected = with_adapters(model, wanted[name], text)
        zoo.assert_as_alone(answer, expected)


def with_adapters(model, adapters, text):
    handles = []
    for module, (made, activation) in adapters.items():

        def hook(module, args, y, made=made, activation=activation):
            narrow = torch.nn.functional.linear(y, made["down"], made["down_bias"])
            narrow = getattr(torch.nn.functional, activation)(narrow)
            return y + torch.nn.functional.linear(narrow, made["up"], made["up_bias"])

        handles.append(model.get_submodule(module).register_forward_hook(hook))
    with torch.no_grad():
        found = model(**{key: tensor[None] for key, tensor in text.items()}).logits[0]
    for handle in handles:
        handle.remove()
    return found


class Odd(torch.nn.Module):
    """Something without a rule, and a head that is a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, 4)
        self.mix = torch.nn.Parameter(zoo.numbers(8, 8, seed=1))
        self.head = torch.nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = torch.einsum("rchw,dc->rdhw", self.stem(x), self.mix)
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)


def test_what_has_no_rule_runs_alone_and_exactly(tmp_path, caplog):
    model = Odd().double()
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    zoo.add_fine_tune(store, "stem", lambda key, value: ("plain", {}) if "stem" in key else None, 1)
    zoo.add_fine_tune(store, "mix", lambda key, value: ("int4", {"group": 4}), 2)
    wide = {"head.weight": zoo.numbers(9, 8, 1, 1, seed=3), "head.bias": zoo.numbers(9, seed=4)}
    made = {key: zoo.encoded("plain", value.double(), None) for key, value in wide.items()}
    tensors = {digest: t for _, own in made.values() for digest, t in own.items()}
    store.add(zoo.Variant("wide", "base", {key: one for key, (one, _) in made.items()}), tensors)
    names = ["mix", "stem", "wide", "mix", "stem"]
    requests = list(zip(names, images(5, 1, torch.float64), strict=True))
    with Tenants(store, Odd().double(), memory_budget=None) as tenants:
        for _ in range(2):
            found = tenants.predict(requests)
            for answer, (name, given) in zip(found, requests, strict=True):
                wanted = zoo.alone(model, store, name, given, tmp_path, torch.float64)
                zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.alone == 2 * 3
    assert len([record for record in caplog.records if "run alone" in record.message]) == 1


def test_a_store_in_float32_computed_in_float64(tmp_path):
    model = zoo.image_model("vit")
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    for place, name in enumerate(("plain", "int4", "changed", "sign")):
        zoo.add_fine_tune(store, name, WAYS[name], seed=place)
    requests = list(zip(("plain", "int4", "changed", "sign"), images(4, 1), strict=True))
    wide = zoo.image_model("vit", torch.float64)
    with Tenants(store, wide, memory_budget=None, dtype=torch.float64) as tenants:
        for answer, (name, given) in zip(tenants.predict(requests), requests, strict=True):
            exact = zoo.image_model("vit", torch.float64)
            wanted = zoo.alone(exact, store, name, given.double(), tmp_path, torch.float64)
            zoo.assert_as_alone(answer, wanted)


def test_the_store_changes_while_it_is_served(tmp_path, vit):
    store, model = vit
    other = Store(store.folder)
    image = images(1, 3, torch.float64)[0]
    names = list(store.variants)
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        before = tenants.predict([(name, image) for name in names])
        assert not tenants.refresh()
        zoo.add_fine_tune(other, "new", WAYS["low_rank"], 77)
        zoo.add_fine_tune(other, names[0], WAYS["plain"], 78)
        other.remove(names[1])
        with pytest.raises(FleetError, match="request 0: no tenant is called 'new'"):
            tenants.predict([("new", image)])
        again = tenants.predict([(name, image) for name in names])
        assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
        assert tenants.refresh()
        misses = tenants.statistics.misses
        found = tenants.predict([("new", image), (names[0], image), (names[2], image)])
        assert tenants.statistics.misses == misses + 2  # what did not change is still there
        for answer, name in zip(found, ("new", names[0], names[2]), strict=True):
            wanted = zoo.alone(model, store, name, image, tmp_path, torch.float64)
            zoo.assert_as_alone(answer, wanted)
        assert not torch.equal(found[1], before[0])
        with pytest.raises(FleetError, match=f"no tenant is called '{names[1]}'"):
            tenants.predict([(names[1], image)])


def test_threads_ask_while_others_add_replace_and_remove(tmp_path, vit):
    store, model = vit
    image = images(1, 3, torch.float64)[0]
    kept = list(store.variants)[:4]
    errors: list[BaseException] = []
    done = threading.Event()
    budget = 3 * max(map(store.nbytes, store.variants)) + (1 << 20)
    served = zoo.image_model("vit", torch.float64)
    with Tenants(store, served, memory_budget=budget) as tenants:
        wanted = dict(zip(kept, tenants.predict([(name, image) for name in kept]), strict=True))
        changed = {name: wanted[name] for name in kept[:1]}

        def ask(seed: int) -> None:
            names = random.Random(seed)
            try:
                while not done.is_set():
                    asked = names.choices(kept, k=5)
                    tenants.prefetch(names.choices(kept, k=2))
                    for name, answer in zip(
                        asked, tenants.predict([(name, image) for name in asked]), strict=True
                    ):
                        same = torch.allclose(answer, wanted[name], rtol=0, atol=1e-10)
                        replaced = name in changed and not torch.equal(answer, changed[name])
                        assert same or replaced
                    tenants.refresh()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        other = Store(store.folder)
        for turn in range(6):
            zoo.add_fine_tune(other, f"new{turn}", WAYS["head"], turn)
            zoo.add_fine_tune(other, kept[0], WAYS["norms"], 100 + turn)
            if turn:
                other.remove(f"new{turn - 1}")
            other.gc()
        done.set()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        tenants.refresh()
        for name in [*kept, "new5"]:
            expected = zoo.alone(model, other, name, image, tmp_path, torch.float64)
            zoo.assert_as_alone(tenants.predict([(name, image)])[0], expected)
        assert not tenants.prefetch(["new4"])
        with pytest.raises(FleetError, match="no tenant is called 'new4'"):
            tenants.predict([("new4", image)])


def test_what_was_fetched_before_it_is_asked_for_is_there(vit):
    store, _ = vit
    requests = asked(6, list(store.variants), seed=2)
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        assert tenants.prefetch([name for name, _ in requests])
        before = tenants.statistics
        assert before.prefetched > 0
        assert before.misses == before.hits == 0
        tenants.predict(requests)
        assert tenants.statistics.misses == 0
        assert tenants.statistics.hits == before.prefetched


def test_one_unknown_name_does_not_keep_the_others_from_being_fetched(vit, caplog):
    store, _ = vit
    image = images(1, 3, torch.float64)[0]
    names = ["birds_head", "nobody", "cars_int4"]
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        assert not tenants.prefetch(names)
        assert "not fetched ahead: no tenant is called 'nobody'" in caplog.text
        tenants.predict([(name, image) for name in names if name != "nobody"])
        assert tenants.statistics.misses == 0
        assert tenants.statistics.hits == tenants.statistics.prefetched > 0


def test_what_gc_removed_is_answered_as_it_is_now(tmp_path, vit):
    store, model = vit
    other = Store(store.folder)
    image = images(1, 3, torch.float64)[0]
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        zoo.add_fine_tune(other, "birds_head", WAYS["plain"], 78)
        other.gc()
        found = tenants.predict([("birds_head", image)])[0]
        wanted = zoo.alone(model, other, "birds_head", image, tmp_path, torch.float64)
        zoo.assert_as_alone(found, wanted)


def test_a_damaged_pack_refuses_those_who_need_it_by_name(vit):
    store, _ = vit
    image = images(1, 3, torch.float64)[0]
    digest = store.variants["birds_head"].tensors["head.weight"].parts["value"]
    path = store.packs.path(store.packs.pack_of(digest))
    path.write_bytes(path.read_bytes()[:-1])
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        for _ in range(2):
            with pytest.raises(FleetError, match=r"was truncated or altered.*'birds_head'"):
                tenants.predict([("birds_norms", image), ("birds_head", image)])
            assert len(tenants.predict([("birds_norms", image), ("cars_head", image)])) == 2


def test_batches_side_by_side_are_as_one_by_one(tmp_path):
    """With two threads batches are computed in pairs, a single large one in halves."""
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
    model = zoo.text_model(torch.float32, **sizes)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    names = [n for n in store.base.tensors if n.endswith(("query.weight", "value.weight"))]
    for place in range(9):
        zoo.add_lora(store, f"t{place}", names, 1 + 5 * place, 2 + place, place)
    zoo.add_fine_tune(store, "t9", WAYS["int4"], 9)
    given = texts(36, 3)
    requests = [(f"t{place % 10}", text) for place, text in enumerate(given)]
    batches = [requests[:5], requests[5:23], requests[23:24], [], requests[24:]]
    wanted = [
        zoo.alone(model, store, name, text, tmp_path, torch.float32) for name, text in requests
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        served = zoo.text_model(torch.float32, **sizes)
        with Tenants(store, served, memory_budget=None) as tenants:
            streamed = list(tenants.stream(batches))
            assert [len(answers) for answers in streamed] == [5, 18, 1, 0, 12]
            every = [answer for answers in streamed for answer in answers]
            for found in (every, tenants.predict(requests)):
                for answer, expected in zip(found, wanted, strict=True):
                    zoo.assert_as_alone(answer, expected)
            assert tenants.statistics.requests == 72
            assert tenants._answers.at_once == 2
            bad = [*batches[:2], [("nobody", given[0])], *batches[3:]]
            stream = tenants.stream(bad)
            assert [len(next(stream)) for _ in range(2)] == [5, 18]
            with pytest.raises(FleetError, match="no tenant is called 'nobody'"):
                next(stream)
    finally:
        torch.set_num_threads(before)


def test_a_stream_that_is_left_or_fails_gives_up_its_memory(vit):
    store, _ = vit
    names = list(store.variants)
    batches = [asked(6, names, seed) for seed in range(6)]
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        stream = tenants.stream(batches)
        next(stream)
        stream.close()
        bad = [*batches[:2], [("nobody", batches[0][0][1])], *batches[3:]]
        with pytest.raises(FleetError, match="no tenant is called 'nobody'"):
            list(tenants.stream(bad))
        entries = tenants._residency.slots._entries.values()
        assert all(entry.pins == 0 for entry in entries)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([("birds_heat", None)], "request 0: no tenant is called 'birds_heat'.* 'birds_head'"),
        ([(3, None)], "no tenant is called 3"),
        (["birds_head"], r"request 0: wanted a pair \(tenant, input\)"),
        ([("birds_head", torch.zeros(3, 5, 5))], r"request 0 .*does not take inputs \[3, 5, 5\]"),
        ([("birds_head", torch.full((3, 32, 32), float("nan")))], "NaN"),
    ],
)
def test_requests_that_are_refused_before_anything_is_computed(vit, requests, message):
    store, _ = vit
    good = ("cars_head", torch.zeros(3, 32, 32))
    with Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=None) as tenants:
        with pytest.raises(FleetError, match=message):
            tenants.predict([*requests, good])
        assert tenants.statistics.misses == 0


def test_settings_that_are_refused(vit):
    store, _ = vit
    for settings, message in (
        ({"memory_budget": 0}, "memory_budget is 0; wanted bytes"),
        ({"memory_budget": None, "look_ahead": -1}, "look_ahead is -1"),
    ):
        with pytest.raises(FleetError, match=message):
            Tenants(store, zoo.image_model("vit", torch.float64), **settings)
    with (
        Tenants(store, zoo.image_model("vit", torch.float64), memory_budget=5000) as tenants,
        pytest.raises(FleetError, match=r"tenant 'birds_int4': its parts are .*memory_budget is"),
    ):
        tenants.predict([("birds_int4", torch.zeros(3, 32, 32))])


def test_features_below_what_is_owned_are_kept(tmp_path):
    model = zoo.image_model("vit", torch.float64)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    upper = ("blocks.1", "norm.", "head")
    for place, name in enumerate(("low_rank", "norms", "plain")):
        ways = WAYS[name]
        zoo.add_fine_tune(
            store, name, lambda k, v, ways=ways: ways(k, v) if k.startswith(upper) else None, place
        )
    given = images(5, 1, torch.float64)
    batches = [
        [("plain", given[0]), ("norms", given[1]), ("plain", given[0])],
        [("low_rank", given[1]), ("low_rank", given[2]), ("norms", given[0])],
        [("plain", given[k]) for k in range(5)],
    ]
    served = zoo.image_model("vit", torch.float64)
    with Tenants(store, served, memory_budget=None, feature_cache_bytes=1 << 20) as tenants:
        for batch in batches:
            for answer, (name, image) in zip(tenants.predict(batch), batch, strict=True):
                wanted = zoo.alone(model, store, name, image, tmp_path, torch.float64)
                zoo.assert_as_alone(answer, wanted)
        statistics = tenants.statistics
        assert (statistics.feature_misses, statistics.feature_hits) == (5, 6)
        assert statistics.feature_bytes == 5 * given[0].new_zeros(17, 48).nbytes
        zoo.add_fine_tune(store, "lower", WAYS["plain"], 9)
        tenants.refresh()
        for name in ("lower", "plain"):
            answer = tenants.predict([(name, given[0])])[0]
            wanted = zoo.alone(model, store, name, given[0], tmp_path, torch.float64)
            zoo.assert_as_alone(answer, wanted)
        assert tenants.statistics.feature_hits == 6
    small = 2 * given[0].new_zeros(17, 48).nbytes
    with Tenants(
        Store(store.folder), served, memory_budget=None, feature_cache_bytes=small
    ) as tenants:
        tenants.predict([("plain", image) for image in given])
        assert tenants.statistics.feature_bytes <= small
