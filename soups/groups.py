"""Which tensors share one coefficient: the model, a block, a layer, a tensor, a run of a size."""

from __future__ import annotations

from collections.abc import Mapping

from soups.learners.registry import Grouping


def group_tensors(
    numels: Mapping[str, int], grouping: Grouping | int, *, bytes_per_weight: int = 4
) -> dict[str, tuple[str, ...]]:
    """Group name → tensor names, both in the order of `numels` (the model's own order).

    `tensor`: each tensor; `layer`: the tensors of one module; `block`: the tensors below one
    numbered module (`stages.0.blocks.1`, `layer1.0`, `blocks.3`), or below one child of the model
    where nothing is numbered; a number: consecutive tensors up to that many bytes.
    """
    if isinstance(grouping, int):
        return _runs(numels, grouping // bytes_per_weight)
    keys = {"model": _model, "block": _block, "layer": _layer, "tensor": _tensor}
    groups: dict[str, list[str]] = {}
    for name in numels:
        groups.setdefault(keys[grouping](name), []).append(name)
    return {group: tuple(names) for group, names in groups.items()}


def _model(name: str) -> str:
    return "model"


def _tensor(name: str) -> str:
    return name


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _block(name: str) -> str:
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if numbered is None:
        return parts[0]
    # A stage is a list of blocks: `stages.0.blocks.1` is one block, `blocks.3.mlp.0` is blocks.3.
    inner = parts[numbered + 1 : numbered + 3]
    if len(inner) == 2 and inner[0].endswith("s") and inner[1].isdigit():
        numbered += 2
    return ".".join(parts[: numbered + 1])


def _runs(numels: Mapping[str, int], limit: int) -> dict[str, tuple[str, ...]]:
    runs: list[list[str]] = []
    filled = 0
    for name, numel in numels.items():
        if not runs or filled + numel > limit:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += numel
    return {
        names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}": tuple(names) for names in runs
    }
