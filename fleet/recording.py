"""Calls of one kind on a group: run as they are, recorded, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fleet.calls import Call
from fleet.capture.cuda import CudaReplay
from fleet.capture.replay import Arguments, Replay, capture, check
from fleet.capture.trace import CaptureError, first_line, trace
from fleet.structure import Rebuild

if TYPE_CHECKING:
    from fleet.group import Group


class Recording:
    """Calls of one kind: the first runs as it is, the second is recorded, others are replayed."""

    def __init__(self) -> None:
        self._calls = 0
        self._replay: Replay | CudaReplay | None = None
        self._rebuild: Rebuild | None = None

    def release(self) -> None:
        if self._replay is not None:
            self._replay.release()

    @property
    def kept_bytes(self) -> int:
        return 0 if self._replay is None else self._replay.kept_bytes

    def __call__(self, group: Group, call: Call, kind: Hashable) -> Any:
        self._calls += 1
        if self._replay is not None and self._rebuild is not None:
            try:
                return self._rebuild(self._replay(group.arguments(call)))
            except CaptureError as error:  # other weights cannot be recorded
                self._replay = None
                group.say("is not captured any more", error)
        results, rebuild = group.results(call, kind)
        if self._calls == 2:
            try:
                self._record(group, call, kind, results)
            except CaptureError as error:
                group.say("is not captured", error)
        return rebuild(results)

    def _record(self, group: Group, call: Call, kind: Hashable, results: Sequence[Tensor]) -> None:
        hooked = [m for m in group.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise CaptureError(f"{type(hooked[0]).__name__} has forward hooks")
        arguments = group.arguments(call)
        with torch.inference_mode(False), torch.no_grad():
            if arguments.stacked[0].is_cuda:
                replay, rebuild = _record_kernels(group, call, kind, arguments)
            else:
                replay, rebuild = _record_operations(group, call, kind, arguments)
            check(_replayed(replay, arguments), results)
        self._replay, self._rebuild = replay, rebuild


def _replayed(replay: Replay | CudaReplay, arguments: Arguments) -> Sequence[Tensor]:
    """What the first replay gives; CaptureError where it fails."""
    try:
        return replay(arguments)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"replaying failed: {first_line(error)}") from error


def _record_operations(
    group: Group, call: Call, kind: Hashable, arguments: Arguments
) -> tuple[Replay, Rebuild]:
    one, rebuilds = _one(group, call)

    def several(*tensors: Tensor) -> Sequence[Tensor]:
        names, others = list(group.stacked), list(group.shared)
        stacked = dict(zip(names, tensors, strict=False))
        shared = dict(zip(others, tensors[len(names) :], strict=False))
        inputs = tensors[len(names) + len(others) :]
        return group.together(call, stacked, shared, inputs)[0]

    replay = capture(one, several if group.joins(kind) else None, arguments)
    return replay, rebuilds[0]


def _one(group: Group, call: Call) -> tuple[Callable[..., list[Tensor]], list[Rebuild]]:
    """One model as a function of tensors, and the list of how to rebuild its outputs."""
    names, others = list(group.stacked), list(group.shared)
    rebuilds: list[Rebuild] = []

    def one(*tensors: Tensor) -> list[Tensor]:
        state = dict(zip([*names, *others], tensors, strict=False))
        return group.one(call, state, tensors[len(state) :], rebuilds)

    return one, rebuilds


def _record_kernels(
    group: Group, call: Call, kind: Hashable, arguments: Arguments
) -> tuple[CudaReplay, Rebuild]:
    def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return group.together(call, group.stacked, group.shared, inputs)[0]

    if not group.joins(kind):
        raise CaptureError("its models do not run together")
    one, rebuilds = _one(group, call)
    trace(one, arguments.of(0))  # refuses what writes into its arguments or depends on data
    return CudaReplay(compute, arguments), rebuilds[0]
