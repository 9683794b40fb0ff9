"""What each operation does to the axes of its tensors: which it ties, and which order it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tag

from merge.align.axes import (
    Axis,
    concatenate,
    extent,
    freeze,
    frozen_axis,
    join,
    narrow,
    new_axis,
    pick,
    regroup,
)


@dataclass(frozen=True)
class Labels:
    """The axes of one tensor; `strides` are the tensor's, where they are known."""

    axes: tuple[Axis, ...]
    strides: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(extent, self.axes))


@dataclass(frozen=True)
class Call:
    """One operation of the trace: its arguments by name, tensors as Labels, and its result."""

    name: str
    arguments: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    tags: frozenset[Tag] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.shapes[0]

    @property
    def tensors(self) -> list[Labels]:
        """All arguments that are tensors."""
        return _labels_in(list(self.arguments.values()))

    def place(self, dim: int, labels: Labels) -> int:
        """`dim` counted from the front."""
        return dim % max(len(labels.axes), 1)


Result = Labels | tuple[Labels, ...]
Rule = Callable[[Call], Result | None]


def is_understood(name: str, tags: frozenset[Tag]) -> bool:
    """Whether there is a rule for an operation."""
    return _rule(name, tags) is not None


def apply_rule(call: Call) -> tuple[Labels, ...] | None:
    """The labels of the results, then of what is computed on the way to them.

    None where the operation is not understood: `freeze_call` is what is left then.
    """
    rule = _rule(call.name, call.tags)
    result = None if rule is None or not call.shapes else rule(call)
    if result is None:
        return None
    return result if isinstance(result, tuple) else (result,)


def _rule(name: str, tags: frozenset[Tag]) -> Rule | None:
    """The rule of an operation, in place or not."""
    elementwise = Tag.pointwise in tags and Tag.nondeterministic_seeded not in tags
    return RULES.get(name.rstrip("_")) or (_pointwise if elementwise else None)


def freeze_call(call: Call, reason: str) -> tuple[Labels, ...]:
    """Freeze what goes into an operation and what comes out of it."""
    for labels in call.tensors:
        for axis in labels.axes:
            freeze(axis, reason)
    return tuple(_frozen(shape, reason) for shape in call.shapes)


def _labels_in(value: Any) -> list[Labels]:
    if isinstance(value, Labels):
        return [value]
    if isinstance(value, list | tuple):
        return [labels for item in value for labels in _labels_in(item)]
    return []


def _frozen(shape: Sequence[int], reason: str) -> Labels:
    return Labels(tuple(frozen_axis(size, reason) for size in shape))


def _fresh(shape: Sequence[int]) -> Labels:
    return Labels(tuple(map(new_axis, shape)))


# --- element by element -------------------------------------------------------------------------


def _broadcast(tensors: Sequence[Labels], shape: Sequence[int], reason: str) -> Labels:
    """Tensors that are combined element by element: axes at the same place are one."""
    axes = []
    for from_end in range(len(shape), 0, -1):
        found = [
            t.axes[-from_end]
            for t in tensors
            if len(t.axes) >= from_end and extent(t.axes[-from_end]) != 1
        ]
        for axis in found[1:]:
            join(found[0], axis, reason)
        axes.append(found[0] if found else new_axis(shape[-from_end]))
    return Labels(tuple(axes))


def _pointwise(call: Call) -> Result:
    result = _broadcast(call.tensors, call.shape, call.name)
    return tuple(result for _ in call.shapes)


def _fill(call: Call) -> Result:
    """Every element has one value: any order will do."""
    return _fresh(call.shape)


def _same(call: Call) -> Result:
    """The axes of the first tensor, for all results: what is done respects any order."""
    return tuple(call.tensors[0] for _ in call.shapes)


def _strided(call: Call) -> Result | None:
    """Only a change of strides that touches no axis with more than one index."""
    labels, wanted = call["self"], tuple(call["stride"])
    same = all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(labels.shape, labels.strides, wanted, strict=False)
    )
    if labels.shape != tuple(call["size"]) or not labels.strides or not same:
        return None
    return None if call["storage_offset"] else labels


def _along(call: Call) -> Result:
    """What depends on the order along `dim` (`dims`; none is all), and only there."""
    labels = call["self"]
    dims = [call["dim"]] if call["dim"] is not None else call["dims"] or range(len(labels.axes))
    for dim in dims:
        freeze(labels.axes[call.place(dim, labels)], call.name)
    return labels


def _triangle(call: Call) -> Result:
    labels = call["self"]
    freeze((*labels.axes[-1], *labels.axes[-2]), call.name)
    return labels


# --- shapes -------------------------------------------------------------------------------------


def _view(call: Call) -> Result | None:
    atoms = [atom for axis in call["self"].axes for atom in axis]
    if extent(atoms) != math.prod(call.shape):
        return None
    return Labels(tuple(regroup(atoms, call.shape, call.name)))


def _permute(call: Call) -> Result:
    labels = call["self"]
    return Labels(tuple(labels.axes[call.place(dim, labels)] for dim in call["dims"]))


