"""Groups of the architectures that people use, against a loop: forward, backward and replayed."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fleet.group import Group

ROWS = 2


@dataclass(frozen=True)
class Family:
    """How to make a small model, and an input."""

    make: Callable[[], nn.Module]
    input: Callable[[], torch.Tensor]


def images(size: int = 32, rows: int = ROWS) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, size, size, generator=draws, dtype=torch.float64)


def tokens() -> torch.Tensor:
    return torch.tensor([[1, 5, 3, 49, 2, 0, 0], [9, 9, 7, 2, 49, 1, 3]])


def timm_model(name: str, **settings) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **settings)

    return make


def clip(part: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        whole = CLIP(
            16,
            CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=16),
            CLIPTextCfg(context_length=7, vocab_size=50, width=16, heads=2, layers=2),
        )
        return whole.visual if part == "visual" else Text(whole)

    return make


class Text(nn.Module):
    """The text tower, which open_clip keeps in the whole model."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        del whole.visual
        self.whole = whole

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.whole.encode_text(tokens, normalize=True)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
FAMILIES = {
    "vit": Family(timm_model("vit_tiny_patch16_224", **VIT), lambda: images(16)),
    "deit": Family(timm_model("deit_tiny_distilled_patch16_224", **VIT), lambda: images(16)),
    "convnext": Family(
        timm_model("convnext_tiny", dims=[8, 12, 16, 16], depths=[1, 1, 2, 1]), images
    ),
    "resnet": Family(timm_model("resnet10t", channels=[8, 12, 16, 16]), images),
    "resnet of bottlenecks": Family(
        timm_model("resnet26", channels=[4, 4, 8, 8], stem_width=8), images
    ),
    "efficientnet": Family(timm_model("test_efficientnet"), images),
    "swin": Family(
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=32, window_size=4, embed_dim=12, depths=(1, 2), num_heads=(2, 4),
        ),
        images,
    ),
    "clip visual": Family(clip("visual"), lambda: images(16)),
    "clip text": Family(clip("text"), tokens),
    "bert": Family(bert, tokens),
}  # fmt: skip


# The whole of it takes half a minute; these run with the slow tests.
QUICK = [name for name in FAMILIES if name not in ("resnet of bottlenecks", "deit", "clip visual")]
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def make_models(name: str, count: int, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """Models whose every parameter and running statistic is different."""
    models = []
    draws = torch.Generator().manual_seed(0)
    for _ in range(count):
        model = FAMILIES[name].make().eval()
        for tensor_name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draws) * 0.1
                tensor.add_(noise.abs() if "var" in tensor_name else noise)
        models.append(model.to(dtype))
    return models


def tensor_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def loop(models, x, **kwargs) -> torch.Tensor:
    return torch.stack([tensor_of(model(x, **kwargs)) for model in models])


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", EVERY)
def test_outputs_are_those_of_a_loop_and_stay_so_when_replayed(name, caplog):
    models, x = make_models(name, 3), FAMILIES[name].input()
    group = Group.of(models)
    with torch.no_grad():
        wanted = loop(models, x)
        for _ in range(4):
            assert_near(tensor_of(group(x)), wanted, 1e-10)
        other = x.flip(0) if name in ("bert", "clip text") else -x
        assert_near(tensor_of(group(other)), loop(models, other), 1e-10)
    assert not caplog.records  # neither a loop, nor left uncaptured


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_a_loop(name):
    models, x = make_models(name, 3), FAMILIES[name].input()
    stacked = {
        key: torch.stack([dict(model.named_parameters())[key] for model in models])
        .detach()
        .requires_grad_()
        for key, _ in models[0].named_parameters()
    }
    buffers = {
        key: torch.stack([dict(model.named_buffers())[key] for model in models])
        for key, buffer in models[0].named_buffers()
        if buffer.is_floating_point()
    }
    found = tensor_of(Group(models[0], stacked | buffers)(x))
    weights = torch.randn(
        found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(2)
    )
    (found * weights).sum().backward()
    (loop(models, x) * weights).sum().backward()
    for key, tensor in stacked.items():
        gradients = [dict(model.named_parameters())[key].grad for model in models]
        if all(gradient is None for gradient in gradients):
            assert tensor.grad is None or not tensor.grad.any()
            continue
        scale = max(1.0, *(float(gradient.abs().max()) for gradient in gradients))
        assert tensor.grad is not None
        for index, gradient in enumerate(gradients):
            assert (tensor.grad[index] - gradient).abs().max() <= 1e-10 * scale, key


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("count", [1, 7])
def test_other_numbers_of_models(name, count):
    models, x = make_models(name, count), FAMILIES[name].input()[:1]
    group = Group.of(models)
    with torch.inference_mode():
        for _ in range(3):
            assert_near(tensor_of(group(x)), loop(models, x), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_within_rounding(name):
    models = make_models(name, 3, torch.float32)
    x = FAMILIES[name].input()
    x = x.float() if x.is_floating_point() else x
    group = Group.of(models)
    with torch.no_grad():
        wanted = loop(models, x)
        for _ in range(3):
            assert_near(tensor_of(group(x)), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "convnext", "resnet", "clip text", "bert"])
