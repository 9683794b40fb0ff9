"""Open a zoo: find the checkpoints, check them against each other and the model, hash them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from inputs.randomness import generator
from inputs.zoo_files import SUFFIXES, holds_checkpoint
from merge.checkpoints import Checkpoint, open_checkpoint
from merge.coefficients import Ingredient
from merge.errors import MergeError
from merge.preflight import Preflight, inspect_ingredients
from merge.stream import stored_name
from soups.config import ZooConfig
from soups.errors import SoupError


@dataclass(frozen=True)
class Zoo:
    """The open ingredients, the base where it is known, and what preflight found.

    `tied` maps each name of a tensor that the model shares to its other names.
    """

    names: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    preflight: Preflight
    tied: dict[str, tuple[str, ...]]
    ingredients: tuple[Ingredient, ...]
    base_ingredient: Ingredient | None

    def stored(self, checkpoint: Checkpoint, name: str) -> str:
        """The name under which the checkpoint holds a tensor of the model; empty if it does not."""
        return stored_name(checkpoint, name, self.tied) or ""


def find_ingredients(config: ZooConfig) -> tuple[list[str], str | None]:
    """Paths or ids of the ingredients, sorted where they come from a folder, and of the base.

    In a folder, every checkpoint file and every folder that holds one is an ingredient; one that
    is called `base` is the base unless zoo.base names another.
    """
    if config.ingredients is not None:
        found = [path for entry in config.ingredients for path in _expand(entry, config.path)]
        return found, config.base
    if not config.path.is_dir():
        raise SoupError(
            f"zoo.path: there is no folder {config.path}; give a folder of checkpoints, or "
            "zoo.finetune to have it made"
        )
    entries = [entry for entry in sorted(config.path.iterdir()) if holds_checkpoint(entry)]
    bases = [str(entry) for entry in entries if entry.stem == "base"]
    base = config.base or next(iter(bases), None)
    return [str(e) for e in entries if str(e) not in bases and not _same(e, base)], base


def draw_subset(paths: list[str], count: int, seed: int) -> list[str]:
    """`count` of the paths, drawn by `seed`; they keep their order, and those of fewer are among
    those of more.

    Raises SoupError where there are not as many.
    """
    if count > len(paths):
        raise SoupError(
            f"zoo.subset: {count} is more than the {len(paths)} ingredients that there are; lower "
            "it, or make a larger zoo"
        )
    drawn = torch.randperm(len(paths), generator=generator(seed, "zoo.subset"))[:count]
    return [paths[k] for k in sorted(drawn.tolist())]


def open_zoo(
    config: ZooConfig,
    model: nn.Module,
    *,
    cache: Path,
    memory_budget: int,
    progress: bool,
    seed: int,
) -> Zoo:
    """Open and check all ingredients; hashes of unchanged files are taken from `cache`.

    `seed` draws those of `zoo.subset`. Raises MergeError with every problem in one report, and
    SoupError where there are not at least two ingredients, or not as many as the subset has.
    """
    paths, base_path = find_ingredients(config)
    if config.subset is not None:
        paths = draw_subset(paths, config.subset, seed)
    if len(paths) < 2:
        raise SoupError(
            f"{config.path}: found {len(paths)} ingredient{'s' * (len(paths) != 1)}; a soup needs "
            f"at least two checkpoints of one architecture ({', '.join(sorted(SUFFIXES))}, or "
            "folders that hold one): put them there, or name them in zoo.ingredients"
        )
    state = model.state_dict()
    every = [*paths, *([base_path] if base_path else [])]
    opened = _open_all(every, config, names=[*state], memory_budget=memory_budget)
    checkpoints = tuple(opened[: len(paths)])
    base = opened[-1] if base_path else None
    preflight = inspect_ingredients(
        checkpoints,
        base=base,
        skip=tuple(config.skip),
        expected={name: (tuple(t.shape), t.dtype) for name, t in state.items()},
        tied=_tied_in(model),
        check_finite=config.check_finite,
        cache=cache,
        progress=progress,
    )
    preflight.raise_if_broken()
    names = ingredient_names(paths)
    base_scan = preflight.base_scan
    return Zoo(
        names=names,
        checkpoints=checkpoints,
        base=base,
        preflight=preflight,
        tied={n: tuple(o for o in shared if o != n) for shared in _tied_in(model) for n in shared},
        ingredients=tuple(
            Ingredient(name, scan.sha256) for name, scan in zip(names, preflight.scans, strict=True)
        ),
        base_ingredient=Ingredient("base", base_scan.sha256) if base_scan else None,
    )


def _open_all(
    paths: list[str], config: ZooConfig, *, names: list[str], memory_budget: int
) -> list[Checkpoint]:
    """All of them, or one MergeError that says what is wrong with each that cannot be opened."""
    opened, problems = [], []
    for path in paths:
        try:
            opened.append(
                open_checkpoint(path, names=names, ema=config.ema, memory_budget=memory_budget)
            )
        except MergeError as error:
            problems.append(str(error))
    if problems:
        for checkpoint in opened:
            checkpoint.close()
        raise MergeError("\n".join(problems))
    return opened


def _expand(entry: str, folder: Path) -> list[str]:
    """A glob's matches, a path inside the zoo's folder, or the entry itself (a path or id)."""
    if any(character in entry for character in "*?["):
        matches = sorted(str(path) for path in folder.glob(entry))
        if not matches:
            raise SoupError(f"zoo.ingredients: nothing in {folder} matches {entry!r}")
        return matches
    inside = folder / entry
    return [str(inside)] if inside.exists() else [entry]


def _same(entry: Path, base: str | None) -> bool:
    return base is not None and Path(base).exists() and entry.samefile(base)


def ingredient_names(paths: list[str]) -> tuple[str, ...]:
    """The files' stems; whole paths where two share one; a number behind a path given again."""
    stems = [Path(p).stem if Path(p).suffix in SUFFIXES else Path(p).name for p in paths]
    count, seen = Counter(stems), Counter[str]()
    names = []
    for stem, path in zip(stems, paths, strict=True):
        seen[path] += 1
        again = f" ({seen[path]})" if seen[path] > 1 else ""
        names.append((stem if count[stem] == 1 else path) + again)
    return tuple(names)


def _tied_in(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that the model uses under several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(shared) for shared in names.values() if len(shared) > 1]
