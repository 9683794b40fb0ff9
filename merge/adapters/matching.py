"""Which tensors of a base an adapter's names stand for, and how its weights lie."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from merge.adapters.adapter import Adapter, Module
from merge.checkpoints.envelopes import quoted
from merge.checkpoints.tensors import Checkpoint, TensorInfo
from merge.errors import MergeError


@dataclass(frozen=True)
class PrefixChange:
    """Names of the adapter's model become names of the base: `old` at their front to `new`."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def __str__(self) -> str:
        return f"the prefix '{self.old}' dropped" if self.old else f"the prefix '{self.new}' added"


def match_names(base: Checkpoint, adapter: Adapter) -> PrefixChange:
    """The one change of prefix under which the base has every module of the adapter.

    Prefixes differ between checkpoints of a model and of its parts (`model.`, `transformer.`).
    Raises MergeError where some module has no partner, or partners in two places.
    """
    wanted = [f"{name}.weight" for name in adapter.modules]
    changes = {PrefixChange(): 0, **dict.fromkeys(_changes(wanted, base.tensors), 0)}
    for change in changes:
        changes[change] = sum(change(name) in base.tensors for name in wanted)
    best = max(changes, key=lambda change: changes[change])
    missing = [name for name in wanted if best(name) not in base.tensors]
    if missing:
        near = difflib.get_close_matches(best(missing[0]), base.tensors, n=1)
        raise MergeError(
            f"{base.path}: has no tensor for {len(missing)} of {len(wanted)} modules of the "
            f"adapter {adapter.path} ({quoted([name.removesuffix('.weight') for name in missing])})"
            f"{_trained_on(adapter)}{f'; the nearest name is {near[0]!r}' if near else ''}; "
            "give the base that the adapter was trained on"
        )
    equal = [change for change, count in changes.items() if count == len(wanted)]
    if best != PrefixChange() and len(equal) > 1:
        raise MergeError(
            f"{adapter.path}: its modules fit {base.path} in {len(equal)} places "
            f"({'; '.join(map(str, equal))}), wanted one; rename the adapter's tensors to those of "
            "the base"
        )
    return best


def _changes(wanted: Collection[str], held: Mapping[str, TensorInfo]) -> Iterator[PrefixChange]:
    """Whole components that may be dropped from, or added to, the front of all wanted names.

    None with a number: that would move a layer.
    """
    first, *others = wanted
    parts = first.split(".")
    for count in range(1, len(parts) - 1):
        old = ".".join(parts[:count]) + "."
        if parts[count - 1].isdigit() or not all(name.startswith(old) for name in others):
            break
        yield PrefixChange(old=old)
    for name in held:
        new = name.removesuffix(first)
        if name.endswith(f".{first}") and not any(part.isdigit() for part in new.split(".")):
            yield PrefixChange(new=new)


def transposed_leaves(base: Checkpoint) -> frozenset[str]:
    """Last components of the modules whose weights are [in, out], as their biases' sizes tell.

    Transformers' Conv1D (GPT-2) stores them so; a square weight shows it by its namesakes.
    """
    found = set()
    for name, info in base.tensors.items():
        bias = base.tensors.get(f"{name.removesuffix('.weight')}.bias")
        if (
            name.endswith(".weight")
            and len(info.shape) == 2
            and bias is not None
            and bias.shape == info.shape[1:] != info.shape[:1]
        ):
            found.add(name.split(".")[-2] if "." in name.removesuffix(".weight") else "")
    return frozenset(found)


def is_transposed(
    base: Checkpoint, adapter: Adapter, module: Module, info: TensorInfo, leaves: Collection[str]
) -> bool:
    """Whether the weight `info` of the base is [in, out]; MergeError where it does not fit.

    The shape decides; of square weights their namesakes, else the adapter's fan_in_fan_out (which
    PEFT saves as the last module had it).
    """
    straight = (module.rows, *module.window)
    crossed = straight[::-1] if len(straight) == 2 else None
    fits = {"embedding": {crossed}, "linear": {straight, crossed}, "conv": {straight}}
    if info.shape not in fits[module.kind]:
        grouped = module.kind == "conv" and info.shape[:1] + info.shape[2:] == (
            *straight[:1],
            *straight[2:],
        )
        why = "; it is a grouped convolution, whose LoRA cannot be merged" if grouped else ""
        raise MergeError(
            f"{base.path}: {info.name!r} is {list(info.shape)}, the adapter {adapter.path} is for "
            f"{module.describe} there{_trained_on(adapter)}{why}; give the base that the adapter "
            "was trained on"
        )
    if module.kind != "linear":
        return module.kind == "embedding"
    if straight != crossed:
        return info.shape == crossed
    return module.name.split(".")[-1] in leaves or adapter.config.fan_in_fan_out


def _trained_on(adapter: Adapter) -> str:
    named = adapter.config.base_model_name_or_path
    return f", which was trained on {named!r}" if named else ""
