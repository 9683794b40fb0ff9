"""The type checks of `--jaxtyping-packages`, without shapes where an annotation has none.

For every call of every function jaxtyping binds the arguments and opens a memo of the sizes of
axes, which took a third of the tests' time. Where no annotation has an axis, beartype alone makes
the same checks. To be imported before the packages that are checked.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_with_shapes = jaxtyping.jaxtyped
_without = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def checked(function: Any = None, *, typechecker: Any) -> Any:
    """What jaxtyping's import hook decorates functions and classes with."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function) or inspect.isgeneratorfunction(function):
        return _with_shapes(function, typechecker=typechecker)
    hints = _hints(function)
    if any(map(_has_axes, hints.values())):
        return _with_shapes(function, typechecker=typechecker)
    if not hints:
        return function
    made = _typed(function, hints)

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else made)(*args, **kwargs)

    return checking


def _hints(function: Callable) -> dict[str, Any]:
    """The annotations as types; Any, as for jaxtyping, for names that are not there at run time."""
    return {
        name: _type(annotation, function.__globals__)
        for name, annotation in function.__annotations__.items()
    }


def _type(annotation: Any, names: dict[str, Any]) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["value"]
    except (NameError, AttributeError, TypeError):  # of names that only a type checker imports
        return Any


def _has_axes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(map(_has_axes, parts))


def _typed(function: Callable, hints: dict[str, Any]) -> Callable:
    own = function.__annotations__
    function.__annotations__ = hints
    try:
        return _without(function)
    finally:
        function.__annotations__ = own


jaxtyping.jaxtyped = checked
