"""Sums of factors and truncated matrices against numpy's SVD in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.adapters import low_rank
from merge.adapters.low_rank import compressed, stacked, truncated


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def best(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    error = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()) if s.any() else 0.0
    return (u[:, :rank] * s[:rank]) @ v[:rank], float(error)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_stacked_factors_are_the_sum_without_cross_terms(rows, columns, ranks) -> None:
    terms = [
        (draw(rows, r, seed=k), draw(r, columns, seed=9 + k), 0.5 - k) for k, r in enumerate(ranks)
    ]
    wanted = sum(scale * (b.numpy() @ a.numpy()) for b, a, scale in terms)
    whole = stacked(terms)
    assert whole.rank == sum(ranks)
    np.testing.assert_allclose((whole.b @ whole.a).numpy(), wanted, rtol=1e-10, atol=1e-12)
    exact = compressed(whole, None)
    assert exact.rank <= min(rows, columns, sum(ranks))
    size = np.linalg.norm(wanted)
    np.testing.assert_allclose((exact.b @ exact.a).numpy(), wanted, atol=1e-6 * size + 1e-300)


@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_compressed_is_the_best_of_its_rank(rank: int) -> None:
    whole = stacked(
        [(draw(7, 3), draw(3, 11, seed=1), 2.0), (draw(7, 2), draw(2, 11, seed=3), -1.0)]
    )
    wanted, error = best((whole.b @ whole.a).numpy(), rank)
    found = compressed(whole, rank)
    assert found.rank == min(rank, 5)
    np.testing.assert_allclose((found.b @ found.a).numpy(), wanted, atol=1e-10)
    assert found.relative_error == pytest.approx(error, abs=1e-9)


def test_shared_directions_and_zeros_need_few_ranks() -> None:
    b, a = draw(7, 2), draw(2, 5, seed=1)
    assert compressed(stacked([(b, a, 1.0), (b, a, 2.0)]), None).rank == 2
    nothing = compressed(stacked([(b, a, 1.0), (b, a, -1.0)]), None)
    assert nothing.rank == 1
    assert nothing.relative_error == 0
    assert not (nothing.b @ nothing.a).any()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_truncated_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = draw(*shape)
    wanted, error = best(matrix.numpy(), rank)
    found = truncated(matrix, rank=rank, energy=None, generator=generator())
    assert found.rank == min(rank, *shape)
    np.testing.assert_allclose((found.b @ found.a).numpy(), wanted, atol=1e-10)
    assert found.relative_error == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_least_rank_that_holds_the_energy(shape: tuple[int, int], energy: float) -> None:
    matrix = draw(*shape)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    wanted = next(
        k for k in range(1, 21) if squares[:k].sum() >= energy * squares.sum() * (1 - 1e-9)
    )
    found = truncated(matrix, rank=None, energy=energy, generator=generator())
    assert found.rank == wanted
    assert found.relative_error**2 <= 1 - energy + 1e-9
    assert truncated(matrix, rank=3, energy=energy, generator=generator()).rank == min(3, wanted)


def test_a_matrix_of_low_rank_and_one_of_zeros() -> None:
    matrix = draw(30, 3) @ draw(3, 20, seed=1)
    assert truncated(matrix, rank=None, energy=1.0, generator=generator()).rank == 3
    zero = truncated(torch.zeros(4, 6), rank=None, energy=0.9, generator=generator())
    assert zero.rank == 1
    assert zero.relative_error == 0
    assert not (zero.b @ zero.a).any()
    assert torch.isfinite(zero.b).all()


@pytest.mark.parametrize("shape", [(150, 260), (260, 150)])
def test_large_matrices_by_random_projections(monkeypatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(low_rank, "WHOLE_SIDE", 64)
    monkeypatch.setattr(low_rank, "FIRST_GUESS", 2)
    spectrum = 0.8 ** torch.arange(150, dtype=torch.float64)
    left = torch.linalg.qr(draw(shape[0], 150))[0]
    right = torch.linalg.qr(draw(shape[1], 150, seed=1))[0]
    matrix = (left * spectrum) @ right.T
    _, error = best(matrix.numpy(), 10)
    found = truncated(matrix, rank=10, energy=None, generator=generator())
    assert found.rank == 10
    assert error <= found.relative_error * (1 + 1e-9) <= error * (1 + 1e-6)
    squares = spectrum.numpy() ** 2
    wanted = next(k for k in range(1, 150) if squares[:k].sum() >= 0.995 * squares.sum())
    by_energy = truncated(matrix, rank=None, energy=0.995, generator=generator())
    assert by_energy.rank == wanted
    assert by_energy.relative_error**2 <= 0.005 + 1e-9
