"""Random numbers by name: the same run seed and name give the same numbers, in any order."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded from SHA-256 of `{seed}/{name}`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
