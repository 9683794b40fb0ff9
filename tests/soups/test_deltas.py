"""The mixture against a float64 reference that differentiates through the sum itself."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from merge.checkpoints import open_checkpoint
from soups import deltas
from soups.deltas import Mixture, fold_coefficients, row_bytes
from soups.errors import SoupError
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_from_an_origin_stay_what_they_are_while_the_centre_moves(zoo, precision):
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "layer")
    near = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-2, "atol": 1e-2}
    with Mixture(model, groups, capacity=2, precision=precision) as mixture:
        mixture.start_at_mean(zoo)
        origin = mixture.centre.clone()
        mean = mean_of(zoo)
        centre = {name: tensor.clone() for name, tensor in mean.items()}
        for block in ([0, 1], [2, 3], [1]):
            mixture.load_block([zoo[k] for k in block], origin)
            coefficients = 0.5 * torch.randn(len(block), len(groups))
            mixture.apply(coefficients)
            mixture.fold()
            for own, names in zip(coefficients.double().T, groups.values(), strict=True):
                for name in names:
                    rows = torch.stack([zoo[k].read(name).double() - mean[name] for k in block])
                    centre[name] += torch.tensordot(own, rows, dims=1)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), centre[name], **near)
        assert not mixture.centre.equal(origin)
        # Without one they are those from where the centre has come.
        mixture.load_block(zoo[:1])
        mixture.apply(torch.ones(1, len(groups)))
        for name, parameter in model.named_parameters():
            wanted = zoo[0].read(name).double()
            torch.testing.assert_close(parameter.detach().double(), wanted, **near)


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


ROUNDED = ["bf16", "int8", "int4", "sign"]


def dequantised(mixture):
    """Name → what the mixture holds of it [block, *shape], in float64."""
    held, found = mixture.rows.unpack().double(), {}
    for name, parameter in mixture.model.named_parameters():
        start = (parameter.data_ptr() - mixture.weights.data_ptr()) // 4
        own = held[:, start : start + parameter.numel()]
        found[name] = own.reshape(len(held), *parameter.shape)
    return found


def mean_of(zoo):
    return {n: torch.stack([k.read(n).double() for k in zoo]).mean(0) for n in zoo[0].tensors}


@pytest.fixture
def short_runs(monkeypatch):
    """Scales for runs of 8 weights, read in pieces of 16: small tensors have several of both."""
    monkeypatch.setattr(deltas, "RUN", 8)
    monkeypatch.setattr(deltas, "PIECE", 16)


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("grouping", ["model", "layer", "tensor"])
@pytest.mark.parametrize("block", [[2], [3, 1, 0]])
def test_weights_and_gradient_of_rounded_rows(zoo, short_runs, precision, grouping, block):
    """Against float64 autograd through the sum of the very rows that are held."""
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, grouping)
    images, labels = torch.randn(7, 1, 6, 6), torch.randint(0, 3, (7,))
    with Mixture(model, groups, capacity=4, precision=precision) as mixture:
        mixture.start_at_mean(zoo)
        mixture.load_block([zoo[k] for k in block])
        coefficients = 0.5 * torch.randn(len(block), len(groups))
        mixture.apply(coefficients)
        loss = F.cross_entropy(model(images), labels)
        gradient = mixture.gradient(loss)
        rows, centre = dequantised(mixture), mean_of(zoo)
        a = coefficients.double().requires_grad_()
        wanted = {
            name: centre[name] + torch.tensordot(a[:, g], rows[name], dims=1)
            for g, names in enumerate(groups.values())
            for name in names
        }
        wanted_loss = F.cross_entropy(
            functional_call(Net().double(), wanted, (images.double(),)), labels
        )
        (wanted_gradient,) = torch.autograd.grad(wanted_loss, a)
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), wanted[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-5 * wanted_gradient.abs().max()
        )
        lengths = [
            torch.cat([rows[name].reshape(len(block), -1) for name in names], dim=1).norm(dim=1)
            for names in groups.values()
        ]
        torch.testing.assert_close(
            mixture.row_norms().double(), torch.stack(lengths, dim=1), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("precision", "most"),
    [("fp32", 0), ("bf16", 0.003), ("int8", 0.01), ("int4", 0.2), ("sign", 0.7)],
)
def test_the_row_error_is_what_rounding_has_lost(zoo, precision, most):
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "layer")
    with Mixture(model, groups, capacity=4, precision=precision) as mixture:
        mixture.start_at_mean(zoo)
        mixture.load_block(zoo)
        rows, centre = dequantised(mixture), mean_of(zoo)
        exact = {n: torch.stack([k.read(n).double() - centre[n] for k in zoo]) for n in rows}
        found = mixture.row_errors()
    for error, names in zip(found.tolist(), groups.values(), strict=True):
        lost = sum((rows[name] - exact[name]).square().sum() for name in names)
        whole = sum(exact[name].square().sum() for name in names)
        assert error == pytest.approx((lost / whole).sqrt().item(), rel=1e-3, abs=1e-6)
    assert most / 10 <= found.max() <= most


@pytest.mark.parametrize("precision", ["int8", "int4", "sign"])
def test_reading_in_pieces_gives_the_same_rows(zoo, monkeypatch, precision):
    monkeypatch.setattr(deltas, "RUN", 8)
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "tensor")
    found = []
    for piece in (8, 24, 1 << 20):
        monkeypatch.setattr(deltas, "PIECE", piece)
        with Mixture(model, groups, capacity=4, precision=precision) as mixture:
            mixture.start_at_mean(zoo)
            mixture.load_block(zoo)
            found.append((mixture.rows.codes.clone(), mixture.rows.scales.clone()))
    for codes, scales in found[1:]:
        assert torch.equal(codes, found[0][0])
        assert torch.equal(scales, found[0][1])


@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_originals_are_mixed_and_folded_as_they_are(zoo, short_runs, precision):
    """However the rows were rounded, the centre stays the coefficients over the originals."""
    model = Net()
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "layer")
    matrix = np.full((4, len(groups)), 0.25)
    with Mixture(model, groups, capacity=3, precision=precision) as mixture:
        mixture.start_at_mean(zoo)
        for block in ([2, 0, 1], [3], [1, 2, 3]):
            mixture.load_block([zoo[k] for k in block])
            coefficients = 0.7 * torch.randn(len(block), len(groups))
            mixture.apply_originals([zoo[k] for k in block], coefficients)
            mixture.fold()
            matrix = fold_coefficients(matrix, block, coefficients)
        for column, names in zip(matrix.T, groups.values(), strict=True):
            for name in names:
                wanted = sum(a * k.read(name).double() for a, k in zip(column, zoo, strict=True))
                parameter = model.get_parameter(name)
                assert (parameter - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_the_memory_of_the_rows_is_the_predicted_one(precision):
    model = nn.Sequential(nn.Linear(512, 384), nn.Linear(384, 511), nn.LayerNorm(511))
    weights = sum(p.numel() for p in model.parameters())
    groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "tensor")
    with Mixture(model, groups, capacity=5, precision=precision) as mixture:
        # Short tensors have a scale of their own, which the prediction leaves out.
        assert 0 <= mixture.row_bytes - 5 * row_bytes(weights, precision) <= 5 * 8 * 6
    copies = {"fp32": 1, "bf16": 2, "int8": 3.9, "int4": 7.9, "sign": 30}
    assert 4 * weights / row_bytes(weights, precision) >= copies[precision]


def test_what_cannot_be_rounded_is_named(tmp_path):
    model = Net()
    state = {n: p.detach().clone() for n, p in model.named_parameters() if n != "second.weight"}
    state["head.weight"][1, 2] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    groups = {"head": ("head.weight",)}
    with (
        open_checkpoint(tmp_path / "bad.safetensors") as bad,
        Mixture(model, groups, capacity=1, precision="int4") as mixture,
        pytest.raises(SoupError, match=r"bad\.safetensors: 'head\.weight'.*nan at weight 7"),
    ):
        mixture.load_block([bad])
