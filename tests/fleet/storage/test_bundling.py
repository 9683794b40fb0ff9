import pytest
import torch

from fleet.errors import FleetError
from fleet.storage.bundling import VALUES_BYTES, bundled
from fleet.storage.hashes import tensor_hash
from fleet.storage.records import Encoded
from fleet.storage.references import piece_of, tensor_of


def records_of(**records):
    """Records of (encoding, parts) by key, and their tensors by hash."""
    tensors, given = {}, {}
    for key, (encoding, parts) in records.items():
        hashes = {part: tensor_hash(value) for part, value in parts.items()}
        tensors[key] = Encoded(encoding, hashes, {"scale": 1.0})
        given |= {hashes[part]: value for part, value in parts.items()}
    return {"tensors": tensors}, given


def test_small_tensors_are_pieces_of_one():
    values = {"a": torch.randn(5), "b": torch.tensor(3), "c": torch.randn(3, 2).bfloat16().T}
    records, given = records_of(**{key: ("plain", {"value": v}) for key, v in values.items()})
    found, stored = bundled(records, given)
    (bundle,) = stored.values()
    assert bundle.dtype == torch.uint8
    assert len(bundle) == sum(value.nbytes for value in values.values())
    for key, value in values.items():
        reference = found["tensors"][key].parts["value"]
        piece = piece_of(reference)
        assert tensor_of(reference) == tensor_hash(bundle)
        part = bundle[piece.offset : piece.offset + piece.nbytes].clone()
        assert torch.equal(part.view(value.dtype).view(piece.shape), value)
    assert records["tensors"]["a"].parts["value"] == tensor_hash(values["a"]), "the caller's"


def test_what_is_large_or_shared_or_alone_stays_as_it_is():
    large = torch.randn(VALUES_BYTES)
    mask, unified = torch.ones(3, dtype=torch.uint8), torch.randn(24)
    records, given = records_of(
        large=("plain", {"value": large}),
        masked=("emr", {"mask": mask, "unified": unified}),
        more=("plain", {"value": unified}),
    )
    assert bundled(records, given) == (records, given)
    records, given = records_of(
        low=("low_rank", {"up": large, "down": torch.randn(7)}), head=("plain", {"value": mask})
    )
    _, stored = bundled(records, given)
    assert [value.nbytes for value in stored.values()] == [large.nbytes + 28 + 3]


def test_a_tensor_under_another_hash_is_refused():
    records, given = records_of(a=("sign", {"signs": torch.ones(2), "scales": torch.ones(3)}))
    first, second = given
    with pytest.raises(FleetError, match=f"given as {first} is {second}"):
        bundled(records, {first: given[second], second: given[first]})


@pytest.mark.parametrize("count", [4, 400])
def test_equal_tensors_are_one_piece_unless_they_are_tiny(count):
    value = torch.randn(count)
    records, given = records_of(
        a=("plain", {"value": value}), b=("plain", {"value": value}), c=("plain", {"value": -value})
    )
    found, stored = bundled(records, given)
    one, two, other = found["tensors"].values()
    assert (one == two) == (count == 400)
    assert one != other
    pieces = 2 if count == 400 else 3
    assert [len(bundle) for bundle in stored.values()] == [pieces * value.nbytes]
