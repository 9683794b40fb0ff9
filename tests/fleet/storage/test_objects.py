import errno
import hashlib
import json
import os
import shutil
import struct

import pytest
import torch

from fleet.errors import FleetError
from fleet.storage.hashes import tensor_hash
from fleet.storage.objects import Packs
from merge.checkpoints.safetensors_file import DTYPE_NAMES


def by_hash(*tensors):
    return {tensor_hash(tensor): tensor for tensor in tensors}


def some(seed=0, count=3):
    draw = torch.Generator().manual_seed(seed)
    return by_hash(*(torch.randn(4, n + 1, generator=draw) for n in range(count)))


@pytest.fixture
def packs(tmp_path):
    return Packs(tmp_path, lambda digests: [f"variant-{n}" for n in range(10)] if digests else [])


def put(packs, tensors):
    contents = packs.put(tensors)
    packs.learn(contents)
    (pack,) = contents
    return pack


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def pack_with(packs, header, data=b""):
    """A file under its right name, with any header: what a hostile store may hold."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    content = struct.pack("<Q", len(text)) + text + data
    pack = hashlib.sha256(content).hexdigest()
    packs.path(pack).parent.mkdir(parents=True)
    packs.path(pack).write_bytes(content)
    return pack


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(packs, dtype):
    draw = torch.Generator().manual_seed(0)
    tensors = []
    for shape in [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)]:
        count = max(torch.Size(shape).numel(), 0) * dtype.itemsize
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=draw)
        tensors.append(data.to(torch.uint8).view(dtype).view(shape))
    given = by_hash(*tensors)
    put(packs, given)
    for digest, found in packs.read_many(given).items():
        wanted = given[digest]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert tensor_hash(found) == digest
    place = packs.place(tensor_hash(tensors[-1]))
    data = place.path.read_bytes()[place.offset : place.offset + place.nbytes]
    assert data == tensors[-1].view(-1).view(torch.uint8).numpy().tobytes()


def test_a_hash_is_of_values_dtype_and_shape_and_not_of_layout():
    x = torch.arange(12.0).reshape(3, 4)
    assert tensor_hash(x.T) == tensor_hash(x.T.contiguous()) != tensor_hash(x)
    assert tensor_hash(x[:1, :1]) == tensor_hash(torch.zeros(1, 1))
    assert tensor_hash(x.reshape(4, 3)) != tensor_hash(x)
    assert tensor_hash(x.view(torch.int32)) != tensor_hash(x)
    text = b"float32 [3, 4]\n" + x.numpy().tobytes()
    assert tensor_hash(x) == hashlib.sha256(text).hexdigest()
    assert tensor_hash(torch.nn.Parameter(x)) == tensor_hash(x)


def test_a_pack_holds_what_no_other_holds_under_its_own_hash(packs, tmp_path):
    first = some(0)
    pack = put(packs, first)
    content = packs.path(pack).read_bytes()
    assert hashlib.sha256(content).hexdigest() == pack
    assert files(tmp_path) == [f"objects/{pack[:2]}/{pack}.safetensors"]
    assert packs.put(first) == {}
    more = packs.put({**first, **some(1, 2)})
    assert list(*more.values()) == list(some(1, 2))
    other = Packs(tmp_path / "other")
    (tmp_path / "other").mkdir()
    assert put(other, dict(reversed(first.items()))) == pack, "the same tensors, the same bytes"


def test_a_tensor_under_another_hash_is_refused(packs, tmp_path):
    (one, two, three), tensors = some(), list(some().values())
    with pytest.raises(FleetError, match=f"given as {one} is {two}"):
        packs.put({one: tensors[1]})
    with pytest.raises(FleetError, match="dense tensors"):
        packs.put({three: tensors[2].to_sparse()})
    assert files(tmp_path) == []


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "header":
        path.write_bytes(content[:8] + b"[" + content[9:])
    elif how == "renamed":
        path.write_bytes(content.replace(last_name(content), b"ab" * 32))
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "link":
        other = path.with_name("other")
        path.rename(other)
        path.symlink_to(other)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)


def last_name(content):
    """The hash of the tensor at the end of a pack."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return max(header, key=lambda digest: header[digest]["data_offsets"]).encode()


# How → how many of three tensors it takes: the last one, or all of them.
HOW = {
    "missing": 3,
    "truncated": 1,
    "empty": 3,
    "altered": 1,
    "header": 3,
    "renamed": 1,
    "longer": 0,
    "link": 3,
    "folder": 3,
    "pipe": 3,
}


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_damage_refuses_what_it_took_by_name_and_the_rest_goes_on(packs, how, read_before):
    good, bad = some(0), some(1)
    put(packs, good)
    pack = put(packs, bad)
    last = last_name(packs.path(pack).read_bytes()).decode()
    if read_before:
        packs.read_many(bad)
    damage(packs.path(pack), how)
    packs.read_many(good)
    lost = {0: [], 1: [last], 3: list(bad)}[HOW[how]]
    for digest, tensor in bad.items():
        if digest not in lost:
            assert torch.equal(packs.read(digest), tensor)
            assert packs.place(digest).nbytes == tensor.nbytes
            continue
        for call in (packs.read, packs.place):
            with pytest.raises(FleetError, match=str(packs.path(pack))) as raised:
                call(digest)
        said = str(raised.value)
        if how not in {"link", "folder", "pipe"}:
            assert "'variant-0', " in said
            assert "and 2 more" in said
        if how not in {"missing", "link", "folder", "pipe"}:
            assert f"and with it {len(lost)} of the 3 tensors read from it (" in said
            assert len(lost) == 3 or f"({last})" in said
    (problem,) = packs.verify(pack)
    assert str(packs.path(pack)) in problem


