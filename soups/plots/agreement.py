"""The picture of how alike the ingredients' deltas are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soups.plots.reading import find_report, read_table, report_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS = {"cosine": ("model",), "pairs": ("layer", "a", "b"), "layers": ("layer",)}


def deltas(folder: str | Path, report: str | None = None) -> Figure:
    """Cosines and sign conflicts of the ingredients' deltas to the base, and by layer.

    Reads a report of type `deltas`, the row `report` of the config if there are several. Raises
    SoupError where there is none.
    """
    from merge.inspection.heatmap import plot_inspection

    stem, _ = find_report(Path(folder), "deltas", report, "deltas: {}")
    return plot_inspection(
        {
            name: read_table(report_file(stem, f"_{name}.csv"), texts=texts)
            for name, texts in TEXTS.items()
        }
    )
