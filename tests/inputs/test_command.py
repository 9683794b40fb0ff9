import errno
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fleet.errors import FleetError
from inputs.command import choose_device, configure_logging, new_app, reported_errors
from inputs.errors import InputError
from merge.errors import MergeError
from soups.errors import MISTAKES, SoupError

ROOT = Path(__file__).parents[2]


def run(error: BaseException, *, debug: bool = False):
    app = new_app()

    @app.command()
    def command():
        with reported_errors(debug, MISTAKES):
            raise error

    return CliRunner().invoke(app, [])


@pytest.mark.parametrize("kind", [InputError, MergeError, FleetError, SoupError])
def test_mistakes_are_one_paragraph_and_exit_2(kind: type[Exception]):
    result = run(kind("zoo/a.pt: found this, \t wanted that; do so\n"))
    assert result.exit_code == 2
    assert result.stderr == "error: zoo/a.pt: found this, wanted that; do so\n"
    assert result.stdout == ""


def test_several_problems_keep_a_line_each():
    result = run(MergeError("2 problems\n\n- a.pt: is empty\n- b.pt: is truncated"))
    assert result.stderr == "error: 2 problems\n  - a.pt: is empty\n  - b.pt: is truncated\n"


def test_debug_adds_the_traceback():
    result = run(SoupError("no"), debug=True)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: no\n")


def test_system_errors_name_the_file():
    result = run(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "zoo/03.safetensors"))
    assert result.exit_code == 2
    assert result.stderr == "error: zoo/03.safetensors: No space left on device\n"
    assert run(ConnectionError("no network")).stderr == "error: no network\n"


def test_an_interruption_says_how_to_go_on():
    result = run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "what was finished is kept" in result.stderr


def test_an_interruption_that_a_library_turned_into_another_error():
    app = new_app()

    @app.command()
    def command():
        with reported_errors(False, MISTAKES):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise RecursionError("numpy was half imported") from None

    handler = signal.getsignal(signal.SIGINT)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_ignored_interruption_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with reported_errors(False, MISTAKES):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bug_keeps_its_traceback():
    result = run(RuntimeError("a bug"))
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_an_exit_inside_passes():
    assert run(typer.Exit(3)).exit_code == 3


@pytest.mark.parametrize(("quiet", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_logging_levels(quiet: bool, level: int, monkeypatch: pytest.MonkeyPatch):
    # Set by configure_logging; monkeypatch puts back what was there.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    with warnings.catch_warnings(record=True) as seen:
        configure_logging(quiet=quiet, debug=False)
        warnings.warn("a library's", UserWarning, stacklevel=1)
    assert not seen
    assert logging.getLogger("soups.zoo").getEffectiveLevel() == level
    assert (os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1") == quiet


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in {"cpu", "cuda"}
    for name in ("gpu0", "cuda:99"):
        with pytest.raises(InputError, match=f"device: '{name}' cannot be used here"):
            choose_device(name)


def test_needs_no_torch():
    code = "import sys, inputs.command, soups.finetune; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout == "False\n"
