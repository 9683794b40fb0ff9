"""Tenants on a CUDA device: as on the CPU, with a tier of host memory between it and the disk."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from fleet.tenants import Tenants
from fleet.variants import Store
from tests.fleet.serving import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_texts_as_on_the_cpu_in_little_memory(tmp_path, dtype):
    model = zoo.text_model(dtype)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    names = [n for n in store.base.tensors if n.endswith(("query.weight", "value.weight"))]
    for place in range(24):
        zoo.add_lora(store, f"t{place}", names, 1 + 7 * place % 64, 2 + place % 5, place)
    chosen = random.Random(0)
    batches = []
    for seed in range(8):
        made = torch.Generator().manual_seed(seed)
        sizes = [chosen.randint(2, 12) for _ in range(16)]
        texts = [{"input_ids": torch.randint(1, 512, (n,), generator=made)} for n in sizes]
        batches.append([(f"t{chosen.randrange(24)}", text) for text in texts])
    total = sum(store.nbytes(name) for name in store.variants)
    settings = {"memory_budget": total // 2, "host_budget": total * 2 // 3}
    with Tenants(store, zoo.text_model(dtype), device="cuda", **settings) as tenants:
        for batch, answers in zip(batches, tenants.stream(batches), strict=True):
            for answer, (name, given) in zip(answers, batch, strict=True):
                wanted = zoo.alone(model, store, name, given, tmp_path, dtype)
                zoo.assert_as_alone(answer, wanted)
        statistics = tenants.statistics
        assert statistics.evictions > 0
        assert statistics.resident_bytes <= settings["memory_budget"]
        assert 0 < statistics.bytes_read < statistics.bytes_moved
        assert statistics.alone == 0


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_fine_tunes_as_on_the_cpu(tmp_path, kind):
    model = zoo.image_model(kind)
    store = Store.create(tmp_path / "store", zoo.tensors_of(model))
    ways = {
        "low_rank": lambda k, v: ("low_rank", {"rank": 3}) if v.dim() > 1 else ("plain", {}),
        "int4": lambda k, v: ("int4", {"group": 16}),
        "sign": lambda k, v: ("sign", {}),
        "sparse": lambda k, v: ("sparse", {"count": 1 + v.numel() // 10}),
    }
    for place, (name, way) in enumerate(ways.items()):
        zoo.add_fine_tune(store, name, way, place)
    requests = [(name, zoo.numbers(3, 32, 32, seed=k)) for k, name in enumerate([*ways, *ways])]
    with Tenants(store, zoo.image_model(kind), memory_budget=None, device="cuda") as tenants:
        for answer, (name, given) in zip(tenants.predict(requests), requests, strict=True):
            wanted = zoo.alone(model, store, name, given, tmp_path, torch.float32)
            limit = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(answer, wanted, rtol=0, atol=3 * limit)
