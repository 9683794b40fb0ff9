"""What the workers of a sweep do; torch is imported when they do it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inputs.command import choose_device
from inputs.errors import InputError
from inputs.files import write_whole
from soups.checks import select_problems
from soups.config import LearnConfig, ZooConfig
from soups.errors import SoupError
from soups.record import fingerprint

# The parts of `data` that no zoo depends on.
_OF_OTHER_SPLITS = {"select", "report", "shifts", "select_seed"}
CELL_FILE = Path("work/cell.json")


def check_cells(configs: Sequence[LearnConfig]) -> list[tuple[int, str]]:
    """What is wrong with each run that only its images and its zoo tell: (run, problem).

    The images are decoded on the way, so that workers find them in the cache.
    """
    from inputs.data import load_learning_data, load_report_data

    problems: list[tuple[int, str]] = []
    for index, config in enumerate(configs):
        try:
            data = load_learning_data(config.data, memory_budget=config.memory_budget)
            load_report_data(config.data, memory_budget=config.memory_budget)
            _check_subset(config)
        except (InputError, SoupError) as error:
            problems.append((index, str(error)))
        else:
            found = select_problems(config.learners, len(data.select))
            problems += [(index, text) for text in found]
    return problems


def make_zoos(
    configs: Sequence[LearnConfig], root: Path, threads: int, progress: bool
) -> list[str]:
    """Make the zoos that are missing, each once; for each run what its zoo and images are.

    That is a fingerprint of *fit* and *tune* and of the sizes and times of the zoo's files. No
    other worker runs meanwhile: `threads` of them are used.
    """
    import torch

    from inputs.data import load_learning_data
    from soups.zoo import make_zoo

    known: dict[str, str] = {}
    found = []
    for config in configs:
        key = fingerprint(
            {
                "model": config.model.model_dump(mode="json"),
                "data": config.data.model_dump(mode="json", exclude=_OF_OTHER_SPLITS),
                "zoo": config.zoo.model_dump(mode="json", exclude={"subset"}),
            }
        )
        if key not in known:
            data = load_learning_data(config.data, memory_budget=config.memory_budget)
            if _is_made(config.zoo):
                device = choose_device(config.device)
                own = torch.get_num_threads()
                torch.set_num_threads(threads)
                make_zoo(config, data, root=root, device=device, progress=progress)
                torch.set_num_threads(own)
            images = [data.fit.digest(), data.tune.digest()]
            known[key] = fingerprint({"images": images, "files": _stamps(config.zoo)})
        found.append(known[key])
    return found


def run_cell(
    config: LearnConfig, root: Path, fresh: bool, made_from: str, keep_soups: bool
) -> None:
    """One run, in its folder; then `work/cell.json` says what it was made from, and the seconds.

    Its zoo is there: it is opened, and not looked at again whether it is finished. Without
    `keep_soups` the cooked soups are removed; the coefficients are there to cook them again.
    """
    from soups.pipeline import run

    start = time.perf_counter()
    zoo = config.zoo
    if _is_made(zoo):
        zoo = zoo.model_copy(update={"finetune": None})
    config = config.model_copy(update={"zoo": zoo})
    run(config, root=root, fresh=fresh, progress=False, say=lambda text: None)
    folder = config.output / config.name
    if not keep_soups:
        shutil.rmtree(folder / "soups")
    record = {"made_from": made_from, "seconds": time.perf_counter() - start}
    write_whole(folder / CELL_FILE, json.dumps(record) + "\n")


def _is_made(zoo: ZooConfig) -> bool:
    return zoo.finetune is not None and zoo.ingredients is None


def _check_subset(config: LearnConfig) -> None:
    """SoupError where the zoo has, or will have, fewer ingredients than the subset."""
    from soups.ingredients import draw_subset, find_ingredients
    from soups.zoo import names_of_run, sample_recipes

    zoo = config.zoo
    if zoo.finetune is not None and _is_made(zoo):
        recipes = enumerate(sample_recipes(zoo.finetune))
        paths = [name for i, recipe in recipes for name in names_of_run(i, recipe, zoo.finetune)]
    else:
        paths, _ = find_ingredients(zoo)
    if zoo.subset is not None:
        draw_subset(paths, zoo.subset, config.seed)


def _stamps(zoo: ZooConfig) -> list[list[Any]]:
    """Path, size and time of change of every file of the zoo; of an id on the Hub the id alone."""
    from soups.ingredients import find_ingredients

    paths, base = find_ingredients(zoo)
    stamps: list[list[Any]] = []
    for path in [*paths, *([base] if base else [])]:
        place = Path(path)
        files = (
            sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else []
        )
        for file in files or [place]:
            status = file.stat() if file.exists() else None
            stamps.append([str(file), *([status.st_size, status.st_mtime_ns] if status else [])])
    return stamps
