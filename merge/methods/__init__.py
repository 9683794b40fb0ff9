"""The merge methods: pure functions on the tensors of one name; `methods["ties"]` finds one."""

from __future__ import annotations

import sys
from types import ModuleType

from merge.method import Method
from merge.registry import METHODS, find_method


class _Methods(ModuleType):
    def __getitem__(self, name: str) -> Method:
        return find_method(name)

    def __iter__(self):
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


sys.modules[__name__].__class__ = _Methods