def _transpose(call: Call) -> Result:
    axes = list(call["self"].axes)
    first = call["dim0"] if call["dim0"] is not None else 0
    second = call["dim1"] if call["dim1"] is not None else len(axes) - 1
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return Labels(tuple(axes))


def _expand(call: Call) -> Result:
    return _broadcast([call["self"]], call.shape, call.name)


def _repeat(call: Call) -> Result:
    axes = [()] * (len(call.shape) - len(call["self"].axes)) + list(call["self"].axes)
    repeats = call["repeats"]
    return Labels(tuple((*new_axis(n), *axis) for n, axis in zip(repeats, axes, strict=True)))


def _cat(call: Call) -> Result:
    tensors = [labels for labels in call["tensors"] if labels.shape != (0,)]
    dim = call.place(call["dim"] or 0, tensors[0])
    axes = []
    for place in range(len(call.shape)):
        found = [labels.axes[place] for labels in tensors]
        if place == dim:
            axes.append(concatenate(found, call.name))
            continue
        for axis in found[1:]:
            join(found[0], axis, call.name)
        axes.append(found[0])
    return Labels(tuple(axes))


def _cut(labels: Labels, dim: int, start: int, stop: int, name: str) -> Labels:
    if stop - start == 1:
        axes = pick(labels.axes, dim, start, f"{name}: taken apart by index")
        return Labels((*axes[:dim], (), *axes[dim:]))
    axes = list(labels.axes)
    axes[dim] = narrow(axes[dim], start, stop, name)
    return Labels(tuple(axes))


def _slice(call: Call) -> Result | None:
    labels = call["self"]
    dim = call.place(call["dim"] or 0, labels)
    size = extent(labels.axes[dim])
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(size)
    if step != 1:
        freeze(labels.axes[dim], call.name)
        axes = list(labels.axes)
        axes[dim] = frozen_axis(call.shape[dim], call.name)
        return Labels(tuple(axes))
    return _cut(labels, dim, start, max(start, stop), call.name)


def _select(call: Call) -> Result:
    labels = call["self"]
    dim = call.place(call["dim"], labels)
    index = call["index"] % extent(labels.axes[dim])
    return Labels(tuple(pick(labels.axes, dim, index, f"{call.name}: taken apart by index")))


def _unbind(call: Call) -> Result:
    labels = call["self"]
    dim = call.place(call["dim"] or 0, labels)
    why = f"{call.name}: taken apart by index"
    count = extent(labels.axes[dim])
    return tuple(Labels(tuple(pick(labels.axes, dim, k, why))) for k in range(count))


def _split(call: Call) -> Result:
    labels = call["self"]
    dim = call.place(call["dim"] or 0, labels)
    start, parts = 0, []
    for shape in call.shapes:
        parts.append(_cut(labels, dim, start, start + shape[dim], call.name))
        start += shape[dim]
    return tuple(parts)


def _pad(call: Call) -> Result:
    labels, pad = call["self"], call["pad"]
    axes = list(labels.axes)
    for place in range(len(pad) // 2):
        dim = len(axes) - 1 - place
        if pad[2 * place] or pad[2 * place + 1]:
            freeze(axes[dim], call.name)
            axes[dim] = frozen_axis(call.shape[dim], call.name)
    return Labels(tuple(axes))


# --- sums of products ---------------------------------------------------------------------------


FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
}


def _matrix_product(call: Call) -> Result:
    """[batch, rows, inner] times [batch, inner, columns], plus what is added to it."""
    names = FACTORS[call.name]
    left, right = (call[name].axes for name in names)
    matrix = len(right) > 1
    join(left[-1], right[-2] if matrix else right[0], call.name)
    for ours, theirs in zip(left[:-2], right[:-2], strict=False):
        join(ours, theirs, call.name)
    product = Labels((*left[:-1], right[-1]) if matrix else left[:-1])
    added = [] if "self" in names else [call["self"]]
    return _broadcast([product, *added], call.shape, call.name)


