"""Logit derivatives against central differences in float64."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fleet.errors import FleetError
from soups.errors import SoupError
from soups.second_order.tangents import ingredient_directions, logit_derivatives
from tests.soups.conftest import open_session

STEP = 2e-6


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same"),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=3, padding_mode="reflect", padding=1),
        nn.GroupNorm(2, 6),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(24),
        nn.Linear(24, 4),
    )


class Tied(nn.Module):
    """One matrix used twice, a standardised weight, a token, and a scale in place."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        weight = self.patch.weight / self.patch.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = F.conv2d(images, weight, self.patch.bias, 4).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.second(torch.tanh(self.first(x))).mul_(self.scale)
        return self.head(x[:, 0] * x[:, 1:].mean(1))


class Sequence(nn.Module):
    """Attention with the rows in the second axis, and a product of two weights."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.place = nn.Parameter(torch.randn(4, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 5)
        self.mix = nn.Parameter(torch.randn(5, 4))

    def forward(self, images):
        x = self.patch(images).flatten(2).permute(2, 0, 1) + self.place
        x = self.attention(x, x, x, need_weights=False)[0]
        return x.mean(0) @ (self.out.weight.T @ self.mix) + self.mix.mean(0)


def convnext():
    settings = {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 2}
    model = timm.create_model("convnext_atto", num_classes=4, **settings)
    return _spread(model)


def vit(fused):
    settings = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, init_values=0.3, **settings)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return _spread(model)


def _spread(model):
    """Weights that no derivative is zero by: timm's heads and layer scales begin near 0."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


MODELS = {
    "conv": (conv_net, 9),
    "tied": (Tied, 8),
    "sequence": (Sequence, 8),
    "convnext": (convnext, 32),
    "vit": (lambda: vit(False), 8),
    "vit, fused": (lambda: vit(True), 8),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    size = MODELS[name][1]
    return model, torch.randn(5, 3, size, size, dtype=dtype)


def drawn(tensors, directions=3):
    return {n: torch.randn(directions, *t.shape, dtype=t.dtype) for n, t in tensors.items()}


def difference(model, moved, images):
    """The derivative of the logits along `moved`, by central differences of fourth order."""
    state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad():
        total = sum(
            factor * functional_call(model, {n: state[n] + s * t for n, t in moved.items()}, images)
            for factor, s in ((8, STEP), (-8, -STEP), (-1, 2 * STEP), (1, -2 * STEP))
        )
    return total / (12 * STEP)


def check(model, directions, images, profiles=None, **settings):
    logits, found = logit_derivatives(model, directions, images, profiles=profiles, **settings)
    assert torch.allclose(logits, model(images).detach(), atol=1e-12)
    of_tensor = profiles or {name: [1.0] for name in directions}
    for d in range(found.shape[2]):
        for r in range(found.shape[3]):
            moved = {n: of_tensor[n][r] * t[d] for n, t in directions.items()}
            wanted = difference(model, moved, images)
            assert wanted.abs().max() > 1e-4
            error = (found[:, :, d, r] - wanted).abs().max()
            assert error < 1e-7 * wanted.abs().max() + 1e-9, (d, r)


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_equal_central_differences(name):
    model, images = made(name)
    directions = drawn(dict(model.named_parameters()))
    profiles = {n: [1.0, np.cos(i), float(i % 2)] for i, n in enumerate(directions)}
    check(model, directions, images, profiles)


def test_norm_buffers_may_move_too():
    model, images = made("conv")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    moving = {n: t for n, t in tensors.items() if t.is_floating_point()}
    directions = {n: 0.1 * t for n, t in drawn(moving).items()}
    check(model, directions, images)
    check(model, {n: t for n, t in directions.items() if "running" in n}, images)


def test_some_tensors_alone():
    model, images = made("vit")
    chosen = {n: p for n, p in model.named_parameters() if "qkv" in n or n == "pos_embed"}
    check(model, drawn(chosen), images)


def test_a_profile_for_each_group_sums_to_the_whole():
    model, images = made("convnext")
    directions = drawn(dict(model.named_parameters()))
    first = set([*directions][:9])
    profiles = {name: [float(name in first), float(name not in first)] for name in directions}
    _, apart = logit_derivatives(model, directions, images, profiles=profiles)
    _, whole = logit_derivatives(model, directions, images)
    assert apart.shape[-1] == 2
    assert apart[..., 0].abs().max() > 1e-3
    torch.testing.assert_close(apart.sum(-1), whole[..., 0], rtol=1e-10, atol=1e-10)


def test_many_classes_are_taken_in_parts(monkeypatch):
    model, images = made("conv")
    directions = drawn(dict(model.named_parameters()))
    logits, whole = logit_derivatives(model, directions, images)
    monkeypatch.setattr("soups.second_order.tangents.CLASSES_AT_ONCE", 3)
    again, parts = logit_derivatives(model, directions, images)
    assert logits.shape[1] == 4
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, logits, rtol=1e-12, atol=1e-12)


