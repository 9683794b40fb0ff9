"""Batching rules against a loop over the models, forward and backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from kernels import grouping
from kernels.grouping import Grouping, RandomnessError

MODELS = 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


class Calls:
    """Counts the calls of each grouped operation."""

    def __init__(self):
        self.counts = {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.counts[name] = self.counts.get(name, 0) + 1
            return getattr(grouping.ops, name)(*args, **kwargs)

        return call


def compare(function, tensors, dims, *, uses=None):
    """`function` under vmap and Grouping, and one model after another; values and gradients."""
    calls = Calls()
    ours = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    theirs = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    with Grouping(calls):
        found = vmap(function, in_dims=tuple(dims))(*ours)
    wanted = torch.stack(
        [
            function(
                *(t if d is None else t.select(d, m) for t, d in zip(theirs, dims, strict=True))
            )
            for m in range(MODELS)
        ]
    )
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = numbers(*wanted.shape, seed=99)
    for results in (found, wanted):
        (results * weights).sum().backward()
    for mine, its in zip(ours, theirs, strict=True):
        if its.grad is not None:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-10, atol=1e-11)
    if uses is not None:
        assert calls.counts == uses


LINEAR = [numbers(MODELS, 2, 5, 7), numbers(MODELS, 11, 7), numbers(MODELS, 11)]


@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None)])
def test_linear(dims):
    tensors = [t if d == 0 else t[0] for t, d in zip(LINEAR, dims, strict=True)]
    compare(F.linear, tensors, dims, uses={"grouped_linear": 1})


def test_a_model_axis_that_is_not_the_first():
    x, weight, bias = LINEAR
    tensors = [x.movedim(0, 2), weight.movedim(0, 1), bias.movedim(0, 1)]
    compare(F.linear, tensors, (2, 1, 1), uses={"grouped_linear": 1})


def test_linear_without_bias_or_rows():
    compare(F.linear, [LINEAR[0][:, 0, 0], LINEAR[1]], (0, 0), uses={"grouped_linear": 1})


def test_linear_of_a_vector_of_weights_is_left_to_vmap():
    compare(F.linear, [LINEAR[0], LINEAR[1][:, 0]], (0, 0), uses={})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1, "dilation": (1, 2)},
        {"stride": [2], "padding": [1, 0]},
        {"padding": "same"},
        {"padding": "valid"},
    ],
)
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, 0), (0, None, None)])
def test_conv2d(settings, dims):
    full = [numbers(MODELS, 2, 3, 7, 6), numbers(MODELS, 5, 3, 3, 2), numbers(MODELS, 5)]
    tensors = [t if d == 0 else t[0] for t, d in zip(full, dims, strict=True)]

    def convolve(x, weight, bias):
        return F.conv2d(x, weight, bias, **settings)

    compare(convolve, tensors, dims, uses={"grouped_conv2d": 1})


def test_conv2d_of_one_image_without_rows_and_in_groups():
    tensors = [numbers(MODELS, 4, 5, 5), numbers(MODELS, 6, 2, 3, 3)]

    def convolve(x, weight):
        return F.conv2d(x, weight, None, 1, 1, 1, 2)

    compare(convolve, tensors, (0, 0), uses={"grouped_conv2d": 1})


@pytest.mark.parametrize("padding", [0, 2, "same", (1,)])
def test_conv1d(padding):
    tensors = [numbers(MODELS, 2, 3, 9), numbers(MODELS, 5, 3, 3), numbers(MODELS, 5)]

    def convolve(x, weight, bias):
        return F.conv1d(x, weight, bias, padding=padding, dilation=(2,))

    compare(convolve, tensors, (0, 0, 0), uses={"grouped_conv2d": 1})


def test_what_has_no_rule_of_its_own_is_a_loop():
    tensors = [numbers(MODELS, 2, 3, 4, 5, 4), numbers(MODELS, 2, 3, 2, 2, 2)]
    compare(F.conv3d, tensors, (0, 0))
    compare(F.conv_transpose2d, [numbers(2, 3, 4, 5), numbers(MODELS, 3, 2, 2, 2)], (None, 0))
    bag = [torch.tensor([[0, 1], [2, 4]]), numbers(MODELS, 5, 3)]
    compare(lambda ids, weight: F.embedding_bag(ids, weight), bag, (None, 0))


def test_lstm():
    torch.manual_seed(0)
    models = [nn.LSTM(3, 4, dtype=torch.float64) for _ in range(MODELS)]
    names = [name for name, _ in models[0].named_parameters()]
    stacked = [torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n in names]
    x = numbers(5, 2, 3)

    def run(*weights):
        return functional_call(models[0], dict(zip(names, weights, strict=True)), (x,))[0]

    with torch.no_grad():
        with Grouping():
            found = vmap(run)(*stacked)
        wanted = torch.stack([model(x)[0] for model in models])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [F.layer_norm, torch.layer_norm])
def test_layer_norm(norm):
    tensors = [numbers(MODELS, 2, 5, 4), numbers(MODELS, 5, 4), numbers(MODELS, 5, 4)]
    compare(
        lambda x, weight, bias: norm(x, [5, 4], weight, bias, 1e-3),
        tensors,
        (0, 0, 0),
        uses={"grouped_layer_norm": 1},
    )
    compare(lambda x: norm(x, (4,)), tensors[:1], (0,), uses={"grouped_layer_norm": 1})


def test_batch_norm_with_running_statistics():
    weight, bias = numbers(MODELS, 3), numbers(MODELS, 3, seed=1)
    mean, variance = numbers(3, seed=2), numbers(3, seed=3).abs() + 0.1
    compare(
        lambda x, weight, bias: F.batch_norm(x, mean, variance, weight, bias, False, 0.1, 1e-3),
        [numbers(MODELS, 4, 3, 5), weight, bias],
        (0, 0, 0),
        uses={"grouped_batch_norm": 1},
    )


def test_batch_norm_with_each_models_running_statistics():
    x, mean, variance = numbers(4, 3, 5), numbers(MODELS, 3), numbers(MODELS, 3).abs() + 0.1
    with Grouping():
        found = vmap(lambda m, v: F.batch_norm(x, m, v))(mean, variance)
    wanted = torch.stack([F.batch_norm(x, m, v) for m, v in zip(mean, variance, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_batch_norm_in_training_updates_each_models_statistics():
    x, mean, variance = numbers(MODELS, 4, 3, 5), numbers(MODELS, 3), numbers(MODELS, 3).abs()
    means, variances = mean.clone(), variance.clone()
    wanted = torch.stack(
        [F.batch_norm(x[m], means[m], variances[m], training=True) for m in range(MODELS)]
    )
    with Grouping():
        found = vmap(lambda x, m, v: F.batch_norm(x, m, v, training=True))(x, mean, variance)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, means, rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, variances, rtol=1e-12, atol=0)


def test_batch_norm_in_training_with_shared_statistics_is_refused():
    with Grouping(), pytest.raises(ValueError, match="share their running statistics"):
        vmap(lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True))(
            torch.zeros(2, 4, 3)
        )


def test_group_norm():
    tensors = [numbers(MODELS, 2, 6, 5), numbers(MODELS, 6), numbers(MODELS, 6)]
    compare(lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3), tensors, (0, 0, 0))
    compare(lambda x, w: F.group_norm(x, 2, w), [tensors[0][0], tensors[1]], (None, 0))


@pytest.mark.parametrize("mask", ["none", "causal", "shared", "own"])
@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (5, 4)])
def test_attention(mask, shape):
    tensors = [numbers(MODELS, *shape, seed=s) for s in range(3)]
    dims = [0, 0, 0]
    if mask in ("shared", "own"):
        tensors.append(numbers(MODELS, 5, 5) if mask == "own" else numbers(5, 5))
        dims.append(0 if mask == "own" else None)

    def attend(q, k, v, m=None):
        return F.scaled_dot_product_attention(q, k, v, m, is_causal=mask == "causal", scale=0.3)

    compare(attend, tensors, dims, uses={"grouped_attention": 1})


def test_attention_with_dropout_is_refused():
    q = numbers(MODELS, 2, 3, 4)
    with Grouping(), pytest.raises(RandomnessError, match="its own mask"):
        vmap(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))(q)


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_embedding(padding_idx):
    ids = torch.tensor([[0, 4, 1], [1, 2, 4]])
    table = numbers(MODELS, 5, 3)

    def look_up(ids, table):
        return F.embedding(ids, table, padding_idx)

    compare(look_up, [ids, table], (None, 0), uses={"grouped_embedding": 1})
    compare(look_up, [ids.expand(MODELS, 2, 3), table], (0, 0), uses={"grouped_embedding": 1})


def test_pooling_to_a_size():
    compare(lambda x: F.adaptive_avg_pool2d(x, (2, 1)), [numbers(MODELS, 2, 3, 5, 5)], (0,))
    compare(lambda x: F.adaptive_avg_pool2d(x, 2), [numbers(MODELS, 3, 5, 5)], (0,))


class Attention(nn.Module):
    """nn.MultiheadAttention; all that it returns in one tensor."""

    def __init__(self, settings, call, other):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, dtype=torch.float64, **settings).eval()
        self.call, self.other = call, other

    def forward(self, x):
        other = x if self.other is None else self.other
        output, weights = self.inner(x, other, other, **self.call)
        return (
            output.flatten()
            if weights is None
            else torch.cat([output.flatten(), weights.flatten()])
        )


CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False, True, False, True]])
CASES = {
    "plain": ({}, {}, None),
    "without weights": ({}, {"need_weights": False}, None),
    "weights of each head": ({}, {"average_attn_weights": False}, None),
    "batch first": ({"batch_first": True}, {"need_weights": False}, None),
    "without bias": ({"bias": False}, {}, None),
    "bias for keys and values": ({"add_bias_kv": True}, {"attn_mask": CAUSAL}, None),
    "an empty key": ({"add_zero_attn": True}, {"key_padding_mask": PADDING}, None),
    "causal hint": ({}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, None),
    "causal hint and padding": (
        {},
        {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
        None,
    ),
    "padding": ({}, {"key_padding_mask": PADDING, "need_weights": False}, None),
    "both masks": ({}, {"key_padding_mask": PADDING, "attn_mask": CAUSAL}, None),
    "a mask per head": ({}, {"attn_mask": numbers(6, 4, 4), "need_weights": False}, None),
    "other keys": ({}, {}, numbers(5, 3, 8)),
    "other widths": ({"kdim": 6, "vdim": 6}, {"need_weights": False}, numbers(5, 3, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_multi_head_attention(case):
    torch.manual_seed(0)
    models = [Attention(*CASES[case]) for _ in range(MODELS)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    names = [name for name, _ in models[0].named_parameters()]
    stacked = [torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n in names]
    x = numbers(3, 4, 8) if "batch_first" in CASES[case][0] else numbers(4, 3, 8)

    def run(x, *weights):
        return functional_call(models[0], dict(zip(names, weights, strict=True)), (x,))

    compare(run, [x, *stacked], (None, *(0 for _ in names)))


def test_multi_head_attention_without_rows():
    torch.manual_seed(0)
    model = Attention({}, {}, None)
    weights = dict(model.named_parameters())
    name = "inner.in_proj_weight"
    stacked = numbers(MODELS, *weights[name].shape)
    compare(
        lambda w, x: functional_call(model, {name: w}, (x,)), [stacked, numbers(4, 8)], (0, None)
    )


def test_multi_head_attention_says_what_does_not_fit():
    model = nn.MultiheadAttention(8, 2, dtype=torch.float64).eval()
    weight = numbers(MODELS, 24, 8)

    def run(weight):
        x = torch.zeros(2, 3, 6, dtype=torch.float64)
        return functional_call(model, {"in_proj_weight": weight}, (x, x, x))[0]

    with Grouping(), pytest.raises(ValueError, match="6 wide, wanted 8"):
        vmap(run)(weight)


def test_raw_parameters_in_products():
    x, left, right = numbers(2, 5, 4), numbers(MODELS, 4, 3), numbers(MODELS, 2, 3, 4)
    compare(lambda w, x: x @ w, [left, x], (0, None))
    compare(lambda w, x: torch.bmm(x, w), [right.transpose(2, 3).contiguous(), x], (0, None))
    compare(lambda w, x: torch.einsum("bti,io->bto", x, w), [left, x], (0, None))
    compare(lambda w, x: torch.matmul(w, x.transpose(1, 2)), [right, x], (0, None))


def test_what_does_not_depend_on_the_model_is_computed_once_by_torch():
    calls = Calls()
    x, weight = numbers(2, 4), numbers(5, 4)
    with Grouping(calls):
        found = vmap(lambda own: F.linear(x, weight) * own)(numbers(MODELS))
    assert calls.counts == {}
    assert torch.equal(found, F.linear(x, weight) * numbers(MODELS)[:, None, None])


def test_outside_of_vmap_nothing_changes():
    x, weight = numbers(2, 4), numbers(5, 4)
    with Grouping():
        assert torch.equal(F.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int64])
def test_factories_can_be_written_in_place_with_a_zero(dtype):
    x = numbers(MODELS, 4).to(dtype)

    def fill(x, zero):
        with Grouping(zero=zero):
            made = torch.zeros(2, 4, dtype=dtype)
            made[1] = x
            return made

    found = vmap(fill)(x, torch.zeros(MODELS))
    assert found.dtype == dtype
    assert torch.equal(found[:, 1], x)
    assert not found[:, 0].any()


def test_an_empty_batch():
    compare(F.linear, [numbers(MODELS, 0, 7), LINEAR[1], LINEAR[2]], (0, 0, 0))
