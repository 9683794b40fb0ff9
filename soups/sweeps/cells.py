"""What the workers of a sweep do; torch is imported when they do it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inputs.command import choose_device
from inputs.errors import InputError
from inputs.files import write_whole
from soups.checks import select_problems
from soups.config import LearnConfig, ZooConfig
from soups.errors import SoupError
from soups.record import WORK, Steps, fingerprint

# The parts of `data` that no zoo depends on.
_OF_OTHER_SPLITS = {"select", "report", "shifts", "select_seed"}
CELL_FILE = Path("work/cell.json")
STARTED_FILE = Path("work/started.json")


def check_cells(
    configs: Sequence[LearnConfig],
) -> tuple[list[tuple[int, str]], list[dict[str, str]]]:
    """What is wrong with each run that only its images and its zoo tell: (run, problem); and for
    each run the digests of its splits.

    The images are decoded on the way, so that workers find them in the cache.
    """
    problems: list[tuple[int, str]] = []
    loaded: dict[str, tuple[int, dict[str, str]] | str] = {}
    digests: list[dict[str, str]] = []
    for index, config in enumerate(configs):
        key = fingerprint(
            {"data": config.data.model_dump(mode="json"), "budget": config.memory_budget}
        )
        if key not in loaded:
            loaded[key] = _load_images(config)
        found = loaded[key]
        texts = [found] if isinstance(found, str) else select_problems(config.learners, found[0])
        try:
            _check_subset(config)
        except (InputError, SoupError) as error:
            texts.append(str(error))
        problems += [(index, text) for text in texts]
        digests.append({} if isinstance(found, str) else found[1])
    return problems, digests


def make_zoos(
    configs: Sequence[LearnConfig], images: Sequence[Mapping[str, str]], root: Path, progress: bool
) -> list[str]:
    """Make the zoos that are missing, each once; for each run what its zoo, images, model are.

    That is a fingerprint of the sizes and times of the zoo's files, of the digests `images`, and
    of a model factory's file.
    """
    from inputs.data import load_learning_data
    from inputs.models import describe_model
    from soups.report_door import shut
    from soups.zoo import make_zoo

    known: dict[str, list[list[Any]]] = {}
    found = []
    for config, digests in zip(configs, images, strict=True):
        model = describe_model(config.model, root)
        key = fingerprint(
            {
                "model": model,
                "data": config.data.model_dump(mode="json", exclude=_OF_OTHER_SPLITS),
                "zoo": config.zoo.model_dump(mode="json", exclude={"subset"}),
            }
        )
        if key not in known:
            if _is_made(config.zoo):
                data = load_learning_data(config.data, memory_budget=config.memory_budget)
                device = choose_device(config.device)
                with shut(lambda: "fine-tuning"):
                    make_zoo(config, data, root=root, device=device, progress=progress)
            known[key] = _stamps(config.zoo)
        found.append(fingerprint({"images": digests, "files": known[key], "model": model}))
    return found


def run_cell(config: LearnConfig, root: Path, made_from: str, keep_soups: bool) -> None:
    """One run, in its folder; then `work/cell.json` says what it was made from, and the seconds.

    Those of earlier starts of the same run are among them, as far as this one went on from there.
    Its zoo is there: it is opened, and not looked at again whether it is finished. Without
    `keep_soups` the cooked soups are removed; the coefficients are there to cook them again.
    """
    from soups.pipeline import run

    start = time.perf_counter()
    zoo = config.zoo
    if _is_made(zoo):
        zoo = zoo.model_copy(update={"finetune": None})
    config = config.model_copy(update={"zoo": zoo})
    folder = config.output / config.name
    before = {"made_from": made_from, "seconds": _seconds_before(folder, made_from)}
    write_whole(folder / STARTED_FILE, json.dumps(before | {"started": time.time()}) + "\n")
    (folder / CELL_FILE).unlink(missing_ok=True)
    run(config, root=root, fresh=False, progress=False, say=lambda text: None)
    if not keep_soups:
        shutil.rmtree(folder / "soups")
    seconds = before["seconds"] + time.perf_counter() - start
    write_whole(folder / CELL_FILE, json.dumps(before | {"seconds": seconds}) + "\n")
    (folder / STARTED_FILE).unlink()


def cell_record(folder: Path) -> dict[str, Any]:
    """What a finished run was made from, and its seconds; nothing of a run that is not finished."""
    return _read_record(folder / CELL_FILE)


def clear_cell(folder: Path) -> None:
    """Remove what earlier starts of the run wrote, and that it was finished."""
    for record in (CELL_FILE, STARTED_FILE):
        (folder / record).unlink(missing_ok=True)
    Steps(folder, fresh=True)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SoupError(f"{path}: is not JSON ({error}); remove it and run again") from error


def _seconds_before(folder: Path, made_from: str) -> float:
    """Of earlier starts with the same inputs; of one that was stopped, up to its last step."""
    started, steps = _read_record(folder / STARTED_FILE), folder / WORK / "steps.json"
    if started.get("made_from") == made_from:
        last = steps.stat().st_mtime if steps.exists() else 0.0
        return started["seconds"] + max(0.0, last - started["started"])
    record = cell_record(folder)
    return record["seconds"] if record.get("made_from") == made_from else 0.0


def _load_images(config: LearnConfig) -> tuple[int, dict[str, str]] | str:
    """How many images *select* has, and every split's digest; or what is wrong with them."""
    from inputs.data import load_learning_data
    from soups.report_door import report_digest
    from soups.rows import REPORT

    try:
        data = load_learning_data(config.data, memory_budget=config.memory_budget)
        digests = {REPORT: report_digest(config)}
    except (InputError, SoupError) as error:
        return str(error)
    splits = (data.fit, data.tune, data.select)
    return len(data.select), {images.name: images.digest() for images in splits} | digests


def _is_made(zoo: ZooConfig) -> bool:
    return zoo.finetune is not None and zoo.ingredients is None


def _check_subset(config: LearnConfig) -> None:
    """SoupError where the zoo has, or will have, fewer ingredients than the subset."""
    from soups.ingredients import draw_subset, find_ingredients
    from soups.zoo_folder import names_to_come

    zoo = config.zoo
    paths = names_to_come(zoo) if _is_made(zoo) else find_ingredients(zoo)[0]
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
