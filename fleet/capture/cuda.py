"""A computation on a CUDA device as one graph of kernels, launched without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fleet.capture.replay import Arguments
from fleet.capture.trace import CaptureError, first_line

WARM_UPS = 3  # libraries choose and set up their kernels in the first calls


class CudaReplay:
    """The kernels of `compute(inputs)` in a CUDA graph, which reads the weights where they lie.

    Weights at other addresses are recorded again. Raises CaptureError where recording fails.
    """

    def __init__(
        self, compute: Callable[[Sequence[Tensor]], Sequence[Tensor]], arguments: Arguments
    ) -> None:
        self._compute = compute
        self._loaded = True
        self._record(arguments)

    def release(self) -> None:
        """The weights may be others now."""
        self._loaded = False

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        if not self._loaded:
            if _addresses(arguments) != self._addresses:
                self._record(arguments)
            self._loaded = True
        for mine, given in zip(self._inputs, arguments.inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return [result.clone() for result in self._results]

    def _record(self, arguments: Arguments) -> None:
        self._addresses = _addresses(arguments)
        self._inputs = [tensor.clone() for tensor in arguments.inputs]
        before = torch.cuda.memory_reserved()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._compute(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = list(self._compute(self._inputs))
        except RuntimeError as error:
            raise CaptureError(f"no CUDA graph: {first_line(error)}") from error
        self.kept_bytes = max(0, torch.cuda.memory_reserved() - before)


def _addresses(arguments: Arguments) -> list[int]:
    return [tensor.data_ptr() for tensor in (*arguments.stacked, *arguments.shared)]
