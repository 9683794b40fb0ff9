import errno
import hashlib
import os
import threading

import pytest

from fleet.errors import FleetError
from fleet.storage.manifest import Manifest
from tests.fleet.storage.stores import sealed


def manifest_of(folder, *records):
    (folder / "manifest.jsonl").write_bytes(sealed(records))
    return Manifest(folder)


def contents(lines):
    return [line.content for line in lines]


def test_lines_are_read_once_and_in_order(tmp_path):
    Manifest.create(tmp_path, {"op": "base"})
    reader, writer = Manifest(tmp_path), Manifest(tmp_path)
    assert contents(reader.read()) == [{"op": "base"}]
    assert reader.read() == []
    writer.read()
    writer.append({"op": "a", "text": "ü\n\u2028"})
    assert reader.has_more()
    assert [(line.number, line.content["text"]) for line in reader.read()] == [(2, "ü\n\u2028")]
    assert not reader.has_more()
    assert (tmp_path / "manifest.jsonl").read_bytes() == sealed(
        [{"op": "base"}, {"op": "a", "text": "ü\n\u2028"}]
    )


def test_a_torn_last_line_is_not_there_and_the_next_writer_cuts_it(tmp_path):
    whole = sealed([{"op": "base"}, {"op": "a"}])
    first = len(sealed([{"op": "base"}]))
    for length in range(first + 1, len(whole)):
        (tmp_path / "manifest.jsonl").write_bytes(whole[:length])
        manifest = Manifest(tmp_path)
        assert contents(manifest.read()) == [{"op": "base"}]
        assert (tmp_path / "manifest.jsonl").stat().st_size == length, "readers write nothing"
        manifest.cut_torn_line()
        manifest.append({"op": "b"})
        assert contents(Manifest(tmp_path).read()) == [{"op": "base"}, {"op": "b"}]


def test_a_line_that_a_power_cut_left_zeros_in_is_torn(tmp_path):
    whole = sealed([{"op": "base"}, {"op": "a", "b": "c" * 50}])
    torn = bytearray(whole)
    torn[-60:-40] = bytes(20)
    (tmp_path / "manifest.jsonl").write_bytes(torn)
    assert contents(Manifest(tmp_path).read()) == [{"op": "base"}]
    (tmp_path / "manifest.jsonl").write_bytes(torn + b"more\n")
    with pytest.raises(FleetError, match="line 2"):
        Manifest(tmp_path).read()


def test_any_altered_byte_of_a_whole_line_is_found_by_its_line(tmp_path):
    whole = sealed([{"op": "base"}, {"op": "a"}, {"op": "b"}])
    for position in range(len(whole) - 1):
        altered = bytearray(whole)
        altered[position] ^= 1
        (tmp_path / "manifest.jsonl").write_bytes(altered)
        number = whole[:position].count(b"\n") + 1
        with pytest.raises(FleetError, match=f"line {number}:.*put back a copy"):
            Manifest(tmp_path)._read()


def test_a_line_that_was_taken_out_or_moved_is_found(tmp_path):
    lines = sealed([{"op": "base"}, {"op": "a"}, {"op": "b"}]).splitlines(keepends=True)
    for other in ([lines[0], lines[2]], [lines[0], lines[2], lines[1]], lines[1:]):
        (tmp_path / "manifest.jsonl").write_bytes(b"".join(other))
        with pytest.raises(FleetError, match="altered"):
            Manifest(tmp_path).read()


@pytest.mark.parametrize(
    "text", [b'{"op":1' + b"0" * 5000 + b"}", b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":1,"a":2}']
)
def test_json_that_is_none_is_refused_though_its_sum_is_right(tmp_path, text):
    seal = hashlib.sha256(text).hexdigest()[:16]
    line = text[:-1] + f',"sum":"{seal}"}}\n'.encode()
    (tmp_path / "manifest.jsonl").write_bytes(line)
    with pytest.raises(FleetError, match="line 1"):
        Manifest(tmp_path).read()


def test_a_full_disk_leaves_the_manifest_as_it_was(tmp_path, monkeypatch):
    manifest = manifest_of(tmp_path, {"op": "base"})
    manifest.read()
    before = (tmp_path / "manifest.jsonl").read_bytes()
    real = os.pwrite

    def full(descriptor, data, offset):
        if offset > len(before):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as raised:
        manifest.append({"op": "a"})
    assert raised.value.filename == str(manifest.path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before
    monkeypatch.undo()
    manifest.append({"op": "b"})
    assert contents(Manifest(tmp_path).read()) == [{"op": "base"}, {"op": "b"}]


def test_a_manifest_that_was_cut_or_replaced_is_not_read_on(tmp_path):
    manifest = manifest_of(tmp_path, {"op": "base"}, {"op": "a"})
    manifest.read()
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(FleetError, match="open the store again"):
        manifest.read()
    path.write_bytes(whole)
    assert manifest.read() == []
    (tmp_path / "new").write_bytes(whole)
    (tmp_path / "new").replace(path)
    with pytest.raises(FleetError, match="open the store again"):
        manifest.read()


def test_links_pipes_and_nothing_are_refused(tmp_path):
    with pytest.raises(FleetError, match="is no store"):
        Manifest(tmp_path).read()
    (tmp_path / "other").write_bytes(sealed([{"op": "base"}]))
    (tmp_path / "manifest.jsonl").symlink_to("other")
    with pytest.raises(FleetError, match="is a link to 'other'"):
        Manifest(tmp_path).read()
    (tmp_path / "manifest.jsonl").unlink()
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(FleetError, match="no plain file"):
        Manifest(tmp_path).read()


def test_a_reader_meets_a_writer_at_any_moment(tmp_path):
    Manifest.create(tmp_path, {"op": "base"})
    writer, reader = Manifest(tmp_path), Manifest(tmp_path)
    writer.read()

    def write():
        for number in range(200):
            writer.append({"op": "a", "number": number, "fill": "x" * (number * 37 % 3000)})
            if number % 20 == 0:  # as a killed writer leaves it, and the next one cuts it
                with (tmp_path / "manifest.jsonl").open("ab") as file:
                    file.write(b'{"op":"torn","fill":"' + b"y" * 500)
                writer.cut_torn_line()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while thread.is_alive() or reader.has_more():
        seen += reader.read()
    thread.join()
    seen += reader.read()
    assert [line.content.get("number") for line in seen] == [None, *range(200)]
