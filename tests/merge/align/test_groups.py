"""Groups: every architecture computes the same after any permutation; what must not move stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from merge.align import (
    PermutationGroups,
    apply_permutations,
    check_groups,
    derive_groups,
    random_permutations,
)
from merge.align.groups import Group
from merge.errors import MergeError


def found(groups: Sequence[Group]) -> dict[tuple[int, bool], int]:
    """(size, whether it has a parent) → how many groups."""
    return dict(Counter((group.size, group.parent is not None) for group in groups))


def tensors_of(groups: PermutationGroups, tensor: str, axis: int) -> set[str]:
    """The tensors that share a group with this axis."""
    return {
        member.tensor
        for group in groups.groups
        if (tensor, axis) in {(m.tensor, m.axis) for m in group.members}
        for member in group.members
    }


def test_the_function_is_unchanged(network):
    model, example = network
    groups = derive_groups(model, example)
    assert groups.groups
    double = model.double()
    example = example.double() if example.is_floating_point() else example
    state = {name: tensor.clone() for name, tensor in double.state_dict().items()}
    moved = apply_permutations(random_permutations(groups, torch.Generator().manual_seed(0)), state)
    assert any(not torch.equal(state[name], moved[name]) for name in state)
    with torch.no_grad():
        expected = double(example)
        double.load_state_dict(moved)
        after = double(example)
    torch.testing.assert_close(after, expected, rtol=1e-8, atol=1e-8)


def test_check_groups_measures_it(network):
    assert check_groups(network[0], derive_groups(*network), network[1]) < 1e-8


def test_nothing_of_the_model_changes(network):
    model, example = network
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    derive_groups(model, example, check=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_mlp():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    groups = derive_groups(model, torch.randn(4, 6))
    assert [(g.size, [(m.tensor, m.axis) for m in g.members]) for g in groups.groups] == [
        (16, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]),
        (8, [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)]),
    ]
    assert {(f.tensor, f.axis, f.reason) for f in groups.frozen} == {
        ("0.weight", 1, "input"),
        ("4.weight", 0, "output"),
        ("4.bias", 0, "output"),
    }
    assert "group 0: 16 units: 0.weight[0], 0.bias[0], 2.weight[1]" in str(groups)


def test_resnet18_has_one_stream_per_stage_and_one_group_per_block():
    model = timm.create_model("resnet18", num_classes=10)
    groups = derive_groups(model, torch.randn(1, 3, 32, 32))
    sizes = (64, 128, 256, 512)
    assert found(groups.groups) == {(size, False): 3 for size in sizes}
    stream = tensors_of(groups, "conv1.weight", 0)
    assert {"bn1.running_var", "layer1.1.conv2.weight", "layer2.0.downsample.0.weight"} <= stream


def test_vit_has_a_stream_heads_their_channels_and_hidden_units():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    groups = derive_groups(model, torch.randn(1, 3, 32, 32))
    assert found(groups.groups) == {(192, False): 1, (3, False): 2, (64, True): 4, (768, False): 2}
    stream = tensors_of(groups, "patch_embed.proj.weight", 0)
    assert {"cls_token", "pos_embed", "blocks.1.attn.proj.bias", "head.weight"} <= stream
    heads = next(group for group in groups.groups if group.size == 3)
    assert [(m.tensor, m.axis) for m in heads.members] == [
        ("blocks.0.attn.qkv.weight", 0),
        ("blocks.0.attn.qkv.bias", 0),
        ("blocks.0.attn.proj.weight", 1),
    ]
    keys, values = (g for g in groups.groups[:4] if g.parent is not None)
    assert "blocks.0.attn.proj.weight" not in {m.tensor for m in keys.members}
    assert "blocks.0.attn.proj.weight" in {m.tensor for m in values.members}
    frozen = {(f.tensor, f.axis) for f in groups.frozen}
    assert ("pos_embed", 1) in frozen
    assert ("head.weight", 0) in frozen


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5)
            self.head = nn.Linear(5, 9)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    groups = derive_groups(Tied(), torch.arange(6).view(2, 3), check=True)
    assert groups.tied == {"head.weight": "embed.weight"}
    assert groups.layouts["head.weight"] == groups.layouts["embed.weight"]
    assert [group.size for group in groups.groups] == [5]


# --- operations that need an order ---------------------------------------------------------------


class Between(nn.Module):
    """Something between two linear layers, with 12 units before it."""

    def __init__(self, what, after: int = 12) -> None:
        super().__init__()
        self.before, self.what, self.after = nn.Linear(5, 12), what, nn.Linear(after, 3)
        self.scale = nn.Parameter(torch.rand(12))
        self.small = nn.Parameter(torch.rand(4))
        self.register_buffer("ramp", torch.arange(12.0), persistent=False)
        self.register_buffer("even", torch.full((12,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.what(self, self.before(x)))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 4))


def outer(_, x: Tensor) -> Tensor:
    """Products of every head with every other."""
    return (heads(x) @ heads(x).transpose(-1, -2)).flatten(-2)


def in_place(_, x: Tensor) -> Tensor:
    x[:, :4] += x[:, 4:8].relu()
    return x


def written(_, x: Tensor) -> Tensor:
    made = x.new_zeros(len(x), 2, 12)
    made[:, 0], made[:, 1] = x, x.exp()
    return made.sum(1)


def halves(x: Tensor) -> Tensor:
    """Two parts with orders of their own, one after the other, as [examples, 2, 6]."""
    return torch.cat([x[:, 6:], x[:, :6].exp()], 1).unflatten(1, (2, 6))


def parts_with_parts(_, x: Tensor) -> Tensor:
    return (halves(x) @ halves(x).transpose(1, 2)).flatten(1)


def norm_over_heads(_, x: Tensor) -> Tensor:
    return F.layer_norm(heads(x).transpose(-1, -2), (3,)).flatten(-2)


def einsum(_, x: Tensor) -> Tensor:
    return torch.einsum("bhd,bkd->bhk", heads(x), heads(x)).flatten(1)


ALL = {(12, False): 1}
HEADS = {(3, False): 1, (4, False): 1}  # one order of the channels for all heads
NESTED = {(3, False): 1, (4, True): 1}  # each head its own

FREE: dict[str, tuple] = {
    "softmax": (lambda m, x: x.softmax(-1), 12, ALL),
    "layer norm": (lambda m, x: F.layer_norm(x, (12,), m.scale), 12, ALL),
    "parameter": (lambda m, x: torch.where(x > 0, x * m.scale, x.abs()), 12, ALL),
    "alias": (lambda m, x: x * m.scale.data, 12, ALL),
    "one value": (lambda m, x: x * m.even, 12, ALL),
    "value of all": (lambda m, x: x * (2 if x.sum().item() > 0 else 3), 12, ALL),
    "twice": (lambda m, x: torch.cat([x, x.exp()], 1), 24, ALL),
    "written": (written, 12, ALL),
    "topk": (lambda m, x: x.topk(12)[0], 12, {}),
    "sort": (lambda m, x: x.sort()[0], 12, {}),
    "cumsum": (lambda m, x: x.cumsum(-1), 12, {}),
    "flip": (lambda m, x: x.flip(-1), 12, {}),
    "roll": (lambda m, x: x.roll(1), 12, {}),
    "every other": (lambda m, x: x[:, ::2], 6, {}),
    "places": (lambda m, x: x * m.ramp, 12, {}),
    "argmax": (lambda m, x: x * x.argmax(-1, keepdim=True), 12, {}),
    "mask": (lambda m, x: x[:, m.ramp > 4], 7, {}),
    "numbers": (lambda m, x: x[:, [3, 1, 2, 3]], 4, {}),
    "fft": (lambda m, x: torch.fft.rfft(x).real, 7, {}),
    "all but one": (lambda m, x: x * x[:, :1], 12, {}),
    "view across": (lambda m, x: heads(x).reshape(-1, 4, 3).softmax(-1).flatten(-2), 12, {}),
    "gate": (lambda m, x: x[:, :6] * x[:, 6:].sigmoid(), 6, {(6, False): 1}),
    "in place": (in_place, 12, {(4, False): 2}),
    "uneven pieces": (
        lambda m, x: torch.cat([x[:, 5:], x[:, :5].exp()], 1),
        12,
        {(5, False): 1, (7, False): 1},
    ),
    "heads": (lambda m, x: heads(x).relu().flatten(-2), 12, NESTED),
    "softmax in heads": (lambda m, x: heads(x).softmax(-1).flatten(-2), 12, NESTED),
    "softmax over heads": (lambda m, x: heads(x).softmax(-2).flatten(-2), 12, HEADS),
    "norm over heads": (norm_over_heads, 12, HEADS),
    "mean of heads": (lambda m, x: heads(x).mean(-2), 4, HEADS),
    "heads share a scale": (lambda m, x: (heads(x) * m.small).flatten(-2), 12, HEADS),
    "heads with heads": (outer, 9, HEADS),
    "einsum": (einsum, 9, HEADS),
    "parts": (lambda m, x: heads(x)[:, 0] * heads(x)[:, 1], 4, {(4, False): 2}),
    "parts apart": (lambda m, x: torch.cat(heads(x).unbind(1), 1), 12, {(4, False): 3}),
    "parts of a sum": (lambda m, x: halves(x).softmax(-1).flatten(1), 12, {(6, False): 2}),
    "parts in turn": (lambda m, x: halves(x).roll(1, 1).flatten(1), 12, {(6, False): 1}),
    "parts with parts": (parts_with_parts, 4, {(6, False): 1}),
    "part and all": (lambda m, x: (heads(x)[:, :1] + heads(x)).flatten(-2), 12, {(4, False): 1}),
}


@pytest.mark.parametrize("name", FREE)
def test_what_an_operation_leaves_free(name):
    what, after, expected = FREE[name]
    torch.manual_seed(0)
    model, example = Between(what, after), torch.randn(6, 5)
    groups = derive_groups(model, example)
    inside = [g for g in groups.groups if "before.weight" in {m.tensor for m in g.members}]
    assert found(inside) == expected
    assert check_groups(model, groups, example) < 1e-8


# --- any program --------------------------------------------------------------------------------

STEPS = ["split 2", "split 3", "merge", "swap", "softmax", "norm", "mean", "double", "halves"]
STEPS += ["parts", "apart", "product", "roll", "scale", "weights"]


class Program(nn.Module):
    """Steps on [examples, ...] tensors, each on an axis, between two linear layers."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps, self.before, self.after = steps, nn.Linear(4, 12), nn.LazyLinear(3)
        self.own = nn.ParameterDict()
        self(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for place, (step, at) in enumerate(self.steps):
            x = self.step(x, step, 1 + at % (x.ndim - 1), str(place))
        return self.after(x.flatten(1))

    def parameter(self, name: str, *shape: int) -> Tensor:
        if name not in self.own:
            self.own[name] = nn.Parameter(torch.randn(shape))
        return self.own[name]

    def step(self, x: Tensor, step: str, axis: int, name: str) -> Tensor:
        size, last = x.shape[axis], x.movedim(axis, -1)
        match step.split():
            case "split", factor if size % int(factor) == 0:
                return x.unflatten(axis, (int(factor), -1))
            case ["merge"] if axis > 1:
                return x.flatten(axis - 1, axis)
            case ["swap"]:
                return x.transpose(axis, -1)
            case ["softmax"]:
                return x.softmax(axis)
            case ["norm"]:
                return F.layer_norm(last, (size,)).movedim(-1, axis)
            case ["mean"]:
                return x + x.mean(axis, keepdim=True).tanh()
            case ["double"] if x[0].numel() < 50:
                return torch.cat([x, x.tanh()], axis)
            case ["halves"] if size % 2 == 0:
                first, second = x.chunk(2, axis)
                return torch.cat([second.relu(), first], axis)
            case ["parts"]:
                return torch.stack([part * (1 + k) for k, part in enumerate(x.unbind(axis))], -1)
            case ["apart"]:
                return x + sum(part.tanh() for part in x.split(1, axis))
            case ["product"] if x[0].numel() // size < 10:
                rows = last.reshape(len(x), -1, size)
                return rows @ rows.transpose(1, 2)
            case ["roll"]:
                return x.roll(1, axis)
            case ["scale"]:
                return (last * self.parameter(name, size)).movedim(-1, axis)
            case ["weights"]:
                return F.linear(last, self.parameter(name, size, size)).movedim(-1, axis)
        return x


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2)), max_size=8))
def test_whatever_is_free_leaves_the_function_unchanged(steps):
    torch.manual_seed(0)
    model, example = Program(steps), torch.randn(3, 4)
    assert check_groups(model, derive_groups(model, example), example) < 1e-8


