"""One process of benchmarks/tenants.py: answers the same requests as the others in its own way.

It is given a `Job`, and talks with its parent in lines: it says when it is ready, and then answers
as many batches as it is asked for, and says how long they took, until its input ends.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from processes import Line
from torch import Tensor, nn

VOCABULARY = 30522
RANKS = (8, 16, 32, 64)
CLASSES = range(2, 21)
TARGETS = ("query", "value")
SCALE = 1
AT_ONCE = 256


@dataclass(frozen=True)
class Job:
    """What one process is to do, with the store, the whole models and the requests of all."""

    side: str
    folder: str
    tenants: int
    whole: int
    batch: int
    tokens: int
    exponent: float
    # Of the bytes of all tenants' parts, how much may be in memory.
    share: float
    peft_seconds: float
    threads: int
    seed: int = 0

    @property
    def store(self) -> Path:
        return Path(self.folder) / "tenants.store"

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of each tenant."""
        return np.random.default_rng(self.seed).choice(RANKS, self.tenants).tolist()

    @cached_property
    def classes(self) -> list[int]:
        """The width of each tenant's head."""
        return np.random.default_rng(self.seed + 1).choice(CLASSES, self.tenants).tolist()

    @property
    def parts_bytes(self) -> int:
        """Bytes of all tenants' parts."""
        return sum(
            4 * (self._adapted * 2 * WIDTH * rank + classes * (WIDTH + 1))
            for rank, classes in zip(self.ranks, self.classes, strict=True)
        )

    @property
    def budget(self) -> int:
        """Bytes that tenants' parts, or whole models, may take."""
        return int(self.share * self.parts_bytes)

    @property
    def _adapted(self) -> int:
        return LAYERS * len(TARGETS)


# --- the model, the tenants, the requests ---------------------------------------------------------

LAYERS, WIDTH = 4, 256


def bert_mini() -> nn.Module:
    """BERT-mini with random weights and a head of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
    )
    return BertForSequenceClassification(config).eval().requires_grad_(False)


def adapted_modules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]


def tenant_name(number: int) -> str:
    return f"tenant{number:05}"


def parts_of(job: Job, number: int, modules: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """A tenant's own: by module {"down": [rank, in], "up": [out, rank]}, and its head."""
    draws = torch.Generator().manual_seed(job.seed * 1_000_003 + number)
    rank, classes = job.ranks[number], job.classes[number]
    parts = {
        module: {
            "down": torch.randn(rank, WIDTH, generator=draws) / WIDTH**0.5,
            "up": torch.randn(WIDTH, rank, generator=draws) / rank**0.5 / 10,
        }
        for module in modules
    }
    parts["classifier"] = {
        "weight": torch.randn(classes, WIDTH, generator=draws) / WIDTH**0.5,
        "bias": torch.zeros(classes),
    }
    return parts


class Requests:
    """Batch after batch: tenants by Zipf's law, whoever is frequent, and random tokens."""

    def __init__(self, job: Job, count: int | None = None) -> None:
        self._job, count = job, count or job.tenants
        weights = 1.0 / np.arange(1, count + 1) ** job.exponent
        self._share = np.cumsum(weights / weights.sum())
        self._who = np.random.default_rng(job.seed + 2).permutation(count)
        self._next = 0

    def __next__(self) -> list[tuple[int, Tensor]]:
        job = self._job
        draws = np.random.default_rng([job.seed, self._next])
        self._next += 1
        who = self._who[np.searchsorted(self._share, draws.random(job.batch))]
        tokens = draws.integers(VOCABULARY, size=(job.batch, job.tokens))
        return list(zip(who.tolist(), torch.from_numpy(tokens).unbind(0), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, Tensor]]]:
        return self


def grouped(batch: Sequence[tuple[int, Tensor]]) -> dict[int, list[int]]:
    """The places of each tenant's requests."""
    places: dict[int, list[int]] = {}
    for place, (number, _) in enumerate(batch):
        places.setdefault(number, []).append(place)
    return places


# --- the sides ------------------------------------------------------------------------------------

Answers = list[Tensor]
Answer = Callable[[Iterator[list[tuple[int, Tensor]]]], Iterator[Answers]]


def ours(job: Job, *, budget: int | None, look_ahead: int = 2) -> tuple[Answer, Any]:
    """`Tenants` over the store, each asked once: files are checked by hash when first read."""
    from fleet.tenants import Tenants
    from fleet.variants import Store

    tenants = Tenants(Store(job.store), bert_mini(), memory_budget=budget, look_ahead=look_ahead)

    def answer(batches: Iterator[list[tuple[int, Tensor]]]) -> Iterator[Answers]:
        named = (
            [(tenant_name(number), {"input_ids": tokens}) for number, tokens in batch]
            for batch in batches
        )
        return tenants.stream(named)

    tokens = torch.zeros(job.tokens, dtype=torch.long)
    for start in range(0, job.tenants, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, job.tenants))
        tenants.predict([(tenant_name(n), {"input_ids": tokens}) for n in numbers])
    return answer, tenants


class Adapted(nn.Module):
    """A linear layer with the product of one tenant added."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.parts: Mapping[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(F.linear(x, self.parts["down"]), self.parts["up"])
        return torch.add(self.linear(x), product, alpha=SCALE)


class Head(nn.Module):
    """One tenant's head."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Mapping[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parts["weight"], self.parts["bias"])


