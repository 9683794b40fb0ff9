"""From results folders to joined tables and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inputs.files import write_whole
from soups.boards.folders import RunFolder, SweepFolder, read_folders
from soups.boards.formats import write_formats
from soups.boards.joining import Task, join
from soups.boards.page import Section, page
from soups.boards.payload import published, task_payload
from soups.boards.standing import standing
from soups.boards.sweeps import sweep_payload, sweep_sentences
from soups.record import check_writable

PAGE = "leaderboard.html"


@dataclass(frozen=True)
class Boards:
    """What was written, the page last; and the first sentence of each of its parts, by title."""

    files: tuple[Path, ...]
    headlines: tuple[tuple[str, str], ...]


def write_boards(folders: Sequence[Path], out: Path, *, quoted: bool) -> Boards:
    """Write one table for each task of the runs in these folders, in four formats, and the page.

    The tables are `leaderboard_<task>.csv`, `.md`, `.tex` and `.parquet`; with `quoted` the page
    has published rows too. Raises SoupError for what is wrong with the folders, and where `out`
    cannot be written in, before anything is written.
    """
    found = read_folders(folders)
    tasks = join([one for one in found if isinstance(one, RunFolder)])
    sections = [_task_section(task) for task in tasks]
    sections += [_sweep_section(one) for one in found if isinstance(one, SweepFolder)]
    text = page(sections, published=published() if quoted else None)
    check_writable(out, setting="give another one with --out")
    files = []
    for task, section in zip(tasks, sections, strict=False):
        about = [section.about, *section.sentences]
        files += write_formats(task, out / f"leaderboard_{task.name}", about=about)
    write_whole(out / PAGE, text)
    headlines = tuple((section.title, section.sentences[0]) for section in sections)
    return Boards((*files, out / PAGE), headlines)


def write_page(folder: Path) -> Path:
    """Write the page of one run or sweep into its own folder; its path."""
    (found,) = read_folders([folder])
    section = (
        _task_section(join([found])[0]) if isinstance(found, RunFolder) else _sweep_section(found)
    )
    write_whole(folder / PAGE, page([section]))
    return folder / PAGE


def _task_section(task: Task) -> Section:
    found = standing(task)
    return Section(
        "task",
        task.name,
        _about(task),
        found.sentences if found else ["There is no soup among these rows."],
        task_payload(task, found),
    )


def _about(task: Task) -> str:
    """The data and the runs in a line."""
    counts = sorted({run.report_count for run in task.runs if run.report_count})
    parts = [f"Data: {task.data}, report split: {task.report}"]
    if counts:
        parts.append(f"{' or '.join(f'{count:,}' for count in counts)} report images")
    if task.classes:
        parts.append(f"{len(task.classes)} classes")
    if len(task.runs) > 1:
        parts.append(f"{len(task.runs)} runs")
    counted = sorted({run.readings for run in task.runs if run.readings})
    if counted:
        most = "once" if counted == [1] else f"{counted[-1]} times"
        parts.append(f"report read {most}" + " at most by a run" * (len(task.runs) > 1))
    return ", ".join(parts)


def _sweep_section(sweep: SweepFolder) -> Section:
    payload = sweep_payload(sweep)
    about = f"A sweep: differences between learners on the same images, from {sweep.folder}"
    return Section("sweep", payload["name"], about, sweep_sentences(sweep), payload)
