"""Variants of a store that are adapters of low rank and tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fleet.variants import Encoded, Variant, tensor_hash

Factors = Mapping[str, Mapping[str, Tensor]]


def adapted_variant(
    name: str, node: str, factors: Factors, plain: Mapping[str, Tensor], classes: int, scale: float
) -> tuple[Variant, dict[str, Tensor]]:
    """A variant's record, and its tensors by hash.

    `factors` are {"down": [rank, in], "up": [out, rank]} by module, `plain` whole tensors by name.
    """
    tensors: dict[str, Tensor] = {}

    def hashed(parts: Mapping[str, Tensor]) -> dict[str, str]:
        digests = {part: tensor_hash(value) for part, value in parts.items()}
        tensors.update({digests[part]: value for part, value in parts.items()})
        return digests

    records = {
        f"{module}.weight": Encoded("low_rank", hashed(parts), {"scale": scale})
        for module, parts in factors.items()
    }
    records |= {key: Encoded("plain", hashed({"value": value})) for key, value in plain.items()}
    return Variant(name, node, records, classes), tensors
