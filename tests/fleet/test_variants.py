import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from fleet.errors import FleetError
from fleet.storage import collecting
from fleet.storage.encodings import ENCODINGS
from fleet.variants import Encoded, Node, Store, SupersededError, Variant, tensor_hash
from merge.checkpoints import open_checkpoint
from merge.errors import MergeError
from tests.fleet.storage.stores import (
    changed,
    damage_tensor,
    encoded,
    exact_variant,
    filled,
    filled_at_once,
    low_rank_variant,
    node_of,
    pack_files,
    pack_of,
    records_of,
    same,
    small_base,
)


@pytest.fixture
def base():
    return small_base()


# --- what is stored comes back ---


def test_variants_come_back_bit_for_bit_from_any_store_object(tmp_path, base):
    store, values = filled(tmp_path / "s", base)
    for opened in (store, Store(tmp_path / "s")):
        assert list(opened.variants) == ["one", "two"]
        for name, wanted in values.items():
            same(opened.tensors(name), wanted)
            assert torch.equal(opened.tensor(name, "layer.weight"), wanted["layer.weight"])
    assert store.base.tensors.keys() == base.keys()
    assert store.about == {}


def test_a_base_may_be_a_checkpoint_and_is_kept_with_what_is_said_of_it(tmp_path, base):
    torch.save(base, tmp_path / "base.pt")
    with open_checkpoint(tmp_path / "base.pt") as checkpoint:
        store = Store.create(tmp_path / "s", checkpoint, about={"model": {"name": "vit"}})
    store.add(Variant("same", "base", {}), {})
    same(store.tensors("same"), base)
    assert Store(tmp_path / "s").about == {"model": {"name": "vit"}}
    assert store.nbytes("same") == 0
    assert store.plain_bytes("same") == sum(tensor.nbytes for tensor in base.values())


def test_a_base_is_written_in_packs_of_a_size(tmp_path, base, monkeypatch):
    monkeypatch.setattr("fleet.storage.creating.PACK_BYTES", 200)
    store = Store.create(tmp_path / "s", base)
    store.add(Variant("same", "base", {}), {})
    same(Store(tmp_path / "s").tensors("same"), base)
    assert len(pack_files(tmp_path / "s")) == 2


