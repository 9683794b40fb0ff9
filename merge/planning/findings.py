"""What planning a merge finds, tensor by tensor, told in few lines: problems and notes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from merge.checkpoints import Checkpoint, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from merge.mixing import compute_dtype
from merge.preflight import PROBLEMS_SHOWN, is_quantised
from merge.words import NAMES_SHOWN, are, files_of, globs_of, listed, them

__all__ = ["Findings"]

_VOCABULARY = re.compile(r"(^|[._])(wte|embed\w*|\w*embeddings?|tok\w*|shared|lm_head|embed_out)\.")

_PACKED = re.compile(r"(^|\.)(qweight|qzeros|weight_packed)$")  # GPTQ, AWQ, compressed-tensors

Held = Sequence[tuple[Checkpoint, TensorInfo]]


class Findings:
    """Problems forbid the merge, notes are for the record; names with the same fate share one."""

    def __init__(self) -> None:
        self._problems: dict[str, None] = {}  # ordered sets
        self._notes: dict[str, None] = {}
        self._missing: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._extra: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._shapes: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
        self._first_axis: dict[tuple[str, str], bool] = {}
        self._quantised: dict[tuple[str, str], list[str]] = {}
        self._integers: dict[tuple[str, str], list[str]] = {}
        self._unresolved: dict[str, list[str]] = {}
        self._carried: dict[tuple[str, str], list[str]] = {}
        self._left_out: dict[str, list[str]] = {}
        self._differing: list[str] = []
        self._dtypes: dict[tuple[tuple[str, ...], str, str], list[str]] = {}

    def problem(self, text: str) -> None:
        self._problems[text] = None

    def note(self, text: str) -> None:
        self._notes[text] = None

    # --- names ---

    def lacking(self, name: str, found: Mapping[str, str], missing: Mapping[str, str]) -> None:
        """`name` of the result: checkpoint's path → the tensor's name there, had or not had."""
        few = 2 * len(found) < len(found) + len(missing)
        where, table = (found, self._extra) if few else (missing, self._missing)
        table.setdefault(tuple(where), []).append((name, next(iter(where.values()))))

    def left_out(self, name: str, why: str) -> None:
        self._left_out.setdefault(why, []).append(name)

    def carried(self, name: str, reason: str, path: str) -> None:
        self._carried.setdefault((reason, path), []).append(name)

    def differing(self, name: str) -> None:
        """A carried tensor whose values are not the same in all checkpoints."""
        self._differing.append(name)

    def unresolved(self, name: str, error: MergeError) -> None:
        self._unresolved.setdefault(str(error).removeprefix(f"{name!r}: "), []).append(name)

    # --- dtypes and shapes ---

    def check_dtypes(self, name: str, held: Held) -> bool:
        """Whether the tensor is floating point in all checkpoints, or in none."""
        kinds = {info.dtype.is_floating_point for _, info in held}
        sound = True
        for checkpoint, info in held:
            key = (checkpoint.path, dtype_name(info.dtype))
            if is_quantised(name, info.dtype, None) or _is_packed(info):
                self._quantised.setdefault(key, []).append(name)
                sound = False
            elif len(kinds) > 1 and not info.dtype.is_floating_point:
                self._integers.setdefault(key, []).append(name)
                sound = False
        return sound

    def check_shapes(self, name: str, held: Held, *, base_last: bool) -> bool:
        """Whether all have one shape: the base's, else the one that most have."""
        if base_last:
            path, shape = held[-1][0].path, held[-1][1].shape
        else:
            ((shape, _),) = Counter(info.shape for _, info in held).most_common(1)
            path = next(checkpoint.path for checkpoint, info in held if info.shape == shape)
        others = [(checkpoint.path, info.shape) for checkpoint, info in held if info.shape != shape]
        for other, found in others:
            line = (name, f"{list(found)}", f"{list(shape)}")
            self._shapes.setdefault((other, path), []).append(line)
            alike = len(found) == len(shape) and found[1:] == shape[1:]
            self._first_axis[other, path] = self._first_axis.get((other, path), True) and alike
        return not others

    def note_dtypes(self, name: str, found: Sequence[torch.dtype], stored: torch.dtype) -> None:
        """Remember what the tensor is in the checkpoints, where it is stored as something else."""
        kinds = tuple(dict.fromkeys(dtype_name(dtype) for dtype in found))
        if kinds != (dtype_name(stored),):
            key = (kinds, dtype_name(compute_dtype(stored)), dtype_name(stored))
            self._dtypes.setdefault(key, []).append(name)

    # --- the report ---

    def raise_if_any(self) -> None:
        """Raise one MergeError that lists the problems, if there are any."""
        problems = [*self._problems, *self._name_problems(), *self._tensor_problems()]
        if not problems:
            return
        lines = [f"- {problem}" for problem in problems[:PROBLEMS_SHOWN]]
        if len(problems) > PROBLEMS_SHOWN:
            lines.append(f"- and {len(problems) - PROBLEMS_SHOWN} more problems like these")
        noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MergeError(f"this merge cannot be made: {noun}\n" + "\n".join(lines))

    def notes(self) -> tuple[str, ...]:
        """What is worth a note, in the order: the config, dtypes, what is not merged."""
        notes = list(self._notes)
        for (kinds, compute, stored), names in self._dtypes.items():
            notes.append(
                f"{listed(names)} {are(names)} {' and '.join(kinds)} in the checkpoints: merged "
                f"in {compute}, stored as {stored}"
            )
        for (reason, path), names in self._carried.items():
            notes.append(f"{listed(names)} {are(names)} carried from {path} ({reason})")
        if self._differing:
            names = self._differing
            notes.append(f"{listed(names)} {are(names)} not the same in all checkpoints")
        for why, names in self._left_out.items():
            notes.append(f"{listed(names)} {are(names)} left out: {why}")
        return tuple(notes)

    def _name_problems(self) -> list[str]:
        problems = []
        for paths, names in self._missing.items():
            shown, globs = [name for _, name in names], globs_of([name for name, _ in names])
            it = them(shown)
            problems.append(
                f"{files_of(paths)}: {listed(shown)} {are(shown)} missing, other checkpoints have "
                f"{it}; give checkpoints of one model, or carry {it} with skip: "
                f"{globs}"
            )
        for paths, names in self._extra.items():
            shown, globs = [name for _, name in names], globs_of([name for name, _ in names])
            problems.append(
                f"{files_of(paths)}: has {listed(shown)}, which most checkpoints do not have; give "
                f"checkpoints of one model, or do not merge {them(shown)} with skip: {globs}"
            )
        for text, names in self._unresolved.items():
            problems.append(f"{listed(names)}: {text}")
        return problems

    def _tensor_problems(self) -> list[str]:
        problems = []
        for (path, dtype), names in self._quantised.items():
            problems.append(
                f"{path}: {listed(names)} {are(names)} quantised ({dtype}), wanted float32, "
                "float16, bfloat16 or float64: codes cannot be averaged without their scales; "
                f"dequantise the checkpoint first, or carry {them(names)} with skip: "
                f"{globs_of(names)}"
            )
        for (path, dtype), names in self._integers.items():
            problems.append(
                f"{path}: {listed(names)} {are(names)} {dtype}, wanted floating point as in the "
                f"other checkpoints; carry {them(names)} with skip: {globs_of(names)}"
            )
        for (path, other), lines in self._shapes.items():
            names = [name for name, _, _ in lines]
            shown = ", ".join(
                f"{name!r} is {found}, {other} has {wanted}"
                for name, found, wanted in lines[:NAMES_SHOWN]
            )
            more = f" and {len(lines) - NAMES_SHOWN} more" if len(lines) > NAMES_SHOWN else ""
            problems.append(
                f"{path}: {shown}{more}; {self._cause(path, other, names)}, or carry "
                f"{them(names)} with skip: {globs_of(names)}"
            )
        return problems

    def _cause(self, path: str, other: str, names: Sequence[str]) -> str:
        """What shapes that differ in the first axis alone, in embeddings or one head, tell."""
        if self._first_axis[path, other]:
            if all(_VOCABULARY.search(name) for name in names):
                return "the vocabularies differ; merge models with the same one"
            if len({name.rpartition(".")[0] for name in names}) == 1:
                return "the numbers of classes differ; merge models with the same head"
        return "merge models of one architecture"


def _is_packed(info: TensorInfo) -> bool:
    """Whether these integers hold several weights each."""
    return not info.dtype.is_floating_point and _PACKED.search(info.name) is not None
