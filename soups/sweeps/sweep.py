"""Many runs of one config: its axes as runs, checked together, run side by side, and gone on with.

Imports no torch: that is for the workers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ConfigDict
from tqdm.auto import tqdm

from inputs.config import ConfigTree, Settings
from inputs.errors import InputError
from soups.config import LearnConfig, SweepConfig, overlap, settings_of
from soups.errors import SoupError
from soups.record import RunRecord, check_writable, fingerprint, locked
from soups.sweeps.cells import cell_record, check_cells, clear_cell, make_zoos, run_cell
from soups.sweeps.workers import Outcome, Workers, cores

log = logging.getLogger(__name__)

RUNS = "runs"
SHOWN = 8


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: axis → label, and the config that this makes."""

    labels: Mapping[str, str]
    config: LearnConfig

    @property
    def name(self) -> str:
        """The labels as the run's folder has them."""
        return "/".join(self.labels.values())

    @property
    def folder(self) -> Path:
        return self.config.output / self.config.name


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its own settings, the results folder, and its runs in the axes' order."""

    settings: SweepConfig
    folder: Path
    cells: tuple[Cell, ...]
    source: Mapping[str, Any]


class _WithSweep(Settings):
    model_config = ConfigDict(extra="ignore")

    sweep: SweepConfig


def is_sweep(read: ConfigTree) -> bool:
    """Whether the config asks for many runs."""
    return "sweep" in read.tree


def plan_sweep(read: ConfigTree) -> Sweep:
    """Every combination of the axes as a checked run in a folder `runs/<label>/…` of its own.

    Raises InputError with every problem once, and the axis that it comes from.
    """
    found, problems = read.check(_WithSweep)
    problems = {key: text for key, text in problems.items() if overlap(key, "sweep")}
    if found is None or problems or read.problems:
        lines = [f"{read.where(key)}: {key}: {text}" for key, text in problems.items()]
        raise InputError("\n".join([*read.problems, *lines]))
    settings = found.sweep
    _refuse_covered(read, settings)
    values = [
        [(axis, label, settings_of(overrides)) for label, overrides in labels.items()]
        for axis, labels in settings.axes.items()
    ]
    run = read.with_values({}, without=("sweep",))
    cells: list[Cell] = []
    places: dict[tuple[str, Path], list[Mapping[str, str]]] = {}
    wrong: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for chosen in itertools.product(*values):
        labels = {axis: label for axis, label, _ in chosen}
        overrides = {key: value for _, _, own in chosen for key, value in own.items()}
        config, found_here = run.with_values(overrides).check(LearnConfig)
        for problem in found_here.items():
            wrong.setdefault(problem, []).append(labels)
        if config is None:
            continue
        for row in settings.compare:
            if row not in config.learners:
                text = f"there is no learner {row!r}; the learners are {', '.join(config.learners)}"
                wrong.setdefault(("sweep.compare", text), []).append(labels)
        places.setdefault((config.name, config.output), []).append(labels)
        runs = config.output / config.name / RUNS
        cells.append(Cell(labels, _placed(config, runs, [*labels.values()])))
    if wrong:
        raise InputError("\n".join(_blame(read, settings, *one) for one in wrong.items()))
    _refuse_places(read, [*places])
    ((name, output),) = places
    source = OmegaConf.to_container(read.tree)
    assert isinstance(source, dict)
    return Sweep(settings, output / name, tuple(cells), {str(key): v for key, v in source.items()})


