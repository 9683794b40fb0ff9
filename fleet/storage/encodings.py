"""How a tensor is made from its parent's: a registry, name → Encoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.places import pack_places, unpack_places
from inputs.randomness import generator
from kernels import quantise
from merge.adapters.low_rank import truncated

Setting = int | float | str | list[Any]
Parts = dict[str, Tensor]
Settings = dict[str, Setting]

_TYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


@dataclass(frozen=True)
class Encoding:
    """One way to store a tensor, as named `parts` and a few `settings`, over its parent's value.

    `exact`: every value comes back bit for bit; the others take finite floating-point tensors of
    the parent's shape and dtype. `shared` parts are a node's, stored once for all that refer to
    them, and no bytes of the variant's own. `product`: what a linear layer may do for rows of
    several tenants without the decoded tensor: `low_rank` adds scale · up @ (down @ x) to the
    parent's product; `decoded` knows no shorter way.
    """

    name: str
    parts: tuple[str, ...]
    make: Callable[..., tuple[Parts, Settings]]
    restore: Callable[[Mapping[str, Tensor], Mapping[str, Setting], Tensor], Tensor]
    exact: bool = False
    shared: tuple[str, ...] = ()
    product: Literal["low_rank", "decoded"] = "decoded"

    def encode(
        self,
        value: Shaped[Tensor, ...],
        parent: Shaped[Tensor, ...] | None = None,
        **settings: Any,
    ) -> tuple[Parts, Settings]:
        """The parts and settings from which `decode` makes `value` again, nearly or exactly.

        Parts are contiguous, and may share memory with `value`.
        Raises FleetError for tensors or settings that this encoding cannot take.
        """
        if self.name != "plain":
            self._check(value, parent)
        with torch.no_grad():
            parts, stored = self.make(value.detach(), parent, **settings)
        return {name: part.contiguous() for name, part in parts.items()}, stored

    def decode(
        self,
        parts: Mapping[str, Shaped[Tensor, ...]],
        settings: Mapping[str, Any],
        parent: Shaped[Tensor, ...] | None = None,
    ) -> Shaped[Tensor, ...]:
        """The value; a tensor of its own, except that `plain` gives its part.

        Raises FleetError where the parts are others than encode's, or do not fit the parent.
        """
        if set(parts) != set(self.parts):
            raise FleetError(
                f"encoding '{self.name}': found the parts {sorted(parts)}, wanted "
                f"{sorted(self.parts)}; add the variant again"
            )
        if self.name == "plain":
            return parts["value"]
        if parent is None:
            raise FleetError(
                f"encoding '{self.name}' is over the parent's value and found none; store a tensor "
                "that the parent has not as 'plain'"
            )
        try:
            with torch.no_grad():
                return self.restore(parts, settings, parent)
        except (KeyError, RuntimeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise self._unfit(parts, settings, parent.shape, reason) from error

    def check_product(
        self,
        parts: Mapping[str, Shaped[Tensor, ...]],
        settings: Mapping[str, Any],
        shape: Sequence[int],
    ) -> None:
        """FleetError unless `low_rank` parts decode over a parent of this shape; quicker than to
        decode them."""
        if set(parts) != set(self.parts):
            raise FleetError(f"encoding '{self.name}': found the parts {sorted(parts)}")
        up, down = parts["up"].shape, parts["down"].shape
        matrices = len(up) == 2 and len(down) == 2
        if not matrices or up[1] != down[0] or up[0] * down[1] != math.prod(shape):
            raise self._unfit(parts, settings, shape, "their product is of another size")
        if not isinstance(settings.get("scale"), int | float):
            raise self._unfit(parts, settings, shape, "there is no scale")

    def _unfit(
        self, parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: Any, reason: str
    ) -> FleetError:
        shapes = {name: list(part.shape) for name, part in parts.items()}
        return FleetError(
            f"encoding '{self.name}': parts {shapes} with settings {dict(settings)} do not fit a "
            f"parent of {list(shape)} ({reason}); they were made for another base: add the variant "
            "again"
        )

    def nbytes(self, parts: Mapping[str, Shaped[Tensor, ...]]) -> int:
        """Bytes of the variant's own parts."""
        return sum(part.nbytes for name, part in parts.items() if name not in self.shared)

    def _check(self, value: Tensor, parent: Tensor | None) -> None:
        if parent is None or parent.shape != value.shape or parent.dtype != value.dtype:
            found = "none" if parent is None else f"{parent.dtype} {list(parent.shape)}"
            raise FleetError(
                f"encoding '{self.name}': the value is {value.dtype} {list(value.shape)}, the "
                f"parent's {found}; wanted both alike: store it as 'plain'"
            )
        if self.exact:
            return
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise FleetError(
                f"encoding '{self.name}': found {value.dtype}, wanted floats of 16 to 64 bits; "
                "store it as 'plain'"
            )
        bad = int(delta_of(value, parent).isfinite().logical_not().sum())
        if bad:
            raise FleetError(
                f"encoding '{self.name}': {bad} of {value.numel()} differences to the parent are "
                "NaN or infinite, wanted finite ones; look at where the checkpoint comes from, or "
                "store it as 'plain'"
            )


