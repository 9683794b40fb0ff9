"""Write the pictures of a run beside its tables."""

from __future__ import annotations

from pathlib import Path

from inputs.figures import save_figure as save_figure
from soups.plots.calibration import reliability
from soups.plots.generalising import overfitting
from soups.plots.learned import coefficients
from soups.plots.ranking import costs, leaderboard
from soups.plots.reading import read_leaderboard, read_record


def write_pictures(folder: str | Path) -> list[Path]:
    """Draw everything that a finished run has numbers for, except its reports, into `pictures/`.

    The leaderboard, costs, calibration, what cross-fitting has found, and every soup's
    coefficients, as PNG and SVG. Returns the files. Raises SoupError where the folder is not
    that of a finished run.
    """
    folder = Path(folder)
    rows = read_leaderboard(folder)
    figures = {
        "leaderboard": leaderboard(folder),
        "costs": costs(folder),
        "reliability": reliability(folder),
    }
    if rows["out_of_fold_accuracy"].notna().to_numpy().any():
        figures["overfitting"] = overfitting(folder)
    for row in read_record(folder)["config"]["learners"]:
        figures[f"coefficients_{row}"] = coefficients(folder, row)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    return [
        file
        for name, figure in figures.items()
        for file in save_figure(figure, pictures / f"{name}.png")
    ]
