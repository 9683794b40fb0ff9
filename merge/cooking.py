"""Cook: turn coefficients into a checkpoint, in one streaming pass."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.checkpoints import Checkpoint, CheckpointWriter, Scan, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.coefficients import Coefficients
from merge.errors import MergeError
from merge.mixing import combine, compute_dtype, mixing_order, scratch_numel
from merge.stream import Item, Piece, Work, stored_name, stream, tied_names


def cook(
    coefficients: Coefficients,
    checkpoints: Sequence[Checkpoint],
    out: str | Path,
    *,
    base: Checkpoint | None = None,
    memory_budget: int,
    max_shard_bytes: int | None = None,
    fold_temperature: str | None = None,
    scans: Sequence[Scan] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the soup of these coefficients as a checkpoint at `out`; the same call, the same bytes.

    One pass: each tensor is read once from each checkpoint whose weight is not zero, mixed by
    `combine`, and stored in the first ingredient's dtype. `memory_budget` bounds the bytes held,
    whatever the number of ingredients. `scans` (ingredients, then base) are checked against the
    coefficients' hashes. `fold_temperature` names the head (its `.weight` and `.bias`) that is
    multiplied by the temperature. Returns a record of what was mixed, cast, carried, read and
    written. Raises MergeError, and leaves nothing behind, where names, shapes or hashes differ, a
    result is not finite or a running variance is not positive.
    """
    out = Path(out)
    work = plan_cooking(
        coefficients, checkpoints, base=base, fold_temperature=fold_temperature, scans=scans
    )
    _check_output(out, [*checkpoints, base] if base else checkpoints)
    with CheckpointWriter(
        out, work.outputs, metadata=work.metadata, max_shard_bytes=max_shard_bytes
    ) as writer:
        streamed = stream(
            work.items,
            work.make,
            writer,
            memory_budget=memory_budget,
            progress=progress,
            title=f"cooking {out.name}",
        )
    return {
        "output": str(out),
        "coefficients": coefficients.sha256,
        "mixed": len(coefficients.tensors),
        "carried": dict(sorted(coefficients.carried.items())),
        "casts": _casts(work.items),
        "temperature_folded_into": fold_temperature,
        "bytes_read": streamed.bytes_read,
        "bytes_written": streamed.bytes_written,
        "seconds": streamed.seconds,
    }


def plan_cooking(
    coefficients: Coefficients,
    checkpoints: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    fold_temperature: str | None = None,
    scans: Sequence[Scan] | None = None,
) -> Work:
    """What has to be read, mixed and written for this soup; raises as `cook` does."""
    coefficients.check_count(checkpoints, base)
    sources = [*checkpoints, base] if coefficients.base is not None and base else [*checkpoints]
    if scans is not None:
        coefficients.check_ingredients(checkpoints, scans, base=base)
    items = _plan(coefficients, sources, base)
    folded = _folded(fold_temperature, [item.output for item in items])
    metadata = {"format": "pt", "coefficients": coefficients.sha256}
    if fold_temperature is not None:
        metadata["temperature_folded_into"] = fold_temperature
    return Work(items, _Kitchen(coefficients, folded).make, metadata)


class _Kitchen:
    """Makes one piece at a time, in buffers that are used again."""

    def __init__(self, coefficients: Coefficients, folded: frozenset[str]) -> None:
        self._coefficients = coefficients
        self._folded = folded
        self._buffers: dict[str, Tensor] = {}

    def make(self, piece: Piece, tensors: Iterator[Tensor]) -> Tensor:
        """The mixed or carried tensor of this piece."""
        output = piece.item.output
        compute = compute_dtype(output.dtype)
        numel = piece.stop - piece.start
        if output.name in self._coefficients.carried:
            result = next(tensors)
            if output.name in self._folded:
                result = result.to(compute)
        else:
            dtype = compute if output.name in self._folded else output.dtype
            result = combine(
                lambda k: next(tensors),
                self._coefficients.weights(output.name),
                out=self._buffer("out", numel, dtype).view(piece.shape),
                scratch=self._buffer("scratch", scratch_numel(numel), compute),
            )
        if output.name in self._folded:
            result = (result * self._coefficients.temperature).to(output.dtype)
        if output.name.endswith("running_var") and numel and not bool(result.min() > 0):
            raise MergeError(
                f"{output.name!r}: the smallest mixed variance is {float(result.min())}, wanted a "
                "positive one; use norm_buffers: uniform (or convex), and look at the ingredients' "
                "own values"
            )
        return result

    def _buffer(self, use: str, numel: int, dtype: torch.dtype) -> Tensor:
        nbytes = numel * dtype.itemsize
        if use not in self._buffers or self._buffers[use].numel() < nbytes:
            self._buffers[use] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[use][:nbytes].view(dtype)


