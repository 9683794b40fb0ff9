"""Operations that draw, on numbers that are handed in, against one model after another."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.layers.drop import DropBlock2d, DropPath
from torch import nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth
from transformers.models.beit.modeling_beit import BeitDropPath

from fleet.capture.trace import trace
from kernels.draws import Draw
from kernels.grouping import Grouping, KernelError, RandomnessError

MODELS = 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


class Given:
    """Draws for all models, all of them kept with what was asked for."""

    def __init__(self, keeps=None):
        self.generator = torch.Generator().manual_seed(5)
        self.keeps = keeps
        self.requests, self.made = [], []

    def __call__(self, draw):
        shape = (MODELS, *draw.shape)
        if draw.kind == "keep":
            made = torch.rand(shape, generator=self.generator) < draw.probability
            made = made if self.keeps is None else torch.full(shape, self.keeps)
        else:
            make = torch.rand if draw.kind == "uniform" else torch.randn
            made = make(shape, generator=self.generator, dtype=draw.dtype)
        self.requests.append(draw)
        self.made.append(made)
        return made


class OneModel(TorchFunctionMode):
    """Gives one model its own of what was drawn for all, in the same order."""

    def __init__(self, given, model):
        super().__init__()
        self.left = [made[model] for made in given.made]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout and kwargs.get("training", True):
            x, p = args[0], kwargs.get("p", 0.5)
            return x * self.left.pop(0) / (1 - p)
        if function is torch.Tensor.bernoulli_:
            return args[0].copy_(self.left.pop(0))
        if function is torch.rand:
            return self.left.pop(0)
        return function(*args, **kwargs)


def together(function, tensors, dims, draws):
    """`function` of all models under vmap, everything drawn handed in."""

    def run(zero, *tensors):
        with Grouping(zero=zero, draws=draws):
            return function(*tensors)

    return vmap(run, in_dims=(0, *dims))(torch.zeros(MODELS), *tensors)


def compare(function, tensors, dims, wanted, keeps=None):
    """Values and gradients; `wanted(made, *tensors of one model)` is torch's, by hand."""
    ours = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    theirs = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    given = Given(keeps)
    found = together(function, ours, dims, given)
    expected = torch.stack(
        [
            wanted(
                [made[m] for made in given.made],
                *(t if d is None else t.select(d, m) for t, d in zip(theirs, dims, strict=True)),
            )
            for m in range(MODELS)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = numbers(*expected.shape, seed=99)
    if expected.requires_grad:
        for results in (found, expected):
            (results * weights).sum().backward()
        for mine, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-10, atol=1e-11)
    return given


@pytest.mark.parametrize("dims", [(0,), (None,), (1,)])
@pytest.mark.parametrize("drop", [F.dropout, lambda x, p: torch.dropout(x, p, True)])
def test_dropout(dims, drop):
    x = {0: numbers(MODELS, 4, 5), None: numbers(4, 5), 1: numbers(4, MODELS, 5)}[dims[0]]
    given = compare(lambda x: drop(x, 0.3), [x], dims, lambda made, x: x * made[0] / 0.7)
    assert given.requests == [Draw("keep", (4, 5), 0.7, torch.bool)]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(rate):
    x = numbers(MODELS, 4, 5)
    found = together(lambda x: F.dropout(x, rate), [x], (0,), Given())
    assert torch.equal(found, x * (1 - rate))


def test_dropout_outside_of_training_draws_nothing():
    x, given = numbers(MODELS, 4), Given()
    assert torch.equal(together(lambda x: F.dropout(x, 0.5, False), [x], (0,), given), x)
    assert given.requests == []


@pytest.mark.parametrize(
    ("drop", "shape", "asked"),
    [
        (F.dropout1d, (2, 3, 4), (2, 3, 1)),
        (F.dropout1d, (3, 4), (3, 1)),
        (F.dropout2d, (2, 3, 4, 5), (2, 3, 1, 1)),
        (F.dropout3d, (2, 3, 4, 5, 2), (2, 3, 1, 1, 1)),
        (F.dropout3d, (3, 4, 5, 2), (3, 1, 1, 1)),
    ],
)
def test_dropout_of_channels(drop, shape, asked):
    given = compare(
        lambda x: drop(x, 0.4), [numbers(*shape)], (None,), lambda made, x: x * made[0] / 0.6
    )
    assert given.requests == [Draw("keep", asked, 0.6, torch.bool)]
    # torch's own drops the same units: every one of them is dropped or kept as a whole.
    torch.manual_seed(0)
    dropped = drop(torch.ones(shape), 0.4)
    assert torch.equal(
        dropped,
        dropped.amax(dim=[i for i, a in enumerate(asked) if a == 1 and i], keepdim=True).expand(
            shape
        ),
    )


@pytest.mark.parametrize("drop", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout_has_the_floor_and_slope_of_torchs(drop):
    x = numbers(MODELS, 4, 3, 5)
    given = Given()
    found = together(lambda x: drop(x, 0.3, True), [x], (0,), given)
    torch.manual_seed(1)
    flat = x.reshape(-1, 3, 5)
    theirs = drop(flat, 0.3, True).view(x.shape)
    shape = (MODELS, 4, 3, 5) if drop is F.alpha_dropout else (MODELS, 4, 3, 1)
    assert given.made[0].shape == shape
    # Where both kept an element, or both dropped it, they agree: floor and slope are torch's.
    floor = theirs.flatten().mode().values
    kept = theirs != floor
    ours_kept = given.made[0].expand(x.shape)
    for same in (kept & ours_kept, ~kept & ~ours_kept):
        assert same.sum() > 10
        torch.testing.assert_close(found[same], theirs[same], rtol=1e-6, atol=1e-6)


def test_rrelu():
    def wanted(made, x):
        return torch.where(x > 0, x, x * (0.1 + 0.3 * made[0]))

    compare(lambda x: F.rrelu(x, 0.1, 0.4, True), [numbers(MODELS, 4, 5)], (0,), wanted)
    given = compare(
        lambda x: F.rrelu(x, 0.1, 0.4),
        [numbers(MODELS, 4, 5)],
        (0,),
        lambda made, x: F.rrelu(x, 0.1, 0.4),
    )
    assert given.requests == []


def test_in_place_on_what_depends_on_the_model():
    def forward(x):
        y = x * 2
        z = F.dropout(y, 0.5, True, True)
        return y + z

    compare(forward, [numbers(MODELS, 4)], (0,), lambda made, x: 2 * (x * 2 * made[0] / 0.5))


@pytest.mark.parametrize("p", [0.3, numbers(4, 5).sigmoid()])
def test_bernoulli(p):
    def wanted(made, x):
        drawn = made[0] if isinstance(p, float) else made[0] < p
        return x * drawn

    compare(lambda x: x * x.clone().bernoulli_(p), [numbers(MODELS, 4, 5)], (0,), wanted)
    compare(lambda x: x * torch.empty(4, 5).bernoulli_(p), [numbers(4, 5)], (None,), wanted)
    if isinstance(p, torch.Tensor):
        compare(lambda x: x * torch.bernoulli(p), [numbers(4, 5)], (None,), wanted)
    else:
        compare(lambda x: x * torch.bernoulli(x, p), [numbers(4, 5)], (None,), wanted)


@pytest.mark.parametrize(
    ("make", "request_"),
    [
        (lambda x: torch.rand(4, 5), Draw("uniform", (4, 5), 0.0, torch.float32)),
        (lambda x: torch.rand((4, 5)), Draw("uniform", (4, 5), 0.0, torch.float32)),
        (lambda x: torch.rand(size=(5,)), Draw("uniform", (5,), 0.0, torch.float32)),
        (lambda x: torch.rand([]), Draw("uniform", (), 0.0, torch.float32)),
        (
            lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device),
            Draw("normal", (4, 5), 0.0, torch.float64),
        ),
        (lambda x: torch.rand_like(x), Draw("uniform", (4, 5), 0.0, torch.float64)),
        (
            lambda x: torch.randn_like(x, dtype=torch.float32),
            Draw("normal", (4, 5), 0.0, torch.float32),
        ),
    ],
)
@pytest.mark.parametrize("dims", [(0,), (None,)])
def test_factories(make, request_, dims):
    x = numbers(MODELS, 4, 5) if dims[0] == 0 else numbers(4, 5)
    given = compare(lambda x: x * make(x), [x], dims, lambda made, x: x * made[0])
    assert given.requests == [request_]


@pytest.mark.parametrize("dims", [(0,), (None,)])
def test_in_place_numbers(dims):
    x = numbers(MODELS, 4, 5) if dims[0] == 0 else numbers(4, 5)
    compare(
        lambda x: x * torch.empty_like(x).uniform_(-1, 3),
        [x],
        dims,
        lambda made, x: x * (made[0] * 4 - 1),
    )
    compare(lambda x: x * x.new_empty(5).uniform_(to=3), [x], dims, lambda made, x: x * made[0] * 3)
    compare(
        lambda x: x + x.new_zeros(5).normal_(2, std=0.5),
        [x],
        dims,
        lambda made, x: x + (made[0] * 0.5 + 2),
    )


def test_calls_come_in_order():
    def forward(x):
        x = F.dropout(x, 0.1)
        x = x + torch.randn(5)
        return F.dropout(x, 0.2)

    given = Given()
    together(forward, [numbers(MODELS, 4, 5)], (0,), given)
    assert [draw.kind for draw in given.requests] == ["keep", "normal", "keep"]
    assert [draw.probability for draw in given.requests] == [0.9, 0.0, 0.8]


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "added": {"attn_mask": numbers(5, 5)},
    "open": {"attn_mask": numbers(5, 5) > -0.5},
    "scaled": {"scale": 0.3},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None), (None, None, None)])
