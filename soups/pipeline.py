"""The run behind `soups.learn`: zoo → preflight → plan → learners → soups → leaderboard."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fleet import Group
from inputs.command import choose_device
from inputs.data import LearningData, load_learning_data
from inputs.models import build_model
from merge.coefficients import Coefficients
from soups.barrier import probe_midpoints
from soups.boards.making import PAGE, write_page
from soups.caption import Setting, readings_text
from soups.checks import select_problems
from soups.config import LearnConfig
from soups.cross_fitting import cross_fit_rows, keep_own, with_out_of_fold
from soups.entries import Entry, evaluate_entries, report_examples, soup_entry
from soups.errors import SoupError
from soups.examples import FILE as EXAMPLES
from soups.ingredients import find_ingredients, open_zoo
from soups.kitchen import cook_soup
from soups.learners.registry import LEARNERS, LearnerSettings, WiseFT
from soups.meter import Meter, memory_in_use
from soups.norms import NormBuffers
from soups.plan import (
    Costs,
    RowPlan,
    check_budget,
    largest_batch,
    measure_activations,
    plan_learners,
    plan_table,
)
from soups.plots.writing import write_pictures
from soups.readings import count_readings, earlier_readings, keep_readings
from soups.record import RunRecord, Steps, check_writable, fingerprint, locked
from soups.references import references
from soups.report_door import Report, open_report, shut
from soups.reports.making import judge_reports, make_reports
from soups.reports.points import report_problems
from soups.rows import REPORT, Row, save_predictions, with_intervals
from soups.run import Run
from soups.session import Session
from soups.statistics import accuracy, correctness
from soups.tables import MARKS, terminal_table, write_leaderboard
from soups.zoo import make_zoo

# Rows are compared with the first learner of each of these types.
BASELINES = ("best_single", "greedy")

log = logging.getLogger(__name__)


def run(
    config: LearnConfig,
    *,
    root: Path = Path(),
    fresh: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Everything that the config asks for, into `<output>/<name>/`; the leaderboard's rows.

    What is finished is kept, unless its inputs changed or `fresh` is set (the zoo is always kept:
    `soups.finetune --fresh` makes it again). `root` is where a model factory's path starts.
    """
    device = choose_device(config.device)
    folder = config.output / config.name
    check_writable(folder)
    with locked(folder):
        with shut(lambda: f"{config.name}, before it learns"):
            this = open_run(config, folder, device, root=root, fresh=fresh, progress=progress)
        with shut(lambda: this.session.row or config.name):
            plans = _plan(this, say)
            this.score_ingredients()
            this.record.save()
            soups = {
                row: _soup(this, row, settings, plans[row])
                for row, settings in config.learners.items()
            }
            cross_fit_rows(this, {row: plan.block_size for row, plan in plans.items()})
            make_reports(this, soups)
            this.session.release()
            entries = [soup_entry(this, row, soup) for row, soup in soups.items()]
            entries += references(this, soups)
        # Learning is over: from here on, and only here, *report* is read.
        report = open_report(config, this.record, who=f"the leaderboard of {config.name}")
        rows = _leaderboard(this, entries, soups, report)
        this.record.save()
        if config.pictures:
            write_pictures(folder)
            write_page(folder)
    say(terminal_table(rows))
    say(f"\n{MARKS}\n{readings_text(count_readings(report.readings))}")
    found = ["leaderboard.md", "leaderboard.csv", "examples.npz", "run.json"]
    found += ["coefficients/", "soups/"]
    found += ["pictures/"] * config.pictures + ["reports/"] * bool(config.reports)
    say(f"\n{folder}: {', '.join(found)}")
    if config.pictures:
        say(f"Open {folder / PAGE} in a browser.")
    return rows


# --- before the long work ------------------------------------------------------------------------