def test_values_are_made_level_by_level(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    domain = changed(base, 1, keys=("layer.weight", "layer.bias"))
    store.add_node(*node_of("domain", domain, base))
    deeper = changed(domain, 2, keys=("layer.bias",))
    store.add_node(*node_of("deeper", deeper, domain, parent="domain"))
    variant, tensors = low_rank_variant("leaf", deeper, 3, node="deeper")
    head = torch.randn(11, 6)
    variant.tensors["head.weight"], given = encoded("plain", head)
    store.add(variant, {**tensors, **given})
    parts = store.parts("leaf")
    delta = 0.5 * parts["layer.weight"]["up"] @ parts["layer.weight"]["down"]
    wanted = {
        **deeper,
        "layer.weight": (delta + deeper["layer.weight"]),
        "head.weight": head,
    }
    same(store.tensors("leaf"), wanted)
    assert [node.name for node in store.path("leaf")] == ["base", "domain", "deeper"]
    assert store.nbytes("leaf") == head.nbytes + 2 * 2 * 6 * 4
    assert store.plain_bytes("leaf") == sum(tensor.nbytes for tensor in wanted.values())
    store.export("leaf", tmp_path / "leaf.safetensors")
    same(load_file(tmp_path / "leaf.safetensors"), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["low_rank", "sparse", "int8", "int4", "sign"])
def test_what_encodings_decode_is_what_the_store_gives(tmp_path, dtype, name):
    base = small_base(dtype=dtype)
    value = base["layer.weight"] + torch.full((6, 6), 0.125, dtype=dtype)
    more = {"low_rank": {"rank": 1}, "sparse": {"count": 9}}.get(name, {})
    more = {"group": 16} if name in {"int8", "int4"} else more
    record, tensors = encoded(name, value, base["layer.weight"], **more)
    store = Store.create(tmp_path / "s", base)
    store.add(Variant("v", "base", {"layer.weight": record}), tensors)
    parts = store.parts("v")["layer.weight"]
    wanted = ENCODINGS[name].decode(parts, record.settings, base["layer.weight"])
    same(Store(tmp_path / "s").tensors("v"), {**base, "layer.weight": wanted})
    assert store.nbytes("v") == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tensor_that_the_base_has_not_is_added_plain(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    extra = torch.randn(4)
    record, tensors = encoded("plain", extra)
    store.add(Variant("v", "base", {"extra.bias": record}), tensors)
    same(store.tensors("v"), {**base, "extra.bias": extra})
    assert store.plain_bytes("v") == sum(t.nbytes for t in base.values()) + extra.nbytes


def test_equal_tensors_are_stored_once(tmp_path, base):
    base = {**base, "tied.weight": base["embed.weight"].clone()}
    store = Store.create(tmp_path / "s", base)
    values = changed(base, 1)
    store.add(*exact_variant("one", values, base))
    before = sum(path.stat().st_size for path in pack_files(store.folder))
    store.add(*exact_variant("two", values, base))
    assert sum(path.stat().st_size for path in pack_files(store.folder)) == before
    store.remove("one")
    store.gc()
    same(store.tensors("two"), values)


# --- changes ---


def test_readers_see_a_snapshot_until_they_refresh(tmp_path, base):
    store, values = filled(tmp_path / "s", base)
    reader = Store(tmp_path / "s")
    before, version = reader.variants, reader.version
    new = changed(base, 9)
    store.add(*exact_variant("one", new, base))
    store.remove("two")
    same(reader.tensors("one"), values["one"])
    assert reader.variants is before
    assert reader.refresh()
    assert not reader.refresh()
    assert list(before) == ["one", "two"]
    assert list(reader.variants) == ["one"]
    assert reader.version == store.version > version
    same(reader.tensors("one"), new)


def test_records_in_the_store_are_not_the_callers(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    variant, tensors = low_rank_variant("v", base, 1)
    store.add(variant, tensors)
    variant.tensors.clear()
    assert list(store.variants["v"].tensors) == ["layer.weight"]
    with pytest.raises(TypeError):
        store.variants["w"] = variant  # pyright: ignore


def test_gc_frees_what_nothing_needs(tmp_path, base):
    store, values = filled(tmp_path / "s", base, ("one", "two", "three"))
    sizes = sum(path.stat().st_size for path in pack_files(store.folder))
    assert store.gc() == 0
    store.remove("two")
    (store.folder / "objects" / "new-1-0123abcd.safetensors").write_bytes(b"12345")
    (store.folder / ".manifest.jsonl.host.1.abcd.part").write_bytes(b"123")
    (store.folder / "objects" / "mine.txt").write_bytes(b"mine")
    freed = store.gc()
    left = sum(p.stat().st_size for p in pack_files(store.folder) if p.suffix == ".safetensors")
    assert freed == sizes - left + 8 > 8
    assert (store.folder / "objects" / "mine.txt").exists()
    for opened in (store, Store(store.folder)):
        assert list(opened.variants) == ["one", "three"]
        same(opened.tensors("three"), values["three"])
        assert opened.verify() == []
    assert store.gc() == 0


def test_what_was_collected_can_be_added_again(tmp_path, base):
    store, values = filled(tmp_path / "s", base, ("one",))
    for _ in range(3):
        store.remove("one")
        assert store.gc() > 0
        store.add(*exact_variant("one", values["one"], base))
        same(Store(store.folder).tensors("one"), values["one"])


def test_variants_are_added_together_in_one_pack_and_line(tmp_path, base):
    names = [f"v{number}" for number in range(5)]
    store, values = filled_at_once(tmp_path / "s", base, names)
    assert len(pack_files(store.folder)) == 2
    assert len(records_of(store.folder)) == 2
    for opened in (store, Store(store.folder)):
        assert list(opened.variants) == names
        for name in names:
            same(opened.tensors(name), values[name])
        assert opened.verify() == []
    sizes = {len(json.dumps(record)) for record in records_of(store.folder)[1]["variants"]}
    assert max(sizes) < 220, "what they have alike is said once"


@pytest.mark.parametrize(("limit", "groups"), [("GROUP_VARIANTS", [2, 2, 1]), ("bytes", [1] * 5)])
def test_many_variants_are_written_by_the_group(tmp_path, base, monkeypatch, limit, groups):
    if limit == "GROUP_VARIANTS":
        monkeypatch.setattr("fleet.storage.adding.GROUP_VARIANTS", 2)
    store = Store.create(tmp_path / "s", base)
    store.add_many(
        (exact_variant(f"v{seed}", changed(base, seed), base) for seed in range(5)),
        group_bytes=1 if limit == "bytes" else 1 << 20,
    )
    found = [len(record["variants"]) for record in records_of(store.folder)[1:]]
    assert found == groups


def test_what_came_before_a_failure_is_added(tmp_path, base):
    def some(failing):
        for seed in range(3):
            yield exact_variant(f"v{seed}", changed(base, seed), base)
        failing()

    def interrupt():
        raise KeyboardInterrupt

    store = Store.create(tmp_path / "s", base)
    with pytest.raises(KeyboardInterrupt):
        store.add_many(some(interrupt))
    assert list(Store(store.folder).variants) == ["v0", "v1", "v2"]
    bad = low_rank_variant("bad", {"layer.weight": torch.zeros(5, 6)}, 1)
    with pytest.raises(FleetError, match=r"variant 'bad': .*made for another base"):
        store.add_many([exact_variant("v3", changed(base, 3), base), bad])
    assert list(Store(store.folder).variants) == ["v0", "v1", "v2", "v3"]


def test_of_two_of_one_name_the_later_one_stays(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    store.add_many(exact_variant("v", changed(base, seed), base) for seed in range(3))
    same(store.tensors("v"), changed(base, 2))


def test_gc_writes_anew_what_is_needed_of_a_pack(tmp_path, base):
    names = ["one", "two", "three", "four"]
    store, values = filled_at_once(tmp_path / "s", base, names)
    store.remove("two")
    store.remove("four")
    assert store.gc() == 0, "half of it is needed"
    before = store.disk_bytes()
    store.remove("three")
    manifest = (store.folder / "manifest.jsonl").stat().st_size
    freed = store.gc()
    manifest = (store.folder / "manifest.jsonl").stat().st_size - manifest
    assert freed > 0
    assert store.disk_bytes() < before
    assert len(pack_files(store.folder)) == 2
    for opened in (store, Store(store.folder)):
        same(opened.tensors("one"), values["one"])
        assert opened.verify() == []
    assert store.gc() == 0
    store.add(*exact_variant("two", values["two"], base))
    same(store.tensors("two"), values["two"])


def test_several_packs_become_one(tmp_path, base, monkeypatch):
    store = Store.create(tmp_path / "s", base)
    wanted = {f"v{seed}": changed(base, seed) for seed in range(9)}
    for first in range(0, 9, 3):
        names = list(wanted)[first : first + 3]
        store.add_many(exact_variant(name, wanted[name], base) for name in names)
        for name in names[1:]:
            store.remove(name)
    assert len(pack_files(store.folder)) == 4
    store.gc()
    assert len(pack_files(store.folder)) == 2
    for name in store.variants:
        same(Store(store.folder).tensors(name), wanted[name])


def test_gc_leaves_a_damaged_pack_as_it_is(tmp_path, base, caplog):
    store, _ = filled_at_once(tmp_path / "s", base, ["one", "two", "three"])
    path, _ = damage_tensor(store, "one")
    store.remove("two")
    store.remove("three")
    with caplog.at_level("WARNING"):
        assert store.gc() == 0
    assert "gc leaves it as it is" in caplog.text
    assert path.exists()
    assert len(store.verify()) == 1


def test_gc_writes_anew_what_is_whole_of_a_damaged_pack(tmp_path, base):
    store, values = filled_at_once(tmp_path / "s", base, ["one", "two", "three"])
    path, _ = damage_tensor(store, "two")
    store.remove("two")
    store.remove("three")
    assert store.gc() > 0
    assert not path.exists()
    for opened in (store, Store(store.folder)):
        same(opened.tensors("one"), values["one"])
        assert opened.verify() == []


def test_gc_merges_many_small_packs(tmp_path, base, monkeypatch):
    """Each variant here is some 200 bytes, the base 500."""
    names = [f"v{number}" for number in range(collecting.SMALL_PACKS)]
    store, values = filled(tmp_path / "s", base, names[:-2])
    files = pack_files(store.folder)
    assert len(files) == collecting.SMALL_PACKS - 1
    assert store.gc() == 0
    assert pack_files(store.folder) == files, "few are left as they are"
    for seed, name in enumerate(names[-2:], start=100):
        values[name] = changed(base, seed)
        store.add(*exact_variant(name, values[name], base))
    store.remove("v3")
    reader, table = Store(store.folder), dict(store.variants)
    reader.tensors("v0")
    monkeypatch.setattr(collecting, "MERGED_BYTES", 1000)
    store.gc()
    after = pack_files(store.folder)
    assert 4 <= len(after) <= 6
    sizes = [sum(tensors.values()) for tensors in store.packs.contents.values()]
    assert max(sizes) <= 1000
    assert dict(reader.variants) == table
    for opened in (store, reader, Store(store.folder)):
        for name in opened.variants:
            same(opened.tensors(name), values[name])
        assert opened.verify() == []
    assert store.gc() == 0
    assert pack_files(store.folder) == after


def test_gc_merges_no_large_and_no_damaged_packs(tmp_path, base, monkeypatch, caplog):
    monkeypatch.setattr(collecting, "SMALL_PACKS", 3)
    store, values = filled(tmp_path / "s", base, ("one", "two", "three", "four"))
    bad, _ = damage_tensor(store, "two")
    packs = {pack_of(store, name) for name in ("one", "three", "four")}
    base_pack = ({*pack_files(store.folder)} - packs - {bad}).pop()
    monkeypatch.setattr(collecting, "SMALL_BYTES", 400)
    with caplog.at_level("WARNING"):
        store.gc()
    assert "gc leaves it as it is" in caplog.text
    left = pack_files(store.folder)
    assert len(left) == 3
    assert {bad, base_pack} < {*left}
    assert packs.isdisjoint(left)
    for name in ("one", "three", "four"):
        same(Store(store.folder).tensors(name), values[name])


def test_a_reader_finds_what_gc_moved_and_sees_its_snapshot(tmp_path, base):
    store, values = filled_at_once(tmp_path / "s", base, ["one", "two", "three"])
    readers = [Store(tmp_path / "s") for _ in range(4)]
    readers[0].tensors("one")
    store.remove("two")
    store.remove("three")
    assert store.gc() > 0
    store.add(*exact_variant("four", changed(base, 4), base))
    tables = [dict(reader.variants) for reader in readers]
    reference = readers[3].variants["one"].tensors["layer.weight"].parts["value"]
    same(readers[0].tensors("one"), values["one"])
    assert readers[1].parts("one").keys() == {"layer.weight", "head.weight"}
    readers[2].export("one", tmp_path / "one.safetensors")
    same(load_file(tmp_path / "one.safetensors"), values["one"])
    assert torch.equal(readers[3].packs.read(reference), values["one"]["layer.weight"])
    for reader, table in zip(readers, tables, strict=True):
        assert dict(reader.variants) == table
        assert list(table) == ["one", "two", "three"]
        with pytest.raises(SupersededError, match="refresh and ask again"):
            reader.tensors("two")
        assert reader.refresh()
        assert not reader.refresh()
        assert list(reader.variants) == ["one", "four"]
        same(reader.tensors("four"), changed(base, 4))


def test_a_reader_that_gc_overtook_is_told_to_refresh(tmp_path, base):
    store, values = filled(tmp_path / "s", base, ("one", "two", "three"))
    reader = Store(tmp_path / "s")
    store.add(*exact_variant("one", changed(base, 9), base))
    store.remove("two")
    store.gc()
    for name in ("one", "two"):
        for read in (reader.tensors, reader.parts):
            with pytest.raises(SupersededError, match="refresh and ask again"):
                read(name)
    same(reader.tensors("three"), values["three"])
    reader.refresh()
    same(reader.tensors("one"), changed(base, 9))
    with pytest.raises(FleetError, match="no variant 'two'"):
        reader.tensors("two")


def test_readers_in_threads_see_old_or_new_while_variants_change_and_gc_runs(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    wanted = {seed: changed(base, seed) for seed in range(20)}
    variant, tensors = exact_variant("v", wanted[0], base, about={"seed": 0})
    store.add(variant, tensors)
    done, wrong, reads = threading.Event(), [], []

    def read():
        reader = Store(tmp_path / "s")
        while not done.is_set():
            try:
                seed = reader.variants["v"].about["seed"]
                same(reader.tensors("v"), wanted[seed])
                reads.append(seed)
            except SupersededError:
                pass
            except BaseException as error:
                wrong.append(error)
                return
            reader.refresh()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for seed in range(1, 20):
        more = (exact_variant(name, changed(base, 100 + seed), base) for name in ("w", "x"))
        store.add_many([exact_variant("v", wanted[seed], base, about={"seed": seed}), *more])
        store.remove("w")
        store.remove("x")
        store.gc()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(reads) > 3


def test_nodes_are_removed_from_the_leaves(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    domain = changed(base, 1)
    store.add_node(*node_of("a", domain, base))
    store.add_node(Node("b", "a", {}), {})
    store.add(Variant("v", "b", {}), {})
    for name, said in (("base", "variant|node|whole"), ("a", "node 'b'"), ("b", "variant 'v'")):
        with pytest.raises(FleetError, match=said):
            store.remove_node(name)
    store.remove("v")
    store.remove_node("b")
    store.remove_node("a")
    assert store.gc() > 0
    assert list(Store(store.folder).nodes) == ["base"]


def test_a_transaction_keeps_other_writers_out_and_is_seen_line_by_line(tmp_path, base):
    store, _ = filled(tmp_path / "s", base)
    other = Store(tmp_path / "s")
    with store.transaction():
        store.add(Variant("three", "base", {}), {})
        store.add(Variant("four", "base", {}), {})
        assert other.refresh()
        assert "four" in other.variants
        for write in (other.gc, lambda: other.remove("one")):
            with pytest.raises(FleetError, match=f"process {os.getpid()}"):
                write()
    other.remove("four")
    store.add(Variant("five", "base", {}), {})
    assert "four" not in store.variants


# --- bad input ---


def test_unknown_names_are_told_the_nearest(tmp_path, base):
    store, _ = filled(tmp_path / "s", base)
    for call in (store.tensors, store.parts, store.nbytes, store.plain_bytes, store.remove):
        with pytest.raises(FleetError, match=r"no variant 'ona', it has 2.*'one'"):
            call("ona")
    with pytest.raises(FleetError, match="has no tensor 'layer'"):
        store.tensor("one", "layer")
    with pytest.raises(FleetError, match=r"no node 'bas'.*'base'"):
        store.add(Variant("v", "bas", {}), {})


HASH = "ab" * 32


def bad_variants(base):
    low, tensors = low_rank_variant("v", base, 1)
    other, other_tensors = low_rank_variant("v", {"layer.weight": torch.zeros(5, 6)}, 1)
    zero, zero_tensors = low_rank_variant("v", base, 1, rank=0)
    half, half_tensors = encoded("plain", base["layer.weight"].half())
    nan = {digest: tensor.clone() for digest, tensor in tensors.items()}
    bad = {part: nan[digest].fill_(torch.nan) for part, digest in _parts(low).items()}
    nans = {part: tensor_hash(tensor) for part, tensor in bad.items()}
    record = low.tensors["layer.weight"]
    yield "another base", other.tensors, other_tensors, "made for another base"
    yield "rank 0", zero.tensors, zero_tensors, "rank 0"
    yield "dtype", {"layer.weight": half}, half_tensors, "cast it"
    yield (
        "nan",
        {"layer.weight": Encoded("low_rank", nans, {"scale": 1.0})},
        {nans[part]: tensor for part, tensor in bad.items()},
        "NaN",
    )
    yield "no parent", {"none.weight": record}, tensors, "the node has not"
    yield "encoding", {"layer.weight": Encoded("magic", {"a": HASH})}, {}, "'magic'"
    yield "parts", {"layer.weight": Encoded("plain", {"a": HASH})}, {}, HASH
    yield "missing", low.tensors, {}, "no pack holds"
    yield "settings", {"layer.weight": Encoded("low_rank", record.parts)}, tensors, "do not fit"
    yield "unused", {}, tensors, "no part of it"
    first, second = tensors
    swapped = {first: tensors[second], second: tensors[first]}
    yield "swapped", low.tensors, swapped, "name each by its hash|do not fit"


def _parts(variant):
    return variant.tensors["layer.weight"].parts


@pytest.mark.parametrize("case", range(11))
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, base, case):
    store, _ = filled(tmp_path / "s", base)
    files, manifest = pack_files(store.folder), (store.folder / "manifest.jsonl").read_bytes()
    _, records, tensors, said = list(bad_variants(base))[case]
    with pytest.raises(FleetError, match=said):
        store.add(Variant("v", "base", records), tensors)
    assert pack_files(store.folder) == files
    assert (store.folder / "manifest.jsonl").read_bytes() == manifest
    assert "v" not in store.variants


def test_nodes_cannot_be_replaced_or_be_their_own_parents(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    store.add_node(Node("a", "base", {}), {})
    for node, said in (
        (Node("a", "base", {}), "is there already"),
        (Node("b", "b", {}), "no node 'b'"),
        (store.base, "is there already"),
    ):
        with pytest.raises(FleetError, match=said):
            store.add_node(node, {})


def test_bottleneck_adapters_are_kept_and_not_exported(tmp_path, base):
    store = Store.create(tmp_path / "s", base)
    given = {"down": torch.randn(2, 6), "down_bias": torch.randn(2)}
    given |= {"up": torch.randn(6, 2), "up_bias": torch.randn(6)}
    hashes = {part: tensor_hash(tensor) for part, tensor in given.items()}
    tensors = {hashes[part]: tensor for part, tensor in given.items()}
    record = Encoded("bottleneck", hashes, {"activation": "gelu"})
    store.add(Variant("v", "base", {}, adapters={"layer": record}), tensors)
    same(Store(store.folder).parts("v")["layer"], given)
    assert store.nbytes("v") == sum(tensor.nbytes for tensor in given.values())
    assert store.verify() == []
    same(store.tensors("v"), base)
    with pytest.raises(FleetError, match="bottleneck adapters after 'layer'"):
        store.export("v", tmp_path / "v.safetensors")
    bad = torch.randn(1)
    hashes["up_bias"] = tensor_hash(bad)
    narrow = Encoded("bottleneck", hashes, {"activation": "gelu"})
    tensors[hashes["up_bias"]] = bad
    with pytest.raises(
        FleetError, match=r"'layer': its parts are .*'up_bias': \[1\].* wanted down"
    ):
        store.add(Variant("w", "base", {}, adapters={"layer": narrow}), tensors)
    wrong = Encoded("bottleneck", {"down": hashes["down"]})
    with pytest.raises(FleetError, match=r"adapters\.layer"):
        store.add(Variant("w", "base", {}, adapters={"layer": wrong}), {})


def test_places_that_are_no_place_for_a_store_are_refused(tmp_path, base):
    store, _ = filled(tmp_path / "s", base)
    with pytest.raises(FleetError, match="is a store already"):
        Store.create(store.folder, base)
    with pytest.raises(FleetError, match="is no store"):
        Store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_bytes(b"")
    with pytest.raises(FleetError, match=r"holds 'photo\.jpg'"):
        Store.create(tmp_path / "full", base)
    for place in (store.folder / "manifest.jsonl", tmp_path / "x" / ".." / "s" / "a.safetensors"):
        with pytest.raises(FleetError, match="inside the store"):
            store.export("one", place)
    with pytest.raises(MergeError, match="is a folder"):
        store.export("one", tmp_path)
    with pytest.raises(FleetError, match="wanted at least one"):
        Store.create(tmp_path / "empty", {})
    with pytest.raises(FleetError, match="'a': is complex128"):
        Store.create(tmp_path / "other", {"a": torch.zeros(2, dtype=torch.complex128)})
    assert pack_files(tmp_path / "other") == []
    Store.create(tmp_path / "other", base)
