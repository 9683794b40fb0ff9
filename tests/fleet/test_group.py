"""What a group promises, on modules that people write themselves."""

import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleet.group import Group


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def models_of(kind, count: int = 3, **settings) -> list[nn.Module]:
    torch.manual_seed(0)
    models = [kind(**settings).double().eval() for _ in range(count)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return models


def loop(models, *inputs):
    return torch.stack([model(*inputs) for model in models])


def assert_replays(models, x, *, quiet, caplog):
    """Eager, recorded and replayed calls all give what a loop gives."""
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(group(x), loop(models, x), rtol=1e-10, atol=1e-12)
    if quiet:
        assert not caplog.records
    return group


class Raw(nn.Module):
    """Parameters used directly, a buffer, a constant, and functions of many kinds."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.empty(4, 6))
        self.kernel = nn.Parameter(torch.empty(2, 3, 6))
        self.scale = nn.Parameter(torch.empty(()))
        self.register_buffer("offset", torch.arange(6.0))
        self.constant = torch.linspace(0, 1, 6, dtype=torch.float64)

    def forward(self, x):
        h = torch.tanh(x @ self.left) * self.scale + self.offset
        h = h + self.constant
        mixed = torch.einsum("bi,kji->bkj", h, self.kernel)
        picked = h.gather(1, h.argsort(1))[:, ::2]
        return torch.cat([mixed.flatten(1), picked, torch.where(h > 0, h, 0.0).sum(1, True)], 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


class InPlace(nn.Module):
    """Writes into its own results, and into what does not depend on the model."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.position = nn.Parameter(torch.empty(4))

    def forward(self, x):
        x = x * 2
        x += self.position
        out = torch.zeros(len(x), 5, dtype=x.dtype)
        out[:, :3] = self.linear(x)
        out[:, 3] = x.new_ones(len(x))
        out[:, 3:] *= self.position[0]
        out.relu_()
        return out


class Views(nn.Module):
    """Writes into a view, and then reads what it is a view of."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        h = self.linear(x)
        half = h[:, ::2]
        half.mul_(3.0)
        return F.softmax(h + half.sum(), dim=1)


@dataclass
class Pair:
    first: torch.Tensor
    rest: list[torch.Tensor]
    name: str


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, *, scale, more=None):
        y = self.linear(x) * scale
        if more is not None:
            y = y + more["bias"]
        return {"pair": Pair(y, [y.sum(1), x.sum(1)], "name"), "none": None, "number": 3}, (y[0],)


class Counted(nn.Module):
    """Counts how often its layers run."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("kind", [Raw, Views])
def test_a_users_own_module(kind, caplog):
    assert_replays(models_of(kind), numbers(5, 4), quiet=True, caplog=caplog)


def test_writing_in_place_into_what_all_models_share(caplog):
    group = assert_replays(models_of(InPlace), numbers(5, 4), quiet=True, caplog=caplog)
    assert set(group._ways.values()) == {1}


def test_writing_in_place_has_the_gradients_of_the_loop():
    models, x = models_of(InPlace), numbers(5, 4)
    names = [name for name, _ in models[0].named_parameters()]
    stacked = {
        n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]).requires_grad_()
        for n in names
    }
    Group(models[0], stacked)(x).pow(2).sum().backward()
    loop(models, x).pow(2).sum().backward()
    for name in names:
        wanted = torch.stack([dict(model.named_parameters())[name].grad for model in models])
        torch.testing.assert_close(stacked[name].grad, wanted, rtol=1e-10, atol=1e-12)


def test_tied_weights(caplog):
    models = models_of(Tied)
    ids = torch.tensor([[1, 2, 6], [0, 0, 3]])
    assert_replays(models, ids, quiet=True, caplog=caplog)
    weights = torch.stack([model.head.weight.detach() for model in models])
    for names in (["table.weight"], ["head.weight"], ["table.weight", "head.weight"]):
        group = Group(models[0], {name: weights.clone() for name in names})
        with torch.no_grad():
            torch.testing.assert_close(group(ids), loop(models, ids), rtol=1e-10, atol=0)


