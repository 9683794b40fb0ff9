import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inputs.budget import format_bytes, peak_resident_bytes, resident_bytes


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (123 * 2**20, "123 MiB"),
        (4 * 2**30, "4.00 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_as_text(n, text):
    assert format_bytes(n) == text


@given(st.integers(0, 2**50))
def test_the_text_is_near_the_number(n):
    number, unit = format_bytes(n).split()
    size = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert size == pytest.approx(n, rel=0.006)


def test_what_was_freed_is_not_counted():
    before = resident_bytes()
    held = [bytearray(b"x") * 100_000 for _ in range(600)]
    assert resident_bytes() - before > 50e6
    held = held[-1:]  # above the others, so that the heap does not shrink by itself
    assert resident_bytes() - before < 5e6


def test_resident_bytes_grow_with_what_is_held():
    before = resident_bytes()
    held = bytearray(b"\1" * 64 * 2**20)
    assert resident_bytes() - before > 0.9 * len(held)
    assert peak_resident_bytes() >= 0.99 * resident_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak comes from getrusage")
def test_the_peak_is_not_that_of_the_process_which_started_this_one():
    held = bytearray(b"\1" * 256 * 2**20)
    code = "from inputs.budget import peak_resident_bytes; print(peak_resident_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(held)
