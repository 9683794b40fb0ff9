"""Merge method name → what it is; imports no torch.

A new method is a settings class and a row in a file of `merge/catalogue`, and a pure function in
`merge/methods`.
"""

from __future__ import annotations

from inputs.config import nearest
from merge.catalogue.agreements import AGREEMENTS
from merge.catalogue.averages import AVERAGES
from merge.catalogue.subspaces import SUBSPACES
from merge.catalogue.task_vectors import TASK_VECTORS
from merge.catalogue.with_data import WITH_DATA
from merge.errors import MergeError
from merge.method import Method

FAMILIES: dict[str, tuple[Method, ...]] = {
    "Averages": AVERAGES,
    "Task vectors": TASK_VECTORS,
    "Agreement": AGREEMENTS,
    "Subspaces": SUBSPACES,
    "With data": WITH_DATA,
}
METHODS: dict[str, Method] = {m.name: m for family in FAMILIES.values() for m in family}


def find_method(name: str) -> Method:
    """The method of this name; MergeError with the nearest name where there is none."""
    if name not in METHODS:
        raise MergeError(f"merge_method: found {name!r}{nearest(name.replace('-', '_'), METHODS)}")
    return METHODS[name]
