"""The curves of a zoo's training as a table; imports no torch."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from inputs.figures import save_figure
from inputs.files import write_whole
from soups.errors import SoupError

if TYPE_CHECKING:
    from fleet.recipes import Recipe
    from fleet.train import Point

CURVES_FILE = "curves.parquet"
PICTURE_FILE = "curves.png"
SECONDS_BETWEEN_PICTURES = 60.0
TYPES = {
    "name": "str",
    "phase": "str",
    "epoch": "int64",
    "step": "int64",
    "trained_epochs": "float64",
    "loss": "float64",
    "lr": "float64",
    "grad_norm": "float64",
    "tune_accuracy": "float64",
    "tune_loss": "float64",
    "seconds": "float64",
    "state": "str",
}


class Curves:
    """The curves of one training, written beside those of models that were trained before.

    `recipes` are those of the models that are trained now, by name, on `images` images of *fit*.
    """

    def __init__(self, folder: Path, recipes: Mapping[str, Recipe], images: int) -> None:
        self._table, self._picture = folder / CURVES_FILE, folder / PICTURE_FILE
        self._recipes = recipes
        self._images = images
        self._drawn = time.monotonic()
        before = read_curves(self._table)
        self._before = _rows_of(before, [n not in recipes for n in before["name"]])

    def write(self, points: Sequence[Point]) -> None:
        """Write the table of all points so far, and draw it again if the picture is old."""
        table = self._table_of(points)
        _write(table, self._table)
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES:
            self._draw(table)

    def finish(self, points: Sequence[Point], *, draw: bool = True) -> None:
        """Write the table, and the picture if it is to be drawn; nothing without any point."""
        table = self._table_of(points)
        if len(table):
            _write(table, self._table)
            if draw:
                self._draw(table)

    def _table_of(self, points: Sequence[Point]) -> pd.DataFrame:
        # Of a training that was killed there may also be those that are finished since.
        points = [point for point in points if point.name in self._recipes]
        own = pd.DataFrame(
            {
                name: [getattr(point, name) for point in points]
                for name in TYPES
                if name != "trained_epochs"
            }
        )
        own["trained_epochs"] = [self._trained_epochs(point) for point in points]
        tables = [table for table in (self._before, _typed(own)) if len(table)]
        return pd.concat(tables, ignore_index=True) if tables else _empty()

    def _trained_epochs(self, point: Point) -> float:
        """Epochs of *fit* that a model has been trained for; head epochs are before 0."""
        recipe = self._recipes[point.name]
        whole, rest = divmod(self._images, recipe.batch_size)
        trained = point.step / (whole + bool(rest and not recipe.drop_last))
        return trained - recipe.head_epochs if point.phase == "head" else trained

    def _draw(self, table: pd.DataFrame) -> None:
        from soups.plots.training import draw_curves

        save_figure(draw_curves(ingredients_of(table)), self._picture)
        self._drawn = time.monotonic()


def read_curves(path: Path) -> pd.DataFrame:
    """The table of curves at `path`; without rows where there is none.

    `trained_epochs` is a fraction between the ends of epochs; head epochs are before 0.
    """
    if not path.exists():
        return _empty()
    try:
        return _typed(pd.read_parquet(path))
    except (ValueError, KeyError) as error:
        raise SoupError(
            f"{path}: is not a table of curves ({' '.join(str(error).split())}); put it aside"
        ) from error


def ingredients_of(table: pd.DataFrame) -> pd.DataFrame:
    """The curves of the ingredients; where there are none yet, that of the base."""
    ingredients = _rows_of(table, [name != "base" for name in table["name"]])
    return ingredients if len(ingredients) else table


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({name: table[name].astype(kind) for name, kind in TYPES.items()})


def _rows_of(table: pd.DataFrame, chosen: Sequence[bool]) -> pd.DataFrame:
    return table.loc[list(chosen), :]


def _empty() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in TYPES.items()})


def _write(table: pd.DataFrame, path: Path) -> None:
    file = io.BytesIO()
    table.to_parquet(file, index=False)
    write_whole(path, file.getvalue())
