import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.errors import FleetError
from fleet.storage.manifest import Manifest
from fleet.variants import Node, Store, Variant
from tests.fleet.storage.stores import (
    changed,
    damage_tensor,
    exact_variant,
    filled,
    filled_at_once,
    node_of,
    pack_files,
    pack_of,
    records_of,
    same,
    sealed,
    small_base,
)
from tests.fleet.storage.writers import (
    add_and_collect,
    add_small,
    add_sparse,
    add_versions,
    done_until,
    killed_at,
    version_of,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base():
    return small_base()


# --- a damaged or hostile folder ---


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_a_damaged_pack_takes_only_the_variants_that_need_it(tmp_path, base, how):
    store, values = filled(tmp_path / "s", base, ("one", "two", "three"))
    path = pack_of(store, "two")
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if how == "truncated" else b"\xff"))
    for opened in (store, Store(store.folder)):
        for name in ("one", "three"):
            same(opened.tensors(name), values[name])
        for read in (
            opened.tensors,
            opened.parts,
            lambda name, store=opened: store.export(name, tmp_path / "two.safetensors"),
        ):
            with pytest.raises(FleetError, match=f"{path.name}: .*cannot be read: 'two';"):
                read("two")
        (problem,) = opened.verify()
        assert path.name in problem
    assert not (tmp_path / "two.safetensors").exists()
    store.add(*exact_variant("two", values["two"], base))
    assert Store(store.folder).verify() == []


@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_damage_in_a_pack_of_many_takes_only_those_whose_tensors_it_hit(tmp_path, base, how):
    names = [f"v{number}" for number in range(6)]
    store, values = filled_at_once(tmp_path / "s", base, names)
    reader = Store(store.folder)
    reader.tensors("v1")
    own = {d.partition("/")[0]: n for n in names for d in store.variants[n].hashes()}
    if how == "altered":
        path, digest = damage_tensor(store, "v3")
        lost = ["v3"]
    else:
        path = pack_of(store, "v3")
        ends = sorted((store.packs.place(digest).offset, digest) for digest in own)
        path.write_bytes(path.read_bytes()[: ends[3][0]])
        lost = sorted(own[digest] for _, digest in ends[3:])
        digest = ends[3][1]
    shown = ", ".join(map(repr, lost))
    said = rf"{path.name}: was truncated or altered, and with it {len(lost)} of the 6 tensors"
    for opened in (store, reader, Store(store.folder)):
        for name in names:
            if name not in lost:
                same(opened.tensors(name), values[name])
                continue
            for read in (
                opened.tensors,
                opened.parts,
                lambda name, opened=opened: opened.export(name, tmp_path / "x.safetensors"),
            ):
                with pytest.raises(FleetError, match=f"{said}.*cannot be read: {shown};") as found:
                    read(name)
            assert digest in str(found.value)
        (problem,) = opened.verify()
        assert shown in problem
    for name in lost:
        store.add(*exact_variant(name, values[name], base))
    reader.refresh()
    for opened in (store, reader, Store(store.folder)):
        for name in names:
            same(opened.tensors(name), values[name])
    store.gc()
    assert store.verify() == Store(store.folder).verify() == []


def test_damage_that_nothing_needs_is_told_and_gone_with_what_is_added_again(tmp_path, base):
    store, values = filled_at_once(tmp_path / "s", base, ["one", "two", "three"])
    damage_tensor(store, "two")
    store.remove("two")
    (problem,) = store.verify()
    assert "nothing that is needed is lost" in problem
    assert "add 'one' again" in problem
    assert store.gc() == 0
    store.add(*exact_variant("one", values["one"], base))
    store.gc()
    assert store.verify() == []
    for name in ("one", "three"):
        same(Store(store.folder).tensors(name), values[name])


