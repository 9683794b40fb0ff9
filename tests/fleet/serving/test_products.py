from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleet.serving.products import LEAST_WEIGHTS, Products, keep_freed_memory


@pytest.mark.parametrize("rows", [(1,), (7,), (300,), (2, 3), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_torchs(rows, with_bias, dtype):
    weight = torch.randn(150, 200).to(dtype)
    bias = torch.randn(150).to(dtype) if with_bias else None
    x = torch.randn(*rows, 200).to(dtype)
    products = Products([weight])
    assert bool(products._packed) == (dtype == torch.float32)
    with torch.inference_mode():
        found, wanted = products.linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert found.shape == wanted.shape


def test_small_weights_and_others_stay_torchs():
    small, other = torch.randn(2, LEAST_WEIGHTS // 4), torch.randn(150, 200)
    products = Products([small])
    assert not products._packed
    x = torch.randn(3, 200)
    assert torch.equal(products.linear(x, other), F.linear(x, other))


def test_a_models_layers_compute_with_the_weights_that_they_have():
    layer = nn.Linear(200, 150).requires_grad_(False)
    products = Products(layer.parameters())
    products.serve(layer)
    x = torch.randn(4, 200)
    with torch.inference_mode():
        wanted = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted)
        found = torch.func.functional_call(layer, {"weight": torch.zeros(150, 200)}, (x,))
        assert torch.equal(found, layer.bias.expand(4, -1))
    layer.requires_grad_(True)
    assert layer(x).requires_grad


def test_freed_memory_is_kept_wherever_it_runs():
    keep_freed_memory()
    keep_freed_memory()
