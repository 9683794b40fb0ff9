"""What taking one ingredient out of a soup changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from inputs.figures import save_figure
from soups.plots.effects import draw_leave_one_out, missed_first
from soups.reports.material import Material
from soups.reports.points import shared_groups
from soups.reports.registry import LeaveOneOut
from soups.reports.tables import Effects, beside, standard_error, write_csv, write_markdown

Matrix = Float64[np.ndarray, "ingredients groups"]


def without(matrix: Matrix, k: int, *, base_known: bool) -> Matrix:
    """The coefficients with ingredient k taken out.

    `A'[j] = A[j] + A[k]·|A[j]| / Σ_{i≠k} |A[i]|` in each group, so that a group keeps its sum and
    a mean becomes the mean of the others. A group in which k is alone falls to the base, else to
    the others in equal parts.
    """
    weights = np.abs(matrix)
    weights[k] = 0.0
    alone = ~weights.any(axis=0)
    weights[:, alone] = 0.0 if base_known else 1.0
    weights[k] = 0.0
    total = weights.sum(axis=0)
    rest = matrix + matrix[k] * weights / np.where(total > 0, total, 1.0)
    rest[k] = 0.0
    return rest


def leave_one_out(material: Material, settings: LeaveOneOut, path: Path) -> list[Path]:
    """The soup without each ingredient against the soup, on the same images, in one pass.

    Writes a table as CSV (in the zoo's order) and Markdown (what is missed most first), and a
    picture. Errors are those of paired differences over the images of *select*.
    """
    session, names = material.session, material.session.zoo.names
    columns = material.point(settings.of)
    groups, (matrix,) = shared_groups([*session.numels], columns[None])
    # An ingredient without weight changes nothing, and needs no run to show it.
    used = np.flatnonzero(matrix.any(axis=1)).tolist()
    base_known = session.zoo.base is not None
    rest = [without(matrix, k, base_known=base_known) for k in used]
    scores = session.evaluate(np.stack([matrix, *rest]), groups)
    whole = {"accuracy": float(scores.accuracies[0]), "loss": float(scores.mean_losses[0])}
    changes = {
        "accuracy": _changes(scores.right.double().numpy(), used, len(names)),
        "loss": _changes(scores.losses.double().numpy(), used, len(names)),
    }
    shares = np.average(columns, axis=1, weights=[*session.numels.values()])
    rows = [
        {"ingredient": name, "share": float(shares[k])}
        | {metric: whole[metric] + change.values[k] for metric, change in changes.items()}
        | changes["accuracy"].record("accuracy_change", k)
        | changes["loss"].record("loss_change", k)
        for k, name in enumerate(names)
    ]
    accuracy, loss = changes["accuracy"], changes["loss"]
    session.record |= {"of": settings.of, **whole, "ingredients": rows}
    return [
        write_csv(beside(path, ".csv"), rows),
        write_markdown(
            beside(path, ".md"),
            f"{settings.of} without one ingredient",
            ["without", "share", "accuracy, points [95%]", "loss, nats [95%]"],
            [
                [
                    names[k],
                    f"{shares[k]:.4f}",
                    accuracy.cell(k, scale=100.0),
                    loss.cell(k, digits=4),
                ]
                for k in missed_first(accuracy, loss)
            ],
            f"The change of {settings.of} (accuracy {100 * whole['accuracy']:.2f}%, loss "
            f"{whole['loss']:.4f}) when the ingredient is taken out and its coefficients are given "
            "to the others in proportion: an accuracy below 0, or a loss above it, is an "
            "ingredient that the soup misses. Share is the ingredient's mean coefficient over the "
            f"weights. {material.remark}; 95% intervals are of the paired difference over these "
            "images.",
        ),
        *save_figure(
            draw_leave_one_out(settings.of, names, accuracy, loss, material.remark),
            beside(path, ".png"),
        ),
    ]


def _changes(
    values: Float64[np.ndarray, "candidates rows"], used: list[int], count: int
) -> Effects:
    """By how much candidate 1 + i, which is without used[i], differs from the first."""
    change, error = np.zeros(count), np.zeros(count)
    apart = values[1:] - values[0]
    change[used], error[used] = apart.mean(axis=1), standard_error(apart)
    return Effects(change, error)
