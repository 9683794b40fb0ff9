"""Groups on a CUDA device: kernels are recorded in a CUDA graph."""

import pytest
import torch
from torch import nn

from fleet.group import Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def models_of(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 5)
        )
        .eval()
        .to("cuda")
        for _ in range(count)
    ]


def loop(models, x):
    return torch.stack([model(x) for model in models])


def assert_near(found, wanted):
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_replayed_kernels_compute_what_the_loop_computes(caplog):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    models = models_of(6)
    first, second = Group.of(models[:3]), Group.of(models[3:])
    group = Group.of(models[:3])
    with torch.no_grad():
        for seed in range(5):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).cuda()
            assert_near(group(x), loop(models[:3], x))
        for source, members in ((second, models[3:]), (first, models[:3])):
            group.load(source.stacked, source.shared)
            assert_near(group(x), loop(members, x))
        kept = {name: tensor.clone() for name, tensor in group.stacked.items()}
        group.load(kept, group.shared)
        for tensor in kept.values():
            tensor.mul_(2)
        group.load(kept, group.shared)
        doubled = Group(models[0], kept, shared=group.shared, capture=False)
        assert_near(group(x), doubled(x))
    assert not caplog.records


def test_each_model_its_own_input():
    models = models_of(3)
    x = torch.randn(3, 2, 3, 8, 8, device="cuda")
    group = Group.of(models)
    with torch.no_grad():
        wanted = torch.stack([model(own) for model, own in zip(models, x, strict=True)])
        for _ in range(3):
            found = group(x, each=True)
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()
