"""What sees every operation that torch computes."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A TorchDispatchMode that does not import torch's compiler for its first operation.

    Torch hides a mode from the compiler, and imports it to do so: two seconds and 150 MB of every
    process. These modes watch models that are not compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
