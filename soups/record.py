"""What a run leaves behind besides its results: run.json, finished steps, the lock, whole files."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from inputs.files import locked_by, write_whole
from soups.errors import SoupError

WORK = "work"
PACKAGES = (
    "model-soups-toolkit",
    "datasets",
    "huggingface_hub",
    "numpy",
    "open_clip_torch",
    "safetensors",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torchvision",
)


def check_writable(folder: str | Path, *, setting: str = "set `output` to another one") -> None:
    """Make the folder if need be and try to write in it; SoupError where that fails, which says
    how to choose another one."""
    folder = Path(folder)
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SoupError(
            f"{folder}: cannot write there ({error.strerror}); wanted a folder for the results: "
            f"change its permissions, or {setting}"
        ) from error


def locked(folder: str | Path) -> AbstractContextManager[None]:
    """Keep other runs out of a results folder while this one works in it.

    Raises InputError with the other run's process id.
    """
    return locked_by(
        Path(folder) / WORK / "lock", who=str(folder), remedy="give this run another name"
    )


class RunRecord:
    """`run.json`: what this run was told, what it ran on, and what it found worth saying."""

    def __init__(self, path: str | Path, *, config: Mapping[str, Any], seed: int, device: str):
        self.path = Path(path)
        self.entries: dict[str, Any] = {
            "config": dict(config),
            "seed": seed,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "commit": commit(),
            "device": device,
            "tensors": {},
            "warnings": [],
        }

    def add(self, **entries: Any) -> None:
        """Set entries by name; a mapping is joined to the one there, a list appended to it.

        Skipped and cast tensors go to `tensors` (name → what happened and why), warnings to
        `warnings`. A line that a list already has is not repeated.
        """
        for name, value in entries.items():
            there = self.entries.get(name)
            if isinstance(there, dict) and isinstance(value, Mapping):
                there.update(value)
            elif isinstance(there, list) and isinstance(value, list | tuple):
                there.extend(item for item in value if item not in there)
            else:
                self.entries[name] = copy.copy(value)  # later entries are joined to ours

    def save(self) -> None:
        """Write all entries as JSON; paths become texts."""
        write_whole(self.path, json.dumps(self.entries, indent=2, default=_as_text) + "\n")


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that results depend on; None for an absent one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit(file: str | Path = __file__) -> str | None:
    """The git commit of the toolkit, `-dirty` where files were changed since; None outside git.

    A file that its repository does not track was installed into somebody else's: also None.
    """
    git = ["git", "-C", str(Path(file).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", "--", Path(file).name], capture_output=True
        )
        if tracked.returncode:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except OSError:  # there is no git on this machine, which is no reason to stop
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as canonical JSON: settings, hashes, seeds; paths count as texts.

    Raises TypeError for what JSON cannot say, and ValueError for NaN and infinity.
    """
    text = json.dumps(
        inputs, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_text
    )
    return hashlib.sha256(text.encode()).hexdigest()


class Steps:
    """The finished steps of the run in a results folder, kept in `work/steps.json`.

    A step is done while it is on record with the same fingerprint and the files it wrote have the
    size and time of change they had then. With `fresh` everything that earlier runs wrote is
    removed first: files on record that nobody changed since, and scratch folders.
    """

    def __init__(self, folder: str | Path, *, fresh: bool = False):
        self.folder = Path(folder)
        self.path = self.folder / WORK / "steps.json"
        self._steps: dict[str, dict[str, Any]] = self._read()
        if fresh:
            self._clear()

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether the step ran to its end from these inputs and its outputs are as it left them."""
        step = self._steps.get(name, {})
        return (
            step.get("fingerprint") == fingerprint
            and "outputs" in step
            and all(_stamp(self.folder / path) == stamp for path, stamp in step["outputs"].items())
        )

    def result(self, name: str) -> dict[str, Any]:
        """What `finish` was given for the step."""
        return self._steps[name]["result"]

    def scratch(self, name: str, fingerprint: str) -> Path:
        """A folder `work/<name>` where the step keeps what it needs to go on after it was killed.

        What is in it comes from a start of this step with the same fingerprint; of any other it is
        emptied. `--fresh` removes it.
        """
        folder = self.folder / WORK / _checked_name(name)
        step = self._steps.get(name, {})
        if step.get("fingerprint") != fingerprint:
            if step.get("scratch") and folder.exists():
                shutil.rmtree(folder)
            step = {"fingerprint": fingerprint}
        self._steps[name] = {**step, "scratch": True}
        self._save()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(
        self, name: str, fingerprint: str, outputs: Iterable[str | Path], result: dict[str, Any]
    ) -> None:
        """Put the step on record with the files it wrote and a result that JSON can hold.

        Raises SoupError where an output is not there.
        """
        stamps: dict[str, Any] = {}
        for output in map(Path, outputs):
            stamp = _stamp(output)
            if stamp is None:
                raise SoupError(f"step {name!r}: its output {output} is not there")
            stamps[self._relative(output)] = stamp
        step = {"fingerprint": fingerprint, "outputs": stamps, "result": result}
        if self._steps.get(_checked_name(name), {}).get("scratch"):
            step["scratch"] = True
        self._steps[name] = step
        self._save()

    def remove(self, name: str) -> None:
        """Forget the step, with the files on record that nobody changed and its scratch folder."""
        self._remove(name)
        self._save()

    def names(self) -> list[str]:
        """The steps on record."""
        return [*self._steps]

    def _relative(self, output: Path) -> str:
        """Relative to the results folder, which may be moved; absolute outside of it."""
        output, folder = output.absolute(), self.folder.absolute()
        inside = output.is_relative_to(folder)
        return str(output.relative_to(folder) if inside else output)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            steps = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise self._corrupt(str(error)) from error
        if not isinstance(steps, dict) or not all(isinstance(s, dict) for s in steps.values()):
            raise self._corrupt("it is not a mapping of steps")
        return steps

    def _corrupt(self, what: str) -> SoupError:
        return SoupError(
            f"{self.path}: not the record of a run ({what}); remove it, and the run starts over"
        )

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self._steps, indent=1, default=_as_text) + "\n")

    def _clear(self) -> None:
        for name in self.names():
            self._remove(name)
        self.path.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        step = self._steps.pop(name, {})
        for path, stamp in step.get("outputs", {}).items():
            if _stamp(self.folder / path) == stamp:
                (self.folder / path).unlink()
        scratch = self.folder / WORK / _checked_name(name)
        if step.get("scratch") and scratch.exists():
            shutil.rmtree(scratch)


def _stamp(path: Path) -> list[int] | None:
    """Size and time of change of a file; None where there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _checked_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or name in ("lock", "steps.json"):
        raise SoupError(
            f"step {name!r}: wanted a name that can be a folder below {WORK}/, without `..` and "
            "other than `lock` and `steps.json`"
        )
    return name


def _as_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be stored as JSON")
