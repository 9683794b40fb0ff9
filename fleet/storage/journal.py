"""A store's manifest as far as it was read, what it adds up to, and the packs that it names.

Readers see the state of their last `refresh`; writers take turns and append a line for each change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from fleet.errors import FleetError
from fleet.storage.creating import locked
from fleet.storage.manifest import Manifest
from fleet.storage.objects import Packs
from fleet.storage.records import Variant
from fleet.storage.state import Change, State, read_line

Given = Mapping[str, Shaped[Tensor, "..."]]


class SupersededError(FleetError):
    """What was asked for was replaced or removed, and its tensors with it: refresh, ask again."""


class Journal:
    """The changes of the store in `folder`; FleetError if there is none.

    `state` is the latest that was read, for writers in a `transaction`; readers take `seen`, which
    stays until `refresh` where tensors are merely looked for in a later state. Threads may read it
    at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packs = Packs(folder, self._needing, self._catch_up)
        self.state = State()
        self._manifest = Manifest(folder)
        self._kept: State | None = None
        self._broken: FleetError | None = None
        self._seeing = threading.RLock()
        self._writing = threading.RLock()
        self._locked = False
        self.refresh()

    # --- reading ---

    @contextmanager
    def seen(self) -> Iterator[State]:
        """The state that readers see, which does not change inside."""
        with self._seeing:
            yield self.state if self._kept is None else self._kept

    def refresh(self) -> bool:
        """Take up what others changed since; whether there was something.

        Raises FleetError for a manifest that was altered; what was seen before stays.
        """
        with self._seeing:
            with self.seen() as before:
                version = before.version
            self._take_lines()
            self._kept = None
            return self.state.version != version

    @contextmanager
    def superseded(self, variant: Variant) -> Iterator[None]:
        """Tell tensors that went with an older state from damage."""
        try:
            yield
        except FleetError as error:
            with self._seeing:
                now = self.state.variants.get(variant.name)
                if now is variant and not self._manifest.has_more():
                    raise
            raise SupersededError(
                f"{self.folder}: variant {variant.name!r}: the store was changed while it was "
                f"read ({error}); refresh and ask again"
            ) from error

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other writers out of several changes; FleetError with the process that writes."""
        with self._writing:
            if self._locked:
                yield
                return
            with locked(self.folder):
                with self._seeing:
                    self.refresh()
                    self._manifest.cut_torn_line()
                self._locked = True
                try:
                    yield
                finally:
                    self._locked = False

    def write(self, record: Mapping[str, Any], given: Given) -> None:
        """Write the given tensors that the store has not, and the record after them."""
        packs = self.packs.put({digest: given[digest] for digest in sorted(given)})
        self.commit({**record, "packs": packs}, packs)

    def commit(self, record: Mapping[str, Any], written: Collection[str] = ()) -> None:
        """Append a record, and see it; what fails removes the packs that were written for it."""
        try:
            with self._seeing:
                content = json.loads(json.dumps(record, allow_nan=False))
                try:
                    change = self.state.checked(content)
                except FleetError as error:
                    raise FleetError(f"{self.folder}: {error}") from error
                self._manifest.append(content)
                self._take(change)
        except BaseException as error:
            self._check_taken(error)
            if self._broken is not None:
                raise
            self.refresh()  # whether the line is there after all
            for pack in set(written) - self.packs.contents.keys():
                self.packs.path(pack).unlink(missing_ok=True)
            raise

    # --- parts of the above ---

    def _take_lines(self) -> bool:
        """Take up what the manifest says since; whether there was something."""
        if self._broken is not None:
            raise self._broken
        try:
            lines = self._manifest.read()
            for line in lines:
                self._take(read_line(self.state, line, str(self._manifest.path)))
        except BaseException as error:
            self._check_taken(error)
            raise
        return bool(lines)

    def _take(self, change: Change) -> None:
        self.packs.learn(change.packs)
        self.packs.forget(change.removed_packs)
        self.state.take(change)

    def _check_taken(self, error: BaseException) -> None:
        """Refuse to go on where a line is there, and an error came before all of it was taken."""
        if self._manifest.count > self.state.version and self._broken is None:
            interrupted = FleetError(
                f"{self.folder}: was interrupted, and what is seen is not what is there; open the "
                "store again"
            )
            self._broken = error if isinstance(error, FleetError) else interrupted

    def _catch_up(self) -> bool:
        """Take up where tensors are now, and nothing that is seen; whether there was something."""
        with self._seeing:
            if self._broken is not None or not self._manifest.has_more():
                return False
            if self._kept is None:
                self._kept = self.state.copy()
            return self._take_lines()

    def _needing(self, digests: Sequence[str]) -> list[str]:
        with self._seeing:
            return self.state.needing(digests)
