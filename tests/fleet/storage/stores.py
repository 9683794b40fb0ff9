"""Small stores for tests: a base of a few tensors, nodes and variants of several encodings."""

import hashlib
import json

import torch

from fleet.storage.encodings import ENCODINGS
from fleet.storage.references import tensor_of
from fleet.variants import Encoded, Node, Store, Variant, tensor_hash


def small_base(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(8, 6, generator=draw).to(dtype),
        "layer.weight": torch.randn(6, 6, generator=draw).to(dtype),
        "layer.bias": torch.randn(6, generator=draw).to(dtype),
        "head.weight": torch.randn(3, 6, generator=draw).to(dtype),
        "steps": torch.tensor(7),
    }


def encoded(name, value, parent=None, **settings):
    """The record of a value, and its tensors by hash."""
    parts, kept = ENCODINGS[name].encode(value, parent, **settings)
    hashes = {part: tensor_hash(tensor) for part, tensor in parts.items()}
    return Encoded(name, hashes, kept), {hashes[part]: t for part, t in parts.items()}


def exact_variant(name, values, parent, node="base", **more):
    """A variant that comes back bit for bit: what differs from the parent's values is plain."""
    records, tensors = {}, {}
    for key, value in values.items():
        if key not in parent or not torch.equal(value, parent[key]):
            records[key], given = encoded("plain", value)
            tensors.update(given)
    return Variant(name, node, records, **more), tensors


def changed(base, seed, keys=("layer.weight", "head.weight"), size=0.1):
    draw = torch.Generator().manual_seed(seed)
    return {
        key: value + size * torch.randn(value.shape, generator=draw) if key in keys else value
        for key, value in base.items()
    }


def low_rank_variant(name, base, seed, rank=2, node="base", key="layer.weight"):
    draw = torch.Generator().manual_seed(seed)
    parts = {
        "down": torch.randn(rank, base[key].shape[1], generator=draw),
        "up": torch.randn(base[key].shape[0], rank, generator=draw),
    }
    hashes = {part: tensor_hash(tensor) for part, tensor in parts.items()}
    record = Encoded("low_rank", hashes, {"scale": 0.5})
    return Variant(name, node, {key: record}), {hashes[p]: t for p, t in parts.items()}


def filled(folder, base, names=("one", "two")):
    """A store of exact variants, and what each of them is."""
    store = Store.create(folder, base)
    values = {}
    for number, name in enumerate(names, start=1):
        values[name] = changed(base, seed=number)
        store.add(*exact_variant(name, values[name], base))
    return store, values


def filled_at_once(folder, base, names):
    """The same of variants that are written together."""
    store = Store.create(folder, base)
    values = {name: changed(base, seed=number) for number, name in enumerate(names, start=1)}
    store.add_many(exact_variant(name, values[name], base) for name in names)
    return store, values


def node_of(name, values, parent_values, parent="base"):
    records, tensors = {}, {}
    for key, value in values.items():
        if not torch.equal(value, parent_values[key]):
            records[key], given = encoded("plain", value)
            tensors.update(given)
    return Node(name, parent, records), tensors


def same(found, wanted):
    """Equal in names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def sealed(lines):
    """A manifest of these records, with sums as the store would write them."""
    text, previous = b"", ""
    for line in lines:
        body = json.dumps(line, separators=(",", ":")).encode()
        previous = hashlib.sha256(previous.encode() + body).hexdigest()[:16]
        text += body[:-1] + f',"sum":"{previous}"}}\n'.encode()
    return text


def records_of(folder):
    """The records of a manifest, without their sums."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_bytes().splitlines()]
    return [{key: value for key, value in line.items() if key != "sum"} for line in lines]


def pack_files(folder):
    """Every file where packs are."""
    return sorted(path for path in (folder / "objects").rglob("*") if path.is_file())


def pack_of(store, name, key="layer.weight"):
    """The file that holds a variant's own tensor."""
    (reference,) = store.variants[name].tensors[key].parts.values()
    return store.packs.path(store.packs.pack_of(reference))


def damage_tensor(store, name, key="layer.weight"):
    """Flip a bit of a variant's own tensor where it lies; the file of its pack, and its hash."""
    (reference,) = store.variants[name].tensors[key].parts.values()
    place = store.packs.place(reference)
    content = bytearray(place.path.read_bytes())
    content[place.offset] ^= 0x40
    place.path.write_bytes(content)
    return place.path, tensor_of(reference)