def delta_of(
    value: Float[Tensor, "*shape"], parent: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """value − parent, in fp32, of float64 tensors in float64."""
    wide = wide_type(value.dtype)
    return value.to(wide) - parent.to(wide)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are computed in: float64 for itself, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def different_bits(
    value: Shaped[Tensor, "*shape"], parent: Shaped[Tensor, "*shape"]
) -> Bool[Tensor, " numel"]:
    """At which flat places the bits differ; shapes and dtypes are alike."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = sizes[value.dtype.itemsize]
    one, other = (tensor.reshape(-1).view(bits) for tensor in (value, parent))
    return one != other


def same_bits(value: Shaped[Tensor, ...], parent: Shaped[Tensor, ...]) -> bool:
    """Whether shape, dtype and every bit are the same: then nothing has to be stored."""
    if value.shape != parent.shape or value.dtype != parent.dtype:
        return False
    return not bool(different_bits(value, parent).any())


def encoding_named(name: str) -> Encoding:
    """The encoding of that name; FleetError with the known ones."""
    if name not in ENCODINGS:
        raise FleetError(f"no encoding is called {name!r}; wanted one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def merged_vector(
    deltas: Iterable[Float[Tensor, "*shape"]],
) -> Float[Tensor, "*shape"]:
    """EMR's elected vector: sign(Σ δ), and of the deltas with that sign the largest |δ|.

    (2405.17461, section 3.2.) The deltas are taken one after another; at least one is needed.
    """
    merged = MergedVector()
    for delta in deltas:
        merged.add(delta)
    return merged.value()


class MergedVector:
    """`merged_vector` of deltas that come one at a time."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, delta: Float[Tensor, "*shape"]) -> None:
        if self._sums is None:
            self._sums = delta.clone(), delta.clamp(min=0), delta.clamp(max=0)
            return
        total, high, low = self._sums
        total += delta
        torch.maximum(high, delta, out=high)
        torch.minimum(low, delta, out=low)

    def value(self) -> Float[Tensor, "*shape"]:
        if self._sums is None:
            raise FleetError(
                "a merged vector of no deltas; wanted at least one variant in the node"
            )
        total, high, low = self._sums
        return torch.where(total > 0, high, torch.where(total < 0, low, 0))


# --- the value itself ---


def _make_plain(value: Tensor, parent: Tensor | None) -> tuple[Parts, Settings]:
    return {"value": value}, {}


def _restore_plain(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    return parts["value"]


def _make_changed(value: Tensor, parent: Tensor) -> tuple[Parts, Settings]:
    places = different_bits(value, parent).nonzero().flatten()
    return {"places": pack_places(places, value.numel()), "values": value.reshape(-1)[places]}, {}


def _restore_changed(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    result = parent.clone(memory_format=torch.contiguous_format)
    places = unpack_places(parts["places"], parent.numel())
    result.view(-1)[places] = parts["values"]
    return result


# --- what is added to the parent's ---


def _make_sparse(
    value: Tensor, parent: Tensor, *, count: int, values: str = "bfloat16"
) -> tuple[Parts, Settings]:
    if not 1 <= count <= max(value.numel(), 1):
        raise FleetError(
            f"encoding 'sparse': count is {count}, wanted 1 to {value.numel()}, the tensor's "
            "numbers; an equal tensor is not stored at all"
        )
    stored = _type_named("sparse", "values", values)
    delta = delta_of(value, parent).flatten()
    places = delta.abs().topk(min(count, len(delta))).indices.sort().values
    return {"places": pack_places(places, len(delta)), "values": delta[places].to(stored)}, {}


def _restore_sparse(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    places = unpack_places(parts["places"], parent.numel())
    wide = parent.to(wide_type(parent.dtype), copy=True, memory_format=torch.contiguous_format)
    wide.view(-1)[places] += parts["values"].to(wide.dtype)
    return wide.to(parent.dtype)


def _make_low_rank(
    value: Tensor, parent: Tensor, *, rank: int, factors: str = "float16"
) -> tuple[Parts, Settings]:
    if value.dim() < 2:
        raise FleetError(
            f"encoding 'low_rank': found a tensor of {list(value.shape)}, wanted a matrix (or a "
            "convolution's kernel, [out, in, …]); use another encoding"
        )
    matrix = delta_of(value, parent).flatten(1)
    if not 1 <= rank <= max(min(matrix.shape), 1):
        raise FleetError(
            f"encoding 'low_rank': the rank is {rank}, wanted 1 to {min(matrix.shape)} for "
            f"{list(value.shape)}; a tensor that is the parent's is not stored at all"
        )
    stored = _type_named("low_rank", "factors", factors)
    if not matrix.numel():
        empty = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
        return {"up": empty[0].to(stored), "down": empty[1].to(stored)}, {"scale": 1.0}
    found = truncated(matrix, rank=rank, energy=None, generator=generator(0, "low_rank"))
    return low_rank_parts(found.b, found.a, stored)


def low_rank_parts(
    up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"], stored: torch.dtype
) -> tuple[Parts, Settings]:
    """The parts for up @ down: factors of at most 1, and a scale that is a power of two."""
    scale = 1.0
    parts: Parts = {}
    for name, factor in (("up", up), ("down", down)):
        largest = float(factor.abs().max())
        power = 2.0 ** math.frexp(largest)[1] if largest else 1.0
        parts[name] = (factor / power).to(stored)
        scale *= power
    return parts, {"scale": scale}


def _restore_low_rank(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    wide = wide_type(parent.dtype)
    up, down = parts["up"].to(wide), parts["down"].to(wide)
    delta = (up @ down).mul_(settings["scale"])
    return delta.view(parent.shape).add_(parent).to(parent.dtype)


def _make_codes(
    value: Tensor, parent: Tensor, precision: quantise.Precision, group: int
) -> tuple[Parts, Settings]:
    if group < 1:
        raise FleetError(
            f"encoding '{precision}': group is {group}, wanted at least 1 number that shares a "
            "scale"
        )
    flat = _delta_in_fp32(value, parent, precision).flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % group)).view(-1, group)
    scales = quantise.SCALES[precision](padded)
    codes = quantise.encode(padded, scales, precision).view(-1)[: len(flat)]
    return {"codes": _packed(codes, precision), "scales": scales}, {"group": group}


def _restore_codes(
    parts: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    parent: Tensor,
    precision: quantise.Precision,
) -> Tensor:
    group = int(settings["group"])
    scales = parts["scales"]
    padded = torch.zeros(len(scales) * group, device=scales.device)
    numel = parent.numel()
    _check_length(parts["codes"], -(-numel // quantise.PER_BYTE[precision]))
    _check_length(scales, -(-numel // group))
    quantise.unpack(parts["codes"][None], 0, numel, precision, padded[None, :numel])
    delta = padded.view(-1, group).mul_(scales[:, None]).flatten()[:numel]
    return _added(parent, delta)


def _make_sign(value: Tensor, parent: Tensor, *, scales: str = "tensor") -> tuple[Parts, Settings]:
    if scales not in ("tensor", "row"):
        raise FleetError(f"encoding 'sign': scales is {scales!r}, wanted 'tensor' or 'row'")
    delta = _delta_in_fp32(value, parent, "sign")
    rows = len(delta) if scales == "row" and delta.dim() else 1
    flat = delta.flatten()
    means = quantise.mean_magnitude(flat.view(rows, -1)) if len(flat) else flat.new_zeros(rows)
    signs = _packed((flat >= 0).to(torch.int8), "sign")
    return {"signs": signs, "scales": means}, {}


def _restore_sign(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    _check_length(parts["signs"], -(-parent.numel() // 8))
    delta = torch.empty(1, parent.numel(), device=parent.device)
    quantise.unpack(parts["signs"][None], 0, parent.numel(), "sign", delta)
    if parent.numel():
        delta.view(len(parts["scales"]), -1).mul_(parts["scales"][:, None])
    return _added(parent, delta)


def _make_emr(value: Tensor, parent: Tensor, *, unified: Tensor) -> tuple[Parts, Settings]:
    if unified.shape != value.shape:
        raise FleetError(
            f"encoding 'emr': the node's merged vector is {list(unified.shape)}, the value "
            f"{list(value.shape)}; wanted one shape: give the vector of this tensor"
        )
    delta, merged = delta_of(value, parent), unified.to(wide_type(value.dtype))
    mask = delta.sign() * merged.sign() > 0  # a product of small numbers may underflow
    kept = torch.linalg.vector_norm(merged[mask], 1, dtype=torch.float64)
    total = torch.linalg.vector_norm(delta, 1, dtype=torch.float64)
    scale = float(total / kept) if kept > 0 else 0.0
    packed = _packed(mask.flatten().to(torch.int8), "sign")
    return {"mask": packed, "unified": unified}, {"scale": scale}


def _restore_emr(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], parent: Tensor
) -> Tensor:
    _check_length(parts["mask"], -(-parent.numel() // 8))
    mask = torch.empty(1, parent.numel(), device=parent.device)
    quantise.unpack(parts["mask"][None], 0, parent.numel(), "sign", mask)
    merged = parts["unified"].to(wide_type(parent.dtype)) * settings["scale"]
    return _added(parent, torch.where(mask.view(parent.shape) > 0, merged, 0))


# --- shared ---


def _added(parent: Tensor, delta: Tensor) -> Tensor:
    wide = wide_type(parent.dtype)
    return (parent.to(wide) + delta.to(wide).view(parent.shape)).to(parent.dtype)


def _delta_in_fp32(value: Tensor, parent: Tensor, encoding: str) -> Tensor:
    delta = delta_of(value, parent)
    # A scale times a code may round to more than the largest fp32: bf16's leaves room for that.
    largest = torch.finfo(torch.bfloat16).max
    if delta.numel() and float(delta.abs().max()) > largest:
        raise FleetError(
            f"encoding '{encoding}': the largest difference to the parent is "
            f"{float(delta.abs().max()):.6g}, wanted at most {largest:.6g}; store it as 'plain'"
        )
    return delta.float()


def _check_length(part: Tensor, wanted: int) -> None:
    if part.shape != (wanted,):
        raise RuntimeError(f"a part is {list(part.shape)}, wanted [{wanted}]")


def _packed(codes: Tensor, precision: quantise.Precision) -> Tensor:
    # A tensor of one byte may have the stride of what it was cut from, and pass as contiguous.
    return quantise.pack(codes, precision).clone(memory_format=torch.contiguous_format)


def _type_named(encoding: str, setting: str, name: str) -> torch.dtype:
    if name not in _TYPES:
        raise FleetError(
            f"encoding '{encoding}': {setting} is {name!r}, wanted one of {', '.join(_TYPES)}"
        )
    return _TYPES[name]


ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding("plain", ("value",), _make_plain, _restore_plain, exact=True),
        Encoding("changed", ("places", "values"), _make_changed, _restore_changed, exact=True),
        Encoding("low_rank", ("up", "down"), _make_low_rank, _restore_low_rank, product="low_rank"),
        Encoding("sparse", ("places", "values"), _make_sparse, _restore_sparse),
        Encoding(
            "int8",
            ("codes", "scales"),
            partial(_make_codes, precision="int8"),
            partial(_restore_codes, precision="int8"),
        ),
        Encoding(
            "int4",
            ("codes", "scales"),
            partial(_make_codes, precision="int4"),
            partial(_restore_codes, precision="int4"),
        ),
        Encoding("sign", ("signs", "scales"), _make_sign, _restore_sign),
        Encoding("emr", ("mask", "unified"), _make_emr, _restore_emr, shared=("unified",)),
    )
}
"""name       parts                      settings         the value, from the parent's W

plain      value                                       value, of any shape and dtype
changed    places, values                              W, but for the values at the places; exact
low_rank   up [out, r], down [r, in]  scale            W + scale · up @ down (PEFT's B and A)
sparse     places, values                              W, and at the places W + values
int8 int4  codes, scales              group            W + scale · code, a scale for each group
sign       signs, scales                               W + scale · ±1, of the tensor or each row
                                                       (BitDelta, 2402.10193)
emr        mask, unified              scale            W + scale · mask ∘ unified (2405.17461)

`encode` takes: low_rank `rank` and `factors` (a dtype); sparse `count` and `values` (a dtype);
int8 and int4 `group`; sign `scales` ("tensor" or "row"); emr `unified`, the node's merged vector.
"""

SHARED_PARTS = {encoding.name: encoding.shared for encoding in ENCODINGS.values()}
