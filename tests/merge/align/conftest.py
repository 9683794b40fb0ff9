"""Networks of every kind, small, each with an input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = tuple[nn.Module, Tensor]


class SmallResNet(nn.Module):
    """A residual stream with BatchNorm, one step down."""

    def __init__(self, width: int = 6, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.first = self._branch(width, width)
        self.second = self._branch(width, 2 * width, stride=2)
        self.down = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.head = nn.Linear(2 * width, classes)

    @staticmethod
    def _branch(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(x + self.first(x))
        x = F.relu(self.down(x) + self.second(x))
        return self.head(x.mean((2, 3)))


class GroupedQueries(nn.Module):
    """Attention with 4 query heads on 2 heads of keys and values, and a gated MLP; RMSNorm."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, 4 * 3, bias=False)
        self.k = nn.Linear(width, 2 * 3, bias=False)
        self.v = nn.Linear(width, 2 * 5, bias=False)
        self.o = nn.Linear(4 * 5, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * 16)
        self.down = nn.Linear(16, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (4, 3)).transpose(1, 2)
        k = self.k(y).unflatten(-1, (2, 3)).transpose(1, 2)
        v = self.v(y).unflatten(-1, (2, 5)).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(z.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * up))


def _images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def _timm(name: str, size: int = 32, **settings) -> Network:
    return timm.create_model(name, num_classes=7, **settings), _images(size)


def _mlp() -> Network:
    layers = [nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(16, 5)), _images(4)


def _grouped() -> Network:
    layers = [nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.GELU(), nn.Conv2d(12, 24, 3, groups=4)]
    up = [nn.ConvTranspose2d(24, 8, 2, groups=2), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1)]
    return nn.Sequential(*layers, *up, nn.AdaptiveAvgPool2d(1)), _images(12)


def _encoder_layer() -> Network:
    layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3)), torch.randn(2, 5, 6)


SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}

NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": _mlp,
    "small resnet": lambda: (SmallResNet(), _images(8, channels=1)),
    "resnet18": lambda: _timm("resnet18"),
    "resnet26": lambda: _timm("resnet26", channels=(8, 12, 16, 20), stem_width=8),
    "resnext": lambda: _timm("resnet26", cardinality=4, base_width=8, channels=(8, 12, 16, 20)),
    "densenet": lambda: _timm("densenet121", block_config=(2, 3), growth_rate=4),
    "convnext": lambda: _timm("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 12, 16, 20)),
    "efficientnet": lambda: _timm("test_efficientnet"),
    "vit": lambda: _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "beit": lambda: _timm("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3),
    "swin": lambda: _timm("swin_tiny_patch4_window7_224", 56, img_size=56, **SWIN),
    "encoder layer": _encoder_layer,
    "grouped queries": lambda: (GroupedQueries(), torch.arange(10).view(2, 5)),
    "grouped convolutions": _grouped,
}


@pytest.fixture(params=list(NETWORKS))
def network(request) -> Network:
    """A network with random weights, no two units of it equal, and an input."""
    torch.manual_seed(0)
    model, example = NETWORKS[request.param]()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand_like if name.endswith("var") else torch.randn_like
                tensor += 0.05 * noise(tensor)
    return model.eval(), example
