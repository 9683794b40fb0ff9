"""From the records of a tensor, level by level, to its value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.encodings import ENCODINGS, SHARED_PARTS, encoding_named
from fleet.storage.hashes import check_storable
from fleet.storage.objects import Packs
from fleet.storage.records import Encoded, Variant
from merge.checkpoints.tensors import TensorInfo

BOTTLENECK = "bottleneck"
BOTTLENECK_PARTS = {"down", "down_bias", "up", "up_bias"}

SHAPES_KEPT = 4096

Chain = Sequence[Encoded]
Given = Mapping[str, Shaped[Tensor, "..."]]


class Decoder:
    """Makes tensors of what the packs hold."""

    def __init__(self, packs: Packs) -> None:
        self._packs = packs
        self._shape_and_dtype = lru_cache(SHAPES_KEPT)(self._look_up)

    def value(
        self,
        key: str,
        chain: Chain,
        given: Given | None = None,
        *,
        parent: Shaped[Tensor, ...] | None = None,
    ) -> Shaped[Tensor, ...]:
        """A tensor decoded, level by level from `parent` on; parts are `given`, else read."""
        value = parent
        for encoded in chain:
            value = _over(key, encoded, self.parts(encoded, given or {}), value)
        assert value is not None
        return value

    def parts(self, encoded: Encoded, given: Given) -> dict[str, Shaped[Tensor, ...]]:
        """What a record refers to, by the encoding's names: `given`, else read."""
        read = self._packs.read_many(d for d in encoded.parts.values() if d not in given)
        return {
            part: read[digest] if digest in read else given[digest].detach().cpu()
            for part, digest in encoded.parts.items()
        }

    def info(self, key: str, chain: Chain) -> TensorInfo:
        """Shape and dtype of a tensor; nothing is decoded, and what is known is not looked up."""
        return TensorInfo(key, *self._shape_and_dtype(plain_part(key, chain)))

    def _look_up(self, reference: str) -> tuple[tuple[int, ...], torch.dtype]:
        place = self._packs.place(reference)
        return place.shape, place.dtype

    def unresolved(self, encoded: Encoded) -> Iterator[str]:
        """What of a record this program, or this store, has not."""
        known = {name: set(encoding.parts) for name, encoding in ENCODINGS.items()}
        known[BOTTLENECK] = BOTTLENECK_PARTS
        if encoded.parts.keys() != known.get(encoded.encoding):
            yield (
                f"is encoded as {encoded.encoding!r} of {sorted(encoded.parts)}, which this "
                "program does not read"
            )
        for part, reference in encoded.parts.items():
            try:
                self._packs.check_held(reference)
            except FleetError as error:
                yield f"its part {part!r}: {error}"

    def check(
        self,
        where: str,
        tensors: Mapping[str, Encoded],
        parents: Mapping[str, Chain],
        given: Given,
    ) -> None:
        """FleetError unless each tensor can be made, and fits its parent (which is not read)."""
        for key, encoded in tensors.items():
            chain = parents.get(key, ())
            try:
                encoding = encoding_named(encoded.encoding)
                if encoding.name == "plain":
                    value = self.value(key, [encoded], given)
                    check_storable(value, repr(key))
                    wanted = self.info(key, chain).dtype if chain else value.dtype
                    if value.dtype != wanted:
                        raise FleetError(
                            f"{key!r}: is {value.dtype}, the base's is {wanted}; cast it"
                        )
                elif not chain:
                    raise FleetError(
                        f"{key!r}: is {encoding.name} over a tensor that the node has not; give a "
                        "variant of this base, or store it as plain"
                    )
                else:
                    info, parts = self.info(key, chain), self.parts(encoded, given)
                    if encoding.product == "low_rank":
                        check_filled(repr(key), parts)
                        encoding.check_product(parts, encoded.settings, info.shape)
                    else:
                        _over(key, encoded, parts, torch.zeros(info.shape, dtype=info.dtype))
            except FleetError as error:
                raise FleetError(f"{where}: {error}") from error


def _over(key: str, encoded: Encoded, parts: Mapping[str, Tensor], parent: Tensor | None) -> Tensor:
    """What a record makes of its parent's value."""
    try:
        found = encoding_named(encoded.encoding).decode(parts, encoded.settings, parent)
    except FleetError as error:
        raise FleetError(f"{key!r}: {error}") from error
    if parent is not None and (found.shape != parent.shape or found.dtype != parent.dtype):
        raise FleetError(
            f"{key!r}: {encoded.encoding} gives {found.dtype} {list(found.shape)}, wanted "
            f"{parent.dtype} {list(parent.shape)} as its parent's; add it again"
        )
    return found


def chains_of(levels: Sequence[Mapping[str, Encoded]]) -> dict[str, Chain]:
    """Of each tensor what makes it: the last plain one, and what is over it."""
    found: dict[str, list[Encoded]] = {}
    for level in levels:
        for key, encoded in level.items():
            if encoded.encoding == "plain":
                found[key] = [encoded]
            else:
                found.setdefault(key, []).append(encoded)
    return dict(sorted(found.items()))


def plain_part(key: str, chain: Chain) -> str:
    """The tensor that the others are over."""
    first = chain[0]
    if first.encoding != "plain" or first.parts.keys() != {"value"}:
        raise FleetError(
            f"{key!r}: is {first.encoding} of {sorted(first.parts)} over a tensor that no level "
            "has; add the variant again"
        )
    return first.parts["value"]


def own_parts(variant: Variant) -> set[str]:
    """What is stored as a variant's own, not its node's."""
    return {
        reference
        for encoded in variant.encoded()
        for part, reference in encoded.parts.items()
        if part not in SHARED_PARTS.get(encoded.encoding, ())
    }


def check_filled(where: str, parts: Mapping[str, Shaped[Tensor, ...]]) -> None:
    """FleetError for factors of rank 0, and for such that are not finite."""
    empty = [part for part, tensor in parts.items() if not tensor.numel()]
    bad = [p for p, t in parts.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if empty or bad:
        found = f"{empty[0]!r} is empty, of rank 0" if empty else f"{bad[0]!r} has NaN or infinity"
        raise FleetError(f"{where}: its part {found}; leave it out, or give one with values")


def check_bottleneck(where: str, parts: Mapping[str, Shaped[Tensor, ...]]) -> None:
    """FleetError unless y + up(act(down(y))) gives back the width that it takes (1902.00751)."""
    check_filled(where, parts)
    shapes = {part: list(parts[part].shape) for part in sorted(BOTTLENECK_PARTS)}
    rank, width = (*shapes["down"], 0, 0)[:2]
    wanted = {"down": [rank, width], "down_bias": [rank], "up": [width, rank], "up_bias": [width]}
    if shapes != wanted:
        raise FleetError(
            f"{where}: its parts are {shapes}, wanted down [rank, width], down_bias [rank], "
            "up [width, rank] and up_bias [width]"
        )
