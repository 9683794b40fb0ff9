from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inputs.errors import InputError
from soups.errors import SoupError
from soups.record import (
    RunRecord,
    Steps,
    check_writable,
    commit,
    fingerprint,
    locked,
    versions,
)


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- files --------------------------------------------------------------------------------------


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "results" / "digits")
    assert list((tmp_path / "results" / "digits").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(SoupError, match=r"results/digits: cannot write there .* set `output`"):
        check_writable(tmp_path / "results" / "digits")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SoupError, match="Permission denied"):
        check_writable(tmp_path / "digits")


# --- lock ---------------------------------------------------------------------------------------


def _lock_in_other_process(folder: Path, answer) -> None:
    try:
        with locked(folder):
            answer.put("locked")
    except InputError as error:
        answer.put(str(error))


def _try_elsewhere(folder: Path) -> str:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_lock_in_other_process, args=(folder, answer))
    process.start()
    result = answer.get(timeout=20)
    process.join()
    return result


def test_a_second_run_in_the_folder_is_told_the_first_ones_process(tmp_path):
    with locked(tmp_path):
        assert f"another run (process {os.getpid()})" in _try_elsewhere(tmp_path)
    assert _try_elsewhere(tmp_path) == "locked"


def test_the_lock_of_a_killed_run_is_gone(tmp_path):
    code = (
        "import os, sys; from soups.record import locked\n"
        "with locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    with locked(tmp_path):
        pass


# --- run.json -----------------------------------------------------------------------------------


def test_run_json(tmp_path):
    record = RunRecord(
        tmp_path / "run.json", config={"name": "digits", "zoo": Path("zoo")}, seed=3, device="cpu"
    )
    record.add(tensors={"head.bias": "skipped: skip: ['head.*']"}, warnings=["one", "two"])
    record.add(tensors={"stem.weight": "cast from fp16 to fp32"}, warnings=["two", "three"])
    record.add(plan={"block_size": 4})
    record.save()
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["config"] == {"name": "digits", "zoo": "zoo"}
    assert (saved["seed"], saved["device"]) == (3, "cpu")
    assert list(saved["tensors"]) == ["head.bias", "stem.weight"]
    assert saved["warnings"] == ["one", "two", "three"]
    assert saved["plan"] == {"block_size": 4}
    assert saved["versions"]["torch"]


def test_what_json_cannot_say_leaves_the_old_record(tmp_path):
    record = RunRecord(tmp_path / "run.json", config={}, seed=0, device="cpu")
    record.save()
    before = (tmp_path / "run.json").read_bytes()
    record.add(model=object())
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        record.save()
    assert (tmp_path / "run.json").read_bytes() == before


def test_versions_name_python_and_torch():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_commit_of_a_repository(tmp_path, monkeypatch):
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    module = tmp_path / "module.py"
    module.write_text("a = 1\n")
    assert commit(module) is None
    _git(tmp_path, "init")
    assert commit(module) is None
    _git(tmp_path, "add", "module.py")
    _git(tmp_path, "commit", "--no-gpg-sign", "-m", "first")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert commit(module) == head
    module.write_text("a = 2\n")
    assert commit(module) == f"{head}-dirty"
    (tmp_path / "other.py").write_text("")
    assert commit(tmp_path / "other.py") is None  # installed into somebody else's repository


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


# --- steps --------------------------------------------------------------------------------------


def test_fingerprint_depends_on_values_and_not_on_order():
    one = fingerprint({"lr": 0.1, "zoo": Path("a/b"), "hashes": ["x", "y"]})
    assert one == fingerprint({"hashes": ("x", "y"), "zoo": "a/b", "lr": 0.1})
    assert one != fingerprint({"lr": 0.1, "zoo": Path("a/b"), "hashes": ["y", "x"]})
    assert len(one) == 64
    with pytest.raises(TypeError):
        fingerprint({"model": object()})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"lr": float("nan")})


@pytest.fixture
def finished(tmp_path) -> Steps:
    """A run with one finished step that wrote one file."""
    (tmp_path / "coefficients").mkdir()
    (tmp_path / "coefficients" / "mehl.json").write_text("[1]")
    steps = Steps(tmp_path)
    steps.finish("mehl", "f1", [tmp_path / "coefficients" / "mehl.json"], {"seconds": 1.5})
    return steps


