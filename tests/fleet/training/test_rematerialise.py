from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleet.capture.layout import observe
from fleet.capture.trace import trace
from fleet.training.draws import fill
from fleet.training.rematerialise import rematerialise
from fleet.training.step import Kernel, _peak_bytes, parts_of
from tests.fleet.training.plain_loop import vit


class Deep(nn.Module):
    """Eight linear layers, each of which keeps something for the backward pass."""

    def __init__(self, layers: int = 8, width: int = 32) -> None:
        super().__init__()
        widths = [36] + [width] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.head(x)


class DeepConv(nn.Module):
    def __init__(self, layers: int = 5, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout(0.2),
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


NETS = {
    "mlp": Deep,
    "convnet": DeepConv,
    "vit": lambda: vit(depth=3, drop_path=0.3),
    "layernorm": lambda: nn.Sequential(nn.Flatten(), *_normed(4), nn.Linear(36, 3)),
}


def _normed(layers: int) -> list[nn.Module]:
    return [m for _ in range(layers) for m in (nn.Linear(36, 36), nn.LayerNorm(36), nn.SiLU())]


def both(make, *, models: int = 3, rows: int = 64, dtype: torch.dtype = torch.float32):
    """Two kernels that differ in checkpointing, and what to call them with."""
    torch.manual_seed(0)
    nets = [make().to(dtype) for _ in range(models)]
    states = [dict(net.named_parameters()) | dict(net.named_buffers()) for net in nets]
    stacked = {n: torch.stack([s[n].detach() for s in states]) for n in states[0]}
    pixels = torch.randn(models, rows, 1, 6, 6, dtype=dtype)
    targets = torch.randn(models, rows, 3, dtype=dtype).softmax(-1)
    parts = parts_of(nets[0], [name for name, _ in nets[0].named_parameters()])
    kernels = [Kernel(nets[0], parts, checkpointing=again) for again in (False, True)]
    return kernels, (stacked, {}, pixels, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("net", NETS)
def test_the_same_bits(net: str, dtype: torch.dtype):
    kernels, (stacked, shared, pixels, targets) = both(NETS[net], dtype=dtype)
    for step in range(2):  # recorded, then replayed
        outcomes = []
        for kernel in kernels:
            draws = kernel.draws(pixels, targets, stacked, shared)
            drawn = fill(draws, [0, 1, 2], ["fit/0"] * 3, [step] * 3, "cpu")
            outcomes.append(kernel(stacked, shared, pixels, targets, drawn))
        kept, again = outcomes
        assert torch.equal(kept.losses, again.losses)
        assert kept.gradients.keys() == again.gradients.keys()
        for name, gradient in kept.gradients.items():
            assert torch.equal(again.gradients[name], gradient), name
        assert kept.buffers.keys() == again.buffers.keys()
        for name, buffer in kept.buffers.items():
            assert torch.equal(again.buffers[name], buffer), name
        pixels = pixels.flip(1).contiguous()


@pytest.mark.parametrize(("net", "share"), [("mlp", 0.8), ("convnet", 0.75), ("vit", 0.8)])
def test_less_is_alive_at_the_peak(net: str, share: float):
    (plain, again), (stacked, _, pixels, targets) = both(NETS[net], models=1, rows=256)
    sizes = [kernel.probe(pixels, targets, stacked)[1] for kernel in (plain, again)]
    assert sizes[1].step_bytes < share * sizes[0].step_bytes


def test_deeper_nets_gain_more():
    def gain(layers: int) -> float:
        (plain, again), (stacked, _, pixels, targets) = both(
            lambda: Deep(layers), models=1, rows=512
        )
        before, after = (
            kernel.probe(pixels, targets, stacked)[1].step_bytes for kernel in (plain, again)
        )
        return after / before

    assert gain(24) < gain(6) < 1
    assert gain(24) < 0.5


def test_a_graph_of_one_layer_stays_right():
    weight, x = torch.randn(3, 4), torch.randn(5, 4)

    def compute(weight: Tensor, x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            loss = (x @ leaf.T).tanh().square().mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return [loss.detach(), gradient]

    expected = compute(weight, x)
    module = trace(compute, [weight, x])
    before = _peak_bytes(module, observe(module, [weight, x]))
    rematerialise(module)
    for found, wanted in zip(module(weight, x), expected, strict=True):
        assert torch.equal(found, wanted)
    assert _peak_bytes(module, observe(module, [weight, x])) <= before