def test_attention_that_keeps_all_is_torchs(mask, dims):
    tensors = [numbers(MODELS, 2, 2, 5, 4, seed=s) for s in range(3)]
    tensors = [t if d == 0 else t[0] for t, d in zip(tensors, dims, strict=True)]
    given = compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **MASKS[mask]),
        tensors,
        dims,
        lambda made, q, k, v: F.scaled_dot_product_attention(q, k, v, **MASKS[mask]) / 0.8,
        keeps=True,
    )
    assert given.requests == [Draw("keep", (2, 2, 5, 5), 0.8, torch.bool)]


def test_attention_with_heads_that_share_keys():
    q, k, v = numbers(MODELS, 2, 4, 5, 3), numbers(MODELS, 2, 2, 6, 3), numbers(MODELS, 2, 2, 6, 3)
    compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, enable_gqa=True),
        [q, k, v],
        (0, 0, 0),
        lambda made, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) / 0.8,
        keeps=True,
    )


def test_attention_drops_weights():
    tensors = [numbers(MODELS, 2, 5, 4, seed=s) for s in range(3)]

    def wanted(made, q, k, v):
        weights = (q @ k.mT / 2).softmax(-1)
        return (weights * made[0] / 0.7) @ v

    compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
        tensors,
        (0, 0, 0),
        wanted,
    )


