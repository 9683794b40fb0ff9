"""What is said below a run's table, in plain words: what each number is and how far it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soups.diversity import Diversity
from soups.readings import Count
from soups.rows import SHIFT, Row, baselines_of, extra_sets, ranked


@dataclass(frozen=True)
class Setting:
    """What the table is of: the data's name, the images of *select* and *report*, the ingredients.

    `readings` says how often rows were scored on *report* and how many, as far as that is known;
    `diversity` how alike the `zoo_size` ingredients are on *select*.
    """

    data: str
    select_examples: int
    report_examples: int
    readings: Count | None = None
    diversity: Diversity | None = None


def caption(rows: Sequence[Row], setting: Setting) -> str:
    """The caption as Markdown."""
    parts = [
        _data(setting),
        *_out_of_fold(rows),
        *_uncertainty(rows),
        *_differences(rows),
        *_ingredients(rows, setting.diversity),
        *_shifts(rows),
        "“Ingredients” are those that the row uses. Worst class, loss (nats), Brier score (0 to 2) "
        "and expected calibration error (15 bins) are on *report*; “→ scaled” is after one "
        "temperature, fitted on *select*. Passes are examples through one model over the size of "
        "*select*. Seconds and peak memory are of choosing or learning, on this machine.",
    ]
    notes = [f"- {row.learner}: {note}" for row in ranked(rows) for note in row.notes]
    return "\n\n".join(parts) + ("\n\nNotes:\n\n" + "\n".join(notes) if notes else "") + "\n"


def _data(setting: Setting) -> str:
    text = (
        f"Data: {setting.data}. Soups were learned on *select* ({setting.select_examples:,} "
        f"images) and measured on *report* ({setting.report_examples:,} images); report accuracy "
        "decides the order."
    )
    if setting.readings is None:
        return text
    return f"{text} {readings_text(setting.readings)}"


def readings_text(count: Count) -> str:
    """How often *report* was read, and what that means."""
    often = "once" if count.times == 1 else f"{count.times} times"
    text = f"*report* was read {often}, for {count.rows} row{'s' * (count.rows != 1)} in all"
    if count.times == 1:
        return f"{text}."
    return (
        f"{text} (`run.json` says when and which): what was changed after looking was chosen on "
        "*report* too, and its numbers flatter it."
    )


def _out_of_fold(rows: Sequence[Row]) -> list[str]:
    folds = sorted({row.out_of_fold.folds for row in rows if row.out_of_fold})
    if not folds:
        return []
    text = (
        "“Out of fold” is the accuracy on *select* where each image is judged by a soup that "
        f"was learned without it ({' or '.join(map(str, folds))} folds)."
    )
    if any(row.out_of_fold and not row.out_of_fold.own for row in rows):
        text += (
            " What that has cost is in `leaderboard.csv`, and not in the seconds and passes of the "
            "row."
        )
    own = [row.learner for row in ranked(rows) if row.out_of_fold and row.out_of_fold.own]
    if own:
        text += (
            f" {', '.join(own)}: on the folds by which the learner itself has chosen, so slightly "
            "flattering; what that has cost is in its row."
        )
    return [text]


def _uncertainty(rows: Sequence[Row]) -> list[str]:
    if not any(row.interval for row in rows):
        return []
    return [
        "[low, high] are 95% percentile bootstrap intervals over the report images: what "
        "another draw of images would change, not another draw of ingredients or seeds."
    ]


def _differences(rows: Sequence[Row]) -> list[str]:
    parts = []
    names = baselines_of(rows)
    if names:
        columns = " and ".join(f"“vs {name}”" for name in names)
        parts.append(
            f"{columns}: the difference in report accuracy, in points, with the paired interval "
            "over the same images. “p” is of the exact McNemar test: how often two equally good "
            "models would come out this far apart on these images, or farther. It is corrected "
            "(Holm) for all rows of its column; at 0.05 or below the row differs by more than the "
            "choice of images."
        )
    tied = [row.learner for row in ranked(rows) if row.tied]
    if len(tied) > 1:
        parts.append(
            f"≈ marks the soups that these images do not tell from the best one, {tied[0]} (exact "
            "McNemar tests, Holm's correction for all pairs of soups). To be tied is not to be "
            "equal: more images may tell them apart."
        )
    return parts


def _ingredients(rows: Sequence[Row], found: Diversity | None) -> list[str]:
    if found is None:
        return []
    text = (
        f"Two of the {rows[0].zoo_size} ingredients are both right or both wrong on "
        f"{100 * found.agreement:.1f}% of *select* (mean over pairs)."
    )
    if found.effective_size is not None:
        text += (
            f" Their errors correlate by {found.error_correlation:.2f}, so that together they "
            f"average like {found.effective_size:.1f} with independent errors."
        )
    return [text]


def _shifts(rows: Sequence[Row]) -> list[str]:
    averaged = [
        f"{kind} ({', '.join(matched[2] for name in names if (matched := SHIFT.fullmatch(name)))})"
        for kind, names in extra_sets(rows).items()
        if len(names) > 1
    ]
    if not averaged:
        return []
    return [
        f"Shifted report sets are means over severities: {', '.join(averaged)}; "
        "`leaderboard.csv` has each."
    ]
