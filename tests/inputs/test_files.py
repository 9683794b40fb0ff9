import signal
import subprocess
import sys

import pytest

from inputs.files import part_path, write_whole


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", "old")
    write_whole(tmp_path / "new" / "a.txt", "über")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "über".encode()
    assert listing(tmp_path / "new") == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", 3.5)  # pyright: ignore
    assert (tmp_path / "a").read_bytes() == b"old"
    assert listing(tmp_path) == ["a"]


def test_a_new_file_can_be_read_by_those_the_umask_lets(tmp_path):
    write_whole(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = "import sys, time, pathlib; from inputs.files import part_path\n"
    code += "path = part_path(pathlib.Path(sys.argv[1])); path.touch(); print(flush=True)\n"
    code += "time.sleep(60)"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    mine = part_path(tmp_path / "a")
    mine.touch()
    write_whole(tmp_path / "a", "one")
    assert len(listing(tmp_path)) == 3, "a running writer's file is its own"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    write_whole(tmp_path / "a", "two")
    assert listing(tmp_path) == sorted(["a", mine.name])
