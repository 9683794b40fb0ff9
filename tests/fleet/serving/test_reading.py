from __future__ import annotations

import os

import pytest
import torch

from fleet.errors import FleetError
from fleet.serving import reading
from fleet.serving.arena import rounded
from fleet.serving.reading import PartsUnit
from fleet.serving.slots import host_memory
from fleet.variants import Store, tensor_hash


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
