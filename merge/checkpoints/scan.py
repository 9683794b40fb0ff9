"""One sequential pass over a checkpoint: hashes, and values that are not finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from merge.checkpoints.tensors import Checkpoint, dtype_name, tensor_bytes

READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Scan:
    """`sha256` of the whole checkpoint, `digests` per tensor, counts of non-finite values.

    The whole is hashed over sorted names, dtypes, shapes and the tensors' digests, a tensor over
    its row-major bytes: the same weights in another container have the same hash. Tensors that
    are finite throughout are left out of `nonfinite`.
    """

    sha256: str
    digests: dict[str, str]
    nonfinite: dict[str, int]


def scan(checkpoint: Checkpoint, *, chunk_bytes: int = READ_BYTES) -> Scan:
    """Hash every tensor and count its NaN and infinite values, `chunk_bytes` at a time.

    A tensor that is stored with gaps or transposed is read whole.
    """
    memory = torch.empty(max(chunk_bytes, 16), dtype=torch.uint8)
    digests: dict[str, str] = {}
    nonfinite: dict[str, int] = {}
    in_file_order = sorted(
        checkpoint.stored.items(), key=lambda item: (str(item[1].file), item[1].offset)
    )
    for name, entry in in_file_order:
        digest, bad = hashlib.sha256(), 0
        numel = checkpoint.tensors[name].numel
        size = memory.numel() // entry.dtype.itemsize
        buffer = memory[: size * entry.dtype.itemsize].view(entry.dtype)
        if entry.stride is not None:
            size, buffer = numel, torch.empty(numel, dtype=entry.dtype)
        for start in range(0, numel, max(size, 1)):
            stop = min(start + size, numel)
            chunk = checkpoint.read(name, out=buffer[: stop - start], start=start, stop=stop)
            digest.update(tensor_bytes(chunk))
            bad += count_nonfinite(chunk)
        digests[name] = digest.hexdigest()
        if bad:
            nonfinite[name] = bad
    ordered = {name: digests[name] for name in checkpoint.tensors}
    whole = _hash_of_all(checkpoint, digests)
    return Scan(whole, ordered, {n: nonfinite[n] for n in ordered if n in nonfinite})


class Hasher:
    """The `sha256` of a scan, gathered from what is read of a checkpoint anyway."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._digests = {name: hashlib.sha256() for name in checkpoint.tensors}
        self._seen = dict.fromkeys(checkpoint.tensors, 0)

    def observe(self, name: str, start: int, tensor: Shaped[Tensor, ...]) -> None:
        """Take the flat elements from `start` on; what was seen before or comes too early is left.

        Several threads may observe different tensors.
        """
        if start == self._seen[name]:
            self._digests[name].update(tensor_bytes(tensor))
            self._seen[name] += tensor.numel()

    def sha256(self) -> str:
        """The hash; what was not observed is read now."""
        for name, info in self.checkpoint.tensors.items():
            step = max(READ_BYTES // info.dtype.itemsize, 1)
            while (start := self._seen[name]) < info.numel:
                stop = min(start + step, info.numel)
                self.observe(name, start, self.checkpoint.read(name, start=start, stop=stop))
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return _hash_of_all(self.checkpoint, digests)


def _hash_of_all(checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    for name, info in checkpoint.tensors.items():
        entry = [name, dtype_name(info.dtype), info.shape, digests[name]]
        whole.update(json.dumps(entry).encode())
    return whole.hexdigest()


def count_nonfinite(values: Shaped[Tensor, " numel"]) -> int:
    """How many of `values` are NaN or infinite; 0 for integers and booleans."""
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    if not values.is_floating_point():
        return 0
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)  # the float8 types have few operations
    # The extremes show NaN and infinities in one fast pass; isfinite is 40 times slower.
    low, high = torch.aminmax(values)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return 0
    return int((~torch.isfinite(values)).sum())
