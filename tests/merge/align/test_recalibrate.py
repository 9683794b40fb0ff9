"""Recalibration: the statistics are those of the data, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from merge.align import recalibrate_norms
from merge.errors import MergeError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, momentum=0.3))


def images(count: int) -> torch.Tensor:
    return 3 + 2 * torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [7, 5], [1, 11]])
def test_statistics_are_means_over_examples(sizes):
    model, data = network(), images(12)
    assert recalibrate_norms(model, data.split(sizes)) == 2
    first = model[0](data).detach().double().numpy()
    parts = np.split(first, np.cumsum(sizes)[:-1])
    weights = np.array(sizes) / 12
    mean = sum(w * p.mean((0, 2, 3)) for w, p in zip(weights, parts, strict=True))
    var = sum(w * p.var((0, 2, 3), ddof=1) for w, p in zip(weights, parts, strict=True))
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)


def test_the_network_is_as_before():
    model = network()
    model[3].eval()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    recalibrate_norms(model, [(images(4), torch.zeros(4))])
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_old_statistics_do_not_matter():
    one, two = network(), network()
    two[1].running_mean += 5
    two[5].running_var *= 9
    for model in (one, two):
        recalibrate_norms(model, images(8).split(4))
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_layer_norms_need_nothing():
    def unread():
        raise AssertionError("the batches were read")
        yield

    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)
    )
    assert recalibrate_norms(model, unread()) == 0


def test_no_batches():
    with pytest.raises(MergeError, match=r"Sequential: found no batches .* of 2 norms"):
        recalibrate_norms(network(), [])


def test_values_that_are_not_finite():
    with pytest.raises(MergeError, match="'1': the running statistics are not finite"):
        recalibrate_norms(network(), [images(4) * float("inf")])


def test_a_failing_batch_leaves_modes_and_momenta():
    model = network()
    with pytest.raises(RuntimeError):
        recalibrate_norms(model, [images(4), images(4)[:, :1]])
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    assert all(module.training for module in model.modules())
