"""Inner products against float64, whole and in slices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.gram import RUN, STEP, gram_matrix

SHAPES = [(), (1,), (0,), (17,), (6, 5), (4, 3, 3, 2), (RUN + 3,), (STEP,), (STEP + RUN + 1,)]


def randoms(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def inner_products(sources: Sequence[Tensor]) -> np.ndarray:
    flat = [source.double().numpy().ravel() for source in sources]
    return np.array([[(one * two).sum() for two in flat] for one in flat])


def close(found: Tensor, wanted: np.ndarray, tolerance: float = 2e-7) -> None:
    assert found.dtype == torch.float64
    norms = np.sqrt(wanted.diagonal())
    error = np.abs(found.numpy() - wanted)
    assert (error <= tolerance * np.outer(norms, norms) + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_tensors_and_of_deltas(shape: tuple[int, ...], count: int) -> None:
    base, *tensors = randoms(shape, count + 1)
    close(gram_matrix("tensors", None, tensors), inner_products(tensors))
    close(gram_matrix("deltas", None, tensors), inner_products(tensors))
    close(gram_matrix("tensors", base, tensors), inner_products([base, *tensors]))
    deltas = [tensor - base for tensor in tensors]
    close(gram_matrix("deltas", base, tensors), inner_products(deltas))


def test_fp64_stays_fp64() -> None:
    tensors = randoms((STEP + 5,), 3, torch.float64)
    close(gram_matrix("tensors", None, tensors), inner_products(tensors), 1e-14)


@pytest.mark.parametrize("of", ["tensors", "deltas"])
def test_it_is_the_sum_of_those_of_the_slices(of: Literal["tensors", "deltas"]) -> None:
    base, *tensors = randoms((2 * STEP + 100,), 3)
    cuts = [0, 1, RUN - 1, STEP + RUN + 7, 2 * STEP + 100]
    total = sum(
        gram_matrix(of, base[start:stop], [tensor[start:stop] for tensor in tensors])
        for start, stop in pairwise(cuts)
    )
    assert isinstance(total, Tensor)
    close(total, gram_matrix(of, base, tensors).numpy())


def test_a_long_sum_of_positive_numbers_does_not_drift() -> None:
    tensor = torch.full((3_000_001,), 0.1)
    wanted = 3_000_001 * float(np.float32(0.1)) ** 2
    assert float(gram_matrix("tensors", None, [tensor])[0, 0]) == pytest.approx(wanted, rel=1e-6)


def test_the_inputs_stay_as_they_are_contiguous_or_not() -> None:
    base, *tensors = randoms((6, 5), 3)
    before = [source.clone() for source in (base, *tensors)]
    turned = gram_matrix("deltas", base.t(), [tensor.t() for tensor in tensors])
    close(turned, gram_matrix("deltas", base, tensors).numpy(), 1e-15)
    pairs = zip((base, *tensors), before, strict=True)
    assert all(torch.equal(now, then) for now, then in pairs)