def open_run(
    config: LearnConfig,
    folder: Path,
    device: torch.device,
    *,
    root: Path,
    fresh: bool,
    progress: bool,
) -> Run:
    """Load the images, make the zoo if it is missing, open and check it.

    Raises InputError, SoupError, MergeError: what is wrong with the images, the settings, the zoo.
    """
    data = load_learning_data(config.data, memory_budget=config.memory_budget)
    _check_learners(config, data)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model, classes=len(data.classes), channels=config.data.channels, root=root
    )
    model = model.to(device).eval()
    check_budget(model, in_use=memory_in_use(device), budget=config.memory_budget)
    if config.zoo.finetune is not None and config.zoo.ingredients is None:
        _check_rows(config, config.zoo.finetune.ingredients, data, model)
        make_zoo(config, data, root=root, device=device, progress=progress)
    zoo = open_zoo(
        config.zoo,
        model,
        cache=folder / "work" / "scans.json",
        memory_budget=config.memory_budget,
        progress=progress,
        seed=config.seed,
    )
    norms = NormBuffers(model, config.norm_buffers, zoo, data.fit)
    session = Session(
        model=model,
        zoo=zoo,
        select=data.select,
        norms=norms,
        seed=config.seed,
        eval_batch_size=config.eval_batch_size,
        memory_budget=config.memory_budget,
        train_mode=config.train_mode,
        progress=progress,
    )
    steps = Steps(folder, fresh=fresh)
    readings = earlier_readings(folder / "run.json")
    record = RunRecord(
        folder / "run.json",
        config=config.model_dump(mode="json", by_alias=True),
        seed=config.seed,
        device=_device_name(device),
    )
    keep_readings(record, readings)
    record.add(
        tensors=zoo.preflight.carried,
        notes=zoo.preflight.notes,
        warnings=zoo.preflight.warnings,
        checkpoints={
            name: {"path": c.path, "sha256": i.sha256, "notes": c.notes}
            for name, c, i in zip(zoo.names, zoo.checkpoints, zoo.ingredients, strict=True)
        },
    )
    for warning in zoo.preflight.warnings:
        log.warning(warning)
    return Run(config, root, folder, data, session, steps, record)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _check_learners(config: LearnConfig, data: LearningData) -> None:
    """What can be known to fail before any long work; all of it in one SoupError."""
    problems = select_problems(config.learners, len(data.select))
    made = config.zoo.finetune is not None and config.zoo.ingredients is None
    known = made or find_ingredients(config.zoo)[1] is not None
    problems += [
        f"learners.{row}: wise_ft is the line from the base to a soup, and the base is not known; "
        "name it with zoo.base, or take this row out"
        for row, settings in config.learners.items()
        if isinstance(settings, WiseFT) and not known
    ]
    problems += report_problems(config, base_known=known)
    if problems:
        raise SoupError("\n".join(problems))


def _check_rows(
    config: LearnConfig, ingredients: int, data: LearningData, model: nn.Module
) -> None:
    """SoupError for rows that will not fit the budget, before there is a zoo to measure them on.

    Planned with what is known by now, which is less than they will take.
    """
    device = next(model.parameters()).device
    images, labels = next(iter(data.select.batches(largest_batch(config.learners))))
    mixed = [t for t in model.state_dict().values() if t.is_floating_point()]
    weights = sum(tensor.numel() for tensor in mixed)
    costs = Costs(
        ingredients=ingredients,
        weights=weights,
        ingredient_bytes=weights * mixed[0].element_size(),
        activations=measure_activations(model, images.to(device), labels.to(device)),
        in_use=memory_in_use(device),
        image=1,
        batch_size=config.eval_batch_size,
        sources=ingredients,
        select=len(data.select),
        classes=len(data.classes),
        tensors=len(mixed),
        device=device.type,
        budget=config.memory_budget,
    )
    plan_learners(config.learners, costs)