def _convolution(call: Call) -> Result | None:
    images, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    spatial = len(weight.axes) - 2
    if len(images.axes) != spatial + 2:
        return None
    for labels in (images, weight):
        for axis in labels.axes[2:]:
            freeze(axis, call.name)
    first, second = weight.axes[:2]
    if groups > 1:
        outer, inner = regroup(first, (groups, extent(first) // groups), call.name)
        second_of_all, first_of_all = (*outer, *second), (*outer, *inner)
    else:
        second_of_all, first_of_all = second, first
    ins, outs = (
        (first_of_all, second_of_all) if call["transposed"] else (second_of_all, first_of_all)
    )
    join(images.axes[1], ins, call.name)
    if isinstance(bias, Labels):
        join(outs, bias.axes[0], call.name)
    sizes = call.shape[2:]
    return Labels((images.axes[0], outs, *(frozen_axis(size, call.name) for size in sizes)))


# --- norms and reductions -----------------------------------------------------------------------


def _batch_norm(call: Call) -> Result:
    images = call["input"]
    channels = images.axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call[name], Labels):
            join(channels, call[name].axes[0], call.name)
    size = extent(channels)
    return (images, *(Labels((channels,)) if s == (size,) else _fresh(s) for s in call.shapes[1:]))


def _layer_norm(call: Call) -> Result:
    images = call["input"]
    over = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(call[name], Labels):
            _broadcast([Labels(images.axes[-over:]), call[name]], call[name].shape, call.name)
    statistics = Labels((*images.axes[:-over], *[()] * over))
    return (images, *(statistics for _ in call.shapes[1:]))


def _group_norm(call: Call) -> Result:
    images, groups = call["input"], call["group"]
    channels = images.axes[1]
    for name in ("weight", "bias"):
        if isinstance(call[name], Labels):
            join(channels, call[name].axes[0], call.name)
    outer, inner = regroup(channels, (groups, extent(channels) // groups), call.name)
    result = Labels((images.axes[0], (*outer, *inner), *images.axes[2:]))
    return (result, *(Labels((images.axes[0], outer)) for _ in call.shapes[1:]))


def _softmax(call: Call) -> Result:
    labels = call["self"]
    gone = call.place(call["dim"], labels)
    sums = tuple(() if place == gone else axis for place, axis in enumerate(labels.axes))
    return labels, Labels(sums)


def _reduce(call: Call) -> Result:
    labels = call.tensors[0]
    dim = call["dim"]
    dims = [dim] if isinstance(dim, int) else dim or range(len(labels.axes))
    gone = {call.place(one, labels) for one in dims}
    if call["keepdim"]:
        axes = [() if place in gone else axis for place, axis in enumerate(labels.axes)]
    else:
        axes = [axis for place, axis in enumerate(labels.axes) if place not in gone]
    return tuple(Labels(tuple(axes)) for _ in call.shapes)


# --- places -------------------------------------------------------------------------------------


def _spatial(call: Call) -> Result:
    """Pooling and resizing: images and channels pass, places do not move."""
    labels = call.tensors[0]
    spatial = next(int(digit) for digit in call.name if digit.isdigit())
    for axis in labels.axes[-spatial:]:
        freeze(axis, call.name)
    kept = labels.axes[:-spatial]
    sizes = [shape[-spatial:] for shape in call.shapes]
    return tuple(Labels((*kept, *(frozen_axis(n, call.name) for n in one))) for one in sizes)


def _embedding(call: Call) -> Result:
    freeze(call["weight"].axes[0], call.name)
    return Labels((*call["indices"].axes, call["weight"].axes[1]))


def _index_select(call: Call) -> Result:
    axes = list(call["self"].axes)
    dim = call.place(call["dim"], call["self"])
    freeze(axes[dim], call.name)
    axes[dim] = call["index"].axes[0] if call["index"].axes else ()
    return Labels(tuple(axes))


def _index(call: Call) -> Result | None:
    """Indices along some axes: those are frozen, the others pass."""
    labels, given = call["self"], list(call["indices"])
    given += [None] * (len(labels.axes) - len(given))
    places = [place for place, index in enumerate(given) if index is not None]
    for place in places:
        freeze(labels.axes[place], call.name)
    kept = [axis for axis, index in zip(labels.axes, given, strict=True) if index is None]
    before = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    count = len(call.shape) - len(kept)
    shape = call.shape[before : before + count]
    indices = _broadcast([given[place] for place in places], shape, call.name)
    return Labels((*kept[:before], *indices.axes, *kept[before:]))


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(_same, "_to_copy lift_fresh_copy lift_fresh detach alias contiguous"),
    **_named(_softmax, "_softmax _log_softmax softmax log_softmax"),
    **_named(_pointwise, "copy clone zero fill"),
    **_named(_fill, "full zeros ones empty new_full new_zeros new_ones new_empty scalar_tensor"),
    **_named(_fill, "full_like zeros_like ones_like empty_like"),
    **_named(_along, "cumsum cumprod flip roll logcumsumexp"),
    **_named(_triangle, "tril triu"),
    **_named(_strided, "as_strided"),
    **_named(_view, "view _unsafe_view reshape unsqueeze squeeze flatten"),
    **_named(_permute, "permute"),
    **_named(_transpose, "transpose t"),
    **_named(_expand, "expand"),
    **_named(_repeat, "repeat"),
    **_named(_cat, "cat"),
    **_named(_slice, "slice"),
    **_named(_select, "select"),
    **_named(_unbind, "unbind"),
    **_named(_split, "split split_with_sizes"),
    **_named(_pad, "constant_pad_nd"),
    **_named(_matrix_product, "mm bmm addmm baddbmm mv addmv dot"),
    **_named(_convolution, "convolution"),
    **_named(_batch_norm, "native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    **_named(_batch_norm, "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    **_named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **_named(_group_norm, "native_group_norm"),
    **_named(_reduce, "sum mean amax amin any all prod var std var_mean logsumexp"),
    **_named(_reduce, "linalg_vector_norm"),
    **_named(_spatial, "max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
    **_named(_spatial, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d"),
    **_named(_spatial, "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    **_named(_embedding, "embedding"),
    **_named(_index_select, "index_select"),
    **_named(_index, "index"),
}
"""Operation (aten, without its overload) → what it does; others that act element by element are
known by their tag, and all the rest freeze what they touch."""
