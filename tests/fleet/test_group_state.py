"""What a group leaves as it was, and what it notices when it changes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fleet.errors import FleetError
from fleet.group import Group


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def module(forward, **parts) -> Any:
    """A module with a linear layer, these parts and this forward(self, x)."""
    made = type("Written", (nn.Module,), {"forward": forward})()
    made.lin = nn.Linear(4, 6)
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            made.register_buffer(name, part.clone())
        else:
            made.add_module(name, copy.deepcopy(part))
    return made.double().eval()


def group_of(forward, count: int = 3, **parts) -> tuple[list[Any], Group]:
    torch.manual_seed(0)
    models = [module(forward, **parts) for _ in range(count)]
    return models, Group.of(models)


def loop(models, x):
    with torch.no_grad():
        return torch.stack([model(x.clone()) for model in models])


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_module_with_two_names_keeps_its_parameters():
    def forward(self, x):
        return self.second(self.first(x))

    torch.manual_seed(0)
    models = []
    for _ in range(3):
        model = module(forward, first=nn.Linear(4, 4))
        model.second = model.first
        models.append(model.double())
    kept = models[0].first.weight
    wanted = loop(models, numbers(2, 4))
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(3):
            near(group(numbers(2, 4)), wanted)
    assert models[0].first.weight is kept
    near(loop(models, numbers(2, 4)), wanted)


def counting(self, x):
    self.n.add_(1)
    return self.lin(x) * self.n


def test_a_buffer_that_forward_writes_is_written_once_a_call():
    models, group = group_of(counting, n=torch.zeros(()))
    x = numbers(2, 4)
    with torch.no_grad():
        for count in range(1, 5):
            near(group(x), torch.stack([model.lin(x) * count for model in models]))
    assert models[0].n == 4


@pytest.mark.parametrize("inference", [False, True])
def test_a_way_that_fails_leaves_nothing_written(inference):
    def forward(self, x):
        self.n.add_(1)
        x.add_(1)
        y = self.lin(x)
        return y * self.n if y.sum() > -1e9 else y

    models, group = group_of(forward, n=torch.zeros(()))
    with torch.inference_mode(inference), torch.no_grad():
        for count in range(1, 4):
            x = numbers(2, 4)
            near(group(x), torch.stack([model.lin(numbers(2, 4) + 1) * count for model in models]))


def test_a_norm_in_train_mode_is_restored_where_a_way_fails():
    def forward(self, x):
        y = self.norm(self.lin(x))
        return y if y.sum() > -1e9 else -y

    models, _ = group_of(forward, norm=nn.BatchNorm1d(6))
    for model in models:
        model.norm.train()
    group = Group.of(models)
    with torch.no_grad():
        group(numbers(5, 4))
    loop(models, numbers(5, 4))
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        near(group.stacked[f"norm.{part}"], torch.stack([getattr(m.norm, part) for m in models]))


def test_a_shared_buffer_that_each_model_writes_otherwise():
    def forward(self, x):
        y = self.lin(x)
        self.n.copy_(y.sum())
        return y

    _, group = group_of(forward, n=torch.zeros(()))
    with torch.no_grad(), pytest.raises(FleetError, match=r"share the buffer 'n'.*stack it"):
        group(numbers(2, 4))


def test_weights_that_are_changed_in_place_are_seen():
    def forward(self, x):
        return x @ self.lin.weight.exp().T + self.shift

    models, group = group_of(forward, shift=torch.zeros(6))
    x = numbers(2, 4)
    with torch.no_grad():
        for _ in range(3):
            near(group(x), loop(models, x))
        group.stacked["lin.weight"].mul_(2)
        models[0].shift.add_(1)
        near(group(x), torch.stack([x @ (2 * m.lin.weight).exp().T + 1 for m in models]))


def test_running_statistics_that_training_changes_are_seen():
    def forward(self, x):
        return self.norm(self.lin(x))

    models, group = group_of(forward, norm=nn.BatchNorm1d(6))
    names = models[0].state_dict()
    states = [model.state_dict() for model in models]
    group = Group(models[0], {n: torch.stack([s[n] for s in states]) for n in names})
    x = numbers(5, 4)
    with torch.inference_mode():
        for _ in range(3):
            group(x)
        models[0].norm.train()
        group(x)
        models[0].norm.eval()
        found = group(x)
    for model in models:
        model.norm.train()
        loop([model], x)
        model.norm.eval()
    near(found, loop(models, x))


def test_what_is_returned_is_not_what_is_kept():
    def forward(self, x):
        return self.lin(x), self.lin.weight.exp(), self.lin.weight

    models, group = group_of(forward)
    x = numbers(2, 4)
    with torch.no_grad():
        _, exponentials, weights = [group(x) for _ in range(3)][-1]
        exponentials.zero_()
        weights.zero_()
        near(group(x)[1], torch.stack([model.lin.weight.exp() for model in models]))
        near(group(x)[0], torch.stack([model.lin(x) for model in models]))


def test_of_stacks_buffers_in_train_mode():
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().train() for _ in range(2)]
    group = Group.of(models)
    assert {"1.running_mean", "1.running_var"} <= set(group.stacked)
    group(numbers(5, 4))


def test_instance_norm_with_shared_statistics_in_train_mode():
    model = nn.InstanceNorm1d(4, affine=True, track_running_stats=True).train()
    group = Group(model, {"weight": torch.ones(2, 4)})
    with pytest.raises(FleetError, match="stack 'running_mean'"):
        group(torch.zeros(2, 4, 5))


def test_one_odd_call_does_not_slow_the_others_down():
    def forward(self, x, odd=False):
        y = self.lin(x)
        return y.sum(1) if odd and y.sum() > -1e9 else y

    models, group = group_of(forward)
    x = numbers(2, 4)
    with torch.no_grad():
        for odd in (False, True, False, 1):
            near(group(x, odd=odd), torch.stack([model(x, odd) for model in models]))
    assert list(group._ways.values()) == [0, 2, 2]
