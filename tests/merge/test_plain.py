"""Methods called on plain tensors."""

from __future__ import annotations

import pytest
import torch

from merge.errors import MergeError
from merge.part import Part
from merge.plain import measure_whole
from merge.registry import METHODS


def test_a_method_is_called_on_tensors() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert METHODS["linear"](None, [one, two], weight=[1, 3]).tolist() == [2.5, 3.5]


def test_half_precision_is_computed_in_fp32_and_rounded_once() -> None:
    tensors = [torch.randn(1000).to(torch.bfloat16) for _ in range(3)]
    found = METHODS["linear"](None, tensors, weight=[0.2, 0.3, 0.5])
    wide = METHODS["linear"](None, [t.float() for t in tensors], weight=[0.2, 0.3, 0.5])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_the_result_has_the_promoted_dtype(
    dtypes: tuple[torch.dtype, ...], wanted: torch.dtype
) -> None:
    found = METHODS["linear"](None, [torch.ones(3, dtype=dtype) for dtype in dtypes])
    assert found.dtype == wanted


def test_the_base_counts_for_the_dtype() -> None:
    base, tensor = torch.zeros(3, dtype=torch.float64), torch.ones(3)
    assert METHODS["slerp"](base, [tensor], t=0.5).dtype == torch.float64


def test_parameters_come_without_their_graph() -> None:
    found = METHODS["linear"](None, [torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    assert not found.requires_grad


def test_all_problems_come_at_once() -> None:
    with pytest.raises(MergeError, match=r"model_stock: .*base_model.*at least 2.*found 1"):
        METHODS["model_stock"](None, [torch.ones(3)])
    with pytest.raises(MergeError, match=r"tensor 1 is torch.float32 \[2\], the first is \[3\]"):
        METHODS["linear"](None, [torch.ones(3), torch.ones(2)])
    with pytest.raises(MergeError, match=r"takes no base"):
        METHODS["linear"](torch.ones(3), [torch.ones(3)])
    with pytest.raises(MergeError, match=r"linear: .*found 0"):
        METHODS["linear"](None, [])


def test_statistics_are_wanted_one_for_each_tensor() -> None:
    tensors = [torch.ones(3), torch.zeros(3)]
    for statistics in (None, [torch.ones(3)]):
        with pytest.raises(MergeError, match=r"wanted statistics \(fisher\), one for each"):
            METHODS["fisher"](None, tensors, statistics=statistics)
    assert METHODS["fisher"](None, tensors, statistics=[]).tolist() == [0.5] * 3


def test_inner_products_are_made_only_where_they_are_used() -> None:
    method, tensors = METHODS["model_stock"], [torch.ones(2, 3), torch.zeros(2, 3)]
    for filter_wise in (False, True):
        settings = method.settings_of({"filter_wise": filter_wise}, 2)
        whole = measure_whole(method, torch.ones(2, 3), tensors, settings, Part())
        assert (whole["gram"] is None) == filter_wise
