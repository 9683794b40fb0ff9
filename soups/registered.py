"""An entry of a registry; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from inputs.config import Settings


@dataclass(frozen=True)
class Registered:
    """Settings and, as `module:function`, what is called with them."""

    settings: type[Settings]
    where: str

    def function(self) -> Callable:
        """The function itself; the first call imports torch."""
        return imported(self.where)


def imported(where: str) -> Callable:
    """The function `module:function`."""
    module, function = where.split(":")
    return getattr(import_module(module), function)
