"""What the parts of a merge config mean together: all that no file is needed for; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from inputs.config import nearest, with_known_keys
from merge.method import Method
from merge.planning.parameters import read_cases, setting_errors
from merge.registry import METHODS

if TYPE_CHECKING:
    from merge.planning.config import Group, MergeConfig

__all__ = ["config_without", "details"]

Location = tuple[int | str, ...]

DECISIVE: tuple[Location, ...] = (
    ("merge_method",),
    ("base_model",),
    ("models",),
    ("slices",),
    ("coefficients",),
)

# The keys that a learned soup is made by; its coefficients say the rest.
OF_SOUPS = (
    "coefficients",
    "models",
    "base_model",
    "tokenizer_source",
    "memory_budget",
)


def config_without(
    value: Any, wrong: Sequence[Location], handler: Callable[[Any], MergeConfig]
) -> MergeConfig | None:
    """The config without the keys that are wrong; None where it is none without them.

    Also None where all else depends on one of them.
    """
    if not isinstance(value, Mapping) or any(location in DECISIVE for location in wrong):
        return None
    rest: Any = _copied(value)
    for location in wrong:
        inside, last = rest, None
        for part in location:
            if isinstance(inside, dict) and part in inside:
                last, inside = (inside, part), inside[part]
            elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
                last, inside = None, inside[part]  # without it, the others would be renumbered
        if last is None:
            return None
        del last[0][last[1]]
    try:
        return handler(rest)
    except ValidationError:  # these are the problems that are being reported
        return None


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def details(config: MergeConfig) -> list[InitErrorDetails]:
    """What is wrong with a config whose fields are right, at the keys where it stands."""
    texts: dict[Location, list[str]] = {}
    for at, text in _problems(config):
        texts.setdefault(at, []).append(text)
    details = [
        InitErrorDetails(
            type=PydanticCustomError("merge", "; ".join(dict.fromkeys(many))),  # type: ignore[arg-type]
            loc=at,
            input={},  # nothing that the text does not say already
        )
        for at, many in texts.items()
    ]
    return details + list(_value_details(config))


def _problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    """What is wrong that can be seen without opening a file, and at which key."""
    yield from _source_problems(config)
    yield from _method_problems(config)
    yield from _group_problems(config)
    yield from _slice_problems(config)
    yield from _name_problems(config)
    yield from _missing_parameters(config)
    yield from _step_problems(config)


def _source_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    given = [key for key in ("models", "slices") if getattr(config, key)]
    if config.coefficients is not None:
        if config.slices:
            yield ("slices",), "coefficients are for whole models; list them in models"
        elif not config.models:
            yield (
                ("models",),
                "missing; they say where the ingredients of coefficients are, in order",
            )
        for key, field in type(config).model_fields.items():
            if key not in (*OF_SOUPS, "slices") and getattr(config, key) != field.default:
                yield (key,), "has no effect beside coefficients, which say it all; take it out"
        for k, entry in enumerate(config.models):
            if entry.parameters:
                yield (
                    ("models", k, "parameters"),
                    "have no effect beside coefficients; take them out",
                )
    elif len(given) != 1:
        found = "both" if given else "neither"
        yield (), f"wanted one of models, slices and coefficients, found {found} of the first two"


def _method_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    if config.coefficients is not None:
        return
    if config.merge_method is None:
        yield ("merge_method",), f"missing; this key is required{nearest('', METHODS)}"
    named: list[tuple[Location, str | None]] = [(("merge_method",), config.merge_method)]
    named += [
        (("methods", k, "merge_method"), r.merge_method) for k, r in enumerate(config.methods)
    ]
    for at, name in named:
        if name is not None and name not in METHODS:
            yield at, f"found {name!r}{nearest(name.lower().replace('-', '_'), METHODS)}"


def _group_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    if config.coefficients is not None:
        return
    for group in config.groups:
        if not group.references:
            continue
        yield from _spelling_problems(group)
        for method in config.methods_in_use:
            base, models = group.roles(method)
            lacks = base is not None and base not in group.all_references
            if lacks:
                yield (
                    group.at,
                    f"base_model {base!r} is none of its sources, and merge_method "
                    f"{method.name!r} needs it; add it with its layer_range",
                )
            for problem in method.check_inputs(models=len(models), base=base is not None):
                if group.base in models and group.base not in group.references:
                    problem += f" with base_model {group.base!r}, for it uses no base"
                yield group.at, problem


def _spelling_problems(group: Group) -> Iterator[tuple[Location, str]]:
    """One checkpoint listed twice, or as a model and as the base in other words."""
    spellings: dict[str, list[str]] = {}
    for reference in group.references:
        spellings.setdefault(_place(reference), []).append(reference)
    for same in spellings.values():
        if len(same) > 1:
            names = " and ".join(map(repr, dict.fromkeys(same)))
            found = "is there twice" if len(set(same)) == 1 else "are one model"
            yield group.at, f"{names} {found}; give it more weight once"
    base = group.base
    listed = spellings.get(_place(base), []) if base is not None else []
    if listed and base not in listed:
        yield (
            group.at,
            f"{listed[0]!r} is the base_model {base!r} in other words; write both alike",
        )


def _place(reference: str) -> str:
    """The same text for the same checkpoint: local parts as resolved paths."""
    parts = [reference] if Path(reference).exists() else reference.split("+")
    return "+".join(str(Path(p).resolve()) if p and Path(p).exists() else p for p in parts)


def _slice_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    for k, slice_ in enumerate(config.slices):
        lengths = {}
        for j, source in enumerate(slice_.sources):
            first, last = source.layer_range
            if first >= last:
                what = "empty" if first == last else "reversed"
                yield (
                    ("slices", k, "sources", j, "layer_range"),
                    f"[{first}, {last}] is {what}; wanted [first, last) with first < last",
                )
            else:
                lengths.setdefault(last - first, source.model)
        if len(lengths) > 1:
            shown = ", ".join(f"{length} of {model!r}" for length, model in lengths.items())
            yield ("slices", k), f"its sources differ in their number of layers: {shown}"


def _name_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    if config.skip and config.only:
        yield ("only",), "skip and only exclude each other; give one of them"
    source = config.tokenizer_source
    if source == "union":
        yield (
            ("tokenizer_source",),
            "'union' is not supported: embeddings are not rearranged for another vocabulary; merge "
            "models that share one, and name one of them, or 'base'",
        )
    elif source == "base" and config.base_model is None:
        yield ("tokenizer_source",), "found 'base', and there is no base_model"
    elif source not in (None, "base", *config.references):
        known = ["base", *config.references]
        yield (
            ("tokenizer_source",),
            f"found {source!r}; wanted one of the models, or 'base'{nearest(source, known)}",
        )


def _missing_parameters(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    """Settings without a default that no level mentions."""
    rules: list[tuple[Location, str | None, Mapping[str, Any]]] = [
        (("parameters",), config.merge_method, {})
    ]
    rules += [
        (("methods", k, "parameters"), rule.merge_method, rule.parameters)
        for k, rule in enumerate(config.methods)
    ]
    for at, name, rule in rules:
        method = METHODS.get(name or "")
        if method is None:
            continue
        for group in config.groups:
            given = {*rule, *(key for scope in group.shared for key in scope)}
            own = dict(zip(group.references, group.own, strict=True))
            _, models = group.roles(method)
            for spelling, python in method.spelled.items():
                if python not in method.required or spelling in given:
                    continue
                lacking = [ref for ref in models if spelling not in own.get(ref, {})]
                if python not in method.per_model:
                    yield at, f"{spelling!r} is missing, merge_method {method.name!r} needs it"
                elif lacking:
                    yield (
                        at,
                        f"{spelling!r} is missing, merge_method {method.name!r} needs it for "
                        f"{', '.join(map(repr, lacking[:4]))}{' …' if len(lacking) > 4 else ''}",
                    )


def _step_problems(config: MergeConfig) -> Iterator[tuple[Location, str]]:
    for method in config.methods_in_use:
        if method.statistics and config.statistics is None:
            yield (
                ("statistics",),
                f"missing; merge_method {method.name!r} gathers them: give model and data",
            )
    if config.align is None:
        return
    if config.align.reference == "base" and config.base_model is None:
        yield ("align", "reference"), "found 'base', and there is no base_model; wanted 'first'"
    if config.slices:
        yield ("align",), "whole models are aligned; use models instead of slices"


# --- the values of parameters -------------------------------------------------------------------


def _value_details(config: MergeConfig) -> Iterator[InitErrorDetails]:
    """Unknown parameters, those at a level where they have no meaning, and values out of bounds."""
    if config.coefficients is not None:
        return
    named = [config.merge_method, *(rule.merge_method for rule in config.methods)]
    known = config.methods_in_use
    if all(name in METHODS for name in named):
        yield from _level_details(("parameters",), config.parameters, known, shared=True)
        for k, slice_ in enumerate(config.slices):
            at = ("slices", k)
            yield from _level_details((*at, "parameters"), slice_.parameters, known, shared=True)
            for j, source in enumerate(slice_.sources):
                where = (*at, "sources", j, "parameters")
                yield from _level_details(where, source.parameters, known, shared=False)
        for k, entry in enumerate(config.models):
            where = ("models", k, "parameters")
            yield from _level_details(where, entry.parameters, known, shared=False)
    for k, rule in enumerate(config.methods):
        if rule.merge_method in METHODS:
            only = (METHODS[rule.merge_method],)
            where = ("methods", k, "parameters")
            yield from _level_details(where, rule.parameters, only, shared=True)


def _level_details(
    at: Location, parameters: Mapping[str, Any], methods: Iterable[Method], *, shared: bool
) -> Iterator[InitErrorDetails]:
    for name, setting in parameters.items():
        users = [method for method in methods if name in method.spelled]
        text = None
        if not users:
            names = dict.fromkeys(spelling for method in methods for spelling in method.spelled)
            who = ", ".join(repr(method.name) for method in methods)
            text = f"no parameter of merge_method {who}{nearest(name, names) or '; it has none'}"
        elif not shared and not any(m.spelled[name] in m.per_model for m in users):
            text = (
                f"is one value for all models with merge_method {users[0].name!r}; move it to the "
                "parameters that all models share"
            )
        if text is not None:
            kind = PydanticCustomError("merge", text)  # type: ignore[arg-type]
            yield InitErrorDetails(type=kind, loc=(*at, name), input={})
            continue
        seen = set()
        for method in users:
            for inside, error in setting_errors(method, name, read_cases(setting)):
                if (inside, error["msg"]) not in seen:
                    seen.add((inside, error["msg"]))
                    yield with_known_keys({**error, "loc": (*at, name, *inside)}, [])
