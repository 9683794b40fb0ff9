"""The style of pictures: what is written, and that it is the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from inputs.figures import (
    COLOURS,
    clean_axes,
    elided,
    grid_lines,
    legend_below,
    name_rows,
    new_figure,
    picture_files,
    save_figure,
)


def figure_of_many_parts():
    figure = new_figure(3.0, 2.0)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "o", label="points")
    axes.imshow([[0.0, 1.0]], aspect="auto")
    axes.fill_between([0, 1], 0, [1, 2], alpha=0.2, label="points")
    grid_lines(axes, "both")
    clean_axes(axes)
    legend_below(figure, [axes], columns_at_most=2)
    return figure


def test_a_figure_is_written_as_png_and_as_svg(tmp_path: Path):
    files = save_figure(figure_of_many_parts(), tmp_path / "loss.v1.png")
    assert [file.name for file in files] == ["loss.v1.png", "loss.v1.svg"]
    assert files == picture_files(tmp_path / "loss.v1.png")
    with Image.open(files[0]) as png:
        assert png.format == "PNG"
        assert png.info["dpi"][0] == pytest.approx(150, abs=0.1)
        assert png.size == (450, 300)
    assert ElementTree.parse(files[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path):
    """In another process too: no time, no version, no random names."""
    code = (
        "import sys; from tests.inputs.test_figures import figure_of_many_parts\n"
        "from inputs.figures import save_figure\n"
        "save_figure(figure_of_many_parts(), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], check=True, cwd=root)
    save_figure(figure_of_many_parts(), tmp_path / "b.png")
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_legend_has_each_label_once():
    (legend,) = figure_of_many_parts().legends
    assert [text.get_text() for text in legend.get_texts()] == ["points"]


def test_long_names_keep_their_ends():
    name = "encoder.layers.12.attention.self.query.weight"
    assert elided("head.bias") == "head.bias"
    assert len(elided(name)) == 30
    assert elided(name).startswith("encoder")
    assert elided(name).endswith("query.weight")


def test_of_many_rows_some_are_named():
    axes = new_figure(2.0, 2.0).add_subplot()
    name_rows(axes, [f"{k:03d}" for k in range(200)])
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["000", "003", "006"]


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb` (WCAG 2)."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
def test_colours_are_told_apart_with_any_colour_vision(kind: str):
    """By the dichromats' matrices of Machado et al. (2009), severity 1, on linear light."""
    matrices = {
        "protan": [(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)],
        "deutan": [(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                   (-0.011820, 0.042940, 0.968881)],
        "tritan": [(1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                   (0.004733, 0.691367, 0.303900)],
    }  # fmt: skip

    def seen(colour: str) -> list[float]:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        return [sum(m * p for m, p in zip(row, parts, strict=True)) for row in matrices[kind]]

    for i, one in enumerate(COLOURS):
        for other in COLOURS[:i]:
            apart = sum((a - b) ** 2 for a, b in zip(seen(one), seen(other), strict=True)) ** 0.5
            assert apart > 0.1, (one, other)
    assert max(map(luminance, COLOURS[:2])) < 0.3  # dark enough for lines on white
