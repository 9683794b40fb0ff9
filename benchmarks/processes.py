"""Processes of a benchmark that wait for their turn: parent and child talk in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recording import ROOT


class Process:
    """A process of `script`, which is given a job: `side`, `threads`, and what else it needs."""

    def __init__(self, script: Path, job: Mapping[str, Any]) -> None:
        self.side, self.rounds = job["side"], 0
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job["threads"]),
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(job)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `hear` finds that it has ended
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side}: the process ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Line:
    """The child's end of the talk; what else it prints goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        """Tell the parent."""
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def wait(self) -> str:
        """What the parent says next; SystemExit when it has no more to say."""
        said = sys.stdin.readline()
        if not said:
            raise SystemExit
        return said.strip()
