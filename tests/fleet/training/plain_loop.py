"""What the joint trainer is held to: a loop over one model as anyone would write it.

It shares with the trainer what each model sees (`Feed`) and how lr goes (`lr_factor`), which have
tests of their own, and nothing else. With it, small nets and images that both are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleet.recipes import Recipe
from fleet.train import JointTrainer, Point, TrainResult
from fleet.training.feed import Feed, load
from fleet.training.schedules import lr_factor
from inputs.data import ImageSet
from inputs.randomness import generator

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    fit: ImageSet
    tune: ImageSet


def images(
    name: str, count: int, seed: int, *, classes: int = 3, side: int = 6, reads: list | None = None
) -> ImageSet:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draws)
    pixels = torch.randint(0, 120, (count, 1, side, side), generator=draws)
    # A bright row tells the class, most of the time.
    rows = labels * side // classes
    pixels[torch.arange(count), 0, rows] += torch.randint(0, 130, (count, side), generator=draws)
    pixels = pixels.to(torch.uint8)

    def read(wanted: Tensor) -> Tensor:
        if reads is not None:
            reads.append(wanted.clone())
        return pixels[wanted]

    names = tuple(map(str, range(classes)))
    return ImageSet(name, names, labels, torch.arange(count), read, mean=(0.3,), std=(0.3,))


def some_data(*, classes: int = 3, side: int = 6, fit: int = 100, tune: int = 40) -> Data:
    return Data(
        images("fit", fit, 0, classes=classes, side=side),
        images("tune", tune, 1, classes=classes, side=side),
    )


DATA = some_data()


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0, classes: int = 3, width: int = 24, side: int = 6):
        super().__init__()
        self.body = nn.Linear(side * side, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(F.gelu(self.body(x.flatten(1)))))


class ConvNet(nn.Module):
    """No bias before a norm: its gradient is rounding noise, which Adam makes large."""

    def __init__(self, dropout: float = 0.0, classes: int = 3):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.deeper = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.body(x)))
        x = F.gelu(self.norm2(self.deeper(x)))
        return self.head(self.dropout(x.flatten(1)))


def vit(
    drop_path: float = 0.0, attention_drop: float = 0.0, classes: int = 3, depth: int = 1
) -> nn.Module:
    """Without qkv biases: that of the keys changes nothing, and its gradient is rounding noise."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=6, patch_size=3, in_chans=1, num_classes=classes, embed_dim=16, depth=depth,
        num_heads=2, mlp_ratio=2, qkv_bias=False, drop_path_rate=drop_path,
        attn_drop_rate=attention_drop,
    )  # fmt: skip


class Kept:
    """What `checkpoint` was given."""

    def __init__(self) -> None:
        self.states: list[Weights] = []
        self.results: list[TrainResult] = []
        self.finals: list[bool] = []

    def __call__(self, model: nn.Module, result: TrainResult, final: bool) -> None:
        assert not any(module.training for module in model.modules())
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        self.results.append(result)
        self.finals.append(final)

    @property
    def last(self) -> dict[int, Weights]:
        """The final weights of each model that is done."""
        every = zip(self.states, self.results, self.finals, strict=True)
        return {result.index: state for state, result, final in every if final}


class Watching:
    """A Watch that notes everything, and calls `at` with the number of steps after each."""

    def __init__(self, at: Callable[[int], object] = lambda steps: None) -> None:
        self.at, self.steps, self.points, self.ended = at, 0, list[Point](), 0
        self.names: Sequence[str] = ()
        self.total = self.done_before = 0

    def begin(self, names: Sequence[str], steps: int, done: int) -> None:
        self.names, self.total, self.done_before = names, steps, done

    def advance(self, steps: int) -> None:
        self.steps += steps
        self.at(self.steps)

    def point(self, point: Point) -> None:
        self.points.append(point)

    def end(self) -> None:
        self.ended += 1


def joint(
    makes: Sequence[Callable[[], nn.Module]] | Callable[[], nn.Module],
    recipes: Sequence[Recipe],
    data: Data | Sequence[Data] = DATA,
    **settings,
) -> tuple[dict[int, Weights], list[TrainResult]]:
    """Final weights by index, and results, of the joint trainer."""
    models = list(makes) if isinstance(makes, Sequence) else [makes] * len(recipes)
    kept = Kept()
    results = JointTrainer(models, recipes, data, kept, **settings).run()
    return kept.last, results