def _plan(
    coefficients: Coefficients, sources: Sequence[Checkpoint], base: Checkpoint | None
) -> list[Item]:
    """One item per tensor of the output, by name; MergeError with all that does not fit."""
    tied = tied_names([*sources, base] if base else sources)
    problems = _untied(coefficients, tied)
    items = []
    for name in sorted([*coefficients.tensors, *coefficients.carried]):
        if name in coefficients.carried:
            giver, stored = _giver(name, sources[0], base, tied)
            if stored is None:
                problems.append(f"{giver.path}: {name!r} is missing, wanted to be carried")
                continue
            info = giver.tensors[stored]
            output = TensorInfo(name, info.shape, info.dtype)
            items.append(Item(output, ((giver, stored),), workspace_bytes=16, finite=False))
            continue
        found = [(source, stored_name(source, name, tied)) for source in sources]
        problems += [f"{source.path}: {name!r} is missing" for source, n in found if n is None]
        held = [(source, n) for source, n in found if n is not None]
        if len(held) < len(found):
            continue
        infos = [source.tensors[n] for source, n in held]
        output = TensorInfo(name, infos[0].shape, infos[0].dtype)
        problems += [
            f"{source.path}: {name!r} is {list(info.shape)}, {sources[0].path} has "
            f"{list(output.shape)}"
            for (source, _), info in zip(held, infos, strict=True)
            if info.shape != output.shape
        ]
        problems += [
            f"{source.path}: {name!r} is {dtype_name(info.dtype)}, which is not mixed"
            for (source, _), info in zip(held, infos, strict=True)
            if not info.dtype.is_floating_point or info.dtype.itemsize == 1
        ]
        compute = compute_dtype(output.dtype)
        # Result, scratch, and once more the result where a temperature is folded in.
        workspace_bytes = 2 * output.dtype.itemsize + 4 * compute.itemsize
        order = mixing_order(coefficients.weights(name))
        items.append(Item(output, tuple(held[k] for k in order), workspace_bytes=workspace_bytes))
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise MergeError(
            "cooking: " + "; ".join(problems[:20]) + more + "; give the checkpoints that the "
            "coefficients were learned over, or learn again with these tensors in skip"
        )
    return items


def _giver(
    name: str, first: Checkpoint, base: Checkpoint | None, tied: Mapping[str, Sequence[str]]
) -> tuple[Checkpoint, str | None]:
    """Who gives a carried tensor, and its name there: the base where it has it, else the first."""
    if base is not None and (stored := stored_name(base, name, tied)) is not None:
        return base, stored
    return first, stored_name(first, name, tied)


def _untied(coefficients: Coefficients, tied: Mapping[str, Sequence[str]]) -> list[str]:
    """Tied tensors that these coefficients would make different."""
    mixed = set(coefficients.tensors)
    return [
        f"{name!r} and {partner!r} are tied, but their groups have different coefficients; wanted "
        "them in one group"
        for name in sorted(mixed & tied.keys())
        for partner in tied[name]
        if name < partner and partner in mixed
        if not np.array_equal(coefficients.column(name), coefficients.column(partner))
    ]


def _check_output(out: Path, opened: Sequence[Checkpoint]) -> None:
    for checkpoint in opened:
        for path in checkpoint.files:
            same = out.exists() and path.exists() and path.samefile(out)
            if same or out.resolve() in (path.resolve(), path.resolve().parent):
                raise MergeError(
                    f"{out}: is the output, and holds the input {checkpoint.path}; wanted a path "
                    "that no input uses"
                )


def _folded(head: str | None, outputs: Sequence[TensorInfo]) -> frozenset[str]:
    if head is None:
        return frozenset()
    found = {info.name: info for info in outputs}
    weight = found.get(f"{head}.weight")
    if weight is None or not weight.dtype.is_floating_point:
        stems = sorted({name.removesuffix(".weight") for name in found if name.endswith(".weight")})
        near = difflib.get_close_matches(head, stems, n=3, cutoff=0.0)
        examples = ", ".join(map(repr, near))
        raise MergeError(
            f"fold_temperature: {head!r} has no weight of floating point in the soup; wanted the "
            f"name of the linear layer that gives the logits, for example {examples}"
        )
    return frozenset({weight.name, f"{head}.bias"} & found.keys())


def _casts(plan: Sequence[Item]) -> list[dict[str, Any]]:
    """Which checkpoints hold tensors in another dtype than the soup: from, to, names."""
    casts: dict[tuple[str, str, str], list[str]] = {}
    for item in plan:
        for checkpoint, stored in item.sources:
            found = checkpoint.tensors[stored].dtype
            if found != item.output.dtype:
                key = (checkpoint.path, dtype_name(found), dtype_name(item.output.dtype))
                casts.setdefault(key, []).append(item.output.name)
    return [
        {"checkpoint": path, "from": found, "to": stored, "tensors": names}
        for (path, found, stored), names in sorted(casts.items())
    ]
