"""One set of laws for every encoding of the registry."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fleet.errors import FleetError
from fleet.storage.encodings import (
    ENCODINGS,
    delta_of,
    encoding_named,
    merged_vector,
    same_bits,
    wide_type,
)
from fleet.storage.places import pack_places, unpack_places

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (1,), (7,), (0,), (0, 5), (1, 1), (3, 5), (16, 33), (5, 3, 3, 2), (130, 67))
LOSSY = [name for name, encoding in ENCODINGS.items() if not encoding.exact]


def draw(shape, dtype, seed=0, size=0.01):
    """A value, its parent, and a sibling of the value."""
    generator = torch.Generator().manual_seed(seed)
    parent = torch.randn(shape, generator=generator, dtype=torch.float64)
    one, other = (
        size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return (parent + one).to(dtype), parent.to(dtype), (parent + one + other).to(dtype)


def settings_for(name, value, parent, sibling):
    """Several settings with which every encoding can take the value; none if it cannot."""
    numel = value.numel()
    if name == "low_rank":
        if value.dim() < 2:
            return []
        most = max(min(value.flatten(1).shape), 1)
        wide = str(wide_type(value.dtype)).removeprefix("torch.")
        return [{"rank": r, "factors": f} for r in {1, most} for f in ("float16", wide)]
    if name == "sparse":
        counts = {1, max(numel // 3, 1), max(numel, 1)}
        return [{"count": c, "values": v} for c in sorted(counts) for v in ("bfloat16", "float32")]
    if name in ("int8", "int4"):
        return [{"group": group} for group in (1, 3, 64, 4096)]
    if name == "sign":
        return [{"scales": "tensor"}, {"scales": "row"}]
    if name == "emr":
        deltas = [delta_of(value, parent), delta_of(sibling, parent)]
        return [{"unified": merged_vector(deltas)}]
    return [{}]


def promised(name, value, parent, given):
    """The largest ‖ŵ − w‖ that the encoding may leave, before the value's own rounding."""
    delta = delta_of(value, parent).double()
    flat, size = delta.flatten(), float(torch.linalg.vector_norm(delta))
    if not delta.numel() or ENCODINGS[name].exact:
        return 0.0
    if name == "low_rank":
        rest = torch.linalg.svdvals(delta.flatten(1))[given["rank"] :]
        rounding = {"float16": 2**-10, "float32": 2**-22, "float64": 2**-50}[given["factors"]]
        most = math.sqrt(min(delta.flatten(1).shape))
        return float(torch.linalg.vector_norm(rest)) + 4 * most * rounding * size
    if name == "sparse":
        dropped = flat.abs().sort().values[: len(flat) - given["count"]]
        rounding = {"bfloat16": 2**-8, "float32": 2**-24}[given["values"]]
        return float(torch.linalg.vector_norm(dropped)) + rounding * size
    if name in ("int8", "int4"):
        largest = {"int8": 127, "int4": 7}[name]
        groups = flat.split(given["group"])
        steps = [len(g) * (float(g.abs().max()) / largest / 2) ** 2 for g in groups]
        return math.sqrt(sum(steps)) * (1 + 1e-5)
    if name == "sign":
        rows = (
            delta.view(len(delta), -1) if given["scales"] == "row" and delta.dim() else flat[None]
        )
        kept = rows.shape[1] * rows.abs().mean(1).square().sum()
        return math.sqrt(max(size**2 - float(kept), 0)) + 1e-6 * size
    assert name == "emr"
    unified = given["unified"].double()
    mask = ((delta > 0) & (unified > 0)) | ((delta < 0) & (unified < 0))
    kept = float(unified[mask].abs().sum())
    scale = float(delta.abs().sum()) / kept if kept else 0.0
    return float(torch.linalg.vector_norm(delta - scale * mask * unified)) + 1e-5 * size


