"""Checkpoints of one base that are read in turn, few of them open at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from fleet.errors import FleetError
from fleet.storage.records import check_name
from merge.adapters import applied, is_adapter, open_adapter
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.checkpoints.tensors import dtype_name

# File descriptors are few on many systems: 1024, or 256.
OPEN_AT_ONCE = 64


class Zoo:
    """Variants by name, each a checkpoint, or a LoRA folder that is applied to the base.

    A context manager. `open_base` opens the base, each time anew. Every variant is opened once to
    be checked: it has the base's tensors, in the base's dtypes; shapes may differ, and it may have
    more (a head of its own). Raises FleetError that names each variant that does not fit.
    """

    def __init__(
        self, open_base: Callable[[], Checkpoint], variants: Mapping[str, str | Path]
    ) -> None:
        self.names = tuple(variants)
        self.paths = dict(variants)
        self._open_base = open_base
        self._open: OrderedDict[str, Checkpoint] = OrderedDict()
        self.base = open_base()
        self._common = {
            name
            for name, info in self.base.tensors.items()
            if info.dtype.is_floating_point and info.dtype.itemsize > 1 and info.numel
        }
        problems: list[str] = []
        try:
            for name in self.names:
                check_name(name, "a variant")
                problems += self._checked(name)
            if problems:
                raise FleetError("\n".join(problems))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Zoo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, name: str) -> Checkpoint:
        """The checkpoint of a variant; open until others have been asked for."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= OPEN_AT_ONCE:
            self._open.popitem(last=False)[1].close()
        path = self.paths[name]
        if is_adapter(path):
            self._open[name] = applied(self._open_base(), open_adapter(path))
        else:
            self._open[name] = open_checkpoint(path, names=self.base.tensors)
        return self._open[name]

    def comparable(self) -> list[str]:
        """The floating-point tensors that all variants have in the base's shape, sorted."""
        return sorted(self._common)

    def close(self) -> None:
        """Close every file."""
        for checkpoint in (*self._open.values(), self.base):
            checkpoint.close()
        self._open.clear()

    def _checked(self, name: str) -> list[str]:
        """What is wrong with a variant; what it has not as the base does is not comparable."""
        checkpoint, base = self.open(name), self.base
        problems: list[str] = []
        missing = sorted(base.tensors.keys() - checkpoint.tensors.keys())
        if missing:
            problems.append(
                f"{name}: {checkpoint.path} lacks {len(missing)} tensors of the base {base.path} "
                f"({', '.join(map(repr, missing[:3]))}); leave the variant out, or give its own "
                "base"
            )
        for info in base.tensors.values():
            own = checkpoint.tensors.get(info.name)
            if own is not None and own.dtype != info.dtype:
                problems.append(
                    f"{name}: {info.name!r} is {dtype_name(own.dtype)} in {checkpoint.path}, "
                    f"{dtype_name(info.dtype)} in the base; cast the checkpoint to the base's dtype"
                )
                break
            if own is None or own.shape != info.shape:
                self._common.discard(info.name)
        return problems
