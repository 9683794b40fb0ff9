"""The laws of the linear combination: exact where it can be, near fp64 elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.errors import MergeError
from merge.mixing import CHUNK, combine, compute_dtype, mixing_order, scratch_numel

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[Tensor], np.ndarray]:
    count = draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(), (1,), (0,), (3, 5), (17,), (2, 3, 4), (1000,)]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sources = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    weights = np.array(draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count)))
    weights[draw(st.integers(0, count - 1))] += 1 - weights.sum()
    return sources, weights


@given(mixes())
@settings(max_examples=200, deadline=None)
def test_it_is_the_sum_of_weights_times_sources(mix: tuple[list[Tensor], np.ndarray]) -> None:
    sources, weights = mix
    found = combine(sources, weights)
    dtype = sources[0].dtype
    assert (found.dtype, found.shape) == (dtype, sources[0].shape)
    terms = [w * s.double() for w, s in zip(weights, sources, strict=True)]
    oracle = torch.stack(terms).sum(0)
    # Errors are relative to the terms: the weights may be large and cancel.
    scale = 1 + torch.stack(terms).abs().sum(0)
    epsilon = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert bool(((found.double() - oracle).abs() <= epsilon * scale).all())


@given(mixes(), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_slices_give_the_bits_of_the_whole(mix: tuple[list[Tensor], np.ndarray], step: int) -> None:
    sources, weights = mix
    whole = combine(sources, weights).reshape(-1)
    for start in range(0, whole.numel(), step):
        part = combine([s.reshape(-1)[start : start + step] for s in sources], weights)
        assert bits(part) == bits(whole[start : start + step])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_gives_the_source_back(dtype: torch.dtype) -> None:
    sources = [torch.randn(300).to(dtype) for _ in range(4)]
    sources[2][:3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny])
    weights = np.array([0.0, 0.0, 1.0, 0.0])
    assert bits(combine(sources, weights)) == bits(sources[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4], [-0.7, 1.2, 0.9, -0.4]])
def test_equal_sources_give_that_tensor_back(dtype: torch.dtype, weights: list[float]) -> None:
    source = torch.randn(300).to(dtype)
    source[:2] = torch.tensor([-0.0, 0.0])
    assert bits(combine([source.clone() for _ in weights], np.array(weights))) == bits(source)


def test_a_long_tensor_is_the_same_in_chunks_and_with_any_thread_count() -> None:
    sources = [torch.randn(2 * CHUNK + 17) for _ in range(3)]
    weights = np.array([0.2, 0.5, 0.3])
    torch.set_num_threads(1)
    one = combine(sources, weights)
    torch.set_num_threads(2)
    assert bits(combine(sources, weights)) == bits(one)
    assert bits(combine([s[CHUNK - 5 : CHUNK + 9] for s in sources], weights)) == bits(
        one[CHUNK - 5 : CHUNK + 9]
    )


def test_reads_the_largest_first_and_never_a_zero() -> None:
    sources = [torch.full((3,), float(k)) for k in range(5)]
    asked: list[int] = []

    def read(k: int) -> Tensor:
        asked.append(k)
        return sources[k]

    found = combine(read, np.array([0.3, 0.0, 0.35, 0.35, 0.0]), dtype=torch.float64)
    assert asked == [2, 0, 3]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full((3,), 1.75, dtype=torch.float64))
    assert mixing_order(np.array([0.0, 1.0])) == [1]


def test_a_source_need_be_valid_only_until_the_next_is_read() -> None:
    sources = [torch.randn(50).to(torch.bfloat16) for _ in range(4)]
    buffer = torch.empty(50, dtype=torch.bfloat16)
    weights = np.array([0.1, 0.2, 0.6, 0.1])
    found = combine(lambda k: buffer.copy_(sources[k]), weights)
    assert bits(found) == bits(combine(sources, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_buffers_are_used_and_change_nothing(dtype: torch.dtype) -> None:
    sources = [torch.randn(7, 3).to(dtype) for _ in range(3)]
    weights = np.array([0.5, 0.25, 0.25])
    out = torch.full((7, 3), torch.nan, dtype=dtype)
    scratch = torch.full((scratch_numel(21),), torch.nan, dtype=compute_dtype(dtype))
    assert combine(sources, weights, out=out, scratch=scratch) is out
    assert bits(out) == bits(combine(sources, weights))


def test_sources_of_several_dtypes_are_summed_in_single_precision() -> None:
    a, b = torch.randn(64), torch.randn(64).to(torch.float16)
    weights = np.array([0.6, 0.4])
    assert bits(combine([a, b], weights)) == bits(combine([a, b.float()], weights))
    found = combine([b, a], weights[::-1].copy())
    assert found.dtype == torch.float16  # of the source that is stored first
    assert bits(found) == bits(combine([b.float(), a], weights[::-1].copy()).half())


def test_slices_that_are_not_contiguous_are_read_as_they_look() -> None:
    sources = [torch.randn(6, 4).T for _ in range(2)]
    weights = np.array([0.5, 0.5])
    expected = combine([s.contiguous() for s in sources], weights)
    assert bits(combine(sources, weights)) == bits(expected)


@pytest.mark.parametrize("weights", [[0.5, 0.4], [0.0, 0.0], [1.0, np.nan], [0.5, 0.50001]])
def test_weights_that_do_not_sum_to_one_are_refused(weights: list[float]) -> None:
    with pytest.raises(MergeError, match=r"sum to .*, wanted 1"):
        combine([torch.ones(2), torch.ones(2)], np.array(weights))
