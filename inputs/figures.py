"""How every picture looks and is written: one style, PNG and SVG; matplotlib comes with a picture.

Figures are drawn without pyplot, so that nothing is shown and no state is left behind. Colours are
told apart with any colour vision (Okabe and Ito), and shades run evenly from dark to light, in grey
too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inputs.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

DPI = 150
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#262626"
# Of grids, and of what is small beside the data.
PALE, QUIET = "#E6E6E6", "#595959"
# Of several things that are told apart by colour; then again with the next dash or mark.
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Blue below and red above a middle that is white; from dark to light.
DIVERGING, SEQUENTIAL = "RdBu_r", "cividis"
TITLE, LABEL, SMALL = 10, 9, 8
LONGEST_NAME = 30
# The salt makes the names of the parts of an SVG file the same in every run.
SVG: dict[Any, str] = {"svg.hashsalt": "model soups", "svg.fonttype": "path"}
WITHOUT_TIME = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def new_figure(width: float, height: float) -> Figure:
    """A figure of these inches that makes room for its labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def picture_files(path: str | Path) -> list[Path]:
    """The files of the picture that is called `path`: the PNG file, and beside it the SVG file."""
    return [Path(path).with_suffix(f".{kind}") for kind in WITHOUT_TIME]


def save_figure(figure: Any, path: str | Path) -> list[Path]:
    """Write the figure as PNG and as SVG, beside each other; both paths.

    The same figure gives the same bytes: no time and no version is in them.
    """
    from matplotlib import rc_context

    paths = picture_files(path)
    layout = figure.get_layout_engine()
    for file, (kind, metadata) in zip(paths, WITHOUT_TIME.items(), strict=True):
        content = io.BytesIO()
        with rc_context(SVG):
            figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        write_whole(file, content.getvalue())
        figure.set_layout_engine("none")  # it is found, and stays for the next
    figure.set_layout_engine(layout)
    return paths


def clean_axes(axes: Axes) -> None:
    """Two spines, and quiet ones."""
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(color=GREY)


def grid_lines(axes: Axes, axis: str) -> None:
    """Pale lines across `axis` ("x", "y" or "both"), behind all that is drawn."""
    axes.grid(axis=axis, color=PALE, lw=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Put the names at 0, 1, … of the y axis; every second, third, … where there are very many."""
    step = math.ceil(len(names) / 90)
    ticks = range(0, len(names), step)
    size = 6.5 if len(names) > 40 else SMALL
    axes.set_yticks(ticks, [elided(names[k]) for k in ticks], fontsize=size)


def row_height(rows: int) -> float:
    """Inches for one of so many rows: as many as 90 names fit below each other."""
    return 0.23 if rows <= 30 else max(0.13, min(0.23, 11 / rows)) if rows <= 90 else 11.7 / rows


def elided(name: str, longest: int = LONGEST_NAME) -> str:
    """The name, without something in its middle where it is long."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return f"{name[: kept - 2 * kept // 3]}…{name[-(2 * kept // 3) :]}"


def legend_below(figure: Figure, axes: Sequence[Axes], *, columns_at_most: int) -> None:
    """One legend below for all axes, each label once."""
    handles = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(columns_at_most, len(handles)),
        frameon=False,
        fontsize=SMALL,
    )


def remark_above(figure: Figure, text: str) -> None:
    """A line above everything: what the numbers are of."""
    figure.suptitle(text, fontsize=7, color=QUIET)


def quiet_bar(bar: Colorbar) -> None:
    """A colour bar without a frame."""
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)  # type: ignore[operator]