def test_batches_change_nothing_but_rounding():
    model, images = made("conv", torch.float32)
    directions = drawn(dict(model.named_parameters()))
    at_once = logit_derivatives(model, directions, images)
    one_by_one = logit_derivatives(model, directions, images, memory=1)
    again = logit_derivatives(model, directions, images)
    for first, second, third in zip(at_once, one_by_one, again, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        assert torch.equal(first, third)


def test_nothing_is_left_on_the_model():
    model, images = made("tied")
    before = {n: p.clone() for n, p in model.named_parameters()}
    given = images.clone()
    logit_derivatives(model, drawn(before), images)
    assert torch.equal(images, given)
    assert not images.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_a_weight_that_is_not_used_has_derivative_zero():
    model, images = made("tied")
    model.spare = nn.Linear(2, 2).double()
    directions = drawn(dict(model.spare.named_parameters(prefix="spare")))
    assert logit_derivatives(model, directions, images)[1].abs().max() == 0


class Scaled(torch.autograd.Function):
    """x · weight, by a function that torch does not look into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum_to_size(weight.shape)


class Odd(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))
        self.head = nn.Linear(12, 3)
        self.wrong = wrong

    def forward(self, images):
        return self.head(self.wrong(images.flatten(1), self.weight))


def written(x, weight):
    x = x.clone()
    x[:, :12] = weight
    return x


@pytest.mark.parametrize(
    "function",
    [
        Scaled.apply,
        lambda x, weight: torch.mul(*torch.broadcast_tensors(x, weight)),
        lambda x, weight: x.clone().mul_(weight).add_(weight).relu_(),
        lambda x, weight: (x @ torch.outer(weight, weight)) * weight.to(x.dtype),
        lambda x, weight: torch.where(x > 0, weight, x @ torch.diag(weight)),
    ],
)
def test_uses_that_no_layer_has(function):
    torch.manual_seed(0)
    model = Odd(function).double().eval()
    directions = drawn(dict(model.named_parameters()))
    check(model, directions, torch.randn(4, 3, 2, 2).double())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, weight: x * weight + x.mean(0), "depend on the other images.*pooled"),
        (written, "__setitem__.*pooled"),
        (lambda x, weight: weight[(x > 0).long()], "by autograd.*pooled"),
        (lambda x, weight: x * weight[: x.sum().int()].sum(), "image by image.*pooled"),
    ],
)
def test_what_cannot_be_differentiated_is_named(wrong, words):
    torch.manual_seed(0)
    model = Odd(wrong).eval().requires_grad_(False)
    with pytest.raises(SoupError, match=words):
        logit_derivatives(model, drawn(dict(model.named_parameters())), torch.randn(4, 3, 2, 2))


def test_bad_input():
    model, images = made("conv")
    directions = drawn(dict(model.named_parameters()))
    with pytest.raises(SoupError, match=r"no weights '0\.wight'"):
        logit_derivatives(model, {"0.wight": directions["0.weight"]}, images)
    with pytest.raises(SoupError, match=r"'0\.bias' is \[3, 5\]; wanted \[directions, \*\[6\]\]"):
        logit_derivatives(model, directions | {"0.bias": torch.ones(3, 5)}, images)
    with pytest.raises(SoupError, match=r"found \[2, 3\] of them"):
        logit_derivatives(model, directions | {"0.bias": torch.ones(2, 6)}, images)
    profiles = {n: [1.0, 2.0] for n in directions if n != "9.bias"}
    with pytest.raises(SoupError, match=r"'9\.bias' has 0 of 2"):
        logit_derivatives(model, directions, images, profiles=profiles)
    with pytest.raises(SoupError, match="no images"):
        logit_derivatives(model, directions, images[:0])
    with pytest.raises(SoupError, match="found none"):
        logit_derivatives(model, {}, images)
    with pytest.raises(FleetError, match="train mode"):
        logit_derivatives(model.train(), directions, images)


def test_directions_of_ingredients(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    found = ingredient_directions(session.sources, [3, 1])
    assert [*found] == [*session.numels]
    for name, rows in found.items():
        every = [k.read(session.zoo.stored(k, name)).double() for k in session.zoo.checkpoints]
        mean = torch.stack(every).mean(0)
        wanted = torch.stack([every[3] - mean, every[1] - mean])
        torch.testing.assert_close(rows.double(), wanted, rtol=1e-4, atol=1e-6)
