"""How alike the ingredients' deltas are, and where they disagree."""

from __future__ import annotations

from pathlib import Path

from inputs.figures import save_figure
from inputs.files import write_whole
from merge.inspection.heatmap import plot_inspection
from merge.inspection.inspection import inspect_models
from soups.reports.material import Material
from soups.reports.registry import Deltas
from soups.reports.tables import beside


def deltas(material: Material, settings: Deltas, path: Path) -> list[Path]:
    """Cosines and sign conflicts of the ingredients' deltas, in all and by layer.

    Every checkpoint is read once, in slices. Writes the tables of an inspection as CSV, all of
    them as Markdown, and a picture.
    """
    session = material.session
    zoo = session.zoo
    session.release()
    inspection = inspect_models(
        zoo.checkpoints,
        base=zoo.base,
        names=zoo.names,
        only={name for mixed in session.numels for name in (mixed, *zoo.tied.get(mixed, ()))},
        memory_budget=session.memory_budget,
        progress=session.progress,
    )
    tables = inspection.tables()
    files = []
    for name, table in tables.items():
        files.append(beside(path, f"_{name}.csv"))
        write_whole(files[-1], table.to_csv(index=False))
    files.append(beside(path, ".md"))
    write_whole(files[-1], inspection.to_markdown() + "\n")
    return [*files, *save_figure(plot_inspection(tables), beside(path, ".png"))]
