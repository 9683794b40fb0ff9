"""The checkpoints of a folder, as far as headers and hashes tell: which can be compared at all."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from inputs.zoo_files import SUFFIXES, holds_checkpoint
from merge.checkpoints import Checkpoint, Scan, open_checkpoint
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from soups.doctor.finding import Finding, listed, plural
from soups.errors import SoupError
from soups.ingredients import ingredient_names

# Of the weights of most checkpoints, another must have so many to be compared with them.
COMPARABLE = 0.5
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
BASE = "base"


@dataclass
class Folder:
    """The checkpoints that could be opened, by name; what was found is added to.

    `compared` are those whose weights can be set against each other: they share most tensors, in
    name and shape, with most checkpoints of the folder.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def find(
        self, kind: str, level: str, members: Sequence[str], text: str, remedy: str = ""
    ) -> None:
        self.findings.append(Finding(kind, level, tuple(members), text, remedy))  # type: ignore[arg-type]

    def shared_weights(self) -> list[str]:
        """The floating-point tensors that all compared checkpoints have in one shape.

        Running statistics of norm layers are no weights.
        """
        first, *others = (self.checkpoints[k] for k in self.compared)
        return [
            name
            for name, info in first.tensors.items()
            if info.dtype.is_floating_point
            and not name.endswith(STATISTICS)
            and all(name in o.tensors and o.tensors[name].shape == info.shape for o in others)
        ]

    @property
    def has_statistics(self) -> bool:
        """Whether there are norm layers with running statistics."""
        return any(name.endswith(STATISTICS) for c in self.checkpoints for name in c.tensors)


def open_folder(path: Path, opened: ExitStack, *, memory_budget: int) -> Folder:
    """Open what looks like a checkpoint in the folder, from its headers; `opened` closes them.

    Raises SoupError where there is no such folder or nothing in it can be opened.
    """
    if not path.is_dir():
        raise SoupError(f"{path}: is no folder; wanted one with checkpoints in it")
    entries = [str(entry) for entry in sorted(path.iterdir()) if holds_checkpoint(entry)]
    folder = Folder(path)
    for name, entry in zip(ingredient_names(entries), entries, strict=True):
        try:
            checkpoint = open_checkpoint(entry, memory_budget=memory_budget)
        except MergeError as error:
            remedy = "take it out of the folder if it cannot be had again"
            folder.find("unreadable", "wrong", [name], f"cannot be opened: {error}", remedy)
            continue
        opened.callback(checkpoint.close)
        folder.names.append(name)
        folder.paths.append(entry)
        folder.checkpoints.append(checkpoint)
    if not folder.checkpoints:
        problems = [f"{name}: {f.text}" for f in folder.findings for name in f.members]
        raise SoupError(
            "\n".join(
                [
                    f"{path}: found no checkpoint ({', '.join(sorted(SUFFIXES))}, or folders that "
                    "hold one); give the folder that they are in",
                    *problems,
                ]
            )
        )
    _compare_structure(folder)
    _compare_dtypes(folder)
    return folder


def check_contents(folder: Folder, scans: Sequence[Scan], base: str) -> None:
    """Find values that are not finite, and checkpoints that are the same, tensor by tensor; of
    these the `base` is the one to keep."""
    for name, scan in zip(folder.names, scans, strict=True):
        if scan.nonfinite:
            values = plural(sum(scan.nonfinite.values()), "value")
            verb = "is" if sum(scan.nonfinite.values()) == 1 else "are"
            folder.find(
                "nonfinite",
                "wrong",
                [name],
                f"{values} in {listed([*scan.nonfinite], 3)} {verb} NaN or infinite",
                "take it out: a soup with it is NaN too",
            )
    same: dict[tuple[str, ...], list[str]] = {}
    for name, scan in zip(folder.names, scans, strict=True):
        same.setdefault(tuple(sorted(scan.digests.values())), []).append(name)
    for names in same.values():
        if len(names) > 1:
            names.sort(key=lambda name: name != base)
            trained = "never trained, or " if base in names else ""
            folder.find(
                "duplicate",
                "odd",
                names,
                f"hold the same tensors, bit for bit: {trained}saved twice",
                f"keep {names[0]} alone: twice in a soup, it weighs double",
            )


def trained_steps(checkpoint: Checkpoint) -> int | None:
    """How many steps its norm layers have counted; None where it has none that count."""
    counters = [name for name in checkpoint.tensors if name.endswith(COUNTER)]
    return max(int(checkpoint.read(name)) for name in counters) if counters else None