def test_a_damaged_base_or_node_takes_all_below_it(tmp_path, base):
    store, _ = filled(tmp_path / "s", base, ("one",))
    domain = changed(base, 1, keys=("embed.weight",))
    node, tensors = node_of("domain", domain, base)
    store.add_node(node, tensors)
    store.add(Variant("in", "domain", {}), {})
    store.add_node(Node("deep", "domain", {}), {})
    store.add(Variant("deeper", "deep", {}), {})
    (digest,) = node.tensors["embed.weight"].parts.values()
    store.packs.path(store.packs.pack_of(digest)).unlink()
    with pytest.raises(FleetError, match="cannot be read: 'deeper', 'in';"):
        store.tensors("in")
    store.tensors("one")
    (digest,) = store.base.tensors["embed.weight"].parts.values()
    store.packs.path(store.packs.pack_of(digest)).unlink()
    with pytest.raises(FleetError, match="cannot be read: 'deeper', 'in', 'one';"):
        store.tensors("one")


def rewritten(folder, change):
    """The manifest with records changed and its sums right: what a hostile store may hold."""
    records = records_of(folder)
    change(records)
    (folder / "manifest.jsonl").write_bytes(sealed(records))


def set_in(path, value):
    def change(records):
        at = records
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


PATTERN = (1, "patterns", 0)
HOSTILE = {
    "name": set_in((1, "variants", 0, "name"), "../../etc/passwd"),
    "node name": lambda records: records.insert(
        1, {"op": "node", "node": {"name": "a/b", "parent": "base", "patterns": [], "hashes": []}}
    ),
    "own parent": lambda records: records.insert(
        1, {"op": "node", "node": {"name": "a", "parent": "a", "patterns": [], "hashes": []}}
    ),
    "later parent": lambda records: records.extend(
        {"op": "node", "node": {"name": a, "parent": b, "patterns": [], "hashes": []}}
        for a, b in (("a", "b"), ("b", "a"))
    ),
    "base as node": lambda records: records.append(
        {"op": "node", "node": {"name": "base", "parent": "base", "patterns": [], "hashes": []}}
    ),
    "second base": lambda records: records.append(records[0]),
    "no base": lambda records: records.pop(0),
    "replaced node": lambda records: records.extend(
        [{"op": "node", "node": {"name": "a", "parent": "base", "patterns": [], "hashes": []}}] * 2
    ),
    "format": set_in((0, "format"), 2),
    "format type": set_in((0, "format"), [1]),
    "about": set_in((0, "about"), 3),
    "operation": set_in((1, "op"), "format"),
    "operation type": set_in((1, "op"), {"a": 1}),
    "keys": set_in((1, "more"), 1),
    "pack": set_in((1, "packs"), {"../../x": {}}),
    "pack bytes": set_in((1, "packs"), {"cd" * 32: {"ab" * 32: -1}}),
    "pack bytes type": set_in((1, "packs"), {"cd" * 32: {"ab" * 32: 1.5}}),
    "packs type": set_in((1, "packs"), [1]),
    "unknown node": set_in((1, "variants", 0, "node"), "none"),
    "gc": lambda records: records.append({"op": "gc", "removed": ["../x"]}),
    "remove": lambda records: records.append({"op": "remove", "variant": "none"}),
    "remove both": lambda records: records.append(
        {"op": "remove", "variant": "one", "node": "base"}
    ),
    "remove base": lambda records: records.append({"op": "remove", "node": "base"}),
    "classes": set_in((1, "variants", 0, "classes"), 1 << 62),
    "hash": set_in((1, "variants", 0, "hashes", 0), "x"),
    "hashes": set_in((1, "variants", 0, "hashes"), []),
    "numbers": set_in((1, "variants", 0, "numbers"), [1.0]),
    "pattern number": set_in((1, "variants", 0, "patterns", 0), 2),
    "pattern number type": set_in((1, "variants", 0, "patterns", 0), True),
    "pattern twice": set_in((1, "variants", 0, "patterns"), [0, 0]),
    "patterns": set_in((1, "patterns"), [{}]),
    "patterns type": set_in((1, "patterns"), 3),
    "variants type": set_in((1, "variants"), {}),
    "part": set_in((*PATTERN, "parts", "value"), "float31/1"),
    "part type": set_in((*PATTERN, "parts", "value"), 1),
    "piece": set_in((*PATTERN, "parts", "value"), "/0/float32/99999999999999999x9999999"),
    "path": set_in((*PATTERN, "parts", "value"), "/../../x"),
    "setting": set_in((*PATTERN, "settings"), {"scale": {"of": 1}}),
    "tensor": set_in((*PATTERN, "tensor"), "a\0b"),
    "tensor and adapter": set_in((*PATTERN, "adapter"), "a"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_records_are_refused_by_their_line(tmp_path, base, case):
    store, _ = filled(tmp_path / "s", base)
    reader = Store(store.folder)
    rewritten(store.folder, HOSTILE[case])
    with pytest.raises(FleetError, match=r"manifest\.jsonl: line \d+: .*put back a copy"):
        Store(store.folder)
    assert list(reader.variants) == ["one", "two"]


def test_after_a_bad_line_nothing_is_taken_up_or_written(tmp_path, base):
    store, values = filled(tmp_path / "s", base)
    manifest = Manifest(store.folder)
    manifest.read()
    manifest.append({"op": "magic"})
    manifest.append({"op": "remove", "variant": "one"})
    for call in (store.refresh, store.refresh, store.gc, lambda: store.remove("two")):
        with pytest.raises(FleetError, match="line 4"):
            call()
    same(store.tensors("one"), values["one"])


def with_record(key, encoding, **parts):
    """The first variant has this too, of hashes that are nowhere or its own."""

    def change(records):
        content = {"tensor": key, "encoding": encoding, "parts": parts, "settings": {}}
        records[1]["patterns"].append(content)
        (variant,) = records[1]["variants"]
        variant["patterns"].append(2)
        for text in parts.values():
            if not text or text[0] == "/":
                variant["hashes"].append(variant["hashes"][0] if text else "ab" * 32)

    return change


@pytest.mark.parametrize(
    ("encoding", "parts", "said"),
    [
        ("of the future", {}, None),
        ("future", {"a": ""}, "no encoding is called|no pack"),
        ("plain", {"value": ""}, "no pack holds"),
        ("plain", {"value": "/200/float32/6"}, "holds 216 bytes of"),
        ("plain", {"value": "float32/1"}, "holds 216 bytes of"),
        ("plain", {}, "parts|plain of"),
        ("sign", {}, "'sign': found the parts"),
    ],
)
def test_what_cannot_be_decoded_takes_only_its_variant(tmp_path, base, encoding, parts, said):
    store, values = filled(tmp_path / "s", base)
    rewritten(store.folder, with_record("layer.bias", encoding, **parts))
    if said is None:
        with pytest.raises(FleetError, match="line 2"):
            Store(store.folder)
        return
    store = Store(store.folder)
    same(store.tensors("two"), values["two"])
    for read in (store.tensors, lambda name: store.export(name, tmp_path / "x.safetensors")):
        with pytest.raises(FleetError, match=said):
            read("one")
    assert any("'one'" in problem for problem in store.verify())
    store.remove("one")
    assert store.verify() == []


def test_a_delta_over_nothing_takes_only_its_variant(tmp_path, base):
    store, _ = filled(tmp_path / "s", base)
    rewritten(store.folder, with_record("none", "sign", signs="", scales=""))
    store = Store(store.folder)
    for call in (store.tensors, store.plain_bytes):
        with pytest.raises(FleetError, match=r"none|no pack holds"):
            call("one")


def test_the_lock_and_manifest_are_not_followed_out_of_the_folder(tmp_path, base):
    store, _ = filled(tmp_path / "s", base)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (store.folder / "store.lock").unlink()
    (store.folder / "store.lock").symlink_to(precious)
    with pytest.raises(FleetError, match=r"store\.lock: is a link"):
        store.remove("one")
    (store.folder / "store.lock").unlink()
    shutil.move(store.folder / "manifest.jsonl", tmp_path / "m")
    (store.folder / "manifest.jsonl").symlink_to(tmp_path / "m")
    for call in (store.gc, lambda: Store(store.folder)):
        with pytest.raises(FleetError, match=r"manifest\.jsonl: is a link"):
            call()
    assert precious.read_bytes() == b"precious"


# --- a full disk, killed writers ---


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_the_old_state_and_no_bytes(tmp_path, base, monkeypatch, where):
    store, values = filled(tmp_path / "s", base)
    files, manifest = pack_files(store.folder), (store.folder / "manifest.jsonl").read_bytes()
    real, calls = getattr(os, where), 0
    for failing in range(1, 8):
        calls = 0

        def full(*arguments, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, where, full)
        try:
            store.add(*exact_variant("new", changed(base, 5), base))
        except OSError as error:
            monkeypatch.undo()
            assert "No space left" in str(error)  # noqa: PT017 (there may be none)
            if "new" not in Store(store.folder).variants:
                assert pack_files(store.folder) == files
                assert (store.folder / "manifest.jsonl").read_bytes() == manifest
            assert Store(store.folder).verify() == []
            if "new" in Store(store.folder).variants:
                break
        else:
            monkeypatch.undo()
            break
    assert failing > 1 or where == "posix_fallocate"
    same(store.tensors("one"), values["one"])
    store.add(*exact_variant("new", changed(base, 5), base))
    same(store.tensors("new"), changed(base, 5))


def test_gc_removes_leftovers_though_the_disk_is_full(tmp_path, base, monkeypatch):
    store, values = filled(tmp_path / "s", base)
    store.remove("one")
    left = store.folder / "objects" / "new-1-0123abcd.safetensors"
    left.write_bytes(b"12345")
    files = pack_files(store.folder)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        store.gc()
    assert pack_files(store.folder) == [path for path in files if path != left]
    monkeypatch.undo()
    assert store.gc() > 0
    same(Store(store.folder).tensors("two"), values["two"])


LIMITED = """
import os, resource, sys
from fleet.variants import Store
from tests.fleet.storage.stores import changed, exact_variant, small_base
folder, what = sys.argv[1:]
store, base = Store(folder), small_base()
manifest = os.path.getsize(store.folder / "manifest.jsonl")
# A pack has some 500 bytes, the manifest more: one is too much for its file, or the other.
limit = 300 if what == "pack" else manifest + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store.add(*exact_variant("new", changed(base, 5), base))
except OSError as error:
    assert error.strerror == "File too large", error
    print("refused", list(store.variants))
    store.tensors("one")
"""


@pytest.mark.parametrize("what", ["pack", "manifest"])
def test_a_file_that_may_not_grow_leaves_the_old_state(tmp_path, base, what):
    store, values = filled(tmp_path / "s", base)
    for name in ("three", "four"):
        store.add(*exact_variant(name, changed(base, len(name)), base))
    files, manifest = pack_files(store.folder), (store.folder / "manifest.jsonl").read_bytes()
    command = [sys.executable, "-c", LIMITED, str(store.folder), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "refused ['one', 'two', 'three', 'four']\n", done.stderr
    assert pack_files(store.folder) == files
    assert (store.folder / "manifest.jsonl").read_bytes() == manifest
    assert Store(store.folder).verify() == []
    store.add(*exact_variant("new", changed(base, 5), base))
    same(store.tensors("one"), values["one"])
    same(store.tensors("new"), changed(base, 5))


@pytest.mark.parametrize("what", ["sparse", "small"])
def test_gc_on_a_full_disk_leaves_the_old_state(tmp_path, base, monkeypatch, what):
    if what == "sparse":
        store, values = filled_at_once(tmp_path / "s", base, ["one", "two", "three"])
        store.remove("two")
        store.remove("three")
    else:
        store, values = filled(tmp_path / "s", base, ["one", "two", "three"])
        monkeypatch.setattr("fleet.storage.collecting.SMALL_PACKS", 4)
    files = pack_files(store.folder)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, where, full)
            with pytest.raises(OSError, match="No space left"):
                store.gc()
        assert pack_files(store.folder) == files
        assert Store(store.folder).verify() == []
        same(store.tensors("one"), values["one"])
    assert store.gc() > 0
    same(Store(store.folder).tensors("one"), values["one"])


def test_an_interrupt_after_the_line_keeps_what_it_needs(tmp_path, base, monkeypatch):
    store, values = filled(tmp_path / "s", base)
    new = changed(base, 5)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fleet.storage.objects.Packs.learn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.add(*exact_variant("new", new, base))
    same(store.tensors("one"), values["one"])
    with pytest.raises(FleetError, match="open the store again"):
        store.remove("one")
    again = Store(store.folder)
    same(again.tensors("new"), new)
    assert again.verify() == []


def test_a_full_disk_while_a_store_is_made_leaves_none(tmp_path, base, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleet.variants.Manifest.create", full)
    with pytest.raises(OSError, match="No space left"):
        Store.create(tmp_path / "s", base)
    assert pack_files(tmp_path / "s") == []
    monkeypatch.undo()
    Store.create(tmp_path / "s", base)


def store_with_v(folder):
    base = small_base()
    store = Store.create(folder, base)
    variant, tensors, _ = version_of("v", 1)
    store.add(variant, tensors)
    return store


def check_after_kill(folder, seeds):
    """Whole, at one of the versions; writers go on, and leftovers can be collected."""
    store = Store(folder)
    seed = store.variants["v"].about["seed"]
    assert seed in seeds
    for name, variant in store.variants.items():
        same(store.tensors(name), version_of(name, variant.about["seed"])[2])
    assert store.verify() == []
    store.gc()
    assert {store.packs.path(pack) for pack in store.packs.contents} == set(pack_files(folder))
    variant, tensors, values = version_of("v", seed + 1)
    store.add(variant, tensors)
    same(Store(folder).tensors("v"), values)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("what", ["add", "gc", "rewrite", "merge"])
def test_killed_at_every_step_it_is_old_or_new(tmp_path, what, before):
    for at in range(1, 100):
        folder = tmp_path / str(at)
        store = store_with_v(folder)
        if what == "gc":
            variant, tensors, _ = version_of("v", 2)
            store.add(variant, tensors)
        elif what == "rewrite":
            add_sparse(folder)
            assert len(pack_files(folder)) == 3
        elif what == "merge":
            add_small(folder)
        killed = done_until(what, folder, at, before)
        check_after_kill(folder, {1, 2} if what == "add" and killed else {2})
        if not killed:
            break
        shutil.rmtree(folder)
    assert 3 < at < 99


@pytest.mark.parametrize("at", [6, 12])
def test_killed_at_a_step_it_is_old_or_new(tmp_path, at):
    store_with_v(tmp_path / "s")
    assert done_until("add", tmp_path / "s", at, True)
    check_after_kill(tmp_path / "s", {1, 2})


@pytest.mark.parametrize("at", [5, 12, 20])
def test_killed_while_packs_are_merged_nothing_is_lost(tmp_path, at):
    store_with_v(tmp_path / "s")
    add_small(tmp_path / "s")
    assert len(pack_files(tmp_path / "s")) == 4
    assert done_until("merge", tmp_path / "s", at, True)
    check_after_kill(tmp_path / "s", {2})


def kill_at_moments(folder, count):
    moments = random.Random(0)
    store_with_v(folder)
    for _ in range(count):
        first = Store(folder).variants["v"].about["seed"]
        said = killed_at(moments.uniform(0, 0.1), add_versions, folder)
        last = said[-1] if said else 0
        check_after_kill(folder, {last or first, last + 1})


def collect_at_moments(folder, count):
    moments = random.Random(1)
    store_with_v(folder)
    for _ in range(count):
        first = Store(folder).variants["v"].about["seed"]
        said = killed_at(moments.uniform(0, 0.1), add_and_collect, folder)
        last = said[-1] if said else 0
        check_after_kill(folder, {last or first, last + 1})


@pytest.mark.parametrize("killing", [kill_at_moments, collect_at_moments])
def test_killed_at_a_moment_it_is_old_or_new(tmp_path, killing):
    killing(tmp_path / "s", 2)


@pytest.mark.slow
@pytest.mark.parametrize("killing", [kill_at_moments, collect_at_moments])
def test_killed_at_20_moments_it_is_old_or_new(tmp_path, killing):
    killing(tmp_path / "s", 20)
