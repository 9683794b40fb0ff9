"""fisher and regmean against the papers' formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.errors import MergeError
from merge.methods.with_data import fisher, regmean
from merge.registry import METHODS

SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 3, 4, 5)]
FISHER, REGMEAN = METHODS["fisher"], METHODS["regmean"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def randoms(rng: np.random.Generator, shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    return [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for _ in range(count)]


def inputs_of(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Correlated inputs, as layers have."""
    mixed = rng.normal(size=(rows, columns)) @ rng.normal(size=(columns, columns))
    return mixed.astype(np.float32).astype(np.float64)


def gram_of(inputs: np.ndarray) -> Tensor:
    return torch.from_numpy(inputs.T @ inputs)


def fisher_oracle(tensors, values, weight) -> np.ndarray:
    result = np.empty(tensors[0].shape)
    for place in np.ndindex(*tensors[0].shape):
        above = below = 0.0
        for tensor, value, share in zip(tensors, values, weight, strict=True):
            above += share * float(value[place]) * float(tensor[place])
            below += share * float(value[place])
        result[place] = above / below
    return result


def regmean_oracle(tensors, grams, weight, scale) -> np.ndarray:
    total, pull = 0.0, 0.0
    for tensor, gram, share in zip(tensors, grams, weight, strict=True):
        g = gram.double().numpy()
        g = scale * g + (1 - scale) * np.diag(np.diag(g))
        total = total + share * g
        pull = pull + share * g @ tensor.double().numpy().reshape(len(tensor), -1).T
    return np.linalg.solve(total, pull).T.reshape(tensors[0].shape)


def mean_oracle(tensors, weight) -> np.ndarray:
    sources = [w * t.double().numpy() for w, t in zip(weight, tensors, strict=True)]
    return np.sum(sources, axis=0) / sum(weight)


def close(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.2, 3.0, 0.5], [0.0, 2.0, 1.0]])
def test_fisher_is_the_papers_mean(shape, weight, rng):
    tensors = randoms(rng, shape)
    values = [t.square() + 1e-9 for t in randoms(rng, shape)]
    before = [t.clone() for t in [*tensors, *values]]
    found = FISHER(None, tensors, statistics=values, weight=weight)
    close(found, fisher_oracle(tensors, values, weight))
    assert all(torch.equal(a, b) for a, b in zip(before, [*tensors, *values], strict=True))


def test_fisher_is_scale_free_down_to_the_smallest_values(rng):
    tensors = randoms(rng, (50,))
    values = [t.square() for t in randoms(rng, (50,))]
    for scale in (1e-12, 1e-24, 1e12):
        scaled = [v * scale for v in values]
        close(
            FISHER(None, tensors, statistics=scaled),
            fisher_oracle(tensors, scaled, [1.0, 1.0, 1.0]),
        )


def test_fisher_of_slices_and_of_strided_tensors_is_that_of_the_whole(rng):
    tensors = [t.T for t in randoms(rng, (6, 4))]
    values = [t.square().T for t in randoms(rng, (6, 4))]
    values[0][1] = values[1][1] = values[2][1] = 0
    whole = FISHER(None, tensors, statistics=values, weight=[0.3, 0.5, 1])
    flat, shares = ([t.reshape(-1) for t in many] for many in (tensors, values))
    for start in range(0, 24, 5):
        part = slice(start, start + 5)
        found = FISHER(
            None,
            [t[part] for t in flat],
            statistics=[v[part] for v in shares],
            weight=[0.3, 0.5, 1],
        )
        assert torch.equal(found, whole.reshape(-1)[part])


def test_where_all_fisher_values_vanish_it_is_the_weighted_mean(rng):
    tensors, weight = randoms(rng, (5, 4)), [0.2, 0.5, 1.0]
    values = [t.square() for t in randoms(rng, (5, 4))]
    for value in values:
        value[2] = 0
    values[0][3] = values[2][3] = 0  # one model alone has information there
    found = FISHER(None, tensors, statistics=values, weight=weight)
    close(found[2], mean_oracle(tensors, weight)[2])
    close(found[3], tensors[1][3].double().numpy())
    assert bool(found.isfinite().all())