def same(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def difference(one: Weights, other: Weights) -> float:
    """The largest ‖a − b‖ / ‖b‖ of all tensors; 0 / 0 is 0."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, value in other.items():
        wide = value.double()
        apart, size = (one[name].double() - wide).norm().item(), wide.norm().item()
        worst = max(worst, apart and apart / size if size else apart)
    return worst


def in_double(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().double()


def alone(make: Callable[[], nn.Module], recipe: Recipe, data: Data = DATA) -> Weights:
    """The weights that this recipe gives, by torch.optim in a plain loop."""
    with torch.random.fork_rng():
        torch.manual_seed(generator(recipe.seed, "init").initial_seed())
        model = make()
    if recipe.head_epochs:
        _phase(model, recipe, data, "head", recipe.head_epochs)
    averaged = _phase(model, recipe, data, "fit", recipe.epochs)
    return averaged or {name: value.clone() for name, value in model.state_dict().items()}


def _phase(model: nn.Module, recipe: Recipe, data: Data, phase: str, epochs: int) -> Weights | None:
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not any(fnmatchcase(name, pattern) for pattern in recipe.frozen)
        and (phase == "fit" or name.startswith("head."))
    }
    _set_modes(model, phase, {id(parameter) for parameter in trained.values()})
    optimizer = _optimizer(trained, recipe)
    classes, dtype = len(data.fit.classes), next(model.parameters()).dtype
    feed = Feed(data.fit, recipe, classes, phase, epochs)
    averaged, count = None, 0
    for step in range(feed.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, feed.steps, recipe)
        batch = load([feed], [step], dtype=dtype)
        pixels, targets = batch.pixels[0], batch.targets[0]
        _backward(model, optimizer, pixels, targets)
        if recipe.sam_rho is not None:
            _sharpen(model, optimizer, trained, pixels, targets, recipe.sam_rho)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained.values(), recipe.clip_norm)
        optimizer.step()
        ends_epoch = (step + 1) % feed.steps_per_epoch == 0
        late = recipe.swa_start is not None and step + 1 >= round(recipe.swa_start * feed.steps)
        if phase == "fit" and (recipe.ema_decay is not None or (late and ends_epoch)):
            count += 1
            weight = 1 / count if recipe.ema_decay is None else 1 - recipe.ema_decay
            averaged = _averaged(averaged, model.state_dict(), weight)
    return averaged


def _set_modes(model: nn.Module, phase: str, trained: set[int]) -> None:
    """What is frozen as a whole stays in eval mode; of a net whose head is trained, all else."""
    model.train(phase == "fit")
    if phase == "head":
        model.get_submodule("head").train()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters()}
        if own and not own & trained:
            module.eval()


def _optimizer(trained: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    decays = {n: p.ndim > 1 and n.rpartition(".")[2] != "bias" for n, p in trained.items()}
    groups = [
        {
            "params": [p for name, p in trained.items() if decays[name] == decaying],
            "weight_decay": recipe.weight_decay if decaying else 0.0,
        }
        for decaying in (True, False)
    ]
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, recipe.lr, (recipe.beta1, recipe.beta2), recipe.eps)


def _backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, targets: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(pixels), targets).backward()


def _sharpen(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    pixels: Tensor,
    targets: Tensor,
    rho: float,
) -> None:
    """SAM (2010.01412): the gradient where the loss is highest near by; buffers from here."""
    norm = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    here = [p.detach().clone() for p in trained.values()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        for parameter in trained.values():
            parameter += rho * parameter.grad / (norm + 1e-12)
    _backward(model, optimizer, pixels, targets)
    with torch.no_grad():
        for parameter, before in zip(trained.values(), here, strict=True):
            parameter.copy_(before)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def _averaged(averaged: Weights | None, state: Weights, weight: float) -> Weights:
    if averaged is None:
        return {name: value.clone() for name, value in state.items()}
    return {
        name: (1 - weight) * averaged[name] + weight * value
        if value.is_floating_point()
        else value.clone()
        for name, value in state.items()
    }
