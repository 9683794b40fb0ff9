"""Tensors named by their hashes, as packs hold them."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from merge.checkpoints.safetensors_file import DTYPE_NAMES
from merge.checkpoints.tensors import dtype_name, tensor_bytes


def tensor_hash(tensor: Shaped[Tensor, ...]) -> str:
    """SHA-256 of dtype, shape and the values' bytes, in hex."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(tensor_bytes(plain(tensor)))
    return digest.hexdigest()


def check_storable(tensor: Shaped[Tensor, ...], where: str) -> None:
    """FleetError unless a pack can hold it: dense, of a dtype that safetensors has."""
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        raise FleetError(
            f"{where}: is {dtype_name(tensor.dtype)}, {tensor.layout}; a store holds dense tensors "
            f"of {', '.join(dtype_name(dtype) for dtype in DTYPE_NAMES)}: cast it"
        )


def check_named(digest: str, tensor: Shaped[Tensor, ...]) -> None:
    """FleetError unless a pack can hold the tensor, and it is what its hash says."""
    check_storable(tensor, f"tensor {digest}")
    found = tensor_hash(tensor)
    if found != digest:
        raise FleetError(f"a tensor given as {digest} is {found}; name each by its hash")


def plain(tensor: Tensor) -> Tensor:
    """The values in CPU memory, row by row."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A single value passes as contiguous with any stride, which torch does not view as bytes.
    return values.clone(memory_format=torch.contiguous_format) if values.numel() == 1 else values