def duplicates_of(folder: Folder) -> set[str]:
    """All but the first of each group of checkpoints that are the same."""
    groups = (f.members[1:] for f in folder.findings if f.kind == "duplicate")
    return {name for members in groups for name in members}


# --- structure -----------------------------------------------------------------------------------


def _compare_structure(folder: Folder) -> None:
    """Find checkpoints whose tensors are not those of most, and how far they can be compared."""
    shapes = [{n: t.shape for n, t in c.tensors.items()} for c in folder.checkpoints]
    kinds = Counter(tuple(sorted(own.items())) for own in shapes)
    most = dict(kinds.most_common(1)[0][0])
    sizes = {n: t.numel for c in folder.checkpoints for n, t in c.tensors.items() if n in most}
    for k, (name, own) in enumerate(zip(folder.names, shapes, strict=True)):
        if own == most:
            folder.compared.append(k)
            continue
        alike = sum(sizes[tensor] for tensor in most if own.get(tensor) == most[tensor])
        if alike >= COMPARABLE * sum(sizes[tensor] for tensor in most):
            folder.compared.append(k)
            _find_difference(folder, name, own, most)
        else:
            share = alike / max(1, sum(sizes[tensor] for tensor in most))
            folder.find(
                "architecture",
                "wrong",
                [name],
                f"is another architecture: {share:.0%} of the weights have the names and shapes "
                f"that most checkpoints have{_renamed(own, most)}",
                "take it out; a soup is of one architecture",
            )


Shapes = dict[str, tuple[int, ...]]


def _find_difference(folder: Folder, name: str, own: Shapes, most: Shapes) -> None:
    missing, extra = sorted(most.keys() - own.keys()), sorted(own.keys() - most.keys())
    other = [tensor for tensor in most if tensor in own and own[tensor] != most[tensor]]
    if other and not missing and not extra and _is_head(other, own, most):
        tensor = max(other, key=lambda name: len(most[name]))
        folder.find(
            "head",
            "wrong",
            [name],
            f"has another head: {tensor} is {[*own[tensor]]}, {[*most[tensor]]} elsewhere",
            f"take it out, or leave the head out of the mixing (skip: "
            f"['{tensor.rpartition('.')[0]}.*'])",
        )
        return
    parts = []
    if missing:
        parts.append(f"lacks {plural(len(missing), 'tensor')} ({listed(missing, 3)})")
    if extra:
        parts.append(f"has {plural(len(extra), 'tensor')} more ({listed(extra, 3)})")
    if other:
        shown = f"{other[0]} is {[*own[other[0]]]}, {[*most[other[0]]]} elsewhere"
        parts.append(f"has {plural(len(other), 'tensor')} of another shape ({shown})")
    folder.find(
        "tensors",
        "wrong",
        [name],
        " and ".join(parts),
        "take it out, or name these tensors in zoo.skip, as globs",
    )


def _is_head(tensors: Sequence[str], own: Shapes, most: Shapes) -> bool:
    """Whether these are of one module and differ in their first axis alone: as many classes."""
    modules = {tensor.rpartition(".")[0] for tensor in tensors}
    first = all(own[t][1:] == most[t][1:] and len(own[t]) for t in tensors)
    return len(modules) == 1 and first


def _renamed(own: Shapes, most: Shapes) -> str:
    """A hint where the shapes are there under other names."""
    if sorted(own.values()) != sorted(most.values()):
        return ""
    mine, theirs = (sorted(a.keys() - b.keys()) for a, b in ((own, most), (most, own)))
    if not mine or not theirs:
        return ""
    near = difflib.get_close_matches(mine[0], theirs, n=1, cutoff=0.0)[0]
    return f"; the shapes are all there under other names, such as {mine[0]} for {near}"


def _compare_dtypes(folder: Folder) -> None:
    """Find checkpoints that are kept in another precision than most."""
    kinds = [_main_dtype(checkpoint) for checkpoint in folder.checkpoints]
    usual = Counter(kinds).most_common(1)[0][0]
    for dtype in dict.fromkeys(kinds):
        members = [n for n, kind in zip(folder.names, kinds, strict=True) if kind == dtype]
        if dtype != usual:
            folder.find(
                "dtype",
                "odd",
                members,
                f"in {dtype_name(dtype)}, the others in {dtype_name(usual)}: changes that are "
                "small beside a weight are lost in it",
                f"save it again in {dtype_name(usual)} if the original is still there; it can be "
                "mixed as it is",
            )


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the weights have."""
    weights = Counter[torch.dtype]()
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            weights[info.dtype] += info.numel
    return weights.most_common(1)[0][0] if weights else torch.float32
