import json

import pytest

from fleet.errors import FleetError
from fleet.storage.patterns import (
    Pattern,
    node_from_json,
    pattern_text,
    patterns_of,
    records_json,
    variant_from_json,
)
from fleet.storage.records import Encoded, Node, Variant

ONE, TWO, THREE = "ab" * 32, "cd" * 32, "ef" * 32


def piece(digest, offset, count):
    return f"{digest}/{offset}/float32/{count}"


PLAIN = Encoded("plain", {"value": ONE})
LOW_RANK = Encoded("low_rank", {"down": ONE, "up": TWO}, {"scale": 0.5, "x": [1, "a"]})
SIGN = Encoded("sign", {"signs": f"{THREE}/0/uint8/5", "scales": f"{THREE}/5/float32/"})
INT4 = Encoded("int4", {"codes": f"{THREE}/9/uint8/2x3", "scales": f"{THREE}/15/float32/1"})
AGAIN = Encoded("plain", {"value": f"{THREE}/0/uint8/5"})
ADAPTER = Encoded("bottleneck", {"down": piece(THREE, 19, 2), "up": TWO}, {"activation": "relu"})

VARIANTS = [
    Variant("Größe-1.2", "base", {"a.weight": LOW_RANK}, 10, {"error": 0.1, "of": [None, {}]}),
    Variant("b", "n", {}, adapters={"layer.0": Encoded("bottleneck", {"down": ONE})}),
    Variant("c", "n", {"a": SIGN, "b": PLAIN, "c": INT4, "d": AGAIN}),
    Variant("d", "n", {"a": SIGN, "c": INT4}, adapters={"m": ADAPTER}),
    Variant("of pieces alone", "n", {"a": Encoded("plain", {"value": piece(ONE, 4, 1)})}),
    Variant("e", "n", {}),
]


def to_json(variant):
    """The variant and its patterns, as if there were none yet."""
    patterns, hashes, numbers = patterns_of(variant.tensors, variant.adapters)
    content = {
        "name": variant.name,
        "node": variant.node,
        **records_json(list(range(len(patterns))), hashes, numbers),
        "classes": variant.classes,
        "about": variant.about,
    }
    return json.loads(json.dumps([content, patterns]))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variants_come_back_from_json(variant):
    content, patterns = to_json(variant)
    known = [Pattern.from_json(pattern) for pattern in patterns]
    for split in range(len(known) + 1):
        found = variant_from_json(content, known[:split], known[split:])
        assert found == variant
        assert variant == found
        assert list(found.tensors) == list(variant.tensors)
        assert list(found.adapters) == list(variant.adapters)
        assert set(found.hashes()) == set(variant.hashes())
        assert all(found.tensors[key] == variant.tensors[key] for key in variant.tensors)
        assert len(found.tensors) == len(variant.tensors)
        assert "none" not in found.tensors


def test_what_follows_in_the_first_tensor_is_said_without_places():
    patterns, hashes, numbers = patterns_of(VARIANTS[2].tensors, {})
    assert [pattern["parts"] for pattern in patterns] == [
        {"signs": "uint8/5", "scales": "float32/"},
        {"value": ""},
        {"codes": "uint8/2x3", "scales": "float32/1"},
        {"value": "/0/uint8/5"},
    ]
    assert hashes == [THREE, ONE, THREE]
    assert numbers == []


def test_variants_that_differ_in_hashes_and_numbers_have_the_same_patterns():
    other = Encoded("low_rank", {"down": TWO, "up": THREE}, {"scale": 0.25, "x": [1, "a"]})
    (one,), _, numbers = patterns_of({"a": LOW_RANK}, {})
    (two,), _, others = patterns_of({"a": other}, {})
    assert pattern_text(one) == pattern_text(two)
    assert (numbers, others) == ([0.5], [0.25])


def test_the_order_of_parts_tells_patterns_apart():
    turned = Encoded("low_rank", dict(reversed(LOW_RANK.parts.items())), LOW_RANK.settings)
    (one,), _, _ = patterns_of({"a": LOW_RANK}, {})
    (two,), _, _ = patterns_of({"a": turned}, {})
    assert pattern_text(one) != pattern_text(two)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a/b"}, "is called"),
        ({"node": ".."}, "is called"),
        ({"classes": 0}, "classes"),
        ({"about": {"a": 1 << 80}}, "64 bits"),
        ({"about": None}, "about"),
        ({"classes": True}, "classes"),
        ({"patterns": None}, "patterns"),
        ({"patterns": [1]}, "numbers below 1"),
        ({"patterns": [-1]}, "numbers below 1"),
        ({"patterns": [0, 0]}, "of one tensor"),
        ({"hashes": []}, "list of 2 SHA-256"),
        ({"hashes": [ONE, ONE.upper()]}, "list of 2 SHA-256"),
        ({"numbers": []}, "list of 1 finite"),
        ({"numbers": [1]}, "list of 1 finite"),
        ({"numbers": [float("inf")]}, "list of 1 finite"),
        ({"more": 1}, "wanted one with"),
    ],
)
def test_what_is_no_variant_is_refused(change, said):
    content, patterns = to_json(VARIANTS[0])
    known = [Pattern.from_json(pattern) for pattern in patterns]
    with pytest.raises(FleetError, match=said):
        variant_from_json({**content, **change}, known, [])


def test_nodes_come_back_from_json_but_not_with_adapters():
    patterns, hashes, numbers = patterns_of(VARIANTS[2].tensors, {})
    content = {"name": "a", "parent": "base", **records_json([0, 1, 2, 3], hashes, numbers)}
    known = [Pattern.from_json(pattern) for pattern in patterns]
    found = node_from_json(content, known, [])
    assert found == Node("a", "base", VARIANTS[2].tensors)
    assert set(found.hashes()) == {ONE, THREE}
    (pattern,), hashes, _ = patterns_of({}, {"m": PLAIN})
    content = {"name": "a", "parent": "base", **records_json([0], hashes, [])}
    with pytest.raises(FleetError, match="tensors alone"):
        node_from_json(content, [], [Pattern.from_json(pattern)])


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": ""},
        {"tensor": 3},
        {"adapter": "a"},
        {"encoding": "Plain"},
        {"encoding": ["plain"]},
        {"parts": []},
        {"parts": {"A": ""}},
        {"parts": {"value": None}},
        {"parts": {"value": "float31/2"}},
        {"parts": {"value": "float32/2/3"}},
        {"parts": {"value": "/0/float32/2/3"}},
        {"parts": {"value": "../../etc/passwd"}},
        {"settings": []},
        {"settings": {"scale": {}}},
        {"settings": {"Scale": None}},
        {"settings": {"scale": 1 << 70}},
    ],
)
def test_what_is_no_pattern_is_refused(change):
    content = {"tensor": "a", "encoding": "plain", "parts": {"value": ""}, "settings": {}}
    Pattern.from_json(content)
    with pytest.raises(FleetError):
        Pattern.from_json({**content, **change})
