"""What a cross-fitted learner ends with: its best trial out of fold, or greedy; with intervals."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.stats import t as students_t

from merge.coefficients import Coefficients
from soups.learners.registry import CrossFittedSettings
from soups.learners.trials import NUMBERS, Gain, Trial
from soups.norms import Groups
from soups.session import Session

LEVEL = 0.95

log = logging.getLogger(__name__)


def conclude(
    session: Session,
    settings: CrossFittedSettings,
    groups: Groups,
    trials: Sequence[Trial],
    finished: Mapping[str, Float64[np.ndarray, "views ingredients groups"]],
    weights: Mapping[str, list[dict[str, Any]]],
) -> Coefficients:
    """The soup of the trial that is best out of fold, unless greedy stays.

    It is the last of what is `finished` of that name, else the mean of the folds' soups; its
    ingredients' weights are recorded with their intervals, the jackknife's where they are not in
    `weights`. Best is the lowest loss out of fold after a temperature: accuracies differ by less
    than their errors long after losses do not. Greedy stays where that trial does not gain more
    than `gate` paired standard errors on it out of fold; its soup is then greedy's on all of
    *select*.
    """
    greedy = next(trial for trial in trials if trial.name == "greedy")
    best = min(trials, key=Trial.mean_loss)
    gains = {
        "loss": Gain.of(greedy.losses - best.losses),
        "accuracy": Gain.of(best.right.astype(float) - greedy.right),
    }
    gain = gains[settings.gate_by]
    passes = gain.mean > settings.gate * gain.standard_error
    taken = best if passes else greedy
    known = finished.get(taken.name)
    soup = taken.soups.mean(axis=0) if known is None else known[-1]
    session.record |= {
        "trials": [trial.described() for trial in trials],
        "best_trial": best.name,
        "gate": {
            "kept": taken.name,
            "by": settings.gate_by,
            "standard_errors_wanted": settings.gate,
            "gains_on_greedy": {name: vars(own) for name, own in gains.items()},
        },
        "out_of_fold": {
            "accuracy": float(taken.right.mean()),
            "loss": taken.mean_loss(),
            "folds": len(taken.soups),
            "right": taken.right.tolist(),
        },
        "free_coefficients": min(taken.numbers, soup.shape[1]) * (len(soup) - 1),
        "weights": weights.get(taken.name) or jackknife(session.zoo.names, soup, taken.soups),
    }
    log.info(
        "%s: takes %s; out of fold %s gains %.4f ± %.4f nats and %+.2f ± %.2f points on greedy",
        session.row,
        taken.name,
        best.name,
        gains["loss"].mean,
        gains["loss"].standard_error,
        100 * gains["accuracy"].mean,
        100 * gains["accuracy"].standard_error,
    )
    temperature = 1.0 if taken.name in NUMBERS else taken.temperature
    if (soup == soup[:, :1]).all():
        groups, soup = session.whole_model(), soup[:, :1]
    return session.coefficients(groups, soup, settings, temperature=temperature)


def jackknife(
    names: Sequence[str],
    soup: Float64[np.ndarray, "ingredients groups"],
    soups: Float64[np.ndarray, "folds ingredients groups"],
) -> list[dict[str, Any]]:
    """Each ingredient's weight, its mean over groups, with the 95% interval of the jackknife.

    The variance is `(F − 1)/F Σ_f (A_f − mean)²` over the F soups learned without a fold
    (delete-a-group jackknife), the quantile Student's t with F − 1 degrees of freedom.
    """
    weights, of_folds = soup.mean(axis=1), soups.mean(axis=2)
    folds = len(soups)
    errors = np.sqrt((folds - 1) * of_folds.var(axis=0))
    reach = students_t.ppf((1 + LEVEL) / 2, folds - 1) * errors
    columns = zip(names, weights.tolist(), errors.tolist(), reach.tolist(), strict=True)
    return [described_weight(*column) for column in columns]


def described_weight(name: str, weight: float, error: float, reach: float) -> dict[str, Any]:
    """An ingredient's weight in the run record."""
    return {
        "ingredient": name,
        "weight": weight,
        "standard_error": error,
        "low": weight - reach,
        "high": weight + reach,
    }


def warn_of_identical(session: Session) -> None:
    """Name in a warning the ingredients that hold the same tensors."""
    by_hash: dict[str, list[str]] = {}
    for ingredient in session.zoo.ingredients:
        by_hash.setdefault(ingredient.sha256, []).append(ingredient.name)
    for names in (names for names in by_hash.values() if len(names) > 1):
        log.warning(
            "%s: %s are the same model: how their weight is shared among them says nothing, and "
            "the penalty shares it evenly; take all but one out of the zoo",
            session.row,
            ", ".join(names),
        )
