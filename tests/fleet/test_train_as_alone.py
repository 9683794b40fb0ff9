"""Trained together, each model ends where it would have ended alone."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import nn

from fleet.recipes import Recipe
from fleet.train import evaluate
from tests.fleet.training.plain_loop import (
    DATA,
    ConvNet,
    Mlp,
    Weights,
    alone,
    difference,
    in_double,
    joint,
    same,
    some_data,
    vit,
)

NETS: dict[str, Callable[..., nn.Module]] = {"mlp": Mlp, "convnet": ConvNet, "vit": vit}
FROZEN = {
    "mlp": ("body.weight",),
    "convnet": ("body.*", "norm.*", "head.bias"),
    "vit": ("patch_embed.*", "pos_embed", "blocks.0.norm1.*"),
}

# 100 images: four epochs of 5 batches, or five of 4 whose last is smaller, are 20 steps.
EVEN = {"epochs": 4, "batch_size": 20, "lr": 0.01}
RAGGED = {"epochs": 5, "batch_size": 32, "drop_last": False, "lr": 0.01}
SGD = {**EVEN, "optimizer": "sgd", "lr": 0.1}

OPTIONS: dict[str, dict] = {
    "sgd": {**SGD, "momentum": 0},
    "sgd with momentum": SGD,
    "sgd with little momentum": {**SGD, "momentum": 0.3, "weight_decay": 0.2},
    "adam": {**EVEN, "optimizer": "adam"},
    "adam with decay": {**EVEN, "optimizer": "adam", "weight_decay": 0.3},
    "adamw": EVEN,
    "adamw with decay": {**EVEN, "weight_decay": 0.5},
    "betas": {**EVEN, "beta1": 0.7, "beta2": 0.9, "eps": 1e-4},
    "sam": {**SGD, "sam_rho": 0.1},
    "sam with adamw": {**EVEN, "sam_rho": 0.05, "clip_norm": 0.5, "ema_decay": 0.8},
    "sam ragged": {**RAGGED, "sam_rho": 0.2},
    "linear": {**EVEN, "schedule": "linear", "warmup": 0.25},
    "constant": {**EVEN, "schedule": "constant", "warmup": 0},
    "constant after warmup": {**SGD, "schedule": "constant", "warmup": 0.4},
    "cosine without warmup": {**EVEN, "warmup": 0},
    "clipped": {**SGD, "clip_norm": 0.05},
    "clipped adamw": {**EVEN, "clip_norm": 0.05},
    "clipped, never reached": {**SGD, "clip_norm": 1e6},
    "smoothed": {**EVEN, "label_smoothing": 0.2},
    "mixup": {**EVEN, "mixup": 0.4},
    "mixup smoothed": {**RAGGED, "mixup": 2.0, "label_smoothing": 0.1},
    "flip": {**EVEN, "flip": True},
    "shift": {**EVEN, "shift": 2},
    "noise": {**EVEN, "noise": 0.3},
    "all augmentation": {**RAGGED, "flip": True, "shift": 1, "noise": 0.1, "mixup": 1.0},
    "ema": {**EVEN, "ema_decay": 0.9},
    "swa": {**SGD, "swa_start": 0.5},
    "swa from the start": {**RAGGED, "swa_start": 0},
    "swa at the end": {**EVEN, "swa_start": 0.99},
    "frozen": {**EVEN, "frozen": True},
    "frozen sgd": {**SGD, "frozen": True, "clip_norm": 0.1},
    "head first": {**EVEN, "head_epochs": 1, "epochs": 3},
    "head first, frozen, averaged": {**RAGGED, "head_epochs": 2, "frozen": True, "swa_start": 0.3},
    "head first with sam": {**SGD, "head_epochs": 2, "sam_rho": 0.1},
    "ragged": RAGGED,
    "ragged sgd": {**RAGGED, "optimizer": "sgd", "clip_norm": 1.0},
    "one image left": {**RAGGED, "batch_size": 33},
    "batches of one": {**EVEN, "batch_size": 1, "epochs": 1},
    "all at once": {**EVEN, "batch_size": 100, "epochs": 20},
    "short": {**EVEN, "epochs": 1},
    "long": {**SGD, "epochs": 6},
    "later": {**EVEN, "batch_size": 50, "epochs": 10, "lr": 0.003},
}  # fmt: skip


# Those that are computed in another way, each once.
IN_VIT = [
    "sgd", "sgd with momentum", "adam", "adamw", "sam with adamw", "linear", "clipped",
    "mixup smoothed", "all augmentation", "ema", "swa", "frozen", "head first", "ragged", "short",
]  # fmt: skip


def recipe_of(option: str, net: str) -> Recipe:
    settings = dict(OPTIONS[option])
    if settings.pop("frozen", False):
        settings["frozen"] = FROZEN[net]
    return Recipe(**settings, seed=list(OPTIONS).index(option))


@pytest.fixture(scope="module")
def zoos() -> Callable[[str], dict[str, Weights]]:
    """All options in one zoo of a net, which also has a model that fails."""
    made: dict[str, dict[str, Weights]] = {}

    def zoo(net: str) -> dict[str, Weights]:
        if net not in made:
            options = [option for of_net, option in CASES if of_net == net]
            recipes = [recipe_of(option, net) for option in options]
            recipes.insert(7, Recipe(optimizer="sgd", lr=1e300, batch_size=20, epochs=4))
            weights, results = joint(in_double(NETS[net]), recipes)
            assert [r.index for r in results if r.state == "failed"] == [7]
            made[net] = dict(zip(options, [weights[i] for i in sorted(weights)], strict=True))
        return made[net]

    return zoo


CASES = [
    *((net, option) for net in ("mlp", "convnet") for option in OPTIONS),
    *(("vit", option) for option in IN_VIT),
]
# With one image the gradients before a BatchNorm are small beside their rounding.
CASES.remove(("convnet", "batches of one"))


@pytest.mark.parametrize(("net", "option"), CASES)
def test_equals_a_plain_loop(zoos, net: str, option: str):
    expected = alone(in_double(NETS[net]), recipe_of(option, net))
    assert difference(zoos(net)[option], expected) < 1e-9


def test_every_option_matters(zoos):
    """Else the test above would pass for options that nobody looks at."""
    for option in OPTIONS:
        if option not in ("adamw", "clipped, never reached", "swa at the end"):
            plain = Recipe(**EVEN, seed=recipe_of(option, "mlp").seed)
            assert difference(zoos("mlp")[option], alone(in_double(Mlp), plain)) > 1e-6, option


DROPPING: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "mlp": (lambda: Mlp(dropout=0.4), Mlp),
    "convnet": (lambda: ConvNet(dropout=0.4), ConvNet),
    "vit, whole blocks": (lambda: vit(drop_path=0.4, depth=2), lambda: vit(depth=2)),
    "vit, attention": (lambda: vit(attention_drop=0.4), vit),
}


@pytest.mark.parametrize("net", DROPPING)
def test_what_is_dropped_does_not_depend_on_the_company(net: str):
    make, never_drops = map(in_double, DROPPING[net])
    recipes = [Recipe(**EVEN, seed=3), Recipe(**RAGGED, seed=4)]
    if net == "mlp":
        recipes += [
            Recipe(**SGD, seed=5),
            Recipe(**SGD, seed=6, sam_rho=0.05),
            Recipe(**EVEN, seed=7, head_epochs=1),
        ]
    together, _ = joint(make, recipes)
    for index, recipe in enumerate(recipes):
        by_itself, _ = joint(make, [recipe])
        assert difference(together[index], by_itself[0]) < 1e-9
    assert difference(together[0], alone(never_drops, recipes[0])) > 1e-3


def test_dropout_is_drawn_by_the_recipes_seed():
    make = in_double(lambda: Mlp(dropout=0.4))

    def seeded_alike() -> nn.Module:
        torch.manual_seed(0)
        return make()

    (one, other), _ = _states(seeded_alike, [Recipe(**EVEN, seed=s) for s in (0, 1)])
    assert difference(one, other) > 1e-3
    (one, other), _ = _states(seeded_alike, [Recipe(**EVEN, seed=s) for s in (1, 1)])
    assert same(one, other)


def _states(make, recipes, *data, **settings):
    weights, results = joint(make, recipes, *data, **settings)
    return [weights[index] for index in sorted(weights)], results


# Sizes are multiples of 64 numbers, so that rounding does not depend on where a model lies.
ROUND = some_data(side=8, fit=64, tune=32)


def round_mlp() -> nn.Module:
    return Mlp(dropout=0.25, classes=64, width=64, side=8)


class RoundConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


HOSTS = [
    Recipe(lr=0.01, epochs=3, batch_size=16, seed=0, clip_norm=1.0, mixup=0.3),
    Recipe(lr=0.05, epochs=2, batch_size=16, seed=1, optimizer="sgd"),
    Recipe(lr=0.02, epochs=3, batch_size=32, seed=2, optimizer="adam", ema_decay=0.5),
    Recipe(lr=0.02, epochs=2, batch_size=16, seed=3, noise=0.1),
]
GUESTS = {
    "leaves": {"epochs": 1},
    "fails": {"epochs": 3, "optimizer": "sgd", "lr": 1e30},
    "fails elsewhere": {"epochs": 3, "optimizer": "sgd", "lr": 1e30, "sam_rho": 0.1},
    "stays longer": {"epochs": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("net", [round_mlp, RoundConvNet], ids=["mlp", "convnet"])
def test_company_changes_no_bit(net, dtype: torch.dtype):
    def make() -> nn.Module:
        return net().to(dtype)

    without, _ = joint(make, HOSTS, ROUND)
    every = dtype == torch.float32 and net is round_mlp
    for name in GUESTS if every else ["fails"]:
        guest = Recipe(**GUESTS[name], batch_size=16, seed=9)
        among, results = joint(make, [*HOSTS[:2], guest, *HOSTS[2:]], ROUND)
        assert results[2].state == ("failed" if "lr" in GUESTS[name] else "done")
        for place, index in enumerate([0, 1, 3, 4]):
            assert same(among[index], without[place]), (name, index)


def test_the_order_of_the_models_changes_no_bit():
    recipes = [
        Recipe(lr=0.01, epochs=2, batch_size=16, seed=s, mixup=0.2 * s, noise=0.1) for s in range(5)
    ]
    forwards, _ = _states(round_mlp, recipes, ROUND)
    backwards, _ = _states(round_mlp, recipes[::-1], ROUND)
    assert all(same(*pair) for pair in zip(forwards, backwards[::-1], strict=True))


def test_a_model_that_holds_nan_changes_no_bit_of_the_others():
    def broken() -> nn.Module:
        model = round_mlp()
        nn.init.constant_(model.head.weight, float("nan"))
        return model

    recipes = [Recipe(lr=0.01, epochs=2, batch_size=16, seed=s) for s in range(3)]
    without, _ = joint(round_mlp, recipes[::2], ROUND)
    among, results = joint([round_mlp, broken, round_mlp], recipes, ROUND)
    assert [result.state for result in results] == ["done", "failed", "done"]
    assert "step 1" in results[1].reason
    assert same(among[0], without[0])
    assert same(among[2], without[1])


@pytest.mark.parametrize("at_once", [1, 3])
def test_how_many_train_at_once_is_no_more_than_rounding(at_once: int):
    recipes = [Recipe(**(EVEN if s % 2 else RAGGED), seed=s, mixup=0.3) for s in range(5)]
    make = in_double(lambda: Mlp(dropout=0.2))
    all_at_once, _ = joint(make, recipes)
    fewer, _ = joint(make, recipes, at_once=at_once)
    for index in all_at_once:
        assert difference(fewer[index], all_at_once[index]) < 1e-9


def test_models_of_several_kinds_data_sets_and_class_counts():
    ten = some_data(classes=10, side=8, fit=60)
    makes = [
        Mlp,
        lambda: Mlp(classes=10, side=8),
        ConvNet,
        lambda: Mlp(width=16),
        lambda: vit(),
        lambda: Mlp(classes=10, side=8),
        ConvNet,
    ]
    data = [DATA, ten, DATA, DATA, DATA, ten, some_data(fit=64)]
    recipes = [Recipe(**EVEN, seed=s, mixup=0.2 * (s % 2)) for s in range(7)]
    makes = [in_double(make) for make in makes]
    together, results = joint(makes, recipes, data)
    assert [result.state for result in results] == ["done"] * 7
    for index, (make, recipe, own) in enumerate(zip(makes, recipes, data, strict=True)):
        assert difference(together[index], alone(make, recipe, own)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_in_float32_accuracies_are_those_of_models_alone(net: str):
    """In float32 rounding differs, and training amplifies it; on average it must not matter."""
    data = some_data(fit=400, tune=1000)
    recipes = [
        Recipe(lr=0.03, epochs=12, batch_size=20, seed=seed, noise=0.3, weight_decay=0.01)
        for seed in range(16)
    ]
    _, results = joint(NETS[net], recipes, data)
    gains = []
    for recipe, result in zip(recipes, results, strict=True):
        model = NETS[net]()
        model.load_state_dict(alone(NETS[net], recipe, data))
        accuracy, _ = evaluate(model, data.tune)
        gains.append(result.tune_accuracy - accuracy)
    gains = torch.tensor(gains, dtype=torch.float64)
    half = stats.t.ppf(0.975, 15) * gains.std().item() / 4
    assert abs(gains.mean().item()) <= half
    assert half < 0.01
