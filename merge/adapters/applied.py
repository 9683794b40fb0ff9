"""A base with an adapter on it, read like any other checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from merge.adapters.adapter import Adapter, Module
from merge.adapters.matching import PrefixChange, is_transposed, match_names, transposed_leaves
from merge.checkpoints.envelopes import quoted
from merge.checkpoints.tensors import Checkpoint, TensorInfo, dtype_name
from merge.errors import MergeError
from merge.mixing import CHUNK, compute_dtype

# Elements of the change that are computed at a time, always for the same rows: matrix products of
# other shapes round differently, and slices are to have the bits of the whole.
BLOCK = CHUNK


@dataclass(frozen=True)
class Change:
    """What is added to a tensor of the base: `scaling · L @ R`, of shape [rows, columns]."""

    module: Module
    transposed: bool
    bias: bool = False

    def factors(
        self, adapter: Adapter, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
        if self.bias:
            column = adapter.checkpoint.read(self.module.b_bias or "").to(dtype)[:, None]
            return column, torch.ones(1, 1, dtype=dtype)
        b, a = adapter.factors(self.module.name, dtype=dtype)
        return (a.T.contiguous(), b.T.contiguous()) if self.transposed else (b, a)


class AppliedAdapter(Checkpoint):
    """`W + s·B·A` for the modules of an adapter, the base's tensors for the rest (2106.09685).

    Computed in fp32 (fp64 where the base is), rounded once to the tensor's dtype; slices have the
    bits of the whole. Tensors that the adapter stores whole replace those of the base, or are
    added to them. Closing it closes the base and the adapter.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> None:
        renamed = match_names(base, adapter)
        self._base, self._adapter = base, adapter
        self._changes = _changes(base, adapter, renamed)
        self._saved = {_saved_name(base, name, renamed): at for name, at in adapter.saved.items()}
        self._latest: tuple[str, Tensor, Tensor] | None = None
        stored = {**base.stored}
        stored.update((name, adapter.checkpoint.stored[at]) for name, at in self._saved.items())
        super().__init__(f"{base.path}+{adapter.path}", stored, [*base.notes, *adapter.notes])
        self.tensors = {
            name: self._info(info, dtype if name in self._changes or name in self._saved else None)
            for name, info in self.tensors.items()
        }
        self.stored = {  # where the larger part of each tensor lies, as what it is read
            name: dataclasses.replace(entry, dtype=self.tensors[name].dtype)
            for name, entry in self.stored.items()
        }
        self.files = tuple(dict.fromkeys([*base.files, *adapter.checkpoint.files]))
        self._inputs = (*base._inputs, *adapter.checkpoint._inputs)
        self.shared, untied = self._still_shared()
        self.notes += (*self._said(renamed), *untied)

    def read(
        self,
        name: str,
        *,
        out: Shaped[Tensor, ...] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Shaped[Tensor, ...]:
        """The tensor `name`, or its flat elements [start, stop), as `Checkpoint.read`."""
        self._entry(name)
        if name not in self._changes and name not in self._saved:
            return self._base.read(name, out=out, start=start, stop=stop)
        info = self.tensors[name]
        end = info.numel if stop is None else stop
        if not 0 <= start <= end <= info.numel:
            raise MergeError(
                f"{self.path}: '{name}' has {info.numel} elements, [{start}, {end}) is outside of "
                "it"
            )
        if out is not None and (out.numel() != end - start or not out.is_contiguous()):
            raise MergeError(
                f"{self.path}: '{name}' is read into a tensor of shape {list(out.shape)}; wanted a "
                f"contiguous one with {end - start} elements"
            )
        values = self._values(name, info, start, end).to(info.dtype)
        if out is None:
            return values.view(info.shape) if start == 0 and stop is None else values
        out.detach().view(-1).copy_(values)
        return out

    def _values(self, name: str, info: TensorInfo, start: int, end: int) -> Float[Tensor, " numel"]:
        values = torch.empty(end - start, dtype=compute_dtype(info.dtype))
        if name in self._saved:
            self._adapter.checkpoint.read(self._saved[name], out=values, start=start, stop=end)
        else:
            self._base.read(name, out=values, start=start, stop=end)
        if name in self._changes and end > start:
            left, right = self._factors(name, values.dtype)
            _add_product(values, start, left, right, self._changes[name].module.scaling)
        return values

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of the tensor that was read last are kept: it is mostly read in slices."""
        latest = self._latest
        if latest is None or latest[0] != name:
            latest = (name, *self._changes[name].factors(self._adapter, dtype))
            self._latest = latest
        return latest[1], latest[2]

    def _info(self, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
        """A saved tensor has the dtype of the base's; all that is changed has `dtype`, if given."""
        known = self._base.tensors.get(info.name, info)
        return dataclasses.replace(info, dtype=dtype or known.dtype)

    def _still_shared(self) -> tuple[tuple[tuple[str, ...], ...], list[str]]:
        """Tied tensors of which none is changed; and notes on the others."""
        changed = self._changes.keys() | self._saved.keys()
        still = tuple(names for names in self._base.shared if not changed & set(names))
        notes = [
            f"tied in the base, changed by the adapter and no longer tied: {quoted(names)}"
            for names in self._base.shared
            if changed & set(names)
        ]
        return still, notes

    def _said(self, renamed: PrefixChange) -> list[str]:
        base, adapter = self._base, self._adapter
        notes = [f"LoRA '{adapter.path}' applied to {len(self._changes)} tensors"]
        if renamed != PrefixChange():
            notes.append(f"names of the adapter matched with {renamed}")
        named = adapter.config.base_model_name_or_path
        if named and named.rstrip("/") != base.path.rstrip("/"):
            notes.append(f"the adapter names '{named}' as its base")
        replaced = [name for name in self._saved if name in base.tensors]
        added = [name for name in self._saved if name not in base.tensors]
        reshaped = [n for n in replaced if base.tensors[n].shape != self.tensors[n].shape]
        if replaced:
            notes.append(f"replaced by what the adapter stores whole: {quoted(replaced)}")
        if reshaped:
            notes.append(f"of another shape than in the base: {quoted(reshaped)}")
        if added:
            notes.append(f"added by the adapter, not in the base: {quoted(added)}")
        return notes


def applied(
    base: Checkpoint, adapter: Adapter, *, dtype: torch.dtype | None = None
) -> AppliedAdapter:
    """The checkpoint that `base` becomes with `adapter`: `W + s·B·A` (2106.09685).

    `dtype` is that of the changed tensors (default: the base's own); float32 keeps what a bf16
    base would round away of a small change. Raises MergeError where the base is not the
    adapter's: a module without a tensor, another shape, quantised weights.
    """
    return AppliedAdapter(base, adapter, dtype)


def _changes(base: Checkpoint, adapter: Adapter, renamed: PrefixChange) -> dict[str, Change]:
    leaves = transposed_leaves(base)
    changes: dict[str, Change] = {}
    for module in adapter.modules.values():
        name = renamed(f"{module.name}.weight")
        info = _floating(base, adapter, name)
        shape = adapter.saved.get(f"{module.name}.weight")
        if shape is not None:  # the embedding that LoRA is on may have been resized
            info = dataclasses.replace(info, shape=adapter.checkpoint.tensors[shape].shape)
        changes[name] = Change(module, is_transposed(base, adapter, module, info, leaves))
        if module.b_bias is not None:
            bias = renamed(f"{module.name}.bias")
            if bias not in base.tensors or base.tensors[bias].shape != (module.rows,):
                raise MergeError(
                    f"{base.path}: has no {bias!r} of {module.rows} elements, which the adapter "
                    f"{adapter.path} changes (lora_bias); give the base that it was trained on"
                )
            _floating(base, adapter, bias)
            changes[bias] = Change(module, transposed=False, bias=True)
    return changes


def _floating(base: Checkpoint, adapter: Adapter, name: str) -> TensorInfo:
    info = base.tensors[name]
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        raise MergeError(
            f"{base.path}: {name!r} is {dtype_name(info.dtype)}, quantised; the adapter "
            f"{adapter.path} adds to weights in 16 to 64-bit floats: give the base in one"
        )
    return info


def _saved_name(base: Checkpoint, name: str, renamed: PrefixChange) -> str:
    """The base's name of a tensor that is stored whole; its own where the base has none."""
    return name if name in base.tensors and renamed(name) not in base.tensors else renamed(name)


def _add_product(
    values: Float[Tensor, " numel"],
    start: int,
    left: Float[Tensor, "rows rank"],
    right: Float[Tensor, "rank columns"],
    scaling: float,
) -> None:
    """Add the flat elements from `start` on of `scaling · left @ right` to `values`, in place."""
    rows, columns = left.shape[0], right.shape[1]
    count = min(rows, max(BLOCK // columns, 1))
    end = start + values.numel()
    for first in range(start // columns // count * count, math.ceil(end / columns), count):
        block = left[first : first + count]
        if block.shape[0] < count:
            block = torch.cat([block, block.new_zeros(count - block.shape[0], block.shape[1])])
        begin = first * columns
        low, high = max(start, begin), min(end, begin + count * columns)
        product = (block @ right).view(-1)[low - begin : high - begin]
        values[low - start : high - start].add_(product, alpha=scaling)