def loop(job: Job) -> tuple[Answer, Any]:
    """Every adapter in memory; the tenants of a batch one after another, each with its rows."""
    model = bert_mini()
    modules = adapted_modules(model)
    everyone = [parts_of(job, number, modules) for number in range(job.tenants)]
    own: dict[str, Adapted | Head] = {name: Adapted(model.get_submodule(name)) for name in modules}
    own["classifier"] = Head()
    for name, module in own.items():
        model.set_submodule(name, module)

    def answer(batches: Iterator[list[tuple[int, Tensor]]]) -> Iterator[Answers]:
        for batch in batches:
            answers: list[Tensor] = [torch.empty(0)] * len(batch)
            for number, places in grouped(batch).items():
                for name, module in own.items():
                    module.parts = everyone[number][name]
                tokens = torch.stack([batch[place][1] for place in places])
                for place, row in zip(places, model(tokens).logits, strict=True):
                    answers[place] = row
            yield answers

    return answer, None


def whole_file(job: Job, number: int) -> Path:
    return Path(job.folder) / "whole" / f"{number:05}.safetensors"


def whole(job: Job) -> tuple[Answer, Any]:
    """A whole model for each tenant, as many in memory as the budget holds, the oldest leaves.

    What is in memory is decided by the tenant, so that as much is missing as with a file for each
    tenant; a tenant that is missing reads the next of the files that there are.
    """
    from safetensors.torch import load_file

    sizes = sum(parameter.nbytes for parameter in bert_mini().parameters())
    slots = max(1, job.budget // sizes)
    free = [bert_mini() for _ in range(slots)]
    held: OrderedDict[int, nn.Module] = OrderedDict()
    state = {"hits": 0, "misses": 0, "next": 0}

    def take(number: int) -> nn.Module:
        if number in held:
            state["hits"] += 1
            held.move_to_end(number)
            return held[number]
        state["misses"] += 1
        model = free.pop() if free else held.popitem(last=False)[1]
        model.load_state_dict(load_file(whole_file(job, state["next"] % job.whole)))
        state["next"] += 1
        held[number] = model
        return model

    def answer(batches: Iterator[list[tuple[int, Tensor]]]) -> Iterator[Answers]:
        for batch in batches:
            answers: list[Tensor] = [torch.empty(0)] * len(batch)
            for number, places in grouped(batch).items():
                tokens = torch.stack([batch[place][1] for place in places])
                logits = take(number)(tokens).logits[:, : job.classes[number]]
                for place, row in zip(places, logits, strict=True):
                    answers[place] = row
            yield answers

    return answer, state


def peft(job: Job) -> tuple[Answer, Any]:
    """PEFT's mixed batches, with as many adapters as it builds in the time.

    Its heads have one width: narrower ones are filled up with zeros.
    """
    from peft import LoraConfig, get_peft_model

    began = time.perf_counter()
    config = {
        rank: LoraConfig(
            r=rank,
            lora_alpha=rank * SCALE,
            target_modules=list(TARGETS),
            modules_to_save=["classifier"],
        )
        for rank in RANKS
    }
    base: Any = bert_mini()
    base.classifier = nn.Linear(WIDTH, max(job.classes))
    model: Any = get_peft_model(base, config[job.ranks[0]], adapter_name=tenant_name(0))
    built = 1
    while built < job.tenants and time.perf_counter() - began < job.peft_seconds:
        rank = job.ranks[built]
        model.add_adapter(tenant_name(built), config[rank], low_cpu_mem_usage=True)
        built += 1
    modules = adapted_modules(bert_mini())
    layers: dict[str, Any] = {name: model.base_model.model.get_submodule(name) for name in modules}
    heads = model.base_model.model.classifier
    for number in range(built):
        mine = parts_of(job, number, modules)
        for name, layer in layers.items():
            down, up = nn.Parameter(mine[name]["down"]), nn.Parameter(mine[name]["up"])
            layer.lora_A[tenant_name(number)].weight = down.requires_grad_(False)
            layer.lora_B[tenant_name(number)].weight = up.requires_grad_(False)
        head = heads.modules_to_save[tenant_name(number)]
        for part, value in mine["classifier"].items():
            getattr(head, part).data.zero_()[: len(value)] = value
    model.eval()
    requests = Requests(job, built)

    def answer(batches: Iterator[list[tuple[int, Tensor]]]) -> Iterator[Answers]:
        # Of the adapters that there are; the law is the same.
        for batch in requests:
            names = [tenant_name(number) for number, _ in batch]
            tokens = torch.stack([tokens for _, tokens in batch])
            logits = model(tokens, adapter_names=names).logits
            yield [row[: job.classes[n]] for row, (n, _) in zip(logits, batch, strict=True)]

    return answer, {"adapters": built}


SIDES: dict[str, Callable[[Job], tuple[Answer, Any]]] = {
    "ours": lambda job: ours(job, budget=job.budget),
    "resident": lambda job: ours(job, budget=None),
    "no prefetch": lambda job: ours(job, budget=job.budget, look_ahead=0),
    "loop": loop,
    "whole": whole,
    "peft": peft,
}


def facts_of(state: Any) -> dict[str, Any]:
    """What a side counts, since its start."""
    if state is None or isinstance(state, dict):
        return dict(state or {})
    return asdict(state.statistics) | {"hidden": state.statistics.hidden}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    line = Line()
    torch.set_num_threads(job.threads)
    began = time.perf_counter()
    answer, state = SIDES[job.side](job)
    line.say(seconds=time.perf_counter() - began)
    with torch.inference_mode():
        found = answer(Requests(job))
        while True:
            count = int(line.wait())
            answers: Answers = []
            began = time.perf_counter()
            for _ in range(count):
                answers = next(found)
            seconds = time.perf_counter() - began
            line.say(
                seconds=seconds,
                answers=[row.tolist() for row in answers],
                peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                **facts_of(state),
            )


if __name__ == "__main__":
    main()