def test_a_finished_step_is_done_for_the_next_run(finished, tmp_path):
    again = Steps(tmp_path)
    assert again.is_done("mehl", "f1")
    assert again.result("mehl") == {"seconds": 1.5}
    assert not again.is_done("mehl", "f2")
    assert not again.is_done("greedy", "f1")


def test_a_results_folder_can_be_moved(finished, tmp_path):
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Steps(moved).is_done("mehl", "f1")


def test_an_output_outside_the_folder_is_known_by_its_whole_path(tmp_path):
    (tmp_path / "zoo.csv").write_text("a")
    Steps(tmp_path / "results").finish("zoo", "f", [tmp_path / "zoo.csv"], {})
    assert Steps(tmp_path / "results").is_done("zoo", "f")
    (tmp_path / "zoo.csv").unlink()
    assert not Steps(tmp_path / "results").is_done("zoo", "f")


def test_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/a").write_text("a")
    Steps("results").finish("a", "f", ["results/a"], {})
    assert Steps(tmp_path / "results").is_done("a", "f")


@pytest.mark.parametrize("change", ["removed", "longer", "written again"])
def test_a_step_whose_output_changed_is_not_done(finished, tmp_path, change):
    output = tmp_path / "coefficients" / "mehl.json"
    match change:
        case "removed":
            output.unlink()
        case "longer":
            output.write_text("[1, 2]")
        case "written again":
            os.utime(output, ns=(0, 0))
    assert not Steps(tmp_path).is_done("mehl", "f1")


def test_a_missing_output_cannot_be_finished(tmp_path):
    with pytest.raises(SoupError, match=r"step 'mehl': its output .*none\.json is not there"):
        Steps(tmp_path).finish("mehl", "f", [tmp_path / "none.json"], {})


def test_scratch_is_kept_for_the_same_inputs_and_emptied_for_others(tmp_path):
    scratch = Steps(tmp_path).scratch("mehl", "f1")
    (scratch / "progress").write_text("block 3")
    assert Steps(tmp_path).scratch("mehl", "f1") == scratch == tmp_path / "work" / "mehl"
    assert (scratch / "progress").exists()
    assert not Steps(tmp_path).is_done("mehl", "f1")
    assert list(Steps(tmp_path).scratch("mehl", "f2").iterdir()) == []


def test_a_folder_that_no_run_made_is_not_emptied(tmp_path):
    (tmp_path / "work" / "mehl").mkdir(parents=True)
    (tmp_path / "work" / "mehl" / "mine").write_text("")
    assert (Steps(tmp_path).scratch("mehl", "f") / "mine").exists()


def test_a_finished_step_stays_done_when_its_scratch_is_asked_for(finished, tmp_path):
    finished.scratch("mehl", "f1")
    assert Steps(tmp_path).is_done("mehl", "f1")


def test_fresh_removes_what_the_runs_wrote_and_nothing_else(finished, tmp_path):
    (finished.scratch("learned", "f") / "progress").write_text("")
    (tmp_path / "coefficients" / "mine.json").write_text("")
    (tmp_path / "work" / "notes.txt").write_text("")
    steps = Steps(tmp_path, fresh=True)
    assert not steps.is_done("mehl", "f1")
    assert listing(tmp_path) == ["coefficients/mine.json", "work/notes.txt"]
    assert not (tmp_path / "work" / "learned").exists()


def test_fresh_leaves_an_output_that_somebody_changed(finished, tmp_path):
    (tmp_path / "coefficients" / "mehl.json").write_text("[1, 2, 3]")
    Steps(tmp_path, fresh=True)
    assert listing(tmp_path) == ["coefficients/mehl.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mehl": 1}', "\xff"])
def test_a_corrupt_record_of_steps_is_named(tmp_path, text):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "steps.json").write_text(text, encoding="latin-1")
    with pytest.raises(SoupError, match=r"steps\.json: not the record of a run"):
        Steps(tmp_path)


@pytest.mark.parametrize("name", ["", "../out", "/etc", "a/../b", "lock", "steps.json"])
def test_a_step_cannot_leave_the_work_folder(tmp_path, name):
    with pytest.raises(SoupError, match="wanted a name that can be a folder below work/"):
        Steps(tmp_path).scratch(name, "f")
