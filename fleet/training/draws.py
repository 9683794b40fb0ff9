"""Random numbers of dropout and its like: any of them can be made without those before it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fleet.errors import FleetError
from kernels.draws import Draw

Key = tuple[int, int]
Words = np.ndarray[tuple[int, int], np.dtype[np.uint64]]

WORD_BITS = 32
BLOCK_WORDS = 1 << 16
# So many random bits fill the fraction of a number on [0, 1) exactly.
FRACTION_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def fill(
    requests: Sequence[Draw],
    seeds: Sequence[int],
    streams: Sequence[str],
    steps: Sequence[int],
    device: torch.device | str,
) -> list[Tensor]:
    """What each model draws at its step, each [models, *shape]: request by request.

    A model's numbers are those of Philox (Random123, SC 2011) with the key SHA-256 of
    `{seed}/{stream}` and the counter (step, place of the request): they depend on nothing else,
    not on the other models, requests or steps. `keep` is 1 where 32 random bits are below
    probability · 2³². On a GPU they are those of the GPU's own Philox, seeded with all of that.

    Raises FleetError where seeds, streams and steps are not one for each model.
    """
    if not len(seeds) == len(streams) == len(steps):
        raise FleetError(
            f"{len(seeds)} seeds, {len(streams)} streams, {len(steps)} steps: give one of each "
            "for each model"
        )
    if not requests:
        return []
    device = torch.device(device)
    keys = [_key(seed, stream) for seed, stream in zip(seeds, streams, strict=True)]
    made = _on_cpu if device.type == "cpu" else _on_device
    return made(requests, keys, steps, device)


def _on_cpu(
    requests: Sequence[Draw], keys: Sequence[Key], steps: Sequence[int], device: torch.device
) -> list[Tensor]:
    philox = np.random.Philox(key=0)
    state = philox.state
    counter, key = state["state"]["counter"], state["state"]["key"]
    results = []
    for place, request in enumerate(requests):
        numbers = math.prod(request.shape)
        result = torch.empty(len(keys), numbers, dtype=request.dtype)
        count = _words(request, numbers)
        block = max(1, BLOCK_WORDS // max(1, count))
        for first in range(0, len(keys), block):
            rows = result[first : first + block]
            words = np.empty((len(rows), count), dtype=np.uint64)
            for m, row in enumerate(words, start=first):
                key[:], counter[:] = keys[m], (0, place, steps[m], 0)
                philox.state = state
                row[:] = philox.random_raw(count)
            MADE_FROM[request.kind](rows, words, request)
        results.append(result.view(len(keys), *request.shape))
    return results


def _words(request: Draw, numbers: int) -> int:
    """So many words of 64 bits are needed for the numbers of one model."""
    if request.kind == "normal":
        numbers += numbers % 2
    return numbers if request.dtype == torch.float64 else (numbers + 1) // 2


def _keep(rows: Tensor, words: Words, request: Draw) -> None:
    threshold = round(request.probability * 2**WORD_BITS)
    if threshold in (0, 2**WORD_BITS):
        rows.fill_(threshold > 0)
        return
    bits = words.view(np.uint32)[:, : rows.shape[1]]
    np.less(bits, np.uint32(threshold), out=rows.numpy())


def _uniform(rows: Tensor, words: Words, request: Draw) -> None:
    bits = FRACTION_BITS[request.dtype]
    if bits > WORD_BITS:
        whole = (words >> np.uint64(64 - bits)).astype(np.float64)
    else:
        parts = words.view(np.uint32)[:, : rows.shape[1]]
        whole = (parts >> np.uint32(WORD_BITS - bits)).astype(np.float32)
    rows.copy_(torch.from_numpy(whole)).mul_(2.0**-bits)


def _normal(rows: Tensor, words: Words, request: Draw) -> None:
    """Pairs √(−2 ln u)·(cos 2πv, sin 2πv) of Box and Muller."""
    if request.dtype == torch.float64:
        uniform, scale = (words >> np.uint64(11)).astype(np.float64), 2.0**-53
    else:
        uniform, scale = words.view(np.uint32).astype(np.float32), 2.0**-WORD_BITS
    uniform += 0.5
    uniform *= scale
    pairs = uniform.shape[1] // 2
    radius, angle = np.log(uniform[:, :pairs]), uniform[:, pairs:] * (2 * math.pi)
    radius *= -2
    np.sqrt(radius, out=radius)
    np.multiply(np.cos(angle), radius, out=uniform[:, :pairs])
    np.multiply(np.sin(angle), radius, out=uniform[:, pairs:])
    rows.copy_(torch.from_numpy(uniform)[:, : rows.shape[1]])


MADE_FROM: dict[str, Callable[[Tensor, Words, Draw], None]] = {
    "keep": _keep,
    "uniform": _uniform,
    "normal": _normal,
}


def _on_device(
    requests: Sequence[Draw], keys: Sequence[Key], steps: Sequence[int], device: torch.device
) -> list[Tensor]:
    draws = torch.Generator(device)
    results = []
    for place, request in enumerate(requests):
        result = torch.empty(len(keys), *request.shape, dtype=request.dtype, device=device)
        for row, key, step in zip(result, keys, steps, strict=True):
            draws.manual_seed(_digest(f"{key}/{step}/{place}")[0] >> 1)
            if request.kind == "keep":
                row.bernoulli_(request.probability, generator=draws)
            elif request.kind == "uniform":
                row.uniform_(generator=draws)
            else:
                row.normal_(generator=draws)
        results.append(result)
    return results


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> Key:
    return _digest(f"{seed}/{stream}")


def _digest(name: str) -> Key:
    """The first two 64-bit words of SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
