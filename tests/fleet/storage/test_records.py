import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.errors import FleetError
from fleet.storage.records import Encoded, Node, Variant, check_json

HASH = "ab" * 32
PLAIN = Encoded("plain", {"value": HASH})
LOW_RANK = Encoded("low_rank", {"down": HASH, "up": "cd" * 32}, {"scale": 0.5, "x": [1, "a"]})


@pytest.mark.parametrize(
    "record",
    [
        LOW_RANK,
        Node("base", None, {"a.weight": PLAIN}),
        Node("digits of 2", "base", {}),
    ],
)
def test_records_come_back_from_json(record):
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


names = st.text(max_size=300) | st.sampled_from(
    ["a/b", "..", "a b", "x.", "-x", "a\n", "é", "a" * 201]
)


@settings(max_examples=200, deadline=None)
@given(names)
def test_a_name_is_one_component_of_a_path_or_refused(name):
    try:
        Variant(name, "base", {})
    except FleetError:
        return
    assert not set(name) & set('/\\:*?"<>|\0\n\r\t')
    assert name not in {"", ".", ".."}
    assert name[0] not in "-. "
    assert name[-1] not in ". "
    assert len(name) <= 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "wanted an object"),
        ([], "wanted an object"),
        ({"encoding": "plain"}, "wanted one with"),
        ({"encoding": "plain", "parts": {}, "more": 1}, "wanted one with"),
        ({"encoding": "Plain", "parts": {}}, "encoding"),
        ({"encoding": ["plain"], "parts": {}}, "encoding"),
        ({"encoding": "plain", "parts": []}, "parts"),
        ({"encoding": "plain", "parts": {"value": HASH.upper()}}, "SHA-256"),
        ({"encoding": "plain", "parts": {"value": "../../etc/passwd"}}, "SHA-256"),
        ({"encoding": "plain", "parts": {"value": HASH + "\n"}}, "SHA-256"),
        ({"encoding": "plain", "parts": {"value": 5}}, "SHA-256"),
        ({"encoding": "plain", "parts": {"value": HASH + "/0/float32"}}, "SHA-256"),
        ({"encoding": "plain", "parts": {"../a": HASH}}, "identifiers"),
        ({"encoding": "sign", "parts": {}, "settings": {"scale": math.inf}}, "finite"),
        ({"encoding": "sign", "parts": {}, "settings": {"scale": math.nan}}, "finite"),
        ({"encoding": "sign", "parts": {}, "settings": {"scale": 1 << 70}}, "64 bits"),
        ({"encoding": "sign", "parts": {}, "settings": {"scale": None}}, "a number"),
        ({"encoding": "sign", "parts": {}, "settings": {"scale": {}}}, "a number"),
        ({"encoding": "sign", "parts": {}, "settings": [1]}, "settings"),
    ],
)
def test_what_is_no_encoding_is_refused(content, said):
    with pytest.raises(FleetError, match=said):
        Encoded.from_json(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a/b"}, "is called"),
        ({"node": ".."}, "is called"),
        ({"tensors": {"": PLAIN}}, "tensor's name"),
        ({"tensors": {"a\0": PLAIN}}, "tensor's name"),
        ({"tensors": {"__metadata__": PLAIN}}, "tensor's name"),
        ({"tensors": {"a" * 1001: PLAIN}}, "tensor's name"),
        ({"classes": 0}, "classes"),
        ({"classes": True}, "classes"),
        ({"classes": 10**12}, "classes"),
        ({"about": {"a": 1 << 80}}, "64 bits"),
        ({"about": {"a": "\ud800"}}, "UTF-8"),
    ],
)
def test_what_is_no_variant_is_refused(change, said):
    with pytest.raises(FleetError, match=said):
        Variant(**{"name": "a", "node": "base", "tensors": {"w": PLAIN}, **change})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (("base", "other", {"a": PLAIN}), "the root alone"),
        (("a", None, {"a": PLAIN}), "the root alone"),
        (("base", None, {}), "at least one"),
        (("base", None, {"a": LOW_RANK}), "'a' is low_rank"),
        (("a", "b/c", {}), "is called"),
    ],
)
def test_what_is_no_node_is_refused(node, said):
    with pytest.raises(FleetError, match=said):
        Node(*node)


def test_what_json_would_not_give_back_is_refused():
    deep: object = 1
    for _ in range(50):
        deep = [deep]
    for value in (deep, (1, 2), {1: 2}, b"a", {"a": object()}, complex(1)):
        with pytest.raises(FleetError):
            check_json(value, "about")