def test_the_fisher_floor_is_the_least_value(rng):
    tensors = randoms(rng, (40,))
    values = [t.square() * 1e-6 for t in randoms(rng, (40,))]
    raised = [v.clamp(min=1e-6) for v in values]
    assert any(not torch.equal(a, b) for a, b in zip(values, raised, strict=True))
    found = FISHER(None, tensors, statistics=values, floor=1e-6)
    close(found, fisher_oracle(tensors, raised, [1.0, 1.0, 1.0]))


@pytest.mark.parametrize("method", [fisher, regmean])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_statistics_it_is_the_weighted_mean(method, shape, rng):
    tensors, weight = randoms(rng, shape), (0.2, 0.5, 1.0)
    own = {"floor": 0.0} if method is fisher else {"scale_off_diagonal": 0.9}
    found = method(None, tensors, weight=weight, statistics=None, **own)
    close(found, mean_oracle(tensors, weight))


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 999)
)
@settings(max_examples=50, deadline=None)
def test_regmean_is_the_papers_solution(models, out, columns, scale, seed):
    rng = np.random.default_rng(seed)
    tensors = randoms(rng, (out, columns), models)
    grams = [gram_of(inputs_of(rng, 40, columns)).float() for _ in tensors]
    weight = rng.uniform(0.1, 2, models).tolist()
    found = REGMEAN(None, tensors, statistics=grams, weight=weight, scale_off_diagonal=scale)
    wanted = regmean_oracle(tensors, grams, weight, scale)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())


def test_regmean_with_whole_grams_is_least_squares(rng):
    """scale_off_diagonal: 1 is the regression on all models' own outputs."""
    tensors = randoms(rng, (4, 6), 2)
    inputs = [inputs_of(rng, 30, 6) for _ in tensors]
    found = REGMEAN(None, tensors, statistics=[gram_of(x) for x in inputs], scale_off_diagonal=1.0)
    targets = [x @ t.double().numpy().T for x, t in zip(inputs, tensors, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets), rcond=None)[0].T
    close(found, wanted)


def test_the_default_scale_is_the_papers(rng):
    tensors = randoms(rng, (3, 5), 2)
    grams = [gram_of(inputs_of(rng, 20, 5)) for _ in tensors]
    close(
        REGMEAN(None, tensors, statistics=grams).float(),
        regmean_oracle(tensors, grams, [1.0, 1.0], 0.9),
    )


def test_regmean_takes_a_convolution_as_a_matrix_on_patches(rng):
    tensors = randoms(rng, (4, 2, 3, 3), 2)
    grams = [gram_of(inputs_of(rng, 60, 18)).float() for _ in tensors]
    found = REGMEAN(None, tensors, statistics=grams)
    close(found, regmean_oracle(tensors, grams, [1.0, 1.0], 0.9))


@pytest.mark.parametrize("scale", [0.9, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 3, 50])
def test_identical_models_come_back(scale, rows, rng):
    tensor = randoms(rng, (4, 6), 1)[0]
    grams = [gram_of(inputs_of(rng, rows, 6)).float() for _ in range(3)]
    found = REGMEAN(
        None,
        [tensor.clone() for _ in grams],
        statistics=grams,
        weight=[0.3, 1, 2],
        scale_off_diagonal=scale,
    )
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_singular_grams_move_from_the_mean_only_where_there_is_data(rows, dtype, rng):
    """Fewer rows than columns: right on the rows, and as near to the mean as that allows."""
    tensors = randoms(rng, (5, 16), 2)
    inputs, other = inputs_of(rng, rows, 16), inputs_of(rng, 1, 16)
    statistics = [gram_of(inputs).to(dtype), gram_of(other).to(dtype)]
    found = regmean(
        None, tensors, weight=(1.0, 1.0), scale_off_diagonal=1.0, statistics=statistics
    ).numpy()
    mean = mean_oracle(tensors, [1.0, 1.0])
    first, second = (t.double().numpy() for t in tensors)
    for x, wanted in ((inputs, first), (other, second)):
        before = np.abs(x @ (mean - wanted).T).max()
        assert np.abs(x @ (found - wanted).T).max() < 1e-4 * before
    both = np.concatenate([inputs, other])
    # The shortest step from the mean, where lengths are in units of each input's own energy.
    energy = np.sqrt((both**2).sum(0))
    targets = np.concatenate([inputs @ (first - mean).T, other @ (second - mean).T])
    step = np.linalg.lstsq(both / energy, targets, rcond=None)[0].T / energy
    # In fp32 the rounding of the Gram matrices points a little into directions without data.
    tolerance = 1e-3 if dtype == torch.float64 else 0.1
    np.testing.assert_allclose(found, mean + step, rtol=0, atol=tolerance * np.abs(step).max())


