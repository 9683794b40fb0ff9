"""The plan of a merge: what makes each tensor of the result, found from headers alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from merge.catalogue.averages import Linear, MultiSlerp
from merge.catalogue.subspaces import Knots
from merge.catalogue.with_data import Fisher, RegMean
from merge.checkpoints import Checkpoint, TensorInfo
from merge.checkpoints.tensors import dtype_name
from merge.errors import MergeError
from merge.method import Method, MethodSettings
from merge.methods.averages import normalized
from merge.planning.config import MergeConfig
from merge.planning.findings import Findings
from merge.planning.parameters import Scope, read_scope, resolve
from merge.planning.slots import Member, Slot, make_slots
from merge.registry import METHODS
from merge.stream import stored_name, tied_names

__all__ = ["MergePlan", "Source", "TensorMerge", "plan_merge"]

# Integer buffers up to this size are compared between the checkpoints.
COMPARED_NUMEL = 1 << 16


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, by the name under which it is stored there."""

    checkpoint: Checkpoint
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.tensors[self.name]


@dataclass(frozen=True)
class TensorMerge:
    """How one tensor of the result is made.

    `method` is None where it is carried: then `models` has one source, which is cast to the
    output's dtype where they differ, and `reason` says why. Else `settings` and `labels` (the
    references of the config) are one per model. `depth` is 0 before the layers, 1 after them.
    `tied_to` names an earlier tensor of the plan that this one shares its sources, method and
    settings with: their results are one tensor, so random draws must go by that name. It has its
    depth, too.
    """

    output: TensorInfo
    method: Method | None
    settings: tuple[MethodSettings, ...]
    base: Source | None
    models: tuple[Source, ...]
    labels: tuple[str, ...]
    depth: float
    reason: str = ""
    tied_to: str | None = None


@dataclass(frozen=True)
class MergePlan:
    """The tensors of the result, by name, and what is worth a note.

    `giver` is the checkpoint whose config and tokenizer files go with it: the base, else the first
    model. `layers` has, where slices made them, for each layer of the result the place of the one
    in the giver that it stands for.
    """

    tensors: tuple[TensorMerge, ...]
    notes: tuple[str, ...]
    layers: tuple[int, ...] | None
    giver: Checkpoint


