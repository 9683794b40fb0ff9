"""The settings of one tensor, from filters, gradients and levels; imports no torch.

A parameter is a scalar, a gradient (a list of them over the layers), or cases
`[{filter, value}, …]` of which the first counts whose filter is in the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from merge.errors import MergeError
from merge.method import Method, MethodSettings

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Case:
    """One value, or several over the layers, for the tensors whose name has `filter` in it.

    `at` is where in the setting it was written: keys and indices.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None
    at: tuple[int | str, ...] = ()
    gradient: bool = False

    def matches(self, name: str) -> bool:
        """Whether this case is meant for the tensor: by a part of its name, `*` or no filter."""
        return self.filter is None or self.filter == "*" or self.filter in name


Scope = Mapping[str, tuple[Case, ...]]
"""The parameters of one level of a config: name as a config spells it → its cases."""


def read_scope(parameters: Mapping[str, Any]) -> Scope:
    """The parameters of one level; ValueError where one has not the shape of a parameter."""
    return {name: read_cases(setting) for name, setting in parameters.items()}


def read_cases(setting: Any) -> tuple[Case, ...]:
    """A parameter as its cases; ValueError that says what is wrong with its shape."""
    if isinstance(setting, Mapping):
        return (_conditional(setting, ()),)
    if isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting):
        plain = [entry for entry in setting if not isinstance(entry, Mapping)]
        if plain:
            raise ValueError(
                f"{plain[0]!r} stands in a list of filters; wanted `- value: {plain[0]}` for the "
                "tensors that no filter before it matches"
            )
        return tuple(_conditional(entry, (k,)) for k, entry in enumerate(setting))
    return (_case(setting, None, ()),)


def _conditional(entry: Mapping[Any, Any], at: tuple[int | str, ...]) -> Case:
    unknown = sorted(str(key) for key in entry if key not in ("filter", "value"))
    if unknown or "value" not in entry:
        found = f"unknown key {unknown[0]!r}" if unknown else "no `value`"
        raise ValueError(f"{found}; wanted a mapping of `value` and, maybe, `filter`")
    text = entry.get("filter")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"filter {text!r} is no text; wanted a part of tensor names, or '*'")
    return _case(entry["value"], text, (*at, "value"))


def _case(value: Any, text: str | None, at: tuple[int | str, ...]) -> Case:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("an empty list; wanted values over the layers")
    for one in values:
        if not isinstance(one, Scalar):
            raise ValueError(
                f"{one!r} is no number, text, true or false; wanted one of these, a list of them "
                "over the layers, or [{filter: …, value: …}, …]"
            )
    return Case(tuple(values), text, at, gradient=isinstance(value, list))


# --- checks, before any file is opened ----------------------------------------------------------


def setting_errors(
    method: Method, name: str, cases: Sequence[Case]
) -> Iterator[tuple[tuple[int | str, ...], ErrorDetails]]:
    """What the method's settings have against each value of a parameter, and where it stands.

    `name` is as a config spells it. A gradient is checked at its points; whole numbers have none.
    """
    kind = _kind(method.settings, method.spelled[name])
    whole = method.settings.model_fields[method.spelled[name]].annotation is int
    for case in cases:
        if whole and len(case.values) > 1:
            text = "is a whole number, which has no gradient over the layers; give one value"
            yield (
                case.at,
                {
                    "type": "gradient",
                    "loc": (),
                    "msg": f"{text}, or filters: [{{filter: …, value: …}}, …]",
                    "input": list(case.values),
                },
            )
            continue
        for k, value in enumerate(case.values):
            try:
                kind.validate_python(value)
            except ValidationError as error:
                at = (*case.at, k) if case.gradient else case.at
                yield at, error.errors(include_url=False)[0]


# --- values, tensor by tensor -------------------------------------------------------------------


def resolve(
    method: Method,
    *,
    output: str,
    inputs: Sequence[str],
    own: Sequence[Scope],
    shared: Sequence[Scope],
    rule: Scope | None = None,
    fraction: float = 0.0,
) -> list[MethodSettings]:
    """The method's settings for the tensor `output`, one for each of the models.

    `inputs` are the tensor's names in the models and `own` the models' parameters; `shared` are
    the levels for all models, the strongest first. `rule`, of the pattern that chose the method,
    is stronger than all of them. The first level counts that has the parameter and a case for the
    name: for settings that are per model the input's name and the model's own level too, for
    others the output's. Gradients are taken at `fraction` (0 to 1) of the layers.

    Raises MergeError where a setting without default is missing, or a value is out of bounds.
    """
    rules = [rule] if rule else []
    for_all = [one for one in method.spelled.items() if one[1] not in method.per_model]
    for_each = [one for one in method.spelled.items() if one[1] in method.per_model]
    wanted = {spelling: one for spelling, one in method.spelled.items() if one in method.required}
    try:
        common = _values(method, for_all, output, [*rules, *shared], fraction)
        resolved = []
        for name, scope in zip(inputs, own, strict=True):
            levels = [*rules, scope, *shared]
            values = {**common, **_values(method, for_each, name, levels, fraction)}
            missing = sorted(spelling for spelling, one in wanted.items() if one not in values)
            if missing:
                raise MergeError(
                    f"{output!r}: merge_method {method.name!r} wants "
                    f"{', '.join(map(repr, missing))}, and no value is given for this tensor; give "
                    "one in `parameters`, after filters as `- value: …`"
                )
            resolved.append(_built(method.settings, tuple(values.items())))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']} (found {e['input']!r})"
            for e in error.errors(include_url=False)
        )
        raise MergeError(f"{output!r}: merge_method {method.name!r}: {problems}") from error
    return resolved


def _values(
    method: Method,
    names: Sequence[tuple[str, str]],
    tensor: str,
    levels: Sequence[Scope],
    fraction: float,
) -> dict[str, Any]:
    """Python name of each setting that some level has a value for → that value."""
    found: dict[str, Any] = {}
    for spelling, python in names:
        for scope in levels:
            case = next((c for c in scope.get(spelling, ()) if c.matches(tensor)), None)
            if case is not None:
                found[python] = _value_at(case, _kind(method.settings, python), fraction)
                break
    return found


def _value_at(case: Case, kind: Any, fraction: float) -> Any:
    """Numbers are interpolated between the points of a gradient, others hold up to the next."""
    values = [kind.validate_python(value) for value in case.values]
    if len(values) == 1:
        return values[0]
    place = fraction * (len(values) - 1)
    lower = min(int(place), len(values) - 2)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return values[int(place)]
    share = place - lower
    return (1 - share) * values[lower] + share * values[lower + 1]


@lru_cache(maxsize=1 << 12)
def _built(settings: type[MethodSettings], values: tuple[tuple[str, Any], ...]) -> MethodSettings:
    return settings(**dict(values))


@cache
def _kind(settings: type[MethodSettings], name: str) -> Any:
    """A TypeAdapter of what a single value of the setting `name` (in Python) has to be."""
    info = settings.model_fields[name]
    kind: Any = info.annotation
    for rule in info.metadata:
        kind = Annotated[kind, rule]
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
