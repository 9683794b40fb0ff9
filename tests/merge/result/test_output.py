import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from inputs.errors import InputError
from merge.errors import MergeError
from merge.result.output import RECORD, aside, open_output


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def merge_into(path: Path, *, text: str = "weights", fingerprint: str = "f", **options: bool):
    settings = {"resume": False, "overwrite": False} | options
    with open_output(path, fingerprint=fingerprint, **settings) as output:
        (output.work / "model.safetensors").write_text(text)
        output.finish("model.safetensors", {"seconds": 1.0})
        output.commit({"ingredients": []})


def test_a_folder_is_put_in_place_whole(tmp_path: Path):
    merge_into(tmp_path / "deep" / "out")
    assert listing(tmp_path) == [
        "deep",
        "deep/out",
        f"deep/out/{RECORD}",
        "deep/out/model.safetensors",
    ]
    record = json.loads((tmp_path / "deep" / "out" / RECORD).read_text())
    assert record == {"ingredients": [], "files": ["model.safetensors", RECORD]}


def test_a_file_is_put_in_place_with_its_record(tmp_path: Path):
    merge_into(tmp_path / "soup.safetensors")
    assert listing(tmp_path) == ["soup.merge.json", "soup.safetensors"]


def test_what_fails_leaves_the_output_away_and_the_work_to_resume(tmp_path: Path):
    def fail() -> None:
        with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False) as one:
            (one.work / "a.safetensors").write_text("a")
            one.finish("a.safetensors", {"seconds": 2.0})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "out").exists()
    with open_output(tmp_path / "out", fingerprint="f", resume=True, overwrite=False) as output:
        assert output.finished("a.safetensors") == {"seconds": 2.0}
        assert output.finished("b.safetensors") is None
    with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False) as output:
        assert output.finished("a.safetensors") is None


def test_another_merge_is_not_resumed(tmp_path: Path):
    with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False):
        pass
    with (
        pytest.raises(MergeError, match="was of another config, shard size or input"),
        open_output(tmp_path / "out", fingerprint="g", resume=True, overwrite=False),
    ):
        pass


def test_resume_with_nothing_to_resume_begins(tmp_path: Path):
    merge_into(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / RECORD).exists()


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path, name: str):
    merge_into(tmp_path / name)
    with pytest.raises(
        MergeError, match="is there already; name another path, or give --overwrite"
    ):
        merge_into(tmp_path / name, text="new")
    before = listing(tmp_path)
    merge_into(tmp_path / name, text="new", overwrite=True)
    assert listing(tmp_path) == before
    file = tmp_path / name / "model.safetensors" if name == "out" else tmp_path / name
    assert file.read_text() == "new"


def test_an_empty_folder_is_no_obstacle_but_a_strangers_is_never_overwritten(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    merge_into(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(MergeError, match="mine"):
            merge_into(tmp_path / "mine", overwrite=overwrite)
    assert listing(tmp_path / "mine") == ["thesis.tex"]


def test_file_and_folder_are_not_confused(tmp_path: Path):
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b").write_text("")
    with pytest.raises(MergeError, match=r"is a folder; name a \.safetensors file"):
        merge_into(tmp_path / "a.safetensors")
    for name in ("b", "new.pt"):
        with pytest.raises(MergeError, match="names a file; name a folder"):
            merge_into(tmp_path / name, overwrite=True)
    with pytest.raises(MergeError, match="b is a file; name a path that is not below it"):
        merge_into(tmp_path / "b" / "out")


def test_what_was_put_beside_a_result_is_never_removed(tmp_path: Path):
    merge_into(tmp_path / "out")
    (tmp_path / "out" / "evaluation.txt").write_text("93.1")
    with pytest.raises(MergeError, match=r"holds what no merge has made \(evaluation\.txt\)"):
        merge_into(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "evaluation.txt").read_text() == "93.1"


def test_a_file_that_no_merge_has_made_is_never_replaced(tmp_path: Path):
    (tmp_path / "mine.safetensors").write_text("years")
    (tmp_path / "other.merge.json").write_text("{}")
    for name in ("mine.safetensors", "other.safetensors"):
        with pytest.raises(MergeError, match="no merge has made"):
            merge_into(tmp_path / name, overwrite=True)
    assert (tmp_path / "mine.safetensors").read_text() == "years"
    assert (tmp_path / "other.merge.json").read_text() == "{}"


def test_a_shard_that_was_cut_short_is_made_again(tmp_path: Path):
    with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False) as output:
        (output.work / "a.safetensors").write_text("abc")
        output.finish("a.safetensors", {})
        (output.work / "a.safetensors").write_text("a")
    with open_output(tmp_path / "out", fingerprint="f", resume=True, overwrite=False) as output:
        assert output.finished("a.safetensors") is None


@pytest.mark.parametrize("moment", ["aside", "in place"])
def test_a_merge_killed_while_it_replaces_a_folder(tmp_path: Path, moment: str):
    out = tmp_path / "out"
    merge_into(out)
    if moment == "aside":  # the old one has gone aside, the new one is not there yet
        out.rename(aside(out))
        with pytest.raises(MergeError, match="is there already"):
            merge_into(out)
        assert (out / "model.safetensors").read_text() == "weights"
    else:
        shutil.copytree(out, aside(out))
    merge_into(out, text="new", overwrite=True)
    assert (out / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mistakes_leave_nothing_and_a_full_disk_says_how_to_go_on(tmp_path: Path):
    def fail(error: Exception) -> None:
        with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False):
            raise error

    with pytest.raises(MergeError, match="no good"):
        fail(MergeError("no good"))
    assert listing(tmp_path) == []
    with pytest.raises(MergeError, match=r"No space left on device; .*go on with --resume"):
        fail(OSError(28, "No space left on device"))
    assert (tmp_path / ".out.unfinished").exists()


def _try(path: Path, answer) -> None:
    try:
        with open_output(path, fingerprint="f", resume=False, overwrite=False):
            answer.put("open")
    except InputError as error:
        answer.put(str(error))


def test_two_runs_into_one_folder(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with open_output(tmp_path / "out", fingerprint="f", resume=False, overwrite=False) as output:
        (output.work / "a").write_text("mine")
        process = context.Process(target=_try, args=(tmp_path / "out", answer))
        process.start()
        assert f"another run (process {os.getpid()}) works there" in answer.get(timeout=20)
        process.join()
        assert (output.work / "a").exists()