def plan_merge(config: MergeConfig, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
    """How each tensor of the result is made from `checkpoints` (reference → checkpoint).

    Raises one MergeError with all that does not fit: names, shapes, dtypes, globs, settings.
    """
    slots, layers = make_slots(config, checkpoints)
    planner = _Planner(config, checkpoints, slots)
    planner.check_globs()
    tensors = [merge for slot in slots if (merge := planner.plan(slot)) is not None]
    tensors = planner.tie(tensors)
    planner.check_filters()
    planner.findings.raise_if_any()
    if not any(merge.method is not None for merge in tensors):
        raise MergeError(
            f"no tensor is left to merge, {len(tensors)} are carried; wanted floating-point "
            "tensors that skip does not match, or only does"
        )
    return MergePlan(tuple(tensors), planner.findings.notes(), layers, planner.giver)


class _Planner:
    """The work of `plan_merge`, slot by slot."""

    def __init__(
        self, config: MergeConfig, checkpoints: Mapping[str, Checkpoint], slots: Sequence[Slot]
    ) -> None:
        self.config = config
        self.slots = slots
        self.checkpoints = [checkpoints[reference] for reference in config.references]
        self.giver = self.checkpoints[0]
        self.tied = tied_names(self.checkpoints)
        self.rules = [(rule, read_scope(rule.parameters)) for rule in config.methods]
        self.findings = Findings()
        named = config.out_dtype or config.dtype
        self.dtype: torch.dtype | None = None if named is None else getattr(torch, named)
        for checkpoint in self.checkpoints:
            for note in checkpoint.notes:
                self.findings.note(f"{checkpoint.path}: {note}")
        base = config.groups[0].base
        if config.groups[0].base_is_model and base is not None and not config.slices:
            self.findings.note(
                f"base_model {base!r} is merged as a model: no method here uses a base"
            )

    # --- one tensor ---

    def plan(self, slot: Slot) -> TensorMerge | None:
        """How the tensor is made; None where it is left out, or cannot be made."""
        if (why := self._set_aside(slot.name)) is not None:
            return self._carry(slot, why)
        method, rule = self._method(slot.name)
        base, models = slot.group.roles(method)
        wanted = [*models, *([base] if base is not None else [])]
        members = [slot.members[reference] for reference in wanted]
        found = {member.reference: self._source(member) for member in members}
        sources = {ref: source for ref, source in found.items() if source is not None}
        if not sources:
            self.findings.left_out(slot.name, "the base alone has it")
            return None
        if len(sources) < len(found):
            had = {m.checkpoint.path: m.name for m in members if m.reference in sources}
            not_had = {m.checkpoint.path: m.name for m in members if m.reference not in sources}
            self.findings.lacking(slot.name, had, not_had)
            return None
        if (partner := self._stored_as(slot, sources)) is not None:
            self.findings.left_out(slot.name, f"it is tied to {partner!r}, and stored as that")
            return None
        held = [(sources[ref].checkpoint, sources[ref].info) for ref in wanted]
        if not self.findings.check_dtypes(slot.name, held):
            return None
        if not any(info.dtype.is_floating_point for _, info in held):
            if _differ(list(sources.values())):
                self.findings.differing(slot.name)
            return self._carry(slot, f"{dtype_name(held[0][1].dtype)} values are not merged")
        if not self.findings.check_shapes(slot.name, held, base_last=base is not None):
            return None
        return self._merge(slot, method, rule, base, models, sources)

    def _merge(
        self,
        slot: Slot,
        method: Method,
        rule: Scope,
        base: str | None,
        models: Sequence[str],
        sources: Mapping[str, Source],
    ) -> TensorMerge | None:
        inputs = [slot.members[reference] for reference in models]
        try:
            settings = resolve(
                method,
                output=slot.name,
                inputs=[member.name for member in inputs],
                own=[member.own for member in inputs],
                shared=slot.shared,
                rule=rule,
                fraction=slot.fraction,
            )
        except MergeError as error:
            self.findings.unresolved(slot.name, error)
            return None
        infos = [source.info for source in sources.values()]
        try:
            _check_weights(settings, infos[0].shape)
        except MergeError as error:
            self.findings.unresolved(slot.name, error)
            return None
        promoted = infos[0].dtype
        for info in infos[1:]:
            promoted = torch.promote_types(promoted, info.dtype)
        dtype = self.dtype or promoted
        self.findings.note_dtypes(
            slot.name, [source.info.dtype for source in sources.values()], dtype
        )
        return TensorMerge(
            TensorInfo(slot.name, infos[0].shape, dtype),
            method,
            tuple(settings),
            None if base is None else sources[base],
            tuple(sources[reference] for reference in models),
            tuple(models),
            slot.depth,
        )

    def _carry(self, slot: Slot, reason: str) -> TensorMerge | None:
        """The tensor unmerged: the base's where it has it, else the first model's."""
        first = next(iter(slot.members))
        base = slot.group.base
        givers = [base, first] if base is not None and base in slot.members else [first]
        for reference in dict.fromkeys(givers):
            source = self._source(slot.members[reference])
            if source is None:
                continue
            info = source.info
            wide = info.dtype.is_floating_point and info.dtype.itemsize > 1
            dtype = self.dtype if wide and self.dtype is not None else info.dtype
            self.findings.carried(slot.name, reason, source.checkpoint.path)
            output = TensorInfo(slot.name, info.shape, dtype)
            return TensorMerge(output, None, (), None, (source,), (reference,), slot.depth, reason)
        paths = " and ".join(slot.members[reference].checkpoint.path for reference in givers)
        self.findings.left_out(slot.name, f"{reason}, and {paths} does not have it")
        return None

    def _source(self, member: Member) -> Source | None:
        stored = stored_name(member.checkpoint, member.name, self.tied)
        return None if stored is None else Source(member.checkpoint, stored)

    def _set_aside(self, name: str) -> str | None:
        """Why the config wants the tensor carried; None where it is to be merged."""
        glob = next((glob for glob in self.config.skip if fnmatchcase(name, glob)), None)
        if glob is not None:
            return f"skip: {glob!r}"
        if self.config.only and not any(fnmatchcase(name, glob) for glob in self.config.only):
            return "only names others"
        return None

    def _method(self, name: str) -> tuple[Method, Scope]:
        for rule, scope in self.rules:
            if fnmatchcase(name, rule.match):
                return METHODS[rule.merge_method], scope
        return METHODS[self.config.merge_method or ""], {}

    # --- tied tensors ---

    def _stored_as(self, slot: Slot, sources: Mapping[str, Source]) -> str | None:
        """The tied partner as which this tensor is stored in some checkpoint, and known in all."""
        others = [
            source.name
            for reference, source in sources.items()
            if source.name != slot.members[reference].name
        ]
        known = bool(others) and all(others[0] in s.checkpoint.tensors for s in sources.values())
        return others[0] if known else None

    def tie(self, tensors: Sequence[TensorMerge]) -> list[TensorMerge]:
        """The tensors, where those tied to an earlier one name it; both must be merged alike."""
        done: dict[str, TensorMerge] = {}
        for merge in tensors:
            name = merge.output.name
            partners = [p for p in self.tied.get(name, ()) if p in done and self._tied(p, name)]
            done[name] = merge
            if not partners:
                continue
            if _same(merge, done[partners[0]]):
                one = done[partners[0]]
                done[name] = replace(merge, tied_to=partners[0], depth=one.depth)
                continue
            text = f"{partners[0]!r} and {name!r} are one tensor (tied), but are made differently"
            if self.config.slices:
                self.findings.note(f"{text} here, and tied no longer")
            else:
                self.findings.problem(f"{text}; give both the same method and parameters")
        return list(done.values())

    def _tied(self, one: str, other: str) -> bool:
        """Whether all checkpoints that have both names have one tensor for them."""
        both = [c for c in self.checkpoints if one in c.tensors and other in c.tensors]
        return all(any(one in names and other in names for names in c.shared) for c in both)

    # --- the config's globs and filters ---

    def check_globs(self) -> None:
        """A glob that matches no tensor is a problem."""
        names = [slot.name for slot in self.slots]
        globs = [("skip", glob) for glob in self.config.skip]
        globs += [("only", glob) for glob in self.config.only]
        globs += [(f"methods.{k}.match", rule.match) for k, rule in enumerate(self.config.methods)]
        for key, glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                near = difflib.get_close_matches(glob, names, n=3, cutoff=0.0)
                self.findings.problem(
                    f"{key}: {glob!r} matches no tensor; the nearest names are "
                    f"{', '.join(map(repr, near))}"
                )

    def check_filters(self) -> None:
        """A filter that is in no name is noted: files for mergekit often name tensors to spare."""
        names = {member.name for slot in self.slots for member in slot.members.values()}
        scopes = {id(s): s for slot in self.slots for s in slot.shared}
        scopes |= {id(m.own): m.own for slot in self.slots for m in slot.members.values()}
        unused = dict.fromkeys(
            (name, case.filter)
            for scope in [*scopes.values(), *(scope for _, scope in self.rules)]
            for name, cases in scope.items()
            for case in cases
            if case.filter and not any(case.matches(tensor) for tensor in names)
        )
        words = {word for name in names for word in name.split(".")}
        for name, text in unused:
            self.findings.note(
                f"parameter {name!r}: the filter {text!r} is in no tensor's name"
                f"{_near(text, words)}"
            )


def _same(one: TensorMerge, other: TensorMerge) -> bool:
    """Whether two tensors that are tied in the checkpoints come out the same."""
    checkpoints = [
        [source.checkpoint for source in (merge.base, *merge.models) if source is not None]
        for merge in (one, other)
    ]
    return (
        (one.method, one.settings, one.output.dtype)
        == (other.method, other.settings, other.output.dtype)
    ) and checkpoints[0] == checkpoints[1]


def _check_weights(settings: Sequence[MethodSettings], shape: Sequence[int]) -> None:
    """MergeError where the method divides by the sum of the weights, and that is 0."""
    first = settings[0]
    if isinstance(first, Knots):
        is_matrix = len(shape) == 2 or (len(shape) > 2 and first.convolutions == "matrix")
        divides = not (is_matrix and first.merge.endswith("ties"))  # these go by what agrees
    elif isinstance(first, Linear):
        divides = first.normalize
    elif isinstance(first, MultiSlerp):
        divides = first.normalize_weights
    else:
        divides = isinstance(first, Fisher | RegMean)
    if divides:
        normalized([one.weight for one in settings])  # type: ignore[attr-defined]


def _differ(sources: Sequence[Source]) -> bool:
    """Whether small tensors have different values; large ones are not read for a note."""
    if any(source.info.numel > COMPARED_NUMEL for source in sources):
        return False
    if len({(source.info.shape, source.info.dtype) for source in sources}) > 1:
        return True
    first, *others = (source.checkpoint.read(source.name) for source in sources)
    return not all(torch.equal(first, other) for other in others)


def _near(text: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
