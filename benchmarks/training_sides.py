"""One process of benchmarks/joint_training.py: trains models in its own way, turn by turn.

It is given a `Job`, and talks with its parent in lines: it says when its imports are done, and then
does what it is told and says so: one step of the smallest model, building and warming up, and as
many rounds (one step of each of its models) as it is asked for, until its input ends.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processes import Line
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
CLASSES = 10
WARM_ROUNDS = 3
PROBES = 5


@dataclass(frozen=True)
class Job:
    """What one process is to do; `images` is a folder with pixels and labels of random images."""

    side: str
    net: str
    models: int
    batch: int
    shape: tuple[int, int, int]
    images: str
    count: int
    device: str = "cpu"
    threads: int = 1
    channels_last: bool = False
    seed: int = 0


class SidesLine(Line):
    """Tells what is in use on the GPU, and turns of training."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def say(self, **facts: Any) -> None:
        super().say(**facts, device_bytes=device_bytes(self._job))

    def turns(self, train: Callable[[int], None]) -> None:
        """Train as many rounds as asked, again and again."""
        while True:
            rounds = int(self.wait())
            synchronise(self._job)
            began = time.perf_counter()
            train(rounds)
            synchronise(self._job)
            self.say_turn(rounds, began)

    def say_turn(self, rounds: float, began: float) -> None:
        # perf_counter is CLOCK_MONOTONIC here: the same in all processes.
        self.say(rounds=rounds, began=began, ended=time.perf_counter())


def synchronise(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def device_bytes(job: Job) -> int:
    """Memory in use on the whole GPU, by all processes, their contexts included."""
    if job.device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


# --- models and images ---------------------------------------------------------------------------


def mlp() -> nn.Module:
    """784-64-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def vit() -> nn.Module:
    """A ViT for images of 8 x 8 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=64,
        depth=4,
        num_heads=4,
    )


