import gc
import math
import re
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleet.augment import augment
from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.train import (
    TrainResult,
    batch_loss,
    classifier_head,
    evaluate,
    lr_factor,
    make_optimizer,
    train,
)
from inputs.data import ImageSet
from inputs.randomness import generator


@dataclass(frozen=True)
class Data:
    fit: ImageSet
    tune: ImageSet


def images(name: str, count: int, seed: int) -> ImageSet:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=draws)
    pixels = torch.randint(0, 120, (count, 1, 6, 6), generator=draws)
    # A bright row tells the class, most of the time.
    pixels[torch.arange(count), 0, 2 * labels] += torch.randint(0, 130, (count, 6), generator=draws)
    pixels = pixels.to(torch.uint8)
    return ImageSet(
        name, ("a", "b", "c"), labels, torch.arange(count), lambda rows: pixels[rows],
        mean=(0.3,), std=(0.3,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(images("fit", 100, 0), images("tune", 40, 1))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, bias=False)  # a bias before a norm only gathers noise
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.dropout(F.gelu(self.norm(self.body(x))).flatten(1)))


class Kept:
    """What `checkpoint` was given."""

    def __init__(self):
        self.states, self.results, self.finals = [], [], []

    def __call__(self, model: nn.Module, result: TrainResult, final: bool):
        self.states.append({k: v.clone() for k, v in model.state_dict().items()})
        self.results.append(result)
        self.finals.append(final)


