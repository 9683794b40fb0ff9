import pytest
import torch

from fleet.storage.references import (
    ITEM_BYTES,
    Piece,
    is_reference,
    piece_of,
    reference_to,
    tensor_of,
)
from merge.checkpoints.safetensors_file import DTYPE_NAMES
from merge.checkpoints.tensors import dtype_name

HASH = "ab" * 32


def test_every_dtype_that_a_pack_holds_has_its_bytes():
    assert {dtype_name(dtype): dtype.itemsize for dtype in DTYPE_NAMES} == ITEM_BYTES


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "float8_e4m3fn"])
def test_pieces_come_back(shape, dtype):
    piece = Piece(12, dtype, shape)
    reference = reference_to(HASH, piece)
    assert is_reference(reference)
    assert (tensor_of(reference), piece_of(reference)) == (HASH, piece)
    assert piece.nbytes == torch.empty(shape, dtype=getattr(torch, dtype)).nbytes


def test_a_hash_is_the_whole_tensor():
    assert is_reference(HASH)
    assert piece_of(HASH) is None
    assert tensor_of(HASH) == HASH


@pytest.mark.parametrize(
    "text",
    [
        "",
        HASH[:-1],
        HASH.upper(),
        HASH + "\n",
        HASH + "/",
        HASH + "/0/float32",
        HASH + "/-1/float32/1",
        HASH + "/00/float32/1",
        HASH + "/0/float31/1",
        HASH + "/0/float32/1x",
        HASH + "/0/float32/01",
        HASH + "/0/float32/1/2",
        HASH + "/0/float32/1\n",
        HASH + "/0/../../x",
        HASH + "/0/float32/0x999999999999999999x999999999999999999",
        HASH + "/0/float32/" + "x".join(["1"] * 65),
        3,
        None,
    ],
)
def test_what_is_no_reference_is_refused(text):
    assert not is_reference(text)
