"""The smallest encoding within the tolerance."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fleet.errors import FleetError
from fleet.storage.choosing import Choice, choose
from fleet.storage.encodings import ENCODINGS, delta_of, merged_vector, same_bits

TOLERANCES = (0.0, 1e-6, 1e-3, 0.02, 0.1, 0.3, 0.7)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def decoded(choice: Choice, parent):
    if choice.encoding is None:
        return parent
    return ENCODINGS[choice.encoding].decode(choice.parts, choice.settings, parent)


DELTAS = {
    "noise": 1e-3 * normal(48, 96, seed=1),
    "low rank": 1e-3 * normal(48, 2, seed=2) @ normal(2, 96, seed=3),
    "few": 1e-2 * normal(48, 96, seed=4) * (normal(48, 96, seed=5) > 2.7),
    "equal": torch.zeros(48, 96),
}
EXPECTED = {
    ("noise", 0.0): "plain",
    ("noise", 0.02): "int8",
    ("noise", 0.3): "int4",
    ("noise", 0.7): "sign",
    ("low rank", 0.0): "plain",
    ("low rank", 0.02): "low_rank",
    ("low rank", 0.3): "low_rank",
    ("few", 0.0): "changed",
    ("few", 0.02): "sparse",
    ("few", 0.7): "sparse",
    ("equal", 0.0): None,
    ("equal", 0.3): None,
}


@pytest.mark.parametrize(("kind", "tolerance"), EXPECTED)
def test_each_kind_of_difference_finds_its_encoding(kind, tolerance):
    parent = normal(48, 96)
    choice = choose(parent + DELTAS[kind], parent, tolerance)
    assert choice.encoding == EXPECTED[kind, tolerance]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("shape", [(48, 96), (4608,), (8, 16, 6, 6)])
def test_the_error_is_measured_and_within_the_tolerance(kind, dtype, shape):
    parent = normal(48, 96).reshape(shape).to(dtype)
    value = (normal(48, 96) + 8 * DELTAS[kind]).reshape(shape).to(dtype)
    size = float(torch.linalg.vector_norm(delta_of(value, parent).double()))
    before = math.inf
    for tolerance in TOLERANCES:
        choice = choose(value, parent, tolerance)
        left = torch.linalg.vector_norm(delta_of(decoded(choice, parent), value).double())
        assert float(left) == pytest.approx(choice.error, rel=1e-6, abs=1e-12)
        assert choice.error <= tolerance * size
        assert choice.nbytes <= before  # a wider tolerance never costs more
        before = choice.nbytes
        if tolerance == 0:
            assert same_bits(decoded(choice, parent), value)


@hypothesis.example(rows=1, columns=1, seed=9, tolerance=0.001, rank=0)
@hypothesis.example(rows=1, columns=1, seed=16, tolerance=0.0, rank=1)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 999),
    tolerance=st.sampled_from(TOLERANCES),
    rank=st.integers(0, 3),
)
def test_nothing_allowed_is_smaller(rows, columns, seed, tolerance, rank):
    """Against every rank, count and group of a brute search."""
    parent = normal(rows, columns, seed=seed)
    noise = normal(rows, columns, seed=seed + 1) if rank == 0 else 0
    value = parent + 0.01 * (
        noise + normal(rows, rank, seed=seed + 2) @ normal(rank, columns, seed=seed + 3)
    )
    bound = tolerance * float(torch.linalg.vector_norm((value - parent).double()))
    choice = choose(value, parent, tolerance)
    assert choice.error <= bound
    tries = [("sign", {"scales": scales}) for scales in ("tensor", "row")]
    tries += [("int4", {"group": g}) for g in (32, 128, 1024)]
    tries += [("int8", {"group": g}) for g in (64, 1024)]
    tries += [("low_rank", {"rank": r}) for r in range(1, min(rows, columns) + 1)]
    tries += [("sparse", {"count": c}) for c in range(1, rows * columns + 1, 7)]
    if tolerance == 0:
        tries = []  # what is exact by chance is not looked for
    for name, given in [*tries, ("changed", {}), ("plain", {})]:
        parts, settings = ENCODINGS[name].encode(value, parent, **given)
        left = delta_of(ENCODINGS[name].decode(parts, settings, parent), value)
        # A little room for the part of the bound that is kept for rounding.
        if float(torch.linalg.vector_norm(left.double())) <= 0.99 * bound or name == "plain":
            assert choice.nbytes <= ENCODINGS[name].nbytes(parts), (name, given)


def test_the_same_tensors_are_stored_the_same():
    parent = normal(64, 64)
    for kind, tolerance in [("noise", 0.3), ("low rank", 0.3)]:
        value = parent + normal(64, 64, seed=9) * 0.01 * (1 if kind == "noise" else 0) + 0.01
        one, other = (choose(value, parent, tolerance) for _ in range(2))
        assert (one.encoding, one.settings) == (other.encoding, other.settings)
        assert all(same_bits(one.parts[part], other.parts[part]) for part in one.parts)


def test_the_error_is_relative_to_the_difference_to_the_base():
    """A value near its node: what is left is small beside what it differs from the base by."""
    base = normal(32, 32)
    node = base + normal(32, 32, seed=1)
    value = node + 0.1 * normal(32, 32, seed=2)
    size = float(torch.linalg.vector_norm(value - base))
    assert choose(value, node, 0.2).encoding not in (None, "sign")
    assert choose(value, node, 0.2, size=size).encoding is None
    assert choose(value, node, 0.07, size=size).encoding == "sign"


@pytest.mark.parametrize("allowed", [*ENCODINGS, None])
def test_a_running_variance_stays_positive(allowed):
    """In few bits small variances would come back as zero and less, and their model say NaN."""
    parent = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.01
    value = parent.clone()
    value[:56] *= 0.01
    value[56:] *= 30
    names = [*ENCODINGS] if allowed is None else [allowed]
    delta = value - parent
    for tolerance in (0.9, 0.6, 0.3, 0.1):
        found = choose(value, parent, tolerance, allowed=names, unified=delta)
        assert bool((decoded(found, parent) > 0).all())
        assert found.error <= tolerance * float(delta.norm())


@pytest.mark.parametrize("allowed", [*ENCODINGS, None])
def test_a_dead_unit_s_variance_does_not_become_negative(allowed):
    """Where a unit is dead its running variance falls to zero; below that the model says NaN."""
    parent = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.01
    value = 0.01 * parent
    value[56:] = 30 * parent[56:]
    value[3] = 0
    names = [*ENCODINGS] if allowed is None else [allowed]
    for tolerance in (0.9, 0.6, 0.3, 0.1):
        found = decoded(choose(value, parent, tolerance, allowed=names, unified=value), parent)
        assert bool((found >= 0).all())
        assert bool((found > 0)[value > 0].all())


def test_emr_is_chosen_where_a_node_has_a_vector_that_fits():
    parent = normal(64, 64)
    shared = 0.01 * normal(64, 64, seed=1)
    scales = [0.7, 1.0, 1.3]
    unified = merged_vector([shared * scale for scale in scales])
    for scale in scales:
        choice = choose(parent + scale * shared, parent, 0.02, unified=unified)
        assert choice.encoding == "emr"
        assert choice.nbytes == 512
    assert choose(parent + shared, parent, 0.02).encoding == "int8"
    other = choose(parent + shared, parent, 0.02, unified=unified, allowed=["int8"])
    assert other.encoding == "int8"


@pytest.mark.parametrize(
    ("value", "parent"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])),
        (torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0])),
        (torch.tensor([1.0, 1.0]), torch.tensor([math.nan, 1.0])),
        (torch.zeros(3, 4), torch.zeros(10, 4)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(3), None),
        (torch.tensor([3e38]), torch.tensor([-3e38])),
    ],
)
def test_what_no_other_encoding_can_hold_is_exact(value, parent):
    choice = choose(value, parent, 0.5)
    assert choice.encoding in ("plain", "changed")
    assert choice.error == 0
    assert same_bits(decoded(choice, parent), value)


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.tensor(math.nan), torch.tensor(3)])
def test_an_equal_tensor_is_not_stored(value):
    assert choose(value, value.clone(), 0.0) == Choice(None)


def test_numbers_of_any_size():
    for size in (1e-30, 1e-12, 1e12, 1e30):
        value = size * normal(40, 3, seed=1) @ normal(3, 40, seed=2)
        choice = choose(value, torch.zeros(40, 40), 0.1)
        assert choice.encoding == "low_rank", size
        assert choice.error <= 0.1 * float(torch.linalg.vector_norm(value.double()))


def test_bad_wishes_are_refused():
    for tolerance in (-0.1, math.nan):
        with pytest.raises(FleetError, match="tolerance is"):
            choose(torch.zeros(2), torch.ones(2), tolerance)
    with pytest.raises(FleetError, match="no encoding is called 'int3'"):
        choose(torch.zeros(2), torch.ones(2), 0.1, allowed=["int3"])
