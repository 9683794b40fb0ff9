"""The picture of calibration: how often rows are right, against how sure they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from inputs.config import nearest
from inputs.figures import (
    BLUE,
    GREY,
    LABEL,
    PALE,
    QUIET,
    SMALL,
    clean_axes,
    elided,
    grid_lines,
    legend_below,
    new_figure,
    remark_above,
)
from soups.errors import SoupError
from soups.plots.reading import LEARN, needed, read_leaderboard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 15
MOST_ROWS = 12
ACROSS = 4
LONGEST_NAME = 24
# A bin with fewer images says too little to be drawn like the others.
FEW = 5


@dataclass(frozen=True)
class Bins:
    """Images by their confidence, in `BINS` bins of equal width; NaN where a bin is empty.

    `accuracy` and `confidence` are means; `low` and `high` are Wilson's 95% interval of the
    accuracy.
    """

    counts: Int64[np.ndarray, " bins"]
    accuracy: Float64[np.ndarray, " bins"]
    confidence: Float64[np.ndarray, " bins"]
    low: Float64[np.ndarray, " bins"]
    high: Float64[np.ndarray, " bins"]

    @classmethod
    def of(
        cls, confidence: Float[np.ndarray, " images"], right: Bool[np.ndarray, " images"]
    ) -> Bins:
        """Bin b of B holds confidences in (b/B, (b+1)/B], as for the calibration error."""
        from scipy.stats import binomtest

        values = confidence.astype(np.float64)
        place = np.clip(np.ceil(values * BINS).astype(int) - 1, 0, BINS - 1)
        counts = np.bincount(place, minlength=BINS)
        hits = np.bincount(place, weights=right, minlength=BINS)
        with np.errstate(invalid="ignore"):
            accuracy = hits / counts
            mean = np.bincount(place, weights=values, minlength=BINS) / counts
        ends = [
            binomtest(int(k), int(n)).proportion_ci(method="wilson") if n else (np.nan, np.nan)
            for k, n in zip(hits, counts, strict=True)
        ]
        low, high = np.array(ends, dtype=np.float64).T
        return cls(counts, accuracy, mean, low, high)

    @property
    def error(self) -> float:
        """The expected calibration error, Σ_b n_b/n · |accuracy_b − confidence_b| (1706.04599)."""
        gaps = self.counts * np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps) / self.counts.sum())


def reliability(folder: str | Path, learners: str | Sequence[str] | None = None) -> Figure:
    """A reliability diagram (1706.04599) of each row on *report*: accuracy against confidence.

    The confidence is the largest probability, without a temperature. `learners` are rows of the
    leaderboard, or one; without them all, in its order, twelve at most. Reads `examples.npz` and
    `leaderboard.csv`; raises SoupError where they are not there, or have no such row.
    """
    from soups.examples import FILE, ReportExamples

    folder = Path(folder)
    learners = [learners] if isinstance(learners, str) else learners
    what = "every row's confidence on the images of report"
    path = needed(folder / FILE, what, f"{LEARN} writes it beside the leaderboard")
    examples = ReportExamples.load(path)
    rows = [row for row in read_leaderboard(folder)["learner"] if row in examples.rows]
    unknown = [name for name in learners or () if name not in rows]
    if unknown:
        raise SoupError(f"{path}: has no row {unknown[0]!r}{nearest(unknown[0], rows)}")
    shown = [*(learners or rows[:MOST_ROWS])]
    bins = [Bins.of(examples.rows[row].confidence, examples.right(row)) for row in shown]
    left = len(rows) - len(shown) if learners is None else 0
    remark = f"{len(examples.labels):,} images of report; above on the right, calibration errors"
    return draw_reliability(shown, bins, f"{remark}; {left} rows more" if left > 0 else remark)


def draw_reliability(names: Sequence[str], bins: Sequence[Bins], remark: str) -> Figure:
    """Draw a diagram for each name: points below the diagonal are too sure of themselves."""
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure = new_figure(max(4.6, 0.9 + 2.3 * across), 1.2 + 2.4 * down)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for place, (name, own) in enumerate(zip(names, bins, strict=True)):
        axes = panels.flat[place]
        _draw(axes, own)
        axes.set_title(elided(name, LONGEST_NAME), loc="left", fontsize=LABEL)
        axes.set_title(f"{100 * own.error:.1f}%", loc="right", fontsize=SMALL, color=QUIET)
        if place + across >= len(names):  # there is none below
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("confidence", fontsize=SMALL)
        if place % across == 0:
            axes.set_ylabel("accuracy", fontsize=SMALL)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    legend_below(figure, figure.axes, columns_at_most=4 if across > 2 else 2)
    remark_above(figure, remark)
    return figure


def _draw(axes: Axes, bins: Bins) -> None:
    middles = (np.arange(BINS) + 0.5) / BINS
    share = bins.counts / bins.counts.sum()
    axes.bar(middles, share, width=1 / BINS, color=PALE, label="share of the images")
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls="--", label="as sure as right")
    for which, colour, fill, label in (
        (bins.counts >= FEW, BLUE, BLUE, "accuracy, 95% interval"),
        ((bins.counts > 0) & (bins.counts < FEW), GREY, "white", f"fewer than {FEW} images"),
    ):
        x, y = bins.confidence[which], bins.accuracy[which]
        axes.vlines(x, bins.low[which], bins.high[which], colour, lw=1.1, zorder=3)
        if which.any():
            look = {"ls": "", "marker": "o", "ms": 4, "mec": colour, "mfc": fill, "zorder": 4}
            axes.plot(x, y, label=label, clip_on=False, **look)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(labelsize=SMALL)
    grid_lines(axes, "both")
    clean_axes(axes)
