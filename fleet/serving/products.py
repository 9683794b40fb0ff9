"""The base's weights as this machine multiplies fastest with them, and memory that stays."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A packed product takes some 15 µs to call.
LEAST_WEIGHTS = 1 << 14
ROWS = 256  # for which the layout is chosen; it serves any number
KEPT_BYTES = 1 << 30
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for `mallopt`


class Products:
    """`F.linear`, with a second copy of the base's matrices in oneDNN's own layout.

    In float32 on the CPU a tenth faster than torch's; elsewhere there is no copy.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        if not torch.backends.mkldnn.is_available():
            return
        for weight in weights:
            fits = weight.dtype == torch.float32 and weight.device.type == "cpu"
            if fits and weight.dim() == 2 and weight.numel() >= LEAST_WEIGHTS:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
                self._packed[id(weight)] = weight, packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x · weightᵀ + bias`."""
        _, packed = self._packed.get(id(weight), (None, None))
        if packed is None or type(x) is not Tensor or torch.is_grad_enabled() or not x.numel():
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def serve(self, model: nn.Module) -> None:
        """Have the model's own linear layers compute with them."""
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for layer in layers:
            if type(layer).forward is nn.Linear.forward and id(layer.weight) in self._packed:
                layer.__dict__["forward"] = partial(_forward, self, layer)


def _forward(products: Products, layer: nn.Linear, input: Tensor) -> Tensor:
    return products.linear(input, layer.weight, layer.bias)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB that was freed, for the whole process.

    Otherwise it gives back what every layer frees, and takes it anew page by page: a fifth of the
    time of a small encoder. Nothing is done where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
