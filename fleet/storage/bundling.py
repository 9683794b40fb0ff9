"""Many small parts of a variant or node as one tensor of bytes, each a piece of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.storage.encodings import ENCODINGS, SHARED_PARTS
from fleet.storage.hashes import check_named, plain, tensor_hash
from fleet.storage.records import Encoded
from fleet.storage.references import Piece, reference_to
from merge.checkpoints.tensors import dtype_name, tensor_bytes

# A tensor of its own takes some 300 bytes of names. Values may be those of another variant too,
# and are then stored once; other parts hardly ever are.
VALUES_BYTES = 8 << 10
PARTS_BYTES = 1 << 20
# What is no larger is there again where several records have it: to say where it is takes more.
AGAIN_BYTES = 128

Records = dict[str, Encoded]
Given = Mapping[str, Shaped[Tensor, "..."]]


@dataclass
class _Bundle:
    """Pieces one after the other, and where each tensor begins."""

    data: bytearray = field(default_factory=bytearray)
    places: dict[str, Piece] = field(default_factory=dict)
    count: int = 0

    def take(self, digest: str, tensor: Tensor) -> Piece:
        if digest in self.places and tensor.nbytes > AGAIN_BYTES:
            return self.places[digest]
        if digest not in self.places:
            check_named(digest, tensor)
        piece = Piece(len(self.data), dtype_name(tensor.dtype), tuple(tensor.shape))
        self.data += tensor_bytes(plain(tensor))
        self.places[digest] = piece
        self.count += 1
        return piece


def bundled(
    records: Mapping[str, Mapping[str, Encoded]], given: Given
) -> tuple[dict[str, Records], dict[str, Shaped[Tensor, ...]]]:
    """Records (by kind, then name) with the small ones of the `given` tensors in one; and tensors.

    They follow each other as the records do. Parts that are a node's stay alone, and so does a
    single one. Raises FleetError for a tensor that is not what its hash says.
    """
    every = [encoded for named in records.values() for encoded in named.values()]
    shared = {e.parts[part] for e in every for part in SHARED_PARTS.get(e.encoding, ())}
    bundle = _Bundle()
    pieces: dict[tuple[int, str], Piece] = {}
    for number, encoded in enumerate(every):
        encoding = ENCODINGS.get(encoded.encoding)
        limit = VALUES_BYTES if encoding is not None and encoding.exact else PARTS_BYTES
        for part, digest in encoded.parts.items():
            tensor = given.get(digest)
            if tensor is not None and digest not in shared and 0 < tensor.nbytes <= limit:
                pieces[number, part] = bundle.take(digest, tensor)
    if bundle.count < 2:
        return {kind: dict(named) for kind, named in records.items()}, dict(given)
    values = torch.frombuffer(bundle.data, dtype=torch.uint8)
    home = tensor_hash(values)
    numbers = iter(range(len(every)))

    def moved(encoded: Encoded) -> Encoded:
        number = next(numbers)
        parts = {
            part: reference_to(home, pieces[number, part]) if (number, part) in pieces else digest
            for part, digest in encoded.parts.items()
        }
        return Encoded(encoded.encoding, parts, encoded.settings)

    found = {kind: {k: moved(e) for k, e in named.items()} for kind, named in records.items()}
    rest = {digest: tensor for digest, tensor in given.items() if digest not in bundle.places}
    return found, {**rest, home: values}