def test_bfloat16_is_about_as_exact_as_the_loop(name):
    models = make_models(name, 3, torch.float32)
    x = FAMILIES[name].input()
    x = x.float() if x.is_floating_point() else x
    with torch.no_grad():
        exact = loop(models, x)
        rounded = [model.to(torch.bfloat16) for model in models]
        x = x.to(torch.bfloat16) if x.is_floating_point() else x
        its_error = (loop(rounded, x) - exact).pow(2).mean().sqrt()
        group = Group.of(rounded)
        for _ in range(3):
            error = (tensor_of(group(x)) - exact).pow(2).mean().sqrt()
            assert error <= 1.5 * its_error


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
def test_an_input_for_each_model_and_one_that_is_not_contiguous(name):
    models = make_models(name, 3)
    x = images(FAMILIES[name].input().shape[-1], rows=6).unflatten(0, (3, 2))
    each = x.transpose(-1, -2)
    group = Group.of(models)
    with torch.no_grad():
        wanted = torch.stack([model(own) for model, own in zip(models, each, strict=True)])
        for _ in range(3):
            assert_near(group(each, each=True), wanted, 1e-10)


def test_bert_with_a_mask_that_is_prepared_outside_is_replayed(caplog):
    models, x = make_models("bert", 3), tokens()
    mask = torch.zeros(ROWS, 1, 1, 7, dtype=torch.float64)
    mask[0, ..., 5:] = -1e9
    group = Group.of(models)
    with torch.no_grad():
        wanted = loop(models, x, attention_mask=mask)
        for _ in range(3):
            output = group(x, attention_mask=mask)
            assert_near(output.logits, wanted, 1e-10)
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert not caplog.records


def test_bert_that_branches_on_a_mask_stays_right_and_says_so_once(caplog):
    models, x = make_models("bert", 3), tokens()
    mask = (x > 0).long()
    group = Group.of(models)
    with torch.no_grad():
        wanted = loop(models, x, attention_mask=mask)
        for _ in range(4):
            assert_near(group(x, attention_mask=mask).logits, wanted, 1e-10)
    (record,) = caplog.records
    assert "is not captured: it branches on data" in record.message


def test_bert_with_a_mask_for_each_model_runs_as_a_loop(caplog):
    models, x = make_models("bert", 3), tokens()
    masks = torch.stack([(x > threshold).long() for threshold in (0, 1, 2)])
    group = Group.of(models)
    with torch.no_grad():
        for _ in range(2):
            found = group(x.expand(3, *x.shape), attention_mask=masks, each=True).logits
    wanted = torch.stack(
        [model(x, attention_mask=mask).logits for model, mask in zip(models, masks, strict=True)]
    )
    assert_near(found, wanted.detach(), 1e-10)
    assert sum("runs model by model" in record.message for record in caplog.records) == 1


def test_one_model_of_a_group_is_that_model():
    models, x = make_models("resnet", 2), images()
    group = Group.of(models)
    state = {name: tensor[1] for name, tensor in group.stacked.items()}
    wanted = functional_call(models[0], state, (x,))
    torch.testing.assert_close(models[1](x), wanted, rtol=1e-12, atol=0)