def test_outputs_keep_their_structure():
    models, x = models_of(Structured), numbers(5, 4)
    group = Group.of(models)
    more = {"bias": numbers(3)}
    with torch.no_grad():
        for _ in range(3):
            found, (row,) = group(x, scale=2.0, more=more)
            wanted = [model(x, scale=2.0, more=more) for model in models]
            assert found["none"] is None
            assert (found["number"], found["pair"].name) == (3, "name")
            for key in (lambda o: o.first, lambda o: o.rest[0], lambda o: o.rest[1]):
                stacked = torch.stack([key(output["pair"]) for output, _ in wanted])
                torch.testing.assert_close(key(found["pair"]), stacked, rtol=1e-10, atol=1e-12)
            assert row.shape == (3, 3)
        other, _ = group(x, scale=1.0)
        torch.testing.assert_close(other["pair"].first[1], models[1].linear(x), rtol=1e-10, atol=0)


def test_an_input_for_each_model():
    models, x = models_of(Raw), numbers(3, 5, 4)
    group = Group.of(models)
    wanted = torch.stack([model(own) for model, own in zip(models, x, strict=True)]).detach()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(group(x, each=True), wanted, rtol=1e-10, atol=1e-12)


def test_inputs_of_other_shapes_and_layouts_in_between():
    models = models_of(Counted)
    group = Group.of(models)
    with torch.no_grad():
        for size in (5, 1, 5, 2, 5, 1, 0, 1, 2):
            x = numbers(4, size, seed=size).T
            torch.testing.assert_close(group(x), loop(models, x), rtol=1e-10, atol=1e-12)
            dense = x.contiguous()
            torch.testing.assert_close(group(dense), loop(models, dense), rtol=1e-10, atol=1e-12)


def test_few_kinds_of_input_are_kept():
    group = Group.of(models_of(Counted))
    with torch.no_grad():
        for size in range(1, 20):
            group(numbers(size, 4))
    assert len(group._captured) == 8


def test_prepared_weights_are_kept_for_one_kind_of_input_where_they_are_large(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.exp())

    torch.manual_seed(0)
    models = [Scaled(4, 3, bias=False).double().eval() for _ in range(3)]
    group = Group.of(models)
    small, large = numbers(2, 4), numbers(5, 4)
    with torch.no_grad():
        for x in (small, large):
            for _ in range(3):
                group(x)
        assert group.kept_bytes == 2 * 3 * 4 * 3 * 8
        monkeypatch.setattr("fleet.group.SMALL_BYTES", 0)
        for x in (small, large, small):
            torch.testing.assert_close(group(x), loop(models, x), rtol=1e-10, atol=0)
            assert group.kept_bytes == 3 * 4 * 3 * 8


def shared_prefix(models, names):
    """The models with the first one's tensors in `names`, and the group that shares them."""
    first = models[0].state_dict()
    for model in models:
        model.load_state_dict({**model.state_dict(), **{name: first[name] for name in names}})
    states = [model.state_dict() for model in models]
    stacked = {n: torch.stack([state[n] for state in states]) for n in first if n not in names}
    return Group(models[0], stacked, shared={name: first[name] for name in names})


@pytest.mark.parametrize("capture", [True, False])
def test_a_shared_prefix_is_computed_once(capture, monkeypatch):
    models, x = models_of(Counted, 4), numbers(5, 4)
    names = ["first.weight", "first.bias", "second.weight", "second.bias"]
    group = shared_prefix(models, names)
    group.capture = capture
    calls = {"tanh": 0, "elements": 0}
    original = torch.ops.aten.tanh.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "tanh" in str(function):
                calls["tanh"] += 1
                calls["elements"] += args[0].numel()
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        group(x), group(x)
        with Count():
            found = group(x)
        torch.testing.assert_close(found, loop(models, x), rtol=1e-12, atol=1e-14)
    assert calls == {"tanh": 2, "elements": 2 * 5 * 4}
    assert original is torch.ops.aten.tanh.default


def test_a_shared_prefix_has_the_gradient_of_all_models():
    models, x = models_of(Counted), numbers(5, 4)
    group = shared_prefix(models, ["first.weight", "first.bias"])
    weight = group.shared["first.weight"] = group.shared["first.weight"].clone().requires_grad_()
    group(x).sum().backward()
    loop(models, x).sum().backward()
    wanted = sum(model.first.weight.grad for model in models)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-12)


