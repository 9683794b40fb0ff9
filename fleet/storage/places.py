"""Which few of a tensor's numbers are meant, in about a byte each."""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from fleet.errors import FleetError

# Steps are bytes: this one goes on without a place, any other ends at one.
SKIP = 255


def pack_places(places: Int64[Tensor, " count"], numel: int) -> Shaped[Tensor, " stored"]:
    """Ascending flat `places` below `numel`, in the fewer bytes of two forms.

    uint8: steps from place to place, the first from −1; 255 is a step without a place at its end
    (1510.00149, section 3). int32 (int64 from 2³¹ numbers on): the places themselves.
    """
    steps = torch.diff(places, prepend=places.new_full((1,), -1))
    skips, last = steps // SKIP, steps % SKIP
    plain = places.to(torch.int32 if numel <= 1 << 31 else torch.int64)
    ends = (skips + 1).cumsum(0)
    stored = int(ends[-1]) if len(ends) else 0
    if stored > plain.nbytes:
        return plain
    packed = torch.full((stored,), SKIP, dtype=torch.uint8)
    packed[ends - 1] = last.to(torch.uint8)
    return packed


def unpack_places(stored: Shaped[Tensor, " stored"], numel: int) -> Int64[Tensor, " count"]:
    """What `pack_places` packed; FleetError unless ascending and below `numel`."""
    if stored.dtype == torch.uint8:
        places = stored.cumsum(0, dtype=torch.int64)[stored != SKIP] - 1
    else:
        places = stored.to(torch.int64)
    ascending = bool((places[1:] > places[:-1]).all())
    if len(places) and not (ascending and places[0] >= 0 and places[-1] < numel):
        raise FleetError(
            f"places of changed numbers: found {int(places.min())} to {int(places.max())}, wanted "
            f"them ascending within [0, {numel}); the parts are of another tensor: add the variant "
            "again"
        )
    return places