def expected_bytes(name, value, given):
    """As the registry's table says, from shapes alone; None where it depends on the values."""
    numel, rows = value.numel(), value.shape[0] if value.dim() else 1
    sizes = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    if name == "plain":
        return numel * value.dtype.itemsize
    if name == "low_rank":
        out, inside = value.flatten(1).shape
        return given["rank"] * (out + inside) * sizes[given["factors"]]
    if name in ("int8", "int4"):
        codes = numel if name == "int8" else -(-numel // 2)
        return codes + 4 * -(-numel // given["group"])
    if name == "sign":
        return -(-numel // 8) + 4 * (rows if given["scales"] == "row" else 1)
    return -(-numel // 8) if name == "emr" else None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_value_back_within_its_promise(name, dtype):
    encoding = ENCODINGS[name]
    for seed, shape in enumerate(SHAPES):
        value, parent, sibling = draw(shape, dtype, seed)
        for given in settings_for(name, value, parent, sibling):
            before = value.clone(), parent.clone()
            parts, stored = encoding.encode(value, parent, **given)
            kept = {part: tensor.clone() for part, tensor in parts.items()}
            decoded = encoding.decode(parts, stored, parent)

            assert decoded.shape == value.shape, (shape, given)
            assert decoded.dtype == dtype
            assert same_bits(value, before[0])
            assert same_bits(parent, before[1])
            assert all(same_bits(parts[part], kept[part]) for part in parts)
            assert all(part.is_contiguous() for part in parts.values())
            assert set(parts) == set(encoding.parts)
            assert all(isinstance(v, int | float | str | list) for v in stored.values())
            size = expected_bytes(name, value, given)
            assert size is None or encoding.nbytes(parts) == size, (shape, given)
            if encoding.exact:
                assert same_bits(decoded, value)
                continue
            left = float(torch.linalg.vector_norm(delta_of(decoded, value).double()))
            norms = sum(float(torch.linalg.vector_norm(t.double())) for t in (value, parent))
            rounding = torch.finfo(wide_type(dtype)).eps + torch.finfo(dtype).eps
            bound = promised(name, value, parent, given)
            assert left <= bound + rounding * norms, (shape, given)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    name=st.sampled_from(LOSSY),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    power=st.integers(-30, 30),
)
def test_no_encoding_depends_on_the_size_of_the_difference(name, rows, columns, seed, power):
    """A delta times a power of two over a parent of zeros is left an error times that power."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    parent, sibling = torch.zeros_like(value), value.flip(0)
    encoding = ENCODINGS[name]
    for one, many in zip(
        settings_for(name, value, parent, sibling),
        settings_for(name, value * 2.0**power, parent, sibling * 2.0**power),
        strict=True,
    ):
        small = encoding.decode(*encoding.encode(value, parent, **one), parent)
        large = encoding.decode(*encoding.encode(value * 2.0**power, parent, **many), parent)
        # The square roots in a singular value decomposition round differently.
        torch.testing.assert_close(large, small * 2.0**power, rtol=2e-3, atol=2e-3 * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ENCODINGS)
def test_integers_are_for_exact_encodings_alone(name, dtype):
    value, parent = torch.tensor([0, 1, 1, 0]).to(dtype), torch.tensor([0, 0, 1, 1]).to(dtype)
    encoding = ENCODINGS[name]
    if encoding.exact:
        assert same_bits(encoding.decode(*encoding.encode(value, parent), parent), value)
        return
    given = {"low_rank": {"rank": 1}, "sparse": {"count": 1}, "emr": {"unified": value}}
    with pytest.raises(FleetError, match=rf"'{name}'.*{dtype}.*16 to 64 bits"):
        encoding.encode(value, parent, **given.get(name, {}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ENCODINGS)
def test_what_is_not_finite_is_refused_by_name_or_kept_bit_for_bit(name, bad):
    value, parent, sibling = draw((6, 5), torch.float32)
    given = settings_for(name, value, parent, sibling)[0]
    value[2, 3] = bad
    encoding = ENCODINGS[name]
    if encoding.exact:
        assert same_bits(encoding.decode(*encoding.encode(value, parent, **given), parent), value)
        return
    with pytest.raises(FleetError, match=rf"'{name}': 1 of 30 .*NaN or infinite"):
        encoding.encode(value, parent, **given)


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "plain"])
@pytest.mark.parametrize(
    "parent", [None, torch.zeros(5, 6), torch.zeros(6, 5, dtype=torch.float64)]
)
def test_a_value_unlike_its_parent_is_refused(name, parent):
    value, own, sibling = draw((6, 5), torch.float32)
    given = settings_for(name, value, own, sibling)[0]
    with pytest.raises(FleetError, match=rf"'{name}'.*wanted both alike"):
        ENCODINGS[name].encode(value, parent, **given)


def test_a_plain_value_may_have_any_shape():
    head = torch.randn(3, 4)
    plain = ENCODINGS["plain"]
    assert same_bits(plain.decode(*plain.encode(head, torch.zeros(10, 4)), torch.zeros(10)), head)


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "plain"])
def test_parts_of_another_tensor_are_refused(name):
    value, parent, sibling = draw((24, 5), torch.float32)
    parts, stored = ENCODINGS[name].encode(
        value, parent, **settings_for(name, value, parent, sibling)[0]
    )
    some = {part: tensor for part, tensor in parts.items() if part != min(parts)}
    with pytest.raises(FleetError, match=rf"'{name}': found the parts"):
        ENCODINGS[name].decode(some, stored, parent)
    if name == "sparse":
        parts["places"] = torch.tensor([400], dtype=torch.int32)
    with pytest.raises(FleetError, match=r"add the variant again"):
        ENCODINGS[name].decode(parts, stored, torch.zeros(3, 2))
    with pytest.raises(FleetError, match="found none"):
        ENCODINGS[name].decode(parts, stored, None)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("low_rank", {"rank": 0}, "the rank is 0, wanted 1 to 5"),
        ("low_rank", {"rank": 6}, "the rank is 6, wanted 1 to 5"),
        ("low_rank", {"rank": 2, "factors": "int8"}, "factors is 'int8', wanted one of float16"),
        ("sparse", {"count": 0}, "count is 0, wanted 1 to 30"),
        ("sparse", {"count": 31}, "count is 31, wanted 1 to 30"),
        ("int8", {"group": 0}, "group is 0"),
        ("int4", {"group": -1}, "group is -1"),
        ("sign", {"scales": "column"}, "scales is 'column'"),
        ("emr", {"unified": torch.zeros(5, 6)}, "merged vector is"),
    ],
)
def test_settings_that_no_tensor_can_have(name, given, message):
    value, parent, _ = draw((6, 5), torch.float32)
    with pytest.raises(FleetError, match=message):
        ENCODINGS[name].encode(value, parent, **given)


def test_an_unknown_encoding_is_told_the_known_ones():
    with pytest.raises(FleetError, match="'lora'; wanted one of plain, changed, low_rank"):
        encoding_named("lora")


def test_differences_too_large_for_a_scale_are_refused():
    value, parent = torch.full((4,), 1e300, dtype=torch.float64), torch.zeros(4).double()
    for name in ("int8", "int4", "sign"):
        given = {} if name == "sign" else {"group": 2}
        with pytest.raises(FleetError, match=rf"'{name}': the largest difference .*1e\+300"):
            ENCODINGS[name].encode(value, parent, **given)


def test_a_low_rank_difference_comes_back_whole():
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(40, 3, generator=generator), torch.randn(3, 25, generator=generator)
    parent = torch.randn(40, 25, generator=generator)
    value = parent + 0.001 * up @ down
    parts, stored = ENCODINGS["low_rank"].encode(value, parent, rank=3, factors="float32")
    torch.testing.assert_close(ENCODINGS["low_rank"].decode(parts, stored, parent), value)
    # What C's product computes without the decoded tensor.
    x = torch.randn(2, 25, generator=generator)
    delta = stored["scale"] * (x @ parts["down"].T @ parts["up"].T)
    torch.testing.assert_close(x @ parent.T + delta, x @ value.T, rtol=1e-4, atol=1e-5)


def test_changed_keeps_rows_of_an_embedding_in_little():
    value, parent, _ = draw((1000, 32), torch.bfloat16)
    table = parent.clone()
    table[[3, 500, 999]] = value[[3, 500, 999]]
    parts, stored = ENCODINGS["changed"].encode(table, parent)
    assert same_bits(ENCODINGS["changed"].decode(parts, stored, parent), table)
    # Two bytes and one step for each, and a step for each 255 between the rows.
    assert ENCODINGS["changed"].nbytes(parts) <= 96 * 3 + 32_000 // 255


def test_the_merged_vector_is_as_in_the_paper():
    deltas = [torch.tensor(row) for row in ([1.0, -2, 3, 0], [2.0, -1, -4, 0], [-1.0, 2, 2, 0])]
    assert merged_vector(deltas).tolist() == [2.0, -2.0, 3.0, 0.0]
    assert deltas[0].tolist() == [1.0, -2, 3, 0]
    with pytest.raises(FleetError, match="no deltas"):
        merged_vector([])


def test_a_merged_vector_is_no_bytes_of_the_variants():
    value, parent, sibling = draw((8, 8), torch.float32)
    unified = merged_vector([delta_of(value, parent), delta_of(sibling, parent)])
    parts, _ = ENCODINGS["emr"].encode(value, parent, unified=unified)
    assert ENCODINGS["emr"].nbytes(parts) == 8
    assert parts["unified"].data_ptr() == unified.data_ptr()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    numel=st.integers(0, 5000),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_places_come_back_in_few_bytes(numel, share, seed):
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(numel, generator=generator) < share).nonzero().flatten()
    stored = pack_places(places, numel)
    assert torch.equal(unpack_places(stored, numel), places)
    assert stored.nbytes <= min(4 * len(places), len(places) + numel / 255 + 1)


@pytest.mark.parametrize("places", [[0, 254, 255, 256, 510, 765, 1020], [254], [255], [509, 510]])
def test_places_at_the_ends_of_steps(places):
    whole = torch.tensor(places)
    for numel in (places[-1] + 1, 100_000):
        assert unpack_places(pack_places(whole, numel), numel).tolist() == places
    with pytest.raises(FleetError, match="ascending within"):
        unpack_places(pack_places(whole, 2000), places[-1])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), False),
        (torch.tensor([]), torch.tensor([]), True),
        (torch.tensor([True, False]), torch.tensor([True, False]), True),
    ],
)
def test_equal_means_every_bit(one, other, same):
    assert same_bits(one, other) == same