def test_an_output_that_does_not_depend_on_the_model():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x), x * 2

    models, x = models_of(Half), numbers(5, 4)
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(3):
            _, doubled = group(x)
            assert torch.equal(doubled, (x * 2).expand(3, 5, 4))


def test_loading_other_weights_keeps_what_was_captured():
    models, x = models_of(Raw, 6), numbers(5, 4)
    halves = [(half, Group.of(half)) for half in (models[:3], models[3:])]
    group = Group.of(models[:3])
    with torch.no_grad():
        for _ in range(3):
            group(x)
        captured = list(group._captured.values())
        for half, source in (halves[1], halves[0], halves[1]):
            group.load(source.stacked, source.shared)
            torch.testing.assert_close(group(x), loop(half, x), rtol=1e-10, atol=1e-12)
    assert list(group._captured.values()) == captured


def test_loading_another_number_of_models_or_another_pattern():
    models, x = models_of(Counted, 5), numbers(2, 4)
    group = Group.of(models)
    with torch.no_grad():
        for count in (5, 2, 1, 5):
            group.load({name: tensor[:count] for name, tensor in Group.of(models).stacked.items()})
            for _ in range(3):
                torch.testing.assert_close(group(x), loop(models[:count], x), rtol=1e-10, atol=0)


def test_equal_tensors_are_shared_by_of():
    models = models_of(Counted)
    for model in models:
        model.first.load_state_dict(models[0].first.state_dict())
    group = Group.of(models)
    assert set(group.shared) == {"first.weight", "first.bias"}
    same = Group.of([models[0]] * 3)
    with torch.no_grad():
        x = numbers(2, 4)
        torch.testing.assert_close(same(x), loop([models[0]] * 3, x), rtol=1e-12, atol=0)


class Branches(nn.Module):
    """Branches on data that depend on the weights: nothing to group."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -2 * y


def test_what_cannot_be_grouped_runs_as_a_loop_and_says_so_once(caplog):
    models, x = models_of(Branches), numbers(5, 4)
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(group(x), loop(models, x))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = (record.message for record in caplog.records)
    assert first.startswith("Branches runs model by model: vmap")
    assert second.startswith("Branches is not captured: it branches on data")


def test_the_models_own_error_is_what_is_seen(caplog):
    group = Group.of(models_of(Counted))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            group(numbers(5, 3))
        group(numbers(5, 4))
    assert not caplog.records
    assert set(group._ways.values()) == {0}


def test_hooks_are_not_skipped(caplog):
    models, x = models_of(Counted), numbers(5, 4)
    seen = []
    models[0].second.register_forward_hook(lambda *_: seen.append(1))
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(4):
            group(x)
    assert len(seen) == 4
    assert "forward hooks" in caplog.records[0].message


def test_training_updates_the_running_statistics_of_each_model():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.linear(x))

    models, x = models_of(Normed), numbers(5, 4)
    states = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    group = Group(models[0].train(), {n: torch.stack([s[n] for s in states]) for n in states[0]})
    found = group(x)
    for model in models:
        model.train()
        model.load_state_dict(states[models.index(model)])
    torch.testing.assert_close(found, loop(models, x), rtol=1e-10, atol=1e-12)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        wanted = torch.stack([model.state_dict()[name] for model in models])
        torch.testing.assert_close(group.stacked[name], wanted, rtol=1e-12, atol=0)


def test_weights_that_are_changed_in_place_are_seen_without_capture_and_after_load():
    models, x = models_of(Counted), numbers(5, 4)
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(3):
            group(x)
        group.stacked["third.bias"] += 1
        group.load(group.stacked, group.shared)
        torch.testing.assert_close(group(x), loop(models, x) + 1, rtol=1e-10, atol=0)


def test_autocast_is_part_of_the_kind_of_call():
    models, x = models_of(Counted), numbers(5, 4).float()
    models = [model.float() for model in models]
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(3):
            assert group(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                found = group(x)
                assert found.dtype == torch.bfloat16
                wanted = loop(models, x)
                torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
