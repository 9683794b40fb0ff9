import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fleet.errors import FleetError
from fleet.training.draws import fill
from kernels.draws import Draw

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def keep(*shape: int, probability: float = 0.7) -> Draw:
    return Draw("keep", shape, probability, torch.bool)


def number(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Draw:
    return Draw(kind, shape, 0.0, dtype)


def of_one(request: Draw, seed: int = 3, stream: str = "fit", step: int = 5) -> torch.Tensor:
    return fill([request], [seed], [stream], [step], "cpu")[0][0]


requests_ = st.builds(
    lambda kind, shape, dtype: Draw(
        kind, tuple(shape), 0.6 if kind == "keep" else 0.0, torch.bool if kind == "keep" else dtype
    ),
    st.sampled_from(["keep", "uniform", "normal"]),
    st.lists(st.integers(0, 7), max_size=3),
    st.sampled_from(DTYPES),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests_, min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 10**6))
def test_a_model_draws_the_same_alone_and_with_others(requests, which, step):
    seeds, streams, steps = [1, 2, 1], ["head", "fit", "fit"], [step, 0, step + 1]
    all_models = fill(requests, seeds, streams, steps, "cpu")
    alone = fill(requests, seeds[which:][:1], streams[which:][:1], steps[which:][:1], "cpu")
    for together, own, request in zip(all_models, alone, requests, strict=True):
        assert together.shape == (3, *request.shape)
        assert together.dtype == request.dtype
        assert torch.equal(together[which], own[0])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1001, 40_003])
def test_bits_do_not_depend_on_the_place_in_memory(kind, dtype, size):
    request = number(kind, size, dtype=dtype)
    five = fill([request], range(5), ["fit"] * 5, [9] * 5, "cpu")[0]
    for seed in range(5):
        assert torch.equal(five[seed], of_one(request, seed, step=9))


def test_every_request_can_be_made_without_those_before_it():
    requests = [keep(3), number("normal", 5), keep(64)]
    third = fill(requests, [3], ["fit"], [5], "cpu")[2]
    others = [keep(1000), number("uniform", 1), keep(64)]
    assert torch.equal(fill(others, [3], ["fit"], [5], "cpu")[2], third)


def test_every_seed_stream_step_and_place_draws_its_own():
    drawn = [of_one(keep(64)), of_one(keep(64), seed=4), of_one(keep(64), stream="head")]
    drawn += [of_one(keep(64), step=6), *fill([keep(64)] * 2, [3], ["fit"], [7], "cpu")]
    different = {tuple(row.flatten().tolist()) for row in drawn}
    assert len(different) == len(drawn)


def test_numbers_are_those_of_numpys_philox():
    """What is drawn stays what it was: a run goes on after an update to the same weights."""
    import hashlib

    key = np.frombuffer(hashlib.sha256(b"3/fit").digest()[:16], np.uint64)
    words = np.random.Philox(key=key, counter=[0, 1, 5, 0]).random_raw(4).view(np.uint32)
    requests = [keep(1), number("uniform", 7), keep(1)]
    found = fill(requests, [3], ["fit"], [5], "cpu")[1][0]
    assert found.tolist() == [int(word >> 8) / 2**24 for word in words[:7]]


def test_kept_fraction():
    for probability in (0.1, 0.5, 0.9):
        kept = of_one(keep(100, 400, probability=probability))
        assert stats.binomtest(int(kept.sum()), kept.numel(), probability).pvalue > 1e-4
        # No two neighbours are alike more often than chance has it.
        pairs = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
        assert abs(pairs - probability**2) < 5 * math.sqrt(probability**2 / kept.numel())


def test_certain_draws():
    assert of_one(keep(1000, probability=1.0)).all()
    assert not of_one(keep(1000, probability=0.0)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_numbers(dtype):
    drawn = of_one(number("uniform", 200, 100, dtype=dtype))
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    # Half precision has steps of 2⁻⁸, on which a number lies at the lower end.
    steps = torch.finfo(dtype).eps / 2
    middle = drawn.double().flatten().numpy() + (steps / 2 if dtype == torch.bfloat16 else 0)
    assert abs(middle.mean() - 0.5) < 5 / math.sqrt(12 * len(middle))
    if dtype != torch.bfloat16:
        assert stats.kstest(middle, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_numbers(dtype):
    drawn = of_one(number("normal", 200, 101, dtype=dtype)).double().flatten().numpy()
    assert np.isfinite(drawn).all()
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert np.abs(drawn).max() > 3.5
    first, second = drawn[: len(drawn) // 2], drawn[-(len(drawn) // 2) :]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(first))


def test_nothing_is_asked_for():
    assert fill([], [1], ["fit"], [0], "cpu") == []
    assert fill([keep(0, 4)], [1, 2], ["fit"] * 2, [0, 1], "cpu")[0].shape == (2, 0, 4)
    assert fill([keep()], [1, 2], ["fit"] * 2, [0, 1], "cpu")[0].shape == (2,)


def test_one_of_each_for_each_model():
    with pytest.raises(FleetError, match="2 seeds, 1 streams, 2 steps"):
        fill([keep(3)], [1, 2], ["fit"], [0, 0], "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_model_draws_the_same_alone_and_with_others():
    requests = [keep(1000), number("uniform", 33), number("normal", 7, 5)]
    together = fill(requests, [1, 2], ["fit", "head"], [4, 5], "cuda")
    alone = fill(requests, [2], ["head"], [5], "cuda")
    for both, own in zip(together, alone, strict=True):
        assert both.is_cuda
        assert torch.equal(both[1], own[0])
    assert stats.binomtest(int(together[0][0].sum()), 1000, 0.7).pvalue > 1e-4
