"""What a person sees of training: one bar for all models, and a table of them that is alive.

In a terminal both are drawn in place; elsewhere there is a bar, and a line when a model is done.
All of it goes to stderr. rich is imported when something is drawn; nothing here imports torch.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text

    from fleet.train import Point, Watch

SECONDS_BETWEEN_REFRESHES = 0.5
SECONDS_BETWEEN_LINES = 10.0
COLUMNS = ("model", "epoch", "step", "loss", "lr", "tune %", "state")
# Rows of the page that are not a model's: the table's head and rule, what is left out, the bar.
OTHER_ROWS = 5
TRAINING, WAITING = "training", "waiting"
# Whom the table shows where there is no room for all.
ORDER = (TRAINING, "failed", "stopped", WAITING, "done")


class Watches:
    """Several watches as one."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = list(watches)

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """Tell all of them what is going to be trained."""
        for watch in self._watches:
            watch.begin(names, steps, done)

    def advance(self, steps: int) -> None:
        """Tell all of them that so many steps were done."""
        for watch in self._watches:
            watch.advance(steps)

    def point(self, point: Point) -> None:
        """Give all of them the point."""
        for watch in self._watches:
            watch.point(point)

    def end(self) -> None:
        """Tell all of them that it is over."""
        for watch in self._watches:
            watch.end()


class AtFirst:
    """Calls `say` once, when the first steps are done: what is planned is known by then."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say: Callable[[], None] | None = say

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """Nothing yet."""

    def advance(self, steps: int) -> None:
        """Say it, if it is not said."""
        if self._say is not None:
            self._say()
            self._say = None

    def point(self, point: Point) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def new_view(title: str) -> LiveTable | Lines:
    """The view that fits where stderr goes."""
    from rich.console import Console

    console = Console(stderr=True)
    animated = console.is_terminal and not console.is_dumb_terminal
    return LiveTable(title, console) if animated else Lines(title)


class Lines:
    """A bar, and a line for each model that is done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm | None = None
        # When the bar was drawn last, as far as it is above the last line.
        self._drawn: float | None = None

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            desc=self._title,
            total=steps,
            initial=done,
            unit="step",
            mininterval=SECONDS_BETWEEN_LINES,
        )

    def advance(self, steps: int) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(steps)

    def point(self, point: Point) -> None:
        """Say how a model has ended; of those that left early a log says why."""
        if point.state == TRAINING:
            return
        self._end_line()
        if point.state == "done":
            cells = zip(COLUMNS[1:-1], cells_of(point), strict=False)
            found = ", ".join(f"{name} {cell}" for name, cell in cells if cell)
            sys.stderr.write(f"{point.name} {point.state}: {found}\n")

    def take_up(self, points: Sequence[Point]) -> None:
        """Make room for what is logged next; how models ended was said before the restart."""
        self._end_line()

    def _end_line(self) -> None:
        drawn = None if self._bar is None else self._bar.last_print_t
        if drawn != self._drawn:
            sys.stderr.write("\n")
        self._drawn = drawn

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LiveTable:
    """The table and the bar, drawn in place; the bar stays when it is over."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._names: list[str] = []
        self._cells: dict[str, list[str]] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._live: Live | None = None
        self._logs: list[logging.StreamHandler] = []
        self._refreshed = 0.0

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        """Draw the first picture."""
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining

        self._names, self._cells = list(names), {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
            Elapsed(),
            TextColumn("left"),
            Remaining(),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(self._title, total=steps, completed=done)
        stderr = sys.stderr
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        # Logs were given stderr itself; now they have to be written above the table.
        self._logs = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is stderr
        ]
        for handler in self._logs:
            handler.setStream(sys.stderr)
        self._refresh()

    def advance(self, steps: int) -> None:
        """Move the bar on, and draw if it is time."""
        if self._progress is None or self._task is None:
            return
        self._progress.advance(self._task, steps)
        if time.monotonic() - self._refreshed >= SECONDS_BETWEEN_REFRESHES:
            self._refresh()

    def point(self, point: Point) -> None:
        """Keep the point for the next picture; a tune accuracy stays until there is a new one."""
        cells = cells_of(point)
        before = self._cells.get(point.name, cells)
        self._cells[point.name] = [*cells[:-2], cells[-2] or before[-2], cells[-1]]

    def take_up(self, points: Sequence[Point]) -> None:
        """Show models as these points, in order, leave them; some are from before a restart."""
        for point in points:
            self.point(point)

    def end(self) -> None:
        """Take the table away and leave the bar."""
        if self._live is None or self._progress is None:
            return
        self._live.update("")
        self._live.stop()
        for handler in self._logs:
            handler.setStream(sys.stderr)
        self._console.print(self._progress.get_renderable())
        self._live = self._progress = self._task = None

    def _refresh(self) -> None:
        from rich.console import Group

        if self._live is None or self._progress is None:
            return
        renderable = Group(*self._table(), self._progress.get_renderable())
        self._live.update(renderable, refresh=True)
        self._refreshed = time.monotonic()

    def _table(self) -> Iterator[Table | Text]:
        """As many models as the page has room for: those in training first, in their order."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        waiting = ["", "", "", "", "", WAITING]
        cells = {name: self._cells.get(name, waiting) for name in self._names}
        room = max(1, self._console.height - OTHER_ROWS)
        if len(cells) > room:
            by_interest = sorted(cells, key=lambda name: ORDER.index(cells[name][-1]))
            chosen = set(by_interest[:room])
        else:
            chosen = set(cells)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("model", "state") else "right")
        for name, own in cells.items():
            if name in chosen:
                table.add_row(name, *own)
        yield table
        others = Counter(own[-1] for name, own in cells.items() if name not in chosen)
        if others:
            counts = ", ".join(f"{others[state]} {state}" for state in ORDER if others[state])
            yield Text(f"{others.total()} more: {counts}")


def cells_of(point: Point) -> list[str]:
    """The cells of a model's row, after its name."""
    return [
        f"{point.epoch}" if point.phase == "fit" else f"{point.phase} {point.epoch}",
        f"{point.step:,}",
        f"{point.loss:.4f}" if abs(point.loss) < 1e4 else f"{point.loss:.3g}",
        f"{point.lr:.2e}",
        "" if point.tune_accuracy is None else f"{100 * point.tune_accuracy:.2f}",
        point.state,
    ]