def test_inputs_that_are_always_zero_keep_the_mean(rng):
    tensors, weight = randoms(rng, (3, 6), 2), [1.0, 3.0]
    inputs = [inputs_of(rng, 30, 6) for _ in tensors]
    for x in inputs:
        x[:, 2] = 0
    found = REGMEAN(None, tensors, statistics=[gram_of(x) for x in inputs], weight=weight).float()
    close(found[:, 2], mean_oracle(tensors, weight)[:, 2])
    kept = [0, 1, 3, 4, 5]
    parts = [t[:, kept] for t in tensors]
    close(found[:, kept], regmean_oracle(parts, [gram_of(x[:, kept]) for x in inputs], weight, 0.9))


def test_regmean_beats_the_mean_on_linear_regression(rng):
    """Two fits, each seen in half of the directions alone, and judged on both."""
    spread = [np.array([3.0] * 5 + [0.1] * 5), np.array([0.1] * 5 + [3.0] * 5)]
    inputs = [rng.normal(size=(200, 10)) * s for s in spread]
    true = rng.normal(size=(4, 10))
    targets = [x @ true.T + rng.normal(size=(200, 4)) for x in inputs]
    fits = [
        np.linalg.lstsq(x, y, rcond=None)[0].T.astype(np.float32)
        for x, y in zip(inputs, targets, strict=True)
    ]
    tensors = [torch.from_numpy(fit.copy()) for fit in fits]
    merged = REGMEAN(None, tensors, statistics=[gram_of(x) / len(x) for x in inputs])

    def loss(weight: np.ndarray) -> float:
        errors = [x @ weight.T - y for x, y in zip(inputs, targets, strict=True)]
        return float(np.mean(np.concatenate(errors) ** 2))

    assert loss(merged.double().numpy()) < 0.8 * loss(mean_oracle(tensors, [1, 1]))


def test_what_is_wrong_is_said(rng):
    square = randoms(rng, (3, 3), 2)
    with pytest.raises(
        MergeError, match=r"fisher statistics of model 1 are \[2\].*wanted \[3, 3\]"
    ):
        FISHER(None, square, statistics=[torch.ones(3, 3), torch.ones(2)])
    with pytest.raises(MergeError, match=r"gram statistics of model 0 .* wanted \[3, 3\]"):
        REGMEAN(None, square, statistics=[torch.ones(4, 4)] * 2)
    with pytest.raises(MergeError, match="no matrix"):
        REGMEAN(None, randoms(rng, (3,), 2), statistics=[torch.ones(3, 3)] * 2)
    indefinite = torch.tensor([[1.0, 5.0, 0], [5.0, 1.0, 0], [0, 0, 1.0]])
    with pytest.raises(MergeError, match="no Gram matrices"):
        REGMEAN(None, square, statistics=[indefinite] * 2)
    with pytest.raises(MergeError, match="no Gram matrices"):
        REGMEAN(None, square, statistics=[torch.full((3, 3), torch.nan)] * 2)
    for method, statistics in ((FISHER, torch.ones(3, 3)), (REGMEAN, torch.eye(3))):
        with pytest.raises(MergeError, match="wanted one above 0"):
            method(None, square, statistics=[statistics] * 2, weight=[0, 0])
        with pytest.raises(MergeError, match="greater than or equal to 0"):
            method(None, square, statistics=[statistics] * 2, weight=[1, -1])