def test_reasons_name_the_operation():
    groups = derive_groups(Between(lambda m, x: x.sort()[0]), torch.randn(2, 5))
    reasons = {f.tensor: f.reason for f in groups.frozen}
    assert reasons["before.bias"] == "sort: not understood"
    assert reasons["scale"] == "unused by the example's forward"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_units_are_derived_or_left(kind):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(1))

    groups = derive_groups(Last(), torch.randn(2, 5, 4), check=True)
    assert found(groups.groups) == {(6, False): 1}
    assert {m.tensor for m in groups.groups[0].members} >= {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_named_and_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": self.out(torch.relu(self.a(x) + scale * self.b(y)))}

    x, y = torch.randn(2, 3), torch.randn(2, 4)
    for example in ((x, y), {"x": x, "y": y, "scale": 2.0}):
        groups = derive_groups(Two(), example, check=True)
        assert [group.size for group in groups.groups] == [8]


def test_a_wrong_group_is_found_and_named():
    right = derive_groups(Between(lambda m, x: x.relu()), torch.randn(4, 5))
    model = Between(lambda m, x: x.cumsum(-1))
    with pytest.raises(MergeError, match=r"Between: .*group 0 \(before.weight"):
        check_groups(model, right, torch.randn(4, 5))


def test_what_leaves_torch_is_found_by_the_check():
    model = Between(lambda m, x: x * float(x.detach().numpy()[0, 0]))
    with pytest.raises(MergeError, match=r"Between: a permutation changes the output"):
        derive_groups(model, torch.randn(4, 5), check=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_units():
    model = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 2))
    assert check_groups(model, derive_groups(model, torch.randn(2, 3)), torch.randn(2, 3)) == 0


def test_an_example_that_the_model_does_not_take():
    with pytest.raises(MergeError, match="Linear failed on the example: RuntimeError"):
        derive_groups(nn.Linear(3, 4), torch.randn(2, 5))
