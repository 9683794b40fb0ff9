"""The pickle machine alone: what it understands, and bombs."""

import contextlib
import io
import pickle
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.checkpoints.pickles import read_pickle
from merge.errors import MergeError

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=plain, protocol=st.sampled_from([3, 4, 5]))
def test_plain_values_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol)), "x").root == value


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=60))
def test_any_bytes_read_or_are_refused(content: bytes) -> None:
    with contextlib.suppress(MergeError):
        read_pickle(io.BytesIO(content), "x")


def test_the_stream_is_left_behind_the_pickle() -> None:
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("two", 2) + b"rest")
    assert read_pickle(stream, "x").root == [1]
    assert read_pickle(stream, "x").root == "two"
    assert stream.read() == b"rest"


NESTED = b"(" * 200_000 + b"t" * 200_000
DOUBLED = b")" + b"\x94h\x00\x86" * 1 + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04}r\xff\xff\xff\xff.",  # LONG_BINPUT: pickle would make a memo of 32 GiB
        b"\x80\x04}" + NESTED + b"K\x01s.",  # a key nested so deep that hashing it crashes
        b"\x80\x04}" + DOUBLED + b"K\x01s.",  # a key of 2**100 leaves
        b"ccollections\nOrderedDict\n" + DOUBLED + b"\x85R.",
    ],
)
def test_bombs_for_pickle_are_plain_values_here(content: bytes) -> None:
    assert isinstance(read_pickle(io.BytesIO(content), "x").root, dict)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x3f" + b"x.",  # a bytearray of 2**62 bytes
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f" + b"x.",  # bytes of 2**62 bytes
        b"\x80\x04\x8b\xff\xff\xff\x7f" + b"x.",  # an integer of 2**31 bytes
        b"\x80\x04" + DOUBLED + b"Q.",  # as a persistent id
        b"\x80\x04" + DOUBLED + b"\x8c\x01x\x93.",  # as a module to import
        b"\x80\x04" + NESTED + b")R.",  # called
        b"ctorch._utils\n_rebuild_tensor_v2\n" + DOUBLED + b"R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + (DOUBLED + b"K\x00") * 3 + b"tR.",
        b"\x82\x01.",  # a name from the registry of extensions
        b"(ios\nsystem\n.",
        b"c" + b"x" * 100_000 + b"\nname\n.",
        b"S" + b"x" * 100_000 + b"\n.",
        b"0.",
        b"t.",
        b"",
    ],
)
def test_bombs_are_refused_cheaply(content: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(MergeError, match=r"^x: [\s\S]{1,500}$"):
        read_pickle(io.BytesIO(content), "x")
    assert time.perf_counter() - started < 20


def test_no_more_objects_are_made_than_the_limit() -> None:
    content = b"}" * 999 + b"."
    read_pickle(io.BytesIO(content), "x", opcode_limit=1000)
    with pytest.raises(MergeError, match="more than 999 opcodes"):
        read_pickle(io.BytesIO(content), "x", opcode_limit=999)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\neval\n.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
        b"\x80\x04\x8c\x05torch\x8c\x0bfloat32.foo\x93.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"cpathlib\nPath.write_text\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.f2py\nfloat64\n.",
    ],
)
def test_names_that_are_not_data_are_refused(content: bytes) -> None:
    with pytest.raises(MergeError, match="wants to run"):
        read_pickle(io.BytesIO(content), "x")
