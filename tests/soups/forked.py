"""Commands in processes of their own that are stopped at some moment.

They are forked from one that has imported torch: its imports take longer than what is tested.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from soups.sweeps.workers import PRELOADED

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PRELOADED, __name__])


def start(module: str, arguments: list[str], folder: Path, said: Path) -> BaseProcess:
    """`python -m module arguments` in `folder`; what it says goes to the file `said`."""
    process = CONTEXT.Process(target=_run, args=(module, arguments, folder, said))
    process.start()
    return process


def _run(module: str, arguments: list[str], folder: Path, said: Path) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # where sweeps made the forkserver
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
