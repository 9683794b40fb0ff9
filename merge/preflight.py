"""Preflight: whether checkpoints can be mixed, from their headers and one scan, in one report."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from merge.checkpoints import Checkpoint, Scan, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from merge.scans import scan_all
from merge.stream import stored_name, tied_names
from merge.words import NAMES_SHOWN, are, files_of, globs_of, listed, them

__all__ = ["Preflight", "inspect_ingredients", "is_quantised", "scan_all"]

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Preflight:
    """What was found: problems forbid mixing, warnings and notes are for the record.

    `mixed` are the tensors that can be mixed, `carried` those taken unmixed (name → reason; from
    the base where it has them, else from the first ingredient), `frozen` the mixed ones that are
    the same in all ingredients, `tied` the names that share storage. `scans` are those of the
    ingredients, in order.
    """

    problems: list[str]
    warnings: list[str]
    notes: list[str]
    mixed: tuple[str, ...] = ()
    carried: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    scans: tuple[Scan, ...] = ()
    base_scan: Scan | None = None
    tied: tuple[tuple[str, ...], ...] = ()

    def raise_if_broken(self) -> None:
        """Raise one MergeError that lists the problems, if there are any."""
        if not self.problems:
            return
        count = len(self.problems)
        lines = [f"- {problem}" for problem in self.problems[:PROBLEMS_SHOWN]]
        if count > PROBLEMS_SHOWN:
            lines.append(f"- and {count - PROBLEMS_SHOWN} more problems like these")
        noun = "1 problem" if count == 1 else f"{count} problems"
        raise MergeError(f"these checkpoints cannot be mixed: {noun}\n" + "\n".join(lines))


def inspect_ingredients(
    checkpoints: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    skip: Sequence[str] = (),
    expected: Expected | None = None,
    tied: Iterable[Sequence[str]] = (),
    check_finite: bool = True,
    scans: Sequence[Scan] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Preflight:
    """Compare ingredients, their base and a model's tensors, and report all problems at once.

    `skip` are globs (case-sensitive) of names that are carried instead of mixed; `expected` are
    the model's tensors and `tied` the names that it shares: one of them is enough. Hashes and
    non-finite values (problems if `check_finite`) come from `scans` (of the ingredients, then of
    the base), else from `scan_all` with `cache`.
    """
    if not checkpoints:
        return Preflight(["there are no ingredients, wanted at least one checkpoint"], [], [])
    sources = [*checkpoints, base] if base is not None else [*checkpoints]
    found = scan_all(sources, cache=cache, progress=progress) if scans is None else tuple(scans)
    if len(found) not in (len(checkpoints), len(sources)):
        raise MergeError(
            f"{len(found)} scans were given for {len(checkpoints)} ingredients and "
            f"{len(sources) - len(checkpoints)} base; wanted one for each"
        )
    inspection = _Inspection(checkpoints, base, skip, expected, tied)
    inspection.check_skip()
    inspection.check_names()
    inspection.sort_out()
    inspection.check_base()
    inspection.check_shapes()
    inspection.check_dtypes()
    inspection.check_contents(found, check_finite)
    return inspection.report(found)


class _Inspection:
    """The work of `inspect_ingredients`, one question per method."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        base: Checkpoint | None,
        skip: Sequence[str],
        expected: Expected | None,
        tied: Iterable[Sequence[str]],
    ) -> None:
        self.ingredients = list(checkpoints)
        self.base = base
        self.sources = [*checkpoints, base] if base is not None else [*checkpoints]
        self.skip = list(skip)
        self.expected = expected
        self.tied = tied_names(self.sources)
        for names in tied:
            for name in names:
                partners = {*self.tied.get(name, ()), *names} - {name}
                self.tied[name] = tuple(sorted(partners))
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.mixed: dict[str, None] = {}  # an ordered set
        self.carried: dict[str, str] = {}
        self.frozen: list[str] = []
        held = Counter(name for checkpoint in checkpoints for name in checkpoint.tensors)
        self.held = dict(sorted(held.items()))  # name -> how many ingredients have it
        if expected is not None:
            self.wanted = dict.fromkeys(sorted(expected))
        else:  # what most ingredients have, or some of them and the base
            most = len(self.ingredients) / 2
            in_base = base.tensors if base is not None else {}
            self.wanted = {n: None for n, k in self.held.items() if k >= most or n in in_base}
        if len(self.ingredients) == 1:
            path = self.ingredients[0].path
            self.warnings.append(f"{path} is the only ingredient: its soup is itself")

    def pattern(self, name: str) -> str | None:
        """The first skip glob that matches."""
        return next((glob for glob in self.skip if fnmatchcase(name, glob)), None)

    def info(self, checkpoint: Checkpoint, name: str) -> TensorInfo | None:
        stored = stored_name(checkpoint, name, self.tied)
        return None if stored is None else checkpoint.tensors[stored]

    def check_skip(self) -> None:
        names = sorted({*self.held, *self.wanted, *(self.base.tensors if self.base else ())})
        for glob in self.skip:
            if any(fnmatchcase(name, glob) for name in names):
                continue
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.0)
            self.problems.append(
                f"skip: {glob!r} matches no tensor; the nearest names are {listed(near)}"
            )

    def check_names(self) -> None:
        missing: dict[tuple[str, ...], list[str]] = {}
        extra: dict[tuple[str, ...], list[str]] = {}
        for checkpoint in self.ingredients:
            lacks = [
                name
                for name in self.wanted
                if stored_name(checkpoint, name, self.tied) is None and not self.pattern(name)
            ]
            beyond = [
                name
                for name in checkpoint.tensors
                if name not in self.wanted and not self._partner(name) and not self.pattern(name)
            ]
            if lacks:
                missing.setdefault(tuple(lacks), []).append(checkpoint.path)
            if beyond:
                extra.setdefault(tuple(beyond), []).append(checkpoint.path)
        model = self.expected is not None
        have = "the model has" if model else "the other ingredients or the base have"
        for names, paths in missing.items():
            self.problems.append(
                f"{files_of(paths)}: {listed(names)} {are(names)} missing, {have} {them(names)}"
                f"{self._nearest(names, paths)}; give checkpoints of one model, or carry "
                f"{them(names)} with skip: {globs_of(names)}"
            )
        have = "the model does not have" if model else "most ingredients do not have"
        for names, paths in extra.items():
            self.problems.append(
                f"{files_of(paths)}: has {listed(names)}, which {have}; give checkpoints of one "
                f"model, or leave {them(names)} out with skip: "
                f"{globs_of(names, but=self.wanted)}"
            )

    def _partner(self, name: str) -> str | None:
        """Another name that is wanted for the same tensor."""
        return next((n for n in self.tied.get(name, ()) if n in self.wanted), None)

    def _nearest(self, names: Sequence[str], paths: Sequence[str]) -> str:
        """The unexpected name that is most like the first missing one."""
        checkpoint = next(c for c in self.ingredients if c.path == paths[0])
        unknown = [name for name in checkpoint.tensors if name not in self.wanted]
        near = difflib.get_close_matches(names[0], unknown, n=1)
        return f" (the nearest name there is {near[0]!r})" if near else ""

    def sort_out(self) -> None:
        """Decide for every tensor: mixed, carried with a reason, or left out with a note."""
        for name in sorted({*self.held, *self.wanted}):
            glob, partner = self.pattern(name), self._partner(name)
            if name not in self.wanted and partner:
                self.notes.append(f"{name!r} is left out: it is tied to {partner!r}")
            elif name not in self.held and not glob:
                if partner:
                    self.notes.append(f"{name!r} is tied to {partner!r}, and stored as that alone")
            elif name not in self.wanted and self.expected is not None:
                if glob:
                    self.notes.append(
                        f"{name!r} is left out: skip: {glob!r}, and the model does not have it"
                    )
            elif glob:
                self._carry(name, f"skip: {glob!r}")
            elif name in self.wanted:
                self._mix_or_carry(name)
        if not self.mixed:
            self.problems.append(
                f"no tensor is left to mix, {len(self.carried)} are carried; wanted floating-point "
                "tensors that skip does not match"
            )

    def _mix_or_carry(self, name: str) -> None:
        infos = [self.info(checkpoint, name) for checkpoint in self.ingredients]
        dtypes = [info.dtype for info in infos if info is not None]
        if any(is_quantised(name, dtype, self._expected_dtype(name)) for dtype in dtypes):
            return  # a problem, which check_dtypes reports
        if any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            self.mixed[name] = None
        else:
            self._carry(name, f"{dtype_name(dtypes[0])} values are not mixed")

    def check_base(self) -> None:
        if self.base is None:
            return
        lacks = [name for name in self.mixed if self.info(self.base, name) is None]
        if lacks:
            self.problems.append(
                f"{self.base.path}: {listed(lacks)} {are(lacks)} missing in the base, the "
                f"ingredients have {them(lacks)}; give the base that they were fine-tuned from, "
                f"leave the base out, or carry {them(lacks)} with skip: {globs_of(lacks)}"
            )
        known = {*self.held, *self.wanted}
        only = [n for n in self.base.tensors if n not in known and not self._partner(n)]
        if only:
            self.warnings.append(
                f"{self.base.path}: {listed(only)} {are(only)} in the base alone, and left out"
            )

    def _carry(self, name: str, reason: str) -> None:
        giver = next(
            (c for c in (self.base, self.ingredients[0]) if c is not None and self.info(c, name)),
            None,
        )
        if giver is None:
            place = self.ingredients[0].path
            place = f"{self.base.path} and {place}" if self.base is not None else place
            text = f"{name!r} ({reason}) should be carried, but {place} does not have it"
            if self.expected is not None:
                self.problems.append(
                    f"{text}; the model needs it: give a first ingredient that does"
                )
            else:
                self.notes.append(f"{text}: it is left out")
            return
        info = self.info(giver, name)
        want = None if self.expected is None else self.expected[name][0]
        if info is not None and want is not None and info.shape != want:
            self.problems.append(
                f"{giver.path}: {name!r} (carried, {reason}) is {list(info.shape)}, the model has "
                f"{list(want)}; give checkpoints with the model's shape"
                + (", or leave the base out" if giver is self.base else "")
            )
        self.carried[name] = reason

    def check_shapes(self) -> None:
        differ: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for checkpoint in self.sources:
            lines = []
            for name in self.mixed:
                info = self.info(checkpoint, name)
                shape, who = self._wanted_shape(name)
                if info is not None and info.shape != shape:
                    lines.append((name, f"{list(info.shape)}", f"{who} has {list(shape)}"))
            if lines:
                differ.setdefault(tuple(lines), []).append(checkpoint.path)
        for lines, paths in differ.items():
            names = [name for name, _, _ in lines]
            shown = ", ".join(f"{n!r} is {found}, {want}" for n, found, want in lines[:NAMES_SHOWN])
            more = f" and {len(lines) - NAMES_SHOWN} more" if len(lines) > NAMES_SHOWN else ""
            remedy = "merge models of one architecture"
            if self._is_head(names, paths[0]):
                remedy = "merge models with the same head, for the same classes"
            self.problems.append(
                f"{files_of(paths)}: {shown}{more}; {remedy}, or skip {them(names)} with skip: "
                f"{globs_of(names)}"
            )

    def _is_head(self, names: Sequence[str], path: str) -> bool:
        """Whether one layer differs in its first axis alone, as with another number of classes."""
        checkpoint = next(c for c in self.sources if c.path == path)
        shapes = [
            (info.shape, self._wanted_shape(name)[0])
            for name in names
            if (info := self.info(checkpoint, name)) is not None
        ]
        one_layer = len({name.rpartition(".")[0] for name in names}) == 1
        return one_layer and all(len(a) == len(b) and a[1:] == b[1:] for a, b in shapes)

    def _wanted_shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """The model's shape, else the base's, else the one that most ingredients have."""
        if self.expected is not None and name in self.expected:
            return self.expected[name][0], "the model"
        if self.base is not None and (info := self.info(self.base, name)) is not None:
            return info.shape, "the base"
        infos = [(c, i) for c in self.ingredients if (i := self.info(c, name)) is not None]
        ((shape, _),) = Counter(info.shape for _, info in infos).most_common(1)
        return shape, next(c.path for c, info in infos if info.shape == shape)

    def _expected_dtype(self, name: str) -> torch.dtype | None:
        if self.expected is None or name not in self.expected:
            return None
        return self.expected[name][1]

    def check_dtypes(self) -> None:
        quantised: dict[tuple[str, str], list[str]] = {}
        unmixable: dict[tuple[str, str], list[str]] = {}
        casts: dict[tuple[str, str, str], list[str]] = {}
        for checkpoint in self.sources:
            for name in self.held:
                info = checkpoint.tensors.get(name)
                if info is None or self.pattern(name):
                    continue
                if is_quantised(name, info.dtype, self._expected_dtype(name)):
                    quantised.setdefault((checkpoint.path, dtype_name(info.dtype)), []).append(name)
                elif name in self.mixed and not info.dtype.is_floating_point:
                    unmixable.setdefault((checkpoint.path, dtype_name(info.dtype)), []).append(name)
        for name in self.mixed:
            first = self.info(self.ingredients[0], name)
            for checkpoint in self.sources:
                info = self.info(checkpoint, name)
                if first and info and info.dtype != first.dtype and info.dtype.is_floating_point:
                    key = (checkpoint.path, dtype_name(info.dtype), dtype_name(first.dtype))
                    casts.setdefault(key, []).append(name)
        for (path, dtype), names in quantised.items():
            self.problems.append(
                f"{path}: {listed(names)} {are(names)} quantised ({dtype}), wanted float32, "
                "float16, bfloat16 or float64: codes cannot be averaged without their scales; "
                f"dequantise the checkpoint first, or carry {them(names)} with skip: "
                f"{globs_of(names)}"
            )
        for (path, dtype), names in unmixable.items():
            self.problems.append(
                f"{path}: {listed(names)} {are(names)} {dtype}, wanted floating point as in the "
                f"other checkpoints; carry {them(names)} with skip: {globs_of(names)}"
            )
        for (path, dtype, stored), names in casts.items():
            self.notes.append(
                f"{path}: {listed(names)} {are(names)} {dtype}, stored as {stored} like the first "
                "ingredient"
            )
        for checkpoint in self.sources:
            self.notes += [f"{checkpoint.path}: {note}" for note in checkpoint.notes]
            self.notes += [
                f"{checkpoint.path}: {listed(names, most=99)} are one tensor (tied)"
                for names in checkpoint.shared
            ]

    def check_contents(self, scans: Sequence[Scan], check_finite: bool) -> None:
        """What the data says: non-finite values, the same ingredient twice, frozen tensors."""
        scanned = list(zip(self.sources, scans, strict=False))
        for checkpoint, found in scanned:
            bad = {n: k for n, k in found.nonfinite.items() if n in self.mixed and check_finite}
            if bad:
                shown = ", ".join(
                    f"{name!r} has {count} of {checkpoint.tensors[name].numel}"
                    for name, count in list(bad.items())[:NAMES_SHOWN]
                )
                more = (
                    f" and {len(bad) - NAMES_SHOWN} more tensors" if len(bad) > NAMES_SHOWN else ""
                )
                self.problems.append(
                    f"{checkpoint.path}: values that are NaN or infinite: {shown}{more}; wanted "
                    "finite weights: leave this checkpoint out, or carry the tensors with skip: "
                    f"{globs_of(list(bad))}"
                )
            self.notes += [
                f"{checkpoint.path}: {name!r} has {count} non-finite values, and is not mixed"
                for name, count in found.nonfinite.items()
                if name not in self.mixed
            ]
        alike: dict[str, list[str]] = {}
        for checkpoint, found in scanned:
            alike.setdefault(found.sha256, []).append(checkpoint.path)
        self.warnings += [
            f"{listed(paths, most=99)} hold the same weights"
            for paths in alike.values()
            if len(paths) > 1
        ]
        ingredients = scanned[: len(self.ingredients)]
        if len(ingredients) < 2:
            return
        for name in self.mixed:
            stored = [stored_name(checkpoint, name, self.tied) for checkpoint, _ in ingredients]
            digests = {
                found.digests[n] if n is not None else None
                for n, (_, found) in zip(stored, ingredients, strict=True)
            }
            infos = [self.info(checkpoint, name) for checkpoint, _ in ingredients]
            kinds = {(info.shape, info.dtype) for info in infos if info is not None}
            if len(digests) == len(kinds) == 1 and None not in digests:
                self.frozen.append(name)
        if self.frozen:
            self.notes.append(
                f"{listed(self.frozen)} {are(self.frozen)} the same in all ingredients (frozen)"
            )

    def report(self, scans: tuple[Scan, ...]) -> Preflight:
        count = len(self.ingredients)
        return Preflight(
            problems=self.problems,
            warnings=self.warnings,
            notes=self.notes,
            mixed=tuple(self.mixed),
            carried=self.carried,
            frozen=tuple(self.frozen),
            scans=scans[:count],
            base_scan=scans[count] if len(scans) > count else None,
            tied=tuple(sorted({names for c in self.sources for names in c.shared})),
        )


def is_quantised(name: str, dtype: torch.dtype, expected: torch.dtype | None) -> bool:
    """Whether values of this dtype are codes that stand for others."""
    if dtype.is_floating_point:
        return dtype.itemsize == 1  # the float8 family
    if dtype not in (torch.int8, torch.uint8):
        return False
    if expected is not None:
        return expected.is_floating_point
    return "weight" in name.rpartition(".")[2]  # masks and counters are bytes, too
