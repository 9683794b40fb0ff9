"""Networks trained apart on the digits: far better merged after alignment than without."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from merge.align import apply_permutations, derive_groups, match_weights, recalibrate_norms

TRAINED = 1200


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(images).float() / 16).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]


def mlp() -> nn.Module:
    hidden = [m for _ in range(2) for m in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), *hidden, nn.Linear(128, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (1, 32, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def trained(make, seed: int, epochs: int, digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(seed)
    model, (images, labels) = make(), digits
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    images, labels = digits
    return 100 * float((model(images[TRAINED:]).argmax(1) == labels[TRAINED:]).float().mean())


def midpoint(model: nn.Module, one: dict[str, Tensor], two: dict[str, Tensor]) -> nn.Module:
    merged = copy.deepcopy(model)
    merged.load_state_dict({n: (one[n].double() + two[n].double()) / 2 for n in one})
    return merged


@pytest.mark.parametrize(("make", "epochs"), [(mlp, 15), (convolutions, 4)])
def test_the_midpoint_is_far_better_after_alignment(make, epochs, digits):
    one, two = (trained(make, seed, epochs, digits) for seed in (0, 1))
    groups = derive_groups(one, digits[0][:2], check=True)
    states = one.state_dict(), two.state_dict()
    aligned = apply_permutations(match_weights(groups, *states), states[1])
    plain, better = midpoint(one, *states), midpoint(one, states[0], aligned)
    without, unrepaired = accuracy(plain, digits), accuracy(better, digits)
    recalibrate_norms(plain, [digits[0][:TRAINED]])
    norms = recalibrate_norms(better, [digits[0][:TRAINED]])
    recalibrated, merged = accuracy(plain, digits), accuracy(better, digits)
    worse = min(accuracy(one, digits), accuracy(two, digits))
    assert worse > 95
    assert merged > without + 20
    assert merged > recalibrated + 10
    assert merged >= unrepaired + (10 if norms else 0)