def test_tensors_that_changed_places_are_both_lost(packs):
    tensors = by_hash(torch.zeros(4), torch.ones(4), torch.full((4,), 2.0))
    pack = put(packs, tensors)
    path, content = packs.path(pack), packs.path(pack).read_bytes()
    one, two, three = (
        content[start : start + 16] for start in range(len(content) - 48, len(content), 16)
    )
    path.write_bytes(content[:-48] + two + one + three)
    last = last_name(content).decode()
    assert torch.equal(packs.read(last), tensors.pop(last))
    for digest in tensors:
        with pytest.raises(FleetError, match="with it 2 of the 3 tensors"):
            packs.read(digest)


@pytest.mark.parametrize("more", [{}, by_hash(torch.arange(7.0))])
def test_what_is_lost_is_put_again_and_the_rest_with_it(packs, more):
    tensors = some()
    old = put(packs, tensors)
    content = packs.path(old).read_bytes()
    last = last_name(content).decode()
    packs.path(old).write_bytes(content[:-1])
    contents = packs.put({last: tensors[last], **more})
    (new,) = contents
    assert (new == old) == (not more), "the same tensors, the same file"
    assert contents[new].keys() == tensors.keys() | more.keys()
    packs.learn(contents)
    for digest, tensor in tensors.items():
        assert torch.equal(packs.read(digest), tensor)
        assert packs.pack_of(digest) == new
    assert packs.verify(new) == []
    if more:
        assert packs.held_by(old) == []
        assert "was truncated or altered; no variant needs it: run gc" in packs.verify(old)[0]


def test_an_alteration_that_keeps_size_and_time_is_found_by_verify_and_by_others(packs, tmp_path):
    tensors = some()
    pack = put(packs, tensors)
    packs.read_many(tensors)
    path = packs.path(pack)
    found = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert "truncated or altered" in packs.verify(pack)[0]
    other = Packs(tmp_path)
    other.learn(packs.contents)
    with pytest.raises(FleetError, match="altered"):
        other.read(last_name(content).decode())


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_what_is_put_again_is_whole_again(packs, how):
    tensors = some()
    pack = put(packs, tensors)
    damage(packs.path(pack), how)
    assert put(packs, tensors) == pack
    assert packs.read_many(tensors).keys() == tensors.keys()
    assert packs.verify(pack) == []


def test_a_tensor_is_read_from_the_latest_pack_and_forgotten_with_it(packs):
    tensors = some()
    first = put(packs, tensors)
    one = next(iter(tensors))
    packs.path(first).unlink()
    second = put(packs, {one: tensors[one]})
    assert torch.equal(packs.read(one), tensors[one])
    assert packs.held_by(second) == [one]
    assert one not in packs.held_by(first)
    packs.forget([second])
    assert one not in packs
    with pytest.raises(FleetError, match="no pack holds"):
        packs.read(one)


LIES = {
    "too long": ({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b""),
    "beyond": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
    "negative": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b""),
    "hole": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}}, b"1234"),
    "huge": ({"a": {"dtype": "U8", "shape": [1 << 64], "data_offsets": [0, 1 << 64]}}, b""),
    "no json": (b"{" * 100, b""),
    "dtype": ({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "other size": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "other name": ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused_though_the_hash_is_right(packs, lie):
    digest = "ab" * 32
    header, data = LIES[lie]
    text = json.dumps(header).replace('"a"', f'"{digest}"') if isinstance(header, dict) else header
    pack = pack_with(packs, text.encode() if isinstance(text, str) else text, data)
    packs.learn({pack: {digest: 8}})
    with pytest.raises(FleetError, match=str(packs.path(pack))) as raised:
        packs.read(digest)
    assert "'variant-0'" in str(raised.value)


def test_a_pack_whose_tensors_are_not_their_hashes_is_found_by_verify(packs):
    digest = "ab" * 32
    header = {digest: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    pack = pack_with(packs, header, b"1234")
    packs.learn({pack: {digest: 4}})
    assert f"its tensor {digest} is " in packs.verify(pack)[0]


def test_links_that_lead_out_of_the_folder_are_not_followed(packs, tmp_path):
    tensors = some()
    pack = put(packs, tensors)
    outside = tmp_path.with_name(tmp_path.name + "-outside")
    shutil.move(tmp_path / "objects", outside)
    (tmp_path / "objects").symlink_to(outside)
    for call in (
        lambda: packs.read_many(tensors),
        lambda: packs.put(some(1)),
        packs.files,
    ):
        with pytest.raises(FleetError, match="objects: is a link"):
            call()
    (tmp_path / "objects").unlink()
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / pack[:2]).symlink_to(outside / pack[:2])
    assert packs.files() == {}
    with pytest.raises(FleetError, match="is a link"):
        packs.read_many(tensors)
    assert files(outside) == [f"{pack[:2]}/{pack}.safetensors"]


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(packs, tmp_path, monkeypatch, where):
    put(packs, some(0))
    before = files(tmp_path)

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    if where == "rename":
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        packs.put(some(1))
    monkeypatch.undo()
    assert files(tmp_path) == before
    put(packs, some(1))


def test_files_are_packs_and_leftovers_and_nothing_else(packs, tmp_path):
    pack = put(packs, some())
    objects = tmp_path / "objects"
    left = [objects / "new-12-0123abcd.safetensors", objects / ".new-1-0123abcd.x.3.ab.part"]
    mine = [objects / "notes.txt", objects / pack[:2] / "notes.txt", objects / "xx"]
    wrong = objects / pack[:2] / f"{'0' * 64 if pack[:2] != '00' else 'f' * 64}.safetensors"
    for path in (*left, *mine, wrong):
        path.write_bytes(b"123")
    found = packs.files()
    assert found.keys() == {packs.path(pack), *left}
    assert found[left[0]] == 3
