"""The task-vector family against float64 oracles written from the formulas, and its edge cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.errors import MergeError
from merge.methods.sparsify import measure_largest
from merge.part import Part
from merge.registry import METHODS

SHAPES = [(), (1,), (0,), (17,), (3, 5), (0, 4), (2, 3, 2, 2), (30, 40)]
VOTES = {"ties", "dare_ties", "della", "breadcrumbs_ties"}
FAMILY = [
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
]


def case(shape: Sequence[int], models: int = 4, *, coarse: bool = False) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(17)
    base = torch.randn(shape, generator=generator)
    deltas = 0.3 * torch.randn((models, *shape), generator=generator)
    if coarse:
        base, deltas = (base * 8).round() / 8, (deltas * 8).round() / 8
    return base, [base + delta for delta in deltas]


# --- the oracle: one element at a time -----------------------------------------------------------


def largest(delta: np.ndarray, k: int) -> np.ndarray:
    order = sorted(range(delta.size), key=lambda i: (-abs(delta[i]), i))
    mask = np.zeros(delta.size)
    mask[order[:k]] = 1
    return mask


def trim(delta: np.ndarray, density: float, gamma: float | None, rescale: bool) -> np.ndarray:
    """The largest magnitudes, or a band of them; the rest is zero."""
    count = delta.size
    if density == 0 or count == 0:
        return np.zeros(count)
    stays = max(1, int(density * count))
    outliers = 0 if gamma is None else min(int(gamma * count), count - stays)
    kept = delta * (largest(delta, stays + outliers) - largest(delta, outliers))
    if rescale and np.abs(kept).sum() > 1e-7:
        kept = kept * (np.abs(delta).sum() / np.abs(kept).sum())
    return kept


def mix(
    deltas: np.ndarray,
    weight: Sequence[float],
    *,
    lambda_: float,
    normalize: bool,
    vote: bool,
    elect: str = "sum",
    normalize_by: str = "weights",
) -> np.ndarray:
    """λ times the (normalised) sum of `a_k δ_k`, of those with the elected sign only in a vote."""
    models, count = deltas.shape
    result = np.zeros(count)
    for i in range(count):
        x = [weight[k] * deltas[k, i] for k in range(models)]
        votes = sum(x) if elect == "sum" else sum(np.sign(x))
        elected = 1 if votes >= 0 else -1
        agree = [k for k in range(models) if not vote or np.sign(x[k]) == elected]
        result[i] = sum(x[k] for k in agree)
        if normalize:
            by_weights = not vote or normalize_by == "weights"
            total = sum(weight[k] for k in agree) if by_weights else len(agree)
            result[i] /= total if abs(total) > 1e-8 else 1.0
    return lambda_ * result


def defaults(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return METHODS[name].settings(**given).model_dump()


def oracle(name: str, base: Tensor, tensors: Sequence[Tensor], **given: Any) -> np.ndarray:
    models = len(tensors)
    many = {key: value for key, value in given.items() if isinstance(value, list)}
    chosen = defaults(name, {k: v for k, v in given.items() if k not in many})
    per_model = {k: many.get(k, [chosen[k]] * models) for k in ("weight", "density")}
    deltas = [(t.double() - base.double()).numpy().reshape(-1) for t in tensors]
    if name != "task_arithmetic":
        gamma = chosen.get("gamma")
        deltas = [
            d if density == 1 else trim(d, density, gamma, chosen["rescale"])
            for d, density in zip(deltas, per_model["density"], strict=True)
        ]
    mixed = mix(
        np.stack(deltas),
        per_model["weight"],
        lambda_=chosen["lambda_"],
        normalize=chosen["normalize"],
        vote=name in VOTES,
        elect=chosen.get("elect", "sum"),
        normalize_by=chosen.get("normalize_by", "weights"),
    )
    return base.double().numpy() + mixed.reshape(base.shape)


def close(found: Tensor, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=tolerance, atol=tolerance)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight": [0.3, 0.5, -0.2, 1.0], "density": 0.3, "lambda": 0.6},
    {"weight": [0.3, 0.5, 0.7, 0.0], "density": [0.2, 0.5, 1.0, 0.0], "normalize": True},
    {"density": 0.5, "rescale": True, "normalize": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"])
def test_deterministic_methods_follow_their_formulas(
    name: str, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base, tensors = case(shape)
    found = METHODS[name](base, tensors, **given)
    assert found.shape == base.shape
    close(found, oracle(name, base, tensors, **given))


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("normalize_by", ["weights", "count"])
@pytest.mark.parametrize("weight", [1.0, [0.9, 0.5, -0.2, 1.0]])
@pytest.mark.parametrize("coarse", [False, True])
def test_votes(elect: str, normalize_by: str, weight: Any, coarse: bool) -> None:
    base, tensors = case((6, 50), coarse=coarse)
    given = {"elect": elect, "normalize_by": normalize_by, "weight": weight, "density": 0.4}
    close(METHODS["ties"](base, tensors, **given), oracle("ties", base, tensors, **given))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_outliers_are_removed(name: str, gamma: float) -> None:
    base, tensors = case((8, 50), coarse=True)
    given: dict[str, Any] = {"gamma": gamma, "density": 0.4}
    close(METHODS[name](base, tensors, **given), oracle(name, base, tensors, **given))


@pytest.mark.parametrize("name", FAMILY)
def test_float64_stays_exact(name: str) -> None:
    base, tensors = case((6, 50))
    base, tensors = base.double(), [tensor.double() for tensor in tensors]
    given: dict[str, Any] = {"weight": [0.3, 0.5, -0.2, 1.0]}
    if not name.startswith(("dare", "della")):
        given["density"] = 0.4
    close(METHODS[name](base, tensors, **given), oracle(name, base, tensors, **given), 1e-12)


def test_a_small_change_of_a_large_weight_is_not_lost() -> None:
    """Deltas are taken before they are summed: Σ a w − Σ a b would round at the size of w."""
    base = torch.full((50,), 1000.0)
    tensors = [base + 2.0**-13, base + 2.0**-12]  # steps of fp32 there are 2⁻¹⁴
    found = METHODS["task_arithmetic"](base, tensors, weight=[0.5, 0.25])
    assert torch.equal(found, base + 2.0**-13)


# --- settings that change little or nothing ------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_int8_mask_changes_nothing(name: str) -> None:
    base, tensors = case((6, 20))
    given: dict[str, Any] = {} if name.startswith("della") else {"density": 0.5}
    one, other = (METHODS[name](base, tensors, int8_mask=mask, **given) for mask in (False, True))
    assert torch.equal(one, other)


def test_task_arithmetic_takes_settings_of_its_relatives_and_ignores_them() -> None:
    base, tensors = case((6, 20))
    found = METHODS["task_arithmetic"](base, tensors, density=0.1, rescale=True)
    assert torch.equal(found, METHODS["task_arithmetic"](base, tensors))


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "task_arithmetic"])
def test_density_zero_gives_the_base_and_one_keeps_everything(name: str) -> None:
    base, tensors = case((6, 20))
    nothing = METHODS[name](base, tensors, density=0)
    assert torch.equal(nothing, base)
    like = METHODS["ties" if name in VOTES else "task_arithmetic"]
    normalize = defaults(name, {})["normalize"]
    wanted = like(base, tensors, density=1, normalize=normalize)
    assert torch.equal(METHODS[name](base, tensors, density=1), wanted)


def test_weights_that_cancel_are_not_divided_by() -> None:
    base, tensors = case((9,), models=2)
    found = METHODS["task_arithmetic"](base, tensors, weight=[1.0, -1.0], normalize=True)
    close(found, (base + tensors[0] - tensors[1]).double().numpy())


# --- TIES over all of a model --------------------------------------------------------------------


def test_ties_as_in_the_paper() -> None:
    """Trimmed over all weights of a model, and divided by the number of models that agree."""
    shapes = [(40, 30), (25,), (2, 3, 2, 2)]
    bases, models = zip(*(case(shape, models=3) for shape in shapes), strict=True)
    models = [
        [scale * (t - b) + b for t in ts]
        for scale, b, ts in zip((1, 5, 0.2), bases, models, strict=True)
    ]
    numel = sum(base.numel() for base in bases)
    measures = [
        measure_largest(numel=numel, density=0.2, rescale=False, scope="model") for _ in range(3)
    ]
    for k, measure in enumerate(measures):
        for see in measure.passes:
            for base, tensors in zip(bases, models, strict=True):
                see(0, base, tensors[k])
    measured = [measure.result() for measure in measures]

    flat_base = np.concatenate([b.double().numpy().reshape(-1) for b in bases])
    deltas = np.stack(
        [
            np.concatenate(
                [
                    (ts[k] - b).double().numpy().reshape(-1)
                    for b, ts in zip(bases, models, strict=True)
                ]
            )
            for k in range(3)
        ]
    )
    trimmed = np.stack([d * largest(d, int(0.2 * d.size)) for d in deltas])
    mixed = np.zeros(flat_base.size)
    for i, column in enumerate(trimmed.T):
        agree = [x for x in column if x * column.sum() > 0]
        mixed[i] = sum(agree) / max(len(agree), 1)

    method = METHODS["ties"]
    given = {"density": 0.2, "scope": "model", "normalize_by": "count"}
    arguments = method.arguments(method.settings_of(given, 3))
    found = [
        method.load(method.function)(base, tensors, measured=measured, part=Part(), **arguments)
        for base, tensors in zip(bases, models, strict=True)
    ]
    close(torch.cat([tensor.reshape(-1) for tensor in found]), flat_base + mixed)


def test_ties_of_one_tensor_is_that_of_a_model_of_one_tensor() -> None:
    base, tensors = case((60, 50))
    given = {"density": 0.2, "weight": [0.2, 0.3, 0.4, 0.5]}
    whole = METHODS["ties"](base, tensors, scope="model", **given)
    assert torch.equal(whole, METHODS["ties"](base, tensors, **given))


# --- random methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_divided_by_the_probability_the_mean_is_that_of_task_arithmetic(name: str) -> None:
    base, tensors = case((1, 30))
    trials = 4000  # as equal rows of one tensor
    given = {"density": 0.4, "weight": [0.3, 0.5, -0.2, 1.0], "rescale_by": "probability"}
    rows = [tensor.expand(trials, -1) for tensor in (base, *tensors)]
    found = METHODS[name](rows[0], rows[1:], part=Part(seed=1), **given).double().numpy()
    wanted = oracle("task_arithmetic", base, tensors, weight=given["weight"])[0]
    noise = found.std(0) / np.sqrt(trials) + 1e-6
    assert np.abs((found.mean(0) - wanted) / noise).max() < 4.5
    if name == "dare_linear":
        deltas = np.stack([(t.double() - base.double()).numpy()[0] for t in tensors])
        spread = np.square(given["weight"]) @ deltas**2 * (1 - 0.4) / 0.4
        np.testing.assert_allclose(found.var(0), spread, rtol=0.1)


@pytest.mark.parametrize("shape", [(1,), (400,), (20, 30), (6, 5, 3, 3), (300, 200)])
@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_by_norm_the_sum_of_magnitudes_stays(name: str, shape: tuple[int, ...]) -> None:
    base, (tensor,) = case(shape, models=1)
    merged = METHODS[name](torch.zeros_like(base), [tensor], density=0.4, part=Part(seed=5))
    share = float((merged != 0).double().mean())
    if share:
        wanted = float(tensor.double().abs().sum())
        assert float(merged.double().abs().sum()) == pytest.approx(wanted, rel=1e-5)
    if merged.numel() > 100:
        assert share == pytest.approx(0.4, abs=5 * (0.24 / merged.numel()) ** 0.5)
        kept = merged != 0
        factors = (merged[kept] / tensor[kept]).double()
        assert float(factors.max() / factors.min()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_the_vote_is_of_what_was_not_dropped(name: str) -> None:
    base, tensors = case((10, 20))
    weight = [0.3, 0.5, -0.2, 1.0]
    given = {"density": 0.6, "lambda": 0.5, "rescale": False}
    part = Part("x", seed=4)
    linear = METHODS[name.replace("ties", "linear") if name == "dare_ties" else "della_linear"]
    zero = torch.zeros_like(base)
    # One model at a time, the others at the base: what stays of each delta.
    kept = np.stack(
        [
            linear(
                zero,
                [t - base if k == one else zero for k, t in enumerate(tensors)],
                density=0.6,
                rescale=False,
                part=part,
            )
            .double()
            .numpy()
            .reshape(-1)
            for one in range(4)
        ]
    )
    for normalize in (False, True):
        found = METHODS[name](base, tensors, weight=weight, normalize=normalize, part=part, **given)
        mixed = mix(kept, weight, lambda_=0.5, normalize=normalize, vote=True)
        close(found, base.double().numpy() + mixed.reshape(base.shape))


def test_models_are_dropped_apart() -> None:
    base = torch.zeros(40_000)
    tensors = [torch.full((40_000,), 1.0), torch.full((40_000,), 10.0)]
    found = METHODS["dare_linear"](base, tensors, density=0.5, rescale=False)
    for value in (0.0, 1.0, 10.0, 11.0):
        share = float((found == value).double().mean())
        assert share == pytest.approx(0.25, abs=5 * (0.1875 / 40_000) ** 0.5)


# --- bad settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.5)])
def test_probabilities_outside_of_their_bounds_are_refused(
    name: str, density: float, epsilon: float
) -> None:
    base, tensors = case((3,))
    with pytest.raises(MergeError, match="choose a smaller epsilon"):
        METHODS[name](base, tensors, density=density, epsilon=epsilon)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_is_a_share(name: str, density: float) -> None:
    base, tensors = case((3,))
    with pytest.raises(MergeError, match="density"):
        METHODS[name](base, tensors, density=density)