def convnet() -> nn.Module:
    """Three convolutions, each with BatchNorm and ReLU, of 16, 32 and 64 channels."""
    layers: list[nn.Module] = []
    channels = (1, 16, 32, 64)
    for place, (before, after) in enumerate(itertools.pairwise(channels)):
        stride = 2 if place else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def resnet18() -> nn.Module:
    """As it is used for 32 pixels: a 3 x 3 stem of stride 1, no pooling after it."""
    from torchvision.models import resnet18 as make

    model = make(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def vit_small() -> nn.Module:
    """ViT-S with patches of 4 pixels, for images of 32."""
    import timm

    return timm.create_model(
        "vit_small_patch16_224", img_size=32, patch_size=4, num_classes=CLASSES
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "vit": vit,
    "convnet": convnet,
    "resnet18": resnet18,
    "vit_small": vit_small,
}
SGD_NETS = ("resnet18",)


def make_optimizer(job: Job, parameters: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Without weight decay, so that one fused call does a step on every side."""
    if job.net in SGD_NETS:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def learning_rate(job: Job, index: int) -> float:
    return (0.01 if job.net in SGD_NETS else 5e-4) * (1 + 0.05 * index)


def load_images(job: Job) -> tuple[Tensor, Tensor]:
    """Normalised images and labels, mapped: processes on one machine share them."""
    shape = (job.count, *job.shape)
    file = str(Path(job.images) / "pixels.f32")
    pixels = torch.from_file(file, shared=True, size=math.prod(shape)).view(shape)
    return pixels.to(job.device), load_labels(job).to(job.device)


def load_labels(job: Job) -> Tensor:
    file = str(Path(job.images) / "labels.i64")
    return torch.from_file(file, shared=True, size=job.count, dtype=torch.int64)


def load_raw_pixels(job: Job) -> Tensor:
    shape = (job.count, *job.shape)
    file = str(Path(job.images) / "pixels.u8")
    return torch.from_file(file, shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)


# --- plain PyTorch -------------------------------------------------------------------------------


class PlainModel:
    """One model and its optimizer, trained by the usual loop over images in memory."""

    def __init__(self, job: Job, index: int, pixels: Tensor, labels: Tensor) -> None:
        torch.manual_seed(job.seed + index)
        model = NETS[job.net]().to(job.device)
        if job.channels_last:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model.train()
        self.optimizer = make_optimizer(job, [*model.parameters()], learning_rate(job, index))
        self.pixels, self.labels, self.batch = pixels, labels, job.batch
        self._order = self._shuffled()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            rows = next(self._order)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.pixels[rows]), self.labels[rows])
            loss.backward()
            self.optimizer.step()

    def _shuffled(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.labels), device=self.labels.device)
            yield from order.split(self.batch)


def run_loop(job: Job, line: SidesLine) -> None:
    """Plain PyTorch, one model after another; with one model, one of the concurrent processes."""
    images = load_images(job)
    models = [PlainModel(job, index, *images) for index in range(job.models)]

    def train(rounds: int) -> None:
        for model in models:
            model.train(rounds)

    train(WARM_ROUNDS)
    line.say(ready=True)
    line.turns(train)


def probe_layout(job: Job, line: SidesLine) -> None:
    """Whether one model of the usual loop trains faster in channels_last."""
    images = load_images(job)
    found: dict[bool, list[float]] = {False: [], True: []}
    models = {
        layout: PlainModel(Job(**{**vars(job), "channels_last": layout}), 0, *images)
        for layout in found
    }
    for turn in range(PROBES + 2):
        for layout, model in models.items():
            synchronise(job)
            began = time.perf_counter()
            model.train(1)
            synchronise(job)
            if turn >= 2:
                found[layout].append(time.perf_counter() - began)
    line.say(channels_last=min(found[True]) < min(found[False]))


# --- stock torch.func.vmap -----------------------------------------------------------------------


def run_stock(job: Job, line: SidesLine) -> None:
    """vmap of grad over functional_call with PyTorch's own rules, and one optimizer over the stack.

    Kind to it: one lr for all models, without which no fused optimizer can step the stack.
    """
    from torch.func import functional_call, grad, stack_module_state, vmap

    pixels, labels = load_images(job)
    torch.manual_seed(job.seed)
    models = [NETS[job.net]().to(job.device).train() for _ in range(job.models)]
    parameters, buffers = stack_module_state(models)
    model = models[0]
    optimizer = make_optimizer(job, [*parameters.values()], learning_rate(job, 0))

    def loss(own: dict, buffers: dict, x: Tensor, y: Tensor) -> tuple[Tensor, dict]:
        logits = functional_call(model, (own, buffers), (x,))
        return F.cross_entropy(logits, y), buffers

    gradient = vmap(grad(loss, has_aux=True))

    def orders() -> Iterator[Tensor]:
        while True:
            drawn = [torch.randperm(len(labels)) for _ in models]
            yield from torch.stack(drawn).to(job.device).split(job.batch, dim=1)

    order = orders()

    def train(rounds: int) -> None:
        for _ in range(rounds):
            rows = next(order)
            with torch.no_grad():
                found, written = gradient(parameters, buffers, pixels[rows], labels[rows])
            buffers.update(written)
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            optimizer.step()

    train(WARM_ROUNDS)
    line.say(ready=True)
    line.turns(train)


# --- ours ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Random images to train on, and a few for *tune*."""

    fit: Any
    tune: Any


class Turns:
    """A watch that lets the trainer go on for as many rounds as the parent asks for.

    Steps count when the trainer says that they are done; a turn ends with the first that makes it
    long enough.
    """

    def __init__(self, job: Job, line: SidesLine) -> None:
        self.job, self.line = job, line
        self.done, self.first, self.goal = 0, 0, WARM_ROUNDS * job.models
        self.began: float | None = None

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        pass

    def advance(self, steps: int) -> None:
        self.done += steps
        if self.done < self.goal:
            return
        synchronise(self.job)
        if self.began is None:
            self.line.say(ready=True)
        else:
            rounds = (self.done - self.first) / self.job.models
            self.line.say_turn(rounds, self.began)
        self.first = self.done
        self.goal = self.done + int(self.line.wait()) * self.job.models
        self.began = time.perf_counter()

    def point(self, point: Any) -> None:
        pass

    def end(self) -> None:
        pass


def run_joint(job: Job, line: SidesLine) -> None:
    """All models by one JointTrainer, each with its own lr and seed."""
    from fleet.recipes import Recipe
    from fleet.train import JointTrainer
    from inputs.data import ImageSet

    raw, labels = load_raw_pixels(job), load_labels(job)
    classes = tuple(str(number) for number in range(CLASSES))
    fit = ImageSet(
        "fit",
        classes,
        labels,
        torch.arange(job.count),
        lambda rows: raw[rows],
        mean=(0.5,) * job.shape[0],
        std=(0.25,) * job.shape[0],
    )
    data = Images(fit, fit.subset(torch.arange(16)))
    recipes = [
        Recipe(
            optimizer="sgd" if job.net in SGD_NETS else "adamw",
            lr=learning_rate(job, index),
            weight_decay=0.0,
            schedule="constant",
            warmup=0.0,
            epochs=100_000,  # the parent ends it
            batch_size=job.batch,
            seed=job.seed + index,
        )
        for index in range(job.models)
    ]
    trainer = JointTrainer(
        [NETS[job.net]] * job.models, recipes, data, device=job.device, watch=Turns(job, line)
    )
    trainer.run()


# --- the digits zoo ------------------------------------------------------------------------------


def open_digits(job: Job) -> tuple[Any, Any]:
    """The config of configs/digits.yaml with a folder of its own for the zoo, and its images."""
    from inputs.config import load_config
    from inputs.data import load_learning_data
    from soups.config import LearnConfig

    overrides = [f"zoo.path={Path(job.images) / job.side}"]
    config = load_config(ROOT / "configs/digits.yaml", overrides, LearnConfig)
    return config, load_learning_data(config.data, memory_budget=config.memory_budget)


def make_zoo_jointly(job: Job, line: SidesLine) -> None:
    """`make_zoo` as `make learn` calls it: base, ingredients, curves, pictures and files."""
    from soups.zoo import make_zoo

    config, data = open_digits(job)
    line.say(ready=True)

    def train(_: int) -> None:
        make_zoo(config, data, root=ROOT / "configs", progress=False)

    line.turns(train)


def make_zoo_plainly(job: Job, line: SidesLine) -> None:
    """The same zoo as it was made before: base and ingredients one after another, their files."""
    from inputs.models import build_model
    from soups.zoo import sample_recipes, save_weights

    config, data = open_digits(job)
    finetune = config.zoo.finetune
    line.say(ready=True)

    def train(_: int) -> None:
        config.zoo.path.mkdir(parents=True)
        torch.manual_seed(finetune.base.seed)
        base = build_model(
            config.model,
            classes=len(data.classes),
            channels=config.data.channels,
            root=ROOT / "configs",
        )
        train_plainly(base, finetune.base, data)
        save_weights(base, config.zoo.path / "base.safetensors")
        for index, recipe in enumerate(sample_recipes(finetune)):
            model = copy.deepcopy(base)
            train_plainly(model, recipe, data)
            save_weights(model, config.zoo.path / f"{index:02d}.safetensors")

    line.turns(train)


def train_plainly(model: nn.Module, recipe: Any, data: Any) -> float:
    """The loop of a recipe of configs/digits.yaml; accuracy on *tune*."""
    torch.manual_seed(recipe.seed)
    draws = torch.Generator().manual_seed(recipe.seed)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    named = [*model.named_parameters()]
    spared = {name for name, p in named if p.ndim <= 1 or name.endswith("bias")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name not in spared]},
            {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    steps = recipe.epochs * (len(data.fit) // recipe.batch_size)
    warm, step = round(recipe.warmup * steps), 0
    model.train()
    for _ in range(recipe.epochs):
        for x, y in data.fit.batches(recipe.batch_size, generator=draws, drop_last=True):
            falling = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * ((step + 1) / warm if step < warm else falling)
            optimizer.zero_grad()
            plain_loss(model, x, y, recipe, draws).backward()
            optimizer.step()
            step += 1
    model.eval()
    hits = 0
    with torch.inference_mode():
        for x, y in data.tune.batches(512):
            hits += int((model(x).argmax(1) == y).sum())
    return hits / len(data.tune)


def plain_loss(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Any, draws: torch.Generator
) -> Tensor:
    """Cross-entropy after noise and mixup, smoothed."""
    smoothing = recipe.label_smoothing
    if recipe.noise:
        x = x + recipe.noise * torch.randn(x.shape, generator=draws)
    if not recipe.mixup:
        return F.cross_entropy(model(x), y, label_smoothing=smoothing)
    weight = torch.distributions.Beta(recipe.mixup, recipe.mixup).sample().item()
    partners = torch.randperm(len(x), generator=draws)
    logits = model(torch.lerp(x[partners], x, weight))
    first = F.cross_entropy(logits, y, label_smoothing=smoothing)
    second = F.cross_entropy(logits, y[partners], label_smoothing=smoothing)
    return weight * first + (1 - weight) * second


# --- what the machine can do ---------------------------------------------------------------------


def measure_limits(job: Job, line: SidesLine) -> None:
    """FLOPs of a round, weights, and the rates of matrix products and of reading and writing."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels, labels = load_images(job)
    model = NETS[job.net]().to(job.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(pixels[: job.batch]), labels[: job.batch]).backward()
    weights = job.models * sum(p.nbytes for p in model.parameters())
    left, right, product = (torch.randn(2048, 2048, device=job.device) for _ in range(3))
    source = torch.ones(weights // 4, device=job.device)
    target = torch.empty_like(source)
    moments = 1 if job.net in SGD_NETS else 2
    line.say(
        flop=counter.get_total_flops() * job.models,
        weight_bytes=weights,
        # Read weights, gradients and moments; write weights and moments.
        moved_bytes=weights * (3 + 2 * moments),
        state_bytes=weights * (1 + moments),
        flop_rate=2 * 2048**3 / _fastest(job, lambda: torch.mm(left, right, out=product)),
        memory_rate=2 * weights / _fastest(job, lambda: target.copy_(source)),
    )


def _fastest(job: Job, work: Callable[[], object], times: int = 20) -> float:
    seconds = []
    for _ in range(times):
        synchronise(job)
        start = time.perf_counter()
        work()
        synchronise(job)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


SIDES: dict[str, Callable[[Job, SidesLine], None]] = {
    "loop": run_loop,
    "processes": run_loop,
    "stock": run_stock,
    "joint": run_joint,
    "layout": probe_layout,
    "limits": measure_limits,
    "zoo jointly": make_zoo_jointly,
    "zoo plainly": make_zoo_plainly,
}


LIBRARIES = {
    "vit": ["timm"],
    "vit_small": ["timm"],
    "resnet18": ["torchvision"],
    "zoo": ["timm", "soups.zoo"],
}


def import_all(job: Job) -> None:
    """What a side imports: torch, the model's library, our packages."""
    for name in [*LIBRARIES.get(job.net, []), *(["fleet.train"] if job.side == "joint" else [])]:
        importlib.import_module(name)
    if job.device == "cuda":
        torch.zeros(1, device="cuda")


def first_step(job: Job) -> None:
    """A step of a model of one weight: PyTorch imports more (torch._dynamo) as it goes."""
    smallest = nn.Linear(1, 1).to(job.device)
    optimizer = make_optimizer(job, [*smallest.parameters()], 0.1)
    smallest(torch.zeros(1, 1, device=job.device)).sum().backward()
    optimizer.step()


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    line = SidesLine(job)
    torch.set_num_threads(job.threads)
    import_all(job)
    line.say(imported=True)
    line.wait()
    first_step(job)
    line.say(stepped=True)
    line.wait()
    SIDES[job.side](job, line)


if __name__ == "__main__":
    main()
