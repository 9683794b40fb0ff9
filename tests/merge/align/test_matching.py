"""Matching: what was permuted at random is found again, and small problems are solved exactly."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge.align import (
    apply_permutations,
    derive_groups,
    identity,
    match_weights,
    random_permutations,
)
from merge.errors import MergeError

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def similarity(reference: State, other: State) -> float:
    """Σ ⟨reference, other⟩, in float64."""
    return sum(
        float(np.vdot(reference[n].double().numpy(), other[n].double().numpy())) for n in reference
    )


def test_a_permuted_network_is_brought_back(network):
    model, example = network
    groups = derive_groups(model, example)
    reference = state_of(model)
    moved = random_permutations(groups, torch.Generator().manual_seed(3))
    other = apply_permutations(moved, reference)
    found = match_weights(groups, reference, other)
    back = apply_permutations(found, other)
    assert all(torch.equal(reference[name], back[name]) for name in reference)


def test_noise_does_not_hide_the_permutation(network):
    model, example = network
    groups = derive_groups(model, example)
    reference = state_of(model)
    generator = torch.Generator().manual_seed(4)
    other = apply_permutations(random_permutations(groups, generator), reference)
    for name in groups.layouts:
        scale = 0.02 * other[name].std(correction=0)
        other[name] = other[name] + scale * torch.randn(other[name].shape, generator=generator)
    back = apply_permutations(match_weights(groups, reference, other), other)
    for name in set(groups.layouts) - groups.buffers:
        distance = (reference[name] - back[name]).norm()
        assert distance <= 0.05 * reference[name].norm() + 1e-6, name


def mlp(widths: list[int]) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_against_every_permutation(seed):
    torch.manual_seed(seed)
    one, two = mlp([3, 5, 2]), mlp([3, 5, 2])
    groups = derive_groups(one, torch.randn(2, 3))
    reference, other = state_of(one), state_of(two)
    a, b = ({n: t.double().numpy() for n, t in s.items()} for s in (reference, other))
    best = max(
        sum(
            a["0.weight"][i] @ b["0.weight"][p[i]]
            + a["0.bias"][i] * b["0.bias"][p[i]]
            + a["2.weight"][:, i] @ b["2.weight"][:, p[i]]
            for i in range(5)
        )
        for p in permutations(range(5))
    )
    best += np.vdot(a["2.bias"], b["2.bias"])
    found = apply_permutations(match_weights(groups, reference, other), other)
    assert similarity(reference, found) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_single_layer_can_be_bettered(seed):
    """Coordinate descent ends where no group alone gains."""
    torch.manual_seed(seed)
    one, two = mlp([3, 4, 4, 2]), mlp([3, 4, 4, 2])
    groups = derive_groups(one, torch.randn(2, 3))
    reference, other = state_of(one), state_of(two)
    found = match_weights(groups, reference, other, seed=seed)
    after = similarity(reference, apply_permutations(found, other))
    assert after >= similarity(reference, other) - 1e-6
    for k in range(len(groups.groups)):
        for order in permutations(range(4)):
            tables = list(found.tables)
            tables[k] = torch.tensor([order])
            changed = type(found)(groups, tuple(tables))
            assert similarity(reference, apply_permutations(changed, other)) <= after + 1e-5


class Attention(nn.Module):
    """2 heads with 3 channels, input and output fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 18, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seed", range(3))
def test_heads_and_their_channels_against_every_permutation(seed):
    torch.manual_seed(seed)
    one, two = Attention(), Attention()
    groups = derive_groups(one, torch.randn(1, 5, 4), check=True)
    assert [(g.size, g.parent) for g in groups.groups] == [(2, None), (3, 0), (3, 0)]
    reference, other = state_of(one), state_of(two)
    a, b = ({n: t.double().numpy() for n, t in s.items()} for s in (reference, other))
    aw, bw = a["qkv.weight"].reshape(3, 2, 3, 4), b["qkv.weight"].reshape(3, 2, 3, 4)
    ao, bo = a["out.weight"].reshape(3, 2, 3), b["out.weight"].reshape(3, 2, 3)
    orders = [list(p) for p in permutations(range(3))]
    best = -np.inf
    for heads in permutations(range(2)):
        for inside in product(product(orders, orders), repeat=2):
            total = 0.0
            for h, (keys, values) in enumerate(inside):
                g = heads[h]
                total += np.vdot(aw[:2, h], bw[:2, g][:, keys])
                total += np.vdot(aw[2, h], bw[2, g][values])
                total += np.vdot(ao[:, h], bo[:, g][:, values])
            best = max(best, total)
    found = apply_permutations(match_weights(groups, reference, other), other)
    assert similarity(reference, found) == pytest.approx(best, rel=1e-6)


def test_fine_tuned_copies_stay_as_they_are(network):
    model, example = network
    groups = derive_groups(model, example)
    reference = state_of(model)
    generator = torch.Generator().manual_seed(5)
    other = {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and name not in groups.buffers
        else tensor
        for name, tensor in reference.items()
    }
    assert match_weights(groups, reference, other) == identity(groups)


def test_the_seed_decides():
    torch.manual_seed(0)
    one, two = mlp([6, 12, 12, 12, 3]), mlp([6, 12, 12, 12, 3])
    groups = derive_groups(one, torch.randn(2, 6))
    states = state_of(one), state_of(two)
    assert match_weights(groups, *states, seed=7) == match_weights(groups, *states, seed=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    model = mlp([6, 12, 12, 3])
    groups = derive_groups(model, torch.randn(2, 6))
    reference = {name: tensor.to(dtype) for name, tensor in state_of(model).items()}
    other = apply_permutations(
        random_permutations(groups, torch.Generator().manual_seed(0)), reference
    )
    back = apply_permutations(match_weights(groups, reference, other), other)
    assert all(torch.equal(reference[n], back[n]) and back[n].dtype == dtype for n in back)


def test_non_contiguous_tensors():
    torch.manual_seed(0)
    model = mlp([6, 12, 12, 3])
    groups = derive_groups(model, torch.randn(2, 6))
    reference = state_of(model)
    other = apply_permutations(
        random_permutations(groups, torch.Generator().manual_seed(0)), reference
    )
    turned = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in other.items()}
    assert match_weights(groups, reference, turned) == match_weights(groups, reference, other)


def test_a_model_with_nothing_to_permute():
    model = nn.Linear(3, 2)
    groups = derive_groups(model, torch.randn(1, 3), check=True)
    assert not groups.groups
    found = match_weights(groups, state_of(model), state_of(nn.Linear(3, 2)))
    assert found.tables == ()
    assert found.moved == 0


def test_bad_states():
    model = mlp([3, 4, 2])
    groups = derive_groups(model, torch.randn(1, 3))
    good = state_of(model)
    short = {name: tensor for name, tensor in good.items() if name != "0.bias"}
    with pytest.raises(MergeError, match=r"the other: '0.bias' is missing"):
        match_weights(groups, good, short)
    wide = state_of(mlp([3, 5, 2]))
    with pytest.raises(MergeError, match=r"the reference: '0.weight' is \[5, 3\].* has \[4, 3\]"):
        match_weights(groups, wide, good)
    with pytest.raises(MergeError, match=r"'0.weight' is \[5, 3\]"):
        apply_permutations(identity(groups), wide)
    broken = good | {"2.weight": good["2.weight"] * float("nan")}
    with pytest.raises(MergeError, match=r"the other: '2.weight' has NaN"):
        match_weights(groups, good, broken)