def run_sweep(
    sweep: Sweep, *, root: Path, fresh: bool, progress: bool, say: Callable[[str], None]
) -> None:
    """Make the zoos, run what is not finished, and write the tables over all runs.

    `root` is where a model factory's path starts; `fresh` runs finished runs again. Raises
    SoupError that names every run that failed, after the others.
    """
    keep_soups = sweep.settings.keep_soups
    check_writable(sweep.folder)
    with locked(sweep.folder):
        count = min(sweep.settings.workers, len(sweep.cells))
        axes = " × ".join(f"{len(labels)} {axis}" for axis, labels in sweep.settings.axes.items())
        say(f"{len(sweep.cells)} runs: {axes}")
        made_from = _prepare(sweep, root=root, fresh=fresh, progress=progress)
        finished = [
            cell.name
            for cell in sweep.cells
            if _is_finished(cell, made_from[cell.name], keep_soups)
        ]
        if finished:
            say(f"{len(finished)} are finished, in {sweep.folder / RUNS}: {_some(finished)}")
        tasks = {
            cell.name: (cell.config, root, made_from[cell.name], keep_soups)
            for cell in sweep.cells
            if cell.name not in finished
        }
        with Workers(count, max(1, cores() // count)) as workers:
            failed = _run(workers, tasks, progress=progress)
        done = [cell for cell in sweep.cells if cell.name not in failed]
        _write_tables(sweep, done, failed, threads=workers.threads, say=say)
    if failed:
        lines = "\n".join(f"{name}: {error}" for name, error in failed.items())
        raise SoupError(
            f"{len(failed)} of {len(sweep.cells)} runs failed; run the same command to try them "
            f"again:\n{lines}"
        )


def _prepare(sweep: Sweep, *, root: Path, fresh: bool, progress: bool) -> dict[str, str]:
    """Check all runs against their images and zoos, then make the zoos; what decides each run.

    The images and models stay in the memory of a process that runs nothing else: what a run finds
    in use enters its plan.
    """
    configs = [cell.config for cell in sweep.cells]
    with Workers(1, cores()) as alone:
        (checked,) = alone.run(check_cells, [(configs,)])
        problems, images = _result(checked)
        if problems:
            names: dict[str, list[str]] = {}
            for index, problem in problems:
                names.setdefault(problem, []).append(sweep.cells[index].name)
            lines = [f"runs {_some(cells)}: {text}" for text, cells in names.items()]
            raise SoupError("\n".join(lines))
        if fresh:
            # Before any work, so that none is taken as finished when this is stopped.
            for cell in sweep.cells:
                clear_cell(cell.folder)
        (made,) = alone.run(make_zoos, [(configs, images, root, progress)])
        inputs = _result(made)
    return {
        cell.name: _made_from(cell.config, one)
        for cell, one in zip(sweep.cells, inputs, strict=True)
    }


def _result(outcome: Outcome) -> Any:
    for warning in outcome.warnings:
        log.warning(warning)
    if outcome.error is not None:
        raise SoupError(outcome.error)
    return outcome.result


def _run(workers: Workers, tasks: Mapping[str, tuple], *, progress: bool) -> dict[str, str]:
    """Run the cells; the names of those that failed, with their errors."""
    failed: dict[str, str] = {}
    warned: dict[str, list[str]] = {}
    names = [*tasks]
    with tqdm(total=len(tasks), desc="runs", unit="run", disable=not progress) as bar:
        for outcome in workers.run(run_cell, [*tasks.values()]):
            name = names[outcome.task]
            if outcome.error is not None:
                failed[name] = outcome.error
            for warning in outcome.warnings:
                warned.setdefault(warning, []).append(name)
            bar.set_postfix_str(name)
            bar.update()
    for warning, where in warned.items():
        log.warning("%s (%s)", warning, _some(where))
    return failed


def _write_tables(
    sweep: Sweep,
    done: Sequence[Cell],
    failed: Mapping[str, str],
    *,
    threads: int,
    say: Callable[[str], None],
) -> None:
    from soups.boards.making import write_page
    from soups.sweeps.tables import read_run, write_tables

    runs = [read_run(cell.folder, cell.labels, cell.config) for cell in done]
    seconds = [cell_record(cell.folder)["seconds"] for cell in done]
    record = RunRecord(
        sweep.folder / "run.json",
        config=sweep.source,
        seed=sweep.cells[0].config.seed,
        device=f"{sweep.settings.workers} workers with {threads} threads each",
    )
    record.add(runs=len(sweep.cells), failed=dict(failed), seconds_of_runs=sum(seconds))
    record.save()
    if runs:
        say(write_tables(sweep.folder, runs, sweep.settings))
        minutes = sum(seconds) / 60
        say(f"\n{sweep.folder}: {len(runs)} runs, {minutes:,.1f} minutes of one worker in all")
        say(f"Open {write_page(sweep.folder)} in a browser.")


def _made_from(config: LearnConfig, inputs: str) -> str:
    """What decides a run's results; not its folder, which may be moved."""
    settings = config.model_dump(mode="json", by_alias=True, exclude={"name", "output"})
    return fingerprint({"config": settings, "inputs": inputs})


def _is_finished(cell: Cell, made_from: str, keep_soups: bool) -> bool:
    outputs = ["leaderboard.csv", "predictions.npz", "examples.npz", "run.json"]
    outputs += ["soups"] * keep_soups
    return cell_record(cell.folder).get("made_from") == made_from and all(
        (cell.folder / output).exists() for output in outputs
    )


def _placed(config: LearnConfig, runs: Path, labels: list[str]) -> LearnConfig:
    """The config with a folder of its own in that of the runs."""
    # Pictures of each run are drawn only where the config asks for them by name.
    pictures = config.pictures and "pictures" in config.model_fields_set
    place = {"name": labels[-1], "output": runs.joinpath(*labels[:-1]), "pictures": pictures}
    return config.model_copy(update=place)


def _refuse_places(read: ConfigTree, places: Sequence[tuple[str, Path]]) -> None:
    """InputError where runs do not have one name and output, as by interpolation they may."""
    names, outputs = zip(*places, strict=True)
    found = {"name": dict.fromkeys(names), "output": dict.fromkeys(map(str, outputs))}
    lines = [
        f"{read.where(key)}: {key}: found {_some([*values])} for different runs; wanted one for "
        "all, since a sweep has one folder: take out what an axis changes (runs have folders of "
        "their own in it, named by their labels)"
        for key, values in found.items()
        if len(values) > 1
    ]
    if lines:
        raise InputError("\n".join(lines))


def _refuse_covered(read: ConfigTree, settings: SweepConfig) -> None:
    """InputError for overrides that would change nothing, since an axis sets the key after them."""
    covered = [
        f"override {override!r}: the axis {axis} sets `{key}`; change sweep.axes.{axis} instead"
        for name, override in read.given.items()
        for axis, labels in settings.axes.items()
        for key in sorted({key for own in labels.values() for key in settings_of(own)})
        if f"{name}.".startswith(f"{key}.")
    ]
    if covered:
        raise InputError("\n".join(covered))


def _blame(
    read: ConfigTree,
    settings: SweepConfig,
    problem: tuple[str, str],
    found: Sequence[Mapping[str, str]],
) -> str:
    """The problem with the axis and labels that it comes from, or with the file."""
    key, text = problem
    said = f"{key}: {text}" if key else text
    for axis, labels in settings.axes.items():
        setters = {
            label
            for label, own in labels.items()
            if any(overlap(key, other) for other in settings_of(own))
        }
        blamed = dict.fromkeys(own[axis] for own in found if own[axis] in setters)
        if key and blamed:
            return f"{read.file}: sweep.axes.{axis} ({', '.join(blamed)}): {said}"
    every = len(found) == len(list(itertools.product(*settings.axes.values())))
    where = "" if every else f" (in {_some(['/'.join(own.values()) for own in found])})"
    return f"{read.where(key)}: {said}{where}"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