def test_attention_where_all_keys_are_masked_is_torchs():
    mask = torch.tensor([[True, True], [False, False]])
    q = numbers(MODELS, 2, 4)
    compare(
        lambda q: F.scaled_dot_product_attention(q, q, q, mask, 0.5),
        [q],
        (0,),
        lambda made, q: F.scaled_dot_product_attention(q, q, q, mask) * 2,
        keeps=True,
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_multi_head_attention(need_weights, shared):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, dropout=0.25, dtype=torch.float64)
    weight = numbers(24, 8) if shared else numbers(MODELS, 24, 8)
    x = numbers(4, 3, 8)

    def run(weight, x):
        tensors = {"in_proj_weight": weight}
        return functional_call(model, tensors, (x, x, x), {"need_weights": need_weights})[0]

    def wanted(made, weight, x):
        q, k, v = F.linear(x, weight, model.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).permute(1, 2, 0, 3) for t in (q, k, v))
        weights = (q @ k.mT / 2).softmax(-1) * made[0] / 0.75
        return model.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))

    given = compare(run, [weight, x], (None if shared else 0, None), wanted)
    assert given.requests == [Draw("keep", (3, 2, 4, 4), 0.75, torch.bool)]


class Residual(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4, dtype=torch.float64), drop

    def forward(self, x):
        return x + self.drop(self.linear(x))