def _plan(this: Run, say: Callable[[str], None]) -> dict[str, RowPlan]:
    """Look for barriers, choose block sizes, print what the run will cost.

    What was measured is kept: a killed run goes on with the same blocks although memory looks
    different by then, and a new row leaves the blocks of the others as they are unless its batch
    is larger than theirs.
    """
    session, steps = this.session, this.steps
    budget = this.config.memory_budget
    inputs = fingerprint(
        this.inputs | {"budget": budget, "batch": largest_batch(this.config.learners)}
    )
    if not steps.is_done("measure", inputs):
        midpoints = [vars(m) | {"warning": m.warning} for m in probe_midpoints(session)]
        session.release()
        images, labels = next(iter(session.select.batches(largest_batch(this.config.learners))))
        counted = session.passes.image_bytes(session.select)
        _warm_up(session.device)
        in_use = memory_in_use(session.device)
        probe = session.probe(session.eval_batch_size)
        with Meter(session.device) as meter:
            session.accuracy(probe)
        image = max(counted, (meter.peak_bytes - in_use) // len(probe))
        costs = Costs(
            ingredients=len(session.zoo.checkpoints),
            weights=sum(session.numels.values()),
            ingredient_bytes=sum(t.nbytes for t in session.zoo.checkpoints[0].tensors.values()),
            activations=measure_activations(
                session.model, images.to(session.device), labels.to(session.device)
            ),
            in_use=in_use,
            evaluation=max(meter.peak_bytes - in_use, image * session.eval_batch_size),
            image=image,
            batch_size=session.eval_batch_size,
            sources=len(session.sources.checkpoints),
            select=len(session.select),
            classes=len(session.select.classes),
            tensors=len(session.numels),
            device=session.device.type,
            budget=budget,
        )
        steps.finish("measure", inputs, [], {"midpoints": midpoints, "costs": vars(costs)})
    measured = steps.result("measure")
    costs = Costs(**measured["costs"])
    plans = plan_learners(this.config.learners, costs, folds=this.folds)
    warnings = [m["warning"] for m in measured["midpoints"] if m["warning"]]
    for warning in warnings:
        log.warning(warning)
    this.record.add(
        plan={row: vars(plan) for row, plan in plans.items()},
        midpoints=measured["midpoints"],
        warnings=warnings,
    )
    session.block_sizes = {row: p.block_size for row, p in plans.items() if p.block_size}
    session.in_use = measured["costs"]["in_use"]
    session.passes.least_image_bytes = measured["costs"]["image"]
    say(plan_table(plans).to_markdown(index=False))
    return plans


def _warm_up(device: torch.device) -> None:
    """Run a group once: the first one leaves what it imports and compiles in the process."""
    models = [nn.Linear(1, 1).to(device).eval() for _ in range(2)]
    with torch.inference_mode():
        Group.of(models)(torch.zeros(1, 1, device=device))


# --- learning and cooking ------------------------------------------------------------------------


def _soup(this: Run, row: str, settings: LearnerSettings, plan: RowPlan) -> Coefficients:
    """The learner's coefficients, and its soup in `soups/`; taken from the folder when finished."""
    session, steps = this.session, this.steps
    inputs = fingerprint(
        this.inputs
        | {"row": row, "settings": settings.model_dump(mode="json"), "block": plan.block_size}
    )
    path = this.folder / "coefficients" / f"{row}.json"
    if not steps.is_done(f"learn/{row}", inputs):
        log.info("learning %s", row)
        session.begin(row, steps.scratch(f"learn/{row}", inputs))
        with Meter(session.device) as meter:
            coefficients = LEARNERS[settings.type].function()(session, settings)
        session.release()
        spent = session.spent(meter)
        session.load(coefficients)
        selected = session.logits()
        coefficients.save(path)
        outcomes = keep_own(session.record, row, this.folder / "work" / "learn" / row)
        result = spent | {
            "select_accuracy": accuracy(correctness(selected, session.select.labels)),
            "record": session.record,
        }
        steps.finish(f"learn/{row}", inputs, [path, *outcomes], result)
    coefficients = Coefficients.load(path)
    _cook(this, row, coefficients)
    return coefficients


def _cook(this: Run, row: str, coefficients: Coefficients) -> None:
    path = this.soup(row)
    inputs = fingerprint(this.inputs | {"coefficients": coefficients.sha256})
    if not this.steps.is_done(f"cook/{row}", inputs):
        record = cook_soup(
            this.session, coefficients, path, memory_budget=this.config.memory_budget
        )
        this.steps.finish(f"cook/{row}", inputs, [path], {"record": record})


# --- the table -----------------------------------------------------------------------------------


def _leaderboard(
    this: Run, entries: Sequence[Entry], soups: Mapping[str, Coefficients], report: Report
) -> list[Row]:
    """Evaluate every row on *select* and on the report sets; write tables and predictions."""
    config, folder = this.config, this.folder
    images = report.sets[REPORT]  # shifted ones are made as they are read
    if this.session.in_use is not None and this.session.device.type == "cpu":
        this.session.in_use += len(images) * images.pixels(torch.arange(1)).nbytes
    sets = {"select": this.data.select, **report.sets}
    evaluated = evaluate_entries(this, entries, sets, report.scored)
    rows = [row for row, _ in evaluated]
    predictions = {row.learner: right for row, right in evaluated}
    baselines = baseline_rows(config.learners)
    rows = with_intervals(rows, predictions, baselines=baselines, seed=config.seed)
    rows = with_out_of_fold(this, rows, predictions)
    save_predictions(folder / "predictions.npz", predictions)
    report_examples(this, [*predictions], images).save(folder / EXAMPLES)
    judge_reports(this, soups, report)
    this.session.release()
    setting = Setting(
        data=config.data.path,
        select_examples=len(this.data.select),
        report_examples=len(images),
        readings=count_readings(report.readings),
        diversity=this.diversity,
    )
    write_leaderboard(rows, folder, setting)
    return rows


def baseline_rows(learners: dict[str, LearnerSettings]) -> list[str]:
    """The rows that all others are compared with."""
    first = {settings.type: row for row, settings in reversed(learners.items())}
    return [first[kind] for kind in BASELINES if kind in first]
