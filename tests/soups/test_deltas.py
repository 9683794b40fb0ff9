"""The mixture against a float64 reference that differentiates through the sum itself."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from merge.checkpoints import open_checkpoint
from soups.deltas import Mixture, fold_coefficients
from soups.groups import group_tensors


class Net(nn.Module):
    """Convolution, LayerNorm, a tied linear pair, a scalar."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        x = self.norm(self.conv(images).mean((2, 3)))
        return self.head(self.second(F.gelu(self.first(x)))) * self.scale


@pytest.fixture
def zoo(tmp_path):
    checkpoints = []
    for k in range(4):
        torch.manual_seed(k)
        state = {n: p + 0.3 * torch.randn_like(p) for n, p in Net().named_parameters()}
        save_file(state, tmp_path / f"{k}.safetensors")
        checkpoints.append(open_checkpoint(tmp_path / f"{k}.safetensors"))
    return checkpoints


def reference(zoo, groups, centre, coefficients, images, labels):
    """Loss, weights and gradient in float64, by autograd through the weighted sum."""
    a = coefficients.double().requires_grad_()
    weights = {}
    for g, names in enumerate(groups.values()):
        for name in names:
            rows = torch.stack([k.read(name).double() - centre[name] for k in zoo])
            weights[name] = centre[name] + torch.tensordot(a[:, g], rows, dims=1)
    logits = functional_call(Net().double(), weights, (images.double(),))
    loss = F.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, a)
    return loss, weights, gradient


@pytest.mark.parametrize("grouping", ["model", "block", "layer", "tensor", 100])
@pytest.mark.parametrize("block", [[0], [1, 3], [0, 1, 2, 3]])
def test_weights_and_gradient_equal_the_float64_reference(zoo, grouping, block):
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, grouping)
    images, labels = torch.randn(7, 1, 6, 6), torch.randint(0, 3, (7,))
    with Mixture(model, groups, capacity=4) as mixture:
        mixture.start_at_mean(zoo)
        mixture.load_block([zoo[k] for k in block])
        coefficients = 0.5 * torch.randn(len(block), len(groups))
        mixture.apply(coefficients)
        loss = F.cross_entropy(model(images), labels)
        gradient = mixture.gradient(loss)
        centre = {
            n: torch.stack([k.read(n).double() for k in zoo]).mean(0)
            for n in dict(model.named_parameters())
        }
        wanted_loss, wanted, wanted_gradient = reference(
            [zoo[k] for k in block], groups, centre, coefficients, images, labels
        )
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), wanted[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-5 * wanted_gradient.abs().max()
        )
        assert all(p.grad is None for p in model.parameters())


def test_rows_lengths_and_displacement(zoo):
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "layer")
    with Mixture(model, groups, capacity=2) as mixture:
        mixture.start_at_mean(zoo[:1])
        mixture.load_block(zoo[:2])
        assert mixture.row_norms()[0].count_nonzero() == 0
        mixture.apply(torch.tensor([[0.0], [0.5]]).expand(2, len(groups)).contiguous())
        torch.testing.assert_close(mixture.displacement(), 0.5 * mixture.row_norms()[1])
        mixture.fold()
        torch.testing.assert_close(mixture.displacement(), torch.zeros(len(groups)))


def test_folding_blocks_keeps_the_coefficients_over_the_originals(zoo):
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "tensor")
    matrix = np.full((4, len(groups)), 0.25)
    with Mixture(model, groups, capacity=3) as mixture:
        mixture.start_at_mean(zoo)
        for block in ([2, 0, 1], [3], [1, 2]):
            mixture.load_block([zoo[k] for k in block])
            coefficients = 0.7 * torch.randn(len(block), len(groups))
            mixture.apply(coefficients)
            mixture.fold()
            matrix = fold_coefficients(matrix, block, coefficients)
        np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
        for (name, parameter), column in zip(model.named_parameters(), matrix.T, strict=True):
            wanted = sum(a * k.read(name).double() for a, k in zip(column, zoo, strict=True))
            assert (parameter - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_frozen_parameter_is_mixed_and_what_is_not_mixed_gets_no_gradient(zoo):
    model = Net()
    model.conv.requires_grad_(False)
    groups = {"mixed": ("conv.weight", "conv.bias")}
    with Mixture(model, groups, capacity=4) as mixture:
        mixture.start_at_mean(zoo)
        mixture.load_block(zoo)
        mixture.apply(torch.zeros(4, 1))
        loss = model(torch.randn(2, 1, 6, 6)).square().sum()
        assert mixture.gradient(loss).abs().min() > 0
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.conv.weight.requires_grad
    assert model.head.weight.requires_grad
