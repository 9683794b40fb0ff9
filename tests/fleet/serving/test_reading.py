from __future__ import annotations

import errno
import os

import pytest
import torch

from fleet.errors import FleetError
from fleet.serving import reading
from fleet.serving.arena import rounded
from fleet.serving.reading import PartsUnit
from fleet.serving.slots import host_memory
from fleet.variants import Store, tensor_hash
from tests.fleet.storage.stores import filled_at_once, small_base


@pytest.fixture
def tensors():
    return {
        tensor_hash(tensor): tensor
        for tensor in (
            torch.randn(7, 5),
            torch.randn(3, dtype=torch.float64),
            torch.randn(9).half(),
            torch.arange(11, dtype=torch.uint8),
            torch.zeros(0, 4),
            torch.tensor(2.5),
            torch.tensor([True, False, True]),
        )
    }


@pytest.fixture
def store(tmp_path, tensors):
    store = Store.create(tmp_path / "store", {"w": torch.randn(4, 4)})
    every = list(tensors.items())
    store.packs.learn(store.packs.put(dict(every[:4])))
    store.packs.learn(store.packs.put(dict(every[4:])))
    return store


def loaded(unit: PartsUnit) -> dict[str, torch.Tensor]:
    return unit.load(host_memory(rounded(unit.nbytes)))[0]


@pytest.mark.parametrize("most", [1, 2, 512])
def test_tensors_of_several_packs_lie_in_the_slot(store, tensors, monkeypatch, most):
    monkeypatch.setattr(reading, "MOST_AT_ONCE", most)
    unit = PartsUnit("a", store.packs, list(reversed(tensors)))
    slot = host_memory(rounded(unit.nbytes))
    found, nbytes = unit.load(slot)
    assert nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for digest, tensor in tensors.items():
        assert torch.equal(found[digest], tensor)
        assert found[digest].dtype == tensor.dtype
        assert found[digest].shape == tensor.shape
        begin = found[digest].data_ptr() - slot.data_ptr()
        assert not tensor.numel() or (0 <= begin < unit.nbytes and begin % 64 == 0)
    for tensor in found.values():
        tensor.zero_()
    assert all(torch.equal(loaded(unit)[digest], tensor) for digest, tensor in tensors.items())


def test_a_read_that_comes_in_pieces(store, tensors, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:3]], at))
    found = loaded(PartsUnit("a", store.packs, list(tensors)))
    assert all(torch.equal(found[digest], tensor) for digest, tensor in tensors.items())


def test_a_file_that_ends_early(store, tensors, monkeypatch):
    unit = PartsUnit("a", store.packs, list(tensors))
    loaded(unit)
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: 0)
    with pytest.raises(FleetError, match="was truncated while it was read"):
        loaded(unit)


def test_an_altered_pack_is_found_although_it_was_read_before(store, tensors):
    unit = PartsUnit("a", store.packs, list(tensors))
    loaded(unit)
    path = store.packs.path(store.packs.pack_of(next(iter(tensors))))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FleetError, match="truncated or altered"):
        loaded(unit)


def test_a_tensor_that_moved_to_another_pack(store, tensors):
    unit = PartsUnit("a", store.packs, list(tensors))
    loaded(unit)
    first = next(iter(tensors))
    old = store.packs.pack_of(first)
    store.packs.path(old).unlink()
    held = {digest: tensors[digest] for digest in store.packs.held_by(old)}
    store.packs.forget([old])
    store.packs.learn(store.packs.put({**held, **tensors}))
    found = loaded(unit)
    assert all(torch.equal(found[digest], tensor) for digest, tensor in tensors.items())


def test_damage_to_another_tensor_of_the_pack_is_found_although_it_was_read_before(store, tensors):
    one, two, *_ = tensors
    both, first = (PartsUnit("a", store.packs, digests) for digests in ([one, two], [one]))
    loaded(both)
    loaded(first)
    place = store.packs.place(two)
    content = bytearray(place.path.read_bytes())
    content[place.offset] ^= 1
    place.path.write_bytes(content)
    assert torch.equal(loaded(first)[one], tensors[one])
    with pytest.raises(FleetError, match=f"was truncated or altered, and with it 1 .*{two}"):
        loaded(both)


@pytest.fixture
def collected(tmp_path):
    """A unit of each of three variants, read by another Store than the one whose gc is given."""
    writer, _ = filled_at_once(tmp_path / "s", small_base(), ["one", "two", "three"])
    reader = Store(writer.folder)
    units = {
        name: PartsUnit(name, reader.packs, [d for e in v.encoded() for d in e.parts.values()])
        for name, v in reader.variants.items()
    }
    writer.remove("two")
    writer.remove("three")
    return units, writer.gc


def collecting_before_reading(monkeypatch, gc):
    """gc runs once, between looking up the first tensors and reading them; what it freed."""
    read, freed = reading._read, []

    def late(path, pieces):
        if not freed:
            freed.append(gc())
            assert not path.exists()
        read(path, pieces)

    monkeypatch.setattr(reading, "_read", late)
    return freed


@pytest.mark.parametrize("read_before", [False, True])
def test_a_pack_that_gc_moves_between_looking_and_reading(collected, monkeypatch, read_before):
    units, gc = collected
    wanted = {digest: tensor.clone() for digest, tensor in loaded(units["one"]).items()}
    unit = units["one"] if read_before else PartsUnit("new", units["one"].packs, list(wanted))
    freed = collecting_before_reading(monkeypatch, gc)
    found = loaded(unit)
    assert freed[0] > 0
    assert all(torch.equal(found[digest], tensor) for digest, tensor in wanted.items())


def test_a_pack_that_gc_removes_between_looking_and_reading(collected, monkeypatch):
    units, gc = collected
    collecting_before_reading(monkeypatch, gc)
    with pytest.raises(FleetError, match="no pack holds the tensor"):
        loaded(units["two"])


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOENT, "went away twice while it was read"), (errno.EIO, "cannot be read")],
)
def test_a_file_that_cannot_be_opened_is_named(collected, monkeypatch, code, said):
    units, _ = collected
    loaded(units["one"])

    def refused(path, flags):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(reading.os, "open", refused)  # what was checked is looked at with lstat
    with pytest.raises(FleetError, match=rf"\.safetensors: {said}"):
        loaded(units["one"])