def weights(recipes: list[Recipe], data: Data, dropout: float = 0.5) -> list[dict]:
    kept = Kept()
    train([lambda: Net(dropout)] * len(recipes), recipes, data, kept, progress=False)
    return kept.states


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(lr=0.01, weight_decay=0.3, epochs=3, batch_size=32, noise=0.2, shift=1, flip=True),
        Recipe(optimizer="sgd", lr=0.1, epochs=2, batch_size=16, clip_norm=0.3, momentum=0.8),
        Recipe(optimizer="sgd", lr=0.1, epochs=2, batch_size=50, schedule="constant", momentum=0),
    ],
    ids=["adamw", "sgd-clipped", "sgd-plain"],
)
def test_equals_a_plain_loop(recipe: Recipe, data: Data):
    torch.manual_seed(generator(recipe.seed, "init").initial_seed())
    model = Net()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    else:
        nesterov = recipe.momentum > 0
        optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=nesterov)
    steps = recipe.epochs * (100 // recipe.batch_size)
    step = 0
    for epoch in range(recipe.epochs):
        draws = generator(recipe.seed, f"fit/{epoch}/augment")
        order = torch.randperm(100, generator=generator(recipe.seed, f"fit/{epoch}/order"))
        for rows in order[: steps // recipe.epochs * recipe.batch_size].split(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(step, steps, recipe)
            pixels = augment(data.fit.normalise(data.fit.pixels(rows)), recipe, draws)
            model.zero_grad()
            F.cross_entropy(model(pixels), data.fit.labels[rows]).backward()
            if recipe.clip_norm:
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                for parameter in model.parameters():
                    parameter.grad.mul_(min(1.0, recipe.clip_norm / (norm.item() + 1e-6)))
            optimizer.step()
            step += 1
    (trained,) = weights([recipe], data, dropout=0.0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)


def test_a_recipe_gives_the_same_bits_whatever_its_neighbours(data: Data):
    recipes = [Recipe(epochs=2, batch_size=32, seed=s, mixup=0.2 * s, noise=0.1) for s in range(3)]
    together = weights(recipes, data)
    backwards = weights(recipes[::-1], data)[::-1]
    (alone,) = weights([recipes[1]], data)
    assert all(same(*pair) for pair in zip(together, backwards, strict=True))
    assert same(together[1], alone)
    assert not same(together[0], together[1])


def test_leaves_the_global_generator_alone(data: Data):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    weights([Recipe(epochs=1, batch_size=50)], data)
    assert torch.equal(torch.rand(4), expected)


def test_learns_and_reports_what_evaluate_says(data: Data):
    kept = Kept()
    recipe = Recipe(lr=0.02, epochs=15, batch_size=20, shift=0)
    (result,) = train([Net], [recipe], data, kept, progress=False)
    model = Net()
    model.load_state_dict(kept.states[0])
    accuracy, loss = evaluate(model, data.tune)
    assert (result.tune_accuracy, result.epochs) == (accuracy, 15)
    assert result.tune_loss == pytest.approx(loss, rel=1e-4)
    assert accuracy > 0.8
    logits = model(data.tune.normalise(data.tune.pixels(torch.arange(40))))
    assert loss == pytest.approx(F.cross_entropy(logits, data.tune.labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == data.tune.labels).double().mean().item()


def test_checkpoints_along_a_run_and_keep_best(data: Data):
    last, best = Kept(), Kept()
    recipe = Recipe(lr=1.0, optimizer="sgd", schedule="constant", epochs=6, batch_size=20)
    (at_end,) = train([Net], [recipe], data, last, checkpoints_every=1, progress=False)
    keeping = recipe.model_copy(update={"keep": "best"})
    (at_best,) = train([Net], [keeping], data, best, checkpoints_every=4, progress=False)
    assert last.finals == [False] * 5 + [True]
    assert [r.epochs for r in last.results] == [1, 2, 3, 4, 5, 6]
    assert best.finals == [False, True]
    assert best.results[0].epochs == 4
    assert at_end is last.results[-1]
    ranked = max(last.results, key=lambda r: (r.tune_accuracy, -r.tune_loss))
    assert (at_best.epochs, at_best.tune_loss) == (ranked.epochs, ranked.tune_loss)
    assert at_best.epochs < 6, "the last epoch is the best: this run shows nothing"
    assert same(best.states[-1], last.states[ranked.epochs - 1])


def test_head_epochs_train_the_head_alone(data: Data):
    seen = []

    def make() -> nn.Module:
        model = Net()

        def look(module, _inputs, _output):
            if torch.is_grad_enabled():
                seen.append({k: v.clone() for k, v in module.state_dict().items()})

        model.register_forward_hook(look)
        return model

    train([make], [Recipe(epochs=1, head_epochs=2, batch_size=50)], data, progress=False)
    assert len(seen) == 6
    for name in seen[0]:
        moved = [not torch.equal(seen[0][name], step[name]) for step in seen]
        if name.startswith("head"):
            assert moved[1:5] == [True] * 4, name
        else:
            assert not any(moved[:4]), name
    assert not torch.equal(seen[4]["body.weight"], seen[5]["body.weight"])


def test_one_model_is_alive_at_a_time(data: Data):
    alive = []

    def make() -> nn.Module:
        gc.collect()
        assert all(reference() is None for reference in alive)
        model = Net()
        alive.append(weakref.ref(model))
        return model

    train([make] * 3, [Recipe(epochs=1, batch_size=50)] * 3, data, progress=False)
    assert len(alive) == 3


def test_schedules_against_the_closed_form():
    cosine = Recipe(warmup=0.2)
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [lr_factor(i, 10, cosine) for i in range(10)] == pytest.approx(expected)
    constant = Recipe(warmup=0.3, schedule="constant")
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [lr_factor(i, 10, constant) for i in range(10)] == pytest.approx(expected)
    assert lr_factor(0, 1, Recipe(warmup=0)) == 1.0


def test_label_smoothing_and_mixup_against_the_formula(data: Data):
    pixels, labels = next(data.fit.batches(10))
    model = Net().eval()
    smooth, alpha = 0.3, 0.7
    recipe = Recipe(label_smoothing=smooth, mixup=alpha)
    found = batch_loss(model, pixels, labels, recipe, generator(0, "x"), torch.device("cpu"))

    from fleet.augment import mixup

    mixed, partners, weight = mixup(pixels, alpha, generator(0, "x"))
    one_hot = F.one_hot(labels, 3) * (1 - smooth) + smooth / 3
    target = weight * one_hot + (1 - weight) * one_hot[partners]
    expected = -(target * model(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, expected)
    assert 0.01 < weight < 0.99


def test_vectors_and_biases_do_not_decay():
    optimizer = make_optimizer(Net(), Recipe(weight_decay=0.5))
    sizes = {
        group["weight_decay"]: sorted(p.ndim for p in group["params"])
        for group in optimizer.param_groups
    }
    assert sizes == {0.5: [2, 4], 0.0: [1, 1, 1]}


def test_frozen_parameters_stay(data: Data):
    def make() -> nn.Module:
        model = Net()
        model.body.requires_grad_(False)
        return model

    kept = Kept()
    recipe = Recipe(epochs=1, head_epochs=1, batch_size=50)
    train([make], [recipe], data, kept, progress=False)
    torch.manual_seed(generator(0, "init").initial_seed())
    assert torch.equal(kept.states[0]["body.weight"], make().state_dict()["body.weight"])


def test_a_loss_that_is_not_finite_names_model_and_step(data: Data):
    recipes = [Recipe(epochs=1, batch_size=20), Recipe(optimizer="sgd", lr=1e30, batch_size=20)]
    with pytest.raises(FleetError, match=r"^07: the loss is not finite at step \d+ .*lr 1e\+30"):
        train([Net, Net], recipes, data, names=["06", "07"], progress=False)


def test_all_problems_of_all_recipes_are_named(data: Data):
    recipes = [Recipe(batch_size=101), Recipe(batch_size=10, shift=6), Recipe(batch_size=10)]
    with pytest.raises(FleetError) as error:
        train([Net] * 3, recipes, data, names=["a", "b", "c"], progress=False)
    message = str(error.value)
    assert "a: the fit split has 100 images, one batch takes 101" in message
    assert "b: shift is 6, the images are 6 pixels" in message
    assert "c:" not in message
    with pytest.raises(FleetError, match="1 models, 2 recipes"):
        train([Net], recipes[:2], data, progress=False)


def test_finds_the_classifier_head():
    import timm

    named = timm.create_model("resnet10t", num_classes=7)
    assert classifier_head(named) is named.get_classifier()
    net = Net()
    assert classifier_head(net) is net.head
    with pytest.raises(FleetError, match=re.escape("Conv2d has neither get_classifier() nor")):
        classifier_head(nn.Conv2d(1, 1, 1))
