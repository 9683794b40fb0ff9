"""Stores of made-up tenants, and what each answers when its exported weights run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fleet.storage.encodings import encoding_named
from fleet.variants import Encoded, Node, Store, Variant, tensor_hash

Change = Callable[[str, Tensor], "tuple[str, dict[str, Any], Tensor] | None"]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_model(dtype: torch.dtype = torch.float32, **settings: int) -> nn.Module:
    """BERT of 4 layers, 256 wide, unless `settings` say otherwise."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "num_labels": 5,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(BertForSequenceClassification(BertConfig(**sizes | settings))).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """GPT-2 of 2 layers, 32 wide, with a head on the last token."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        num_labels=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(GPT2ForSequenceClassification(config)).to(dtype)


def image_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Small ones of timm, for images of 32 x 32."""
    import timm
    from timm.models import ConvNeXt, ResNet, VisionTransformer
    from timm.models.resnet import BasicBlock

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 0.5}
            model = VisionTransformer(img_size=32, patch_size=8, num_classes=6, **settings)
        elif kind == "resnet":
            model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=6, channels=(8, 8, 16, 16))
        elif kind == "convnext":
            model = ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 16, 24), num_classes=6)
        else:
            model = timm.create_model(kind, num_classes=6)
        return spread(model).to(dtype)


def spread(model: nn.Module) -> nn.Module:
    """Running statistics, scales and biases that are not all 0 and 1."""
    with torch.no_grad():
        every = (*model.named_parameters(), *model.named_buffers())
        for seed, (name, tensor) in enumerate(every):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * numbers(*tensor.shape, seed=seed).tanh())
            elif tensor.dim() < 2 or tensor.std() == 0:
                tensor.add_(0.2 * numbers(*tensor.shape, seed=seed))
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def base_of(store: Store) -> dict[str, Tensor]:
    """Every tensor of the base, each pack opened once."""
    wanted = {key: encoded.parts["value"] for key, encoded in store.base.tensors.items()}
    found = store.packs.read_many(wanted.values())
    return {key: found[digest].clone() for key, digest in wanted.items()}


def parts(
    encoding: str, given: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[Encoded, dict[str, Tensor]]:
    """The record, and its tensors by hash."""
    hashes = {part: tensor_hash(tensor) for part, tensor in given.items()}
    return Encoded(encoding, hashes, dict(settings)), {hashes[p]: t for p, t in given.items()}


def encoded(
    encoding: str, value: Tensor, parent: Tensor | None, **settings: Any
) -> tuple[Encoded, dict[str, Tensor]]:
    return parts(encoding, *encoding_named(encoding).encode(value, parent, **settings))


def add_lora(
    store: Store, name: str, names: Iterable[str], rank: int, head: int | None, seed: int
) -> None:
    """PEFT's adapters of one rank on matrices, and a head of a width of its own."""
    base = base_of(store)
    records, tensors = {}, {}
    for place, key in enumerate(names):
        outs, ins = base[key].shape
        down = numbers(rank, ins, seed=100 * seed + place) / ins**0.5
        up = numbers(outs, rank, seed=100 * seed + place + 50) / rank**0.5
        made = {"down": down.to(base[key].dtype), "up": up.to(base[key].dtype)}
        records[key], own = parts("low_rank", made, {"scale": 0.5})
        tensors |= own
    if head is not None:
        for key in ("classifier.weight", "classifier.bias"):
            value = numbers(head, *base[key].shape[1:], seed=seed).to(base[key].dtype) / 4
            records[key], own = encoded("plain", value, None)
            tensors |= own
    store.add(Variant(name, "base", records, head), tensors)


def add_fine_tune(
    store: Store,
    name: str,
    ways: Callable[[str, Tensor], tuple[str, dict[str, Any]] | None],
    seed: int,
    node: str = "base",
    parent: Mapping[str, Tensor] | None = None,
) -> None:
    """A variant that differs from its node in every tensor for which `ways` names an encoding."""
    if parent is None:
        parent = base_of(store)
    records, tensors = {}, {}
    for place, (key, value) in enumerate(parent.items()):
        way = ways(key, value)
        if way is None or not value.is_floating_point():
            continue
        changed = moved(key, value, 1000 * seed + place)
        records[key], own = encoded(way[0], changed, value, **way[1])
        tensors |= own
    store.add(Variant(name, node, records), tensors)


def add_node(store: Store, name: str, keys: Iterable[str], seed: int) -> dict[str, Tensor]:
    """A node with plain tensors of its own; all of its values."""
    base = base_of(store)
    records, tensors = {}, {}
    for place, key in enumerate(keys):
        base[key] = moved(key, base[key], 500 * seed + place)
        records[key], own = encoded("plain", base[key], None)
        tensors |= own
    store.add_node(Node(name, "base", records), tensors)
    return base


def moved(key: str, value: Tensor, seed: int) -> Tensor:
    noise = numbers(*value.shape, seed=seed).to(value.dtype)
    if key.endswith("running_var"):
        return value * (1 + 0.2 * noise.tanh())
    size = value.double().square().mean().sqrt().to(value.dtype)
    return value + 0.1 * noise * size.clamp(min=0.05)


def alone(
    model: nn.Module, store: Store, name: str, given: Any, path: Path, dtype: torch.dtype
) -> Tensor:
    """The answer of a variant's exported checkpoint."""
    from safetensors.torch import load_file

    file = path / f"{name}.safetensors"
    if not file.exists():
        store.export(name, file)
    weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(file).items()}
    with torch.no_grad():
        if isinstance(given, Tensor):
            return torch.func.functional_call(model, weights, (given[None],))[0]
        tokens = {key: tensor[None] for key, tensor in given.items()}
        return torch.func.functional_call(model, weights, (), tokens).logits[0]


def assert_as_alone(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-10 in float64, 1e-5 in float32, of the largest number."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit * float(wanted.abs().max()))
