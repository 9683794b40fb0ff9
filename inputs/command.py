"""What the command lines share; imports no torch, so that `--help` comes at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from inputs.errors import InputError

if TYPE_CHECKING:
    import torch

USER_MISTAKE = 2
INTERRUPTED = 130
OUR_PACKAGES = ("soups", "fleet", "merge", "inputs", "kernels")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, warnings only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every library's logs.")]


def new_app() -> typer.Typer:
    """A typer application with plain help and plain tracebacks."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def size(text: str) -> int:
    """Bytes, such as 5GB or 512MiB; typer's BadParameter for what is no size."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is no size; wanted bytes, such as 5GB") from error


def run_and_exit(app: typer.Typer, name: str) -> None:
    """Run a command line and end the process at once: all is written and closed by then, and
    taking torch apart takes half a second. What is no ordinary end is raised."""
    try:
        app(prog_name=name)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


@contextmanager
def reported_errors(
    debug: bool, mistakes: tuple[type[Exception], ...], *, go_on: str = "run the same command"
) -> Iterator[None]:
    """Turn the user's `mistakes`, and OSErrors, into one paragraph on stderr and exit code 2.

    Each problem keeps a line of its own. Ctrl-C ends with 130, and says how to `go_on`. Any other
    exception is a bug: it passes, with its traceback.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # as a job in the background has it
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        # A library may make another error of an interruption, as numpy does while it is imported.
        interrupted = bool(interrupts) or isinstance(error, KeyboardInterrupt)
        if not interrupted and not isinstance(error, (*mistakes, OSError)):
            raise
        if debug:
            traceback.print_exc()
        if interrupted:
            typer.echo(f"\nInterrupted; what was finished is kept; {go_on} to go on.", err=True)
            raise typer.Exit(INTERRUPTED) from error
        typer.echo(f"error: {_lines(error)}", err=True)
        raise typer.Exit(USER_MISTAKE) from error
    finally:
        signal.signal(signal.SIGINT, before)


def configure_logging(*, quiet: bool, debug: bool) -> None:
    """Our own logs on stderr; libraries' warnings and chatter only with `debug`."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(message)s")
    for package in OUR_PACKAGES:
        level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
        logging.getLogger(package).setLevel(level)
    if not debug:
        warnings.simplefilter("ignore")
    if quiet:
        # Read when those libraries are imported, which is later.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; InputError for a device that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: {name!r} cannot be used here ({reason}); use auto, cpu or cuda"
        ) from error
    return device


def _lines(error: BaseException) -> str:
    """The message without blank lines; lines after the first are indented."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines) or type(error).__name__