PATHS = {
    "timm": lambda: DropPath(0.3),
    "timm unscaled": lambda: DropPath(0.3, scale_by_keep=False),
    "torchvision by row": lambda: StochasticDepth(0.3, "row"),
    "torchvision by batch": lambda: StochasticDepth(0.3, "batch"),
    "transformers": lambda: BeitDropPath(0.3),
    "torch": lambda: nn.Dropout(0.3),
    "torch in place": lambda: nn.Dropout(0.3, inplace=True),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared", [False, True])
def test_stochastic_depth_of_libraries(path, shared):
    model = Residual(PATHS[path]())
    weight = numbers(4, 4) if shared else numbers(MODELS, 4, 4)

    def run(x, weight):
        return functional_call(model, {"linear.weight": weight}, (x,))

    given = Given()
    x, dims = numbers(6, 4), (None, None if shared else 0)
    found = together(run, [x, weight], dims, given)
    assert len(given.requests) == 1
    assert 0 < given.made[0].double().mean() < 1
    for m in range(MODELS):
        with OneModel(given, m):
            expected = run(x, weight if shared else weight[m])
        torch.testing.assert_close(found[m], expected, rtol=1e-10, atol=1e-12)


def test_drop_block_of_timm():
    x = numbers(MODELS, 2, 3, 8, 8)
    block = DropBlock2d(0.2, block_size=3)
    given = Given()
    found = together(block, [x], (0,), given)
    for m in range(MODELS):
        with OneModel(given, m):
            torch.testing.assert_close(found[m], block(x[m]), rtol=1e-10, atol=1e-12)


def test_transformer_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x = torch.randn(2, 5, 8)
    given = Given()
    found = together(
        lambda x, w: functional_call(layer, {"linear1.weight": w}, (x,)),
        [x, torch.randn(MODELS, 16, 8)],
        (None, 0),
        given,
    )
    assert found.shape == (MODELS, 2, 5, 8)
    assert [draw.shape for draw in given.requests] == [
        (2, 2, 5, 5),
        (2, 5, 8),
        (2, 5, 16),
        (2, 5, 8),
    ]


def test_traced_forward_and_backward_take_what_is_handed_in():
    """As the trainer does: masks are inputs of the graph."""
    model = Residual(DropPath(0.5))
    weight, x = numbers(MODELS, 4, 4), numbers(6, 4)
    masks = [torch.rand(MODELS, 6, 1) < 0.5, torch.rand(MODELS, 6, 4) < 0.7]

    def step(weight, *masks):
        left = list(masks)
        leaf = weight.detach().requires_grad_()

        def run(zero, weight):
            with Grouping(zero=zero, draws=lambda draw: left.pop(0)):
                made = functional_call(model, {"linear.weight": weight}, (x,))
                return F.dropout(made, 0.3).square().sum()

        with torch.enable_grad():
            loss = vmap(run)(torch.zeros(MODELS), leaf)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return [loss.detach(), gradient]

    graph = trace(step, [weight, *masks])
    others = [numbers(MODELS, 4, 4, seed=3), ~masks[0], ~masks[1]]
    for tensors in ([weight, *masks], others):
        for found, wanted in zip(graph(*tensors), step(*tensors), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def refused(function, match, error=RandomnessError):
    with pytest.raises(error, match=match):
        together(function, [numbers(MODELS, 4, 5)], (0,), Given())


def test_what_has_no_rule_is_named():
    refused(lambda x: x * torch.empty_like(x).exponential_(), "exponential_ draws random numbers")
    refused(lambda x: x[torch.randperm(4)], "randperm draws random numbers")
    refused(lambda x: F.gumbel_softmax(x), "gumbel_softmax draws random numbers")
    own = torch.Generator()
    refused(lambda x: x * torch.rand(5, generator=own), "rand with generator")
    refused(
        lambda x: x * torch.empty(5).bernoulli_(0.5, generator=own), "bernoulli_ with generator"
    )
    refused(lambda x: vmap(lambda row: F.dropout(row, 0.5))(x), "vmap of the model's own")
    refused(lambda x: F.dropout(x, 1.5), "probability is 1.5", KernelError)


def test_other_errors_stay_as_they_are():
    refused(lambda x: x @ x, "size", RuntimeError)


def test_a_shared_tensor_that_was_drawn_into_is_not_used_as_it_was():
    shared = numbers(5)

    def forgets(x):
        mask = shared.clone()
        mask.bernoulli_(0.5)
        return x * mask

    refused(forgets, "use what the operation returns")
    compare(
        lambda x: x * shared.clone().bernoulli_(0.5),
        [numbers(MODELS, 4, 5)],
        (0,),
        lambda made, x: x * made[0],
    )


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recurrent_layers_with_dropout_between_them_are_refused(rate):
    model = nn.LSTM(5, 4, num_layers=2, dropout=rate, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    weights = [numbers(MODELS, *w.shape) for w in model.parameters()]
    x = numbers(4, 5)

    def run(*weights):
        return functional_call(model, dict(zip(names, weights, strict=True)), (x,))[0]

    if rate:
        with pytest.raises(RandomnessError, match="lstm with dropout"):
            together(run, weights, (0,) * len(weights), Given())
    else:
        assert together(run, weights, (0,) * len(weights), Given()).shape == (MODELS, 4, 4)


def test_draws_need_a_zero_of_the_models():
    for zero in (None, torch.zeros(())):
        with pytest.raises(KernelError, match="without `zero`"):
            Grouping(zero=zero, draws=Given())


def test_without_draws_all_is_refused_as_before():
    x = numbers(MODELS, 4, 5)
    with pytest.raises(RuntimeError, match="vmap: called random operation"), Grouping():
        vmap(lambda x: F.dropout(x, 0.5))(x)
    with pytest.raises(RandomnessError, match="its own mask"), Grouping():
        vmap(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5))(x)


def test_dropped_fraction():
    x = torch.ones(MODELS, 4000, dtype=torch.float64)
    dropped = together(lambda x: F.dropout(x, 0.3), [x], (0,), Given()) == 0
    for row in dropped:
        assert stats.binomtest(int(row.sum()), 4000, 0.3).pvalue > 1e-4
