import gc
import math
import re
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.train import (
    JointTrainer,
    TrainResult,
    Watch,
    classifier_head,
    evaluate,
    train,
)
from fleet.training.halving import Halving, Rungs
from inputs.randomness import generator
from tests.fleet.training.plain_loop import (
    DATA,
    ConvNet,
    Data,
    Kept,
    Mlp,
    Watching,
    alone,
    difference,
    images,
    in_double,
    joint,
    same,
    some_data,
)


def test_train_is_the_trainer_with_a_bar(capsys):
    recipes = [Recipe(lr=0.01, epochs=2, batch_size=32, seed=s) for s in range(2)]
    kept = Kept()
    results = train([Mlp] * 2, recipes, DATA, kept, progress=False)
    assert capsys.readouterr().err == ""
    weights, expected = joint(Mlp, recipes)
    assert [r.tune_loss for r in results] == [r.tune_loss for r in expected]
    assert all(same(kept.last[index], weights[index]) for index in range(2))
    train([Mlp] * 2, recipes, DATA)
    assert "2 models: 100%" in capsys.readouterr().err


def test_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    joint(lambda: Mlp(dropout=0.5), [Recipe(epochs=1, batch_size=50)])
    assert torch.equal(torch.rand(4), expected)


def test_learns_and_reports_what_evaluate_says():
    recipe = Recipe(lr=0.02, epochs=15, batch_size=20)
    weights, (result,) = joint(ConvNet, [recipe])
    model = ConvNet()
    model.load_state_dict(weights[0])
    accuracy, loss = evaluate(model, DATA.tune)
    assert (result.tune_accuracy, result.epochs, result.state) == (accuracy, 15, "done")
    assert result.tune_loss == pytest.approx(loss, rel=1e-4)
    assert accuracy > 0.8
    logits = model(DATA.tune.normalise(DATA.tune.pixels(torch.arange(40))))
    assert loss == pytest.approx(F.cross_entropy(logits, DATA.tune.labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == DATA.tune.labels).double().mean().item()


def test_checkpoints_along_a_run_and_keep_best():
    last, best = Kept(), Kept()
    recipe = Recipe(lr=1.0, optimizer="sgd", schedule="constant", epochs=6, batch_size=20)
    (at_end,) = train([ConvNet], [recipe], DATA, last, checkpoints_every=1, progress=False)
    keeping = recipe.model_copy(update={"keep": "best"})
    (at_best,) = train([ConvNet], [keeping], DATA, best, checkpoints_every=4, progress=False)
    assert last.finals == [False] * 5 + [True]
    assert [r.epochs for r in last.results] == [1, 2, 3, 4, 5, 6]
    assert best.finals == [False, True]
    assert best.results[0].epochs == 4
    assert at_end == last.results[-1]
    ranked = max(last.results, key=lambda r: (r.tune_accuracy, -r.tune_loss))
    assert (at_best.epochs, at_best.tune_loss) == (ranked.epochs, ranked.tune_loss)
    assert at_best.epochs < 6, "the last epoch is the best: this run shows nothing"
    assert same(best.states[-1], last.states[ranked.epochs - 1])


@pytest.mark.parametrize("average", [{}, {"ema_decay": 0.7}, {"swa_start": 0.2}])
def test_a_checkpoint_along_a_run_is_a_shorter_one(average: dict):
    """With a constant lr, after two of four epochs a model is where two epochs would end."""
    recipe = Recipe(schedule="constant", warmup=0, epochs=4, batch_size=20, **average)
    kept = Kept()
    train([in_double(ConvNet)], [recipe], DATA, kept, checkpoints_every=2, progress=False)
    if "swa_start" in average:
        average = {"swa_start": 0.4}  # the same step of a run half as long
    shorter = Recipe(schedule="constant", warmup=0, epochs=2, batch_size=20, **average)
    assert difference(kept.states[0], alone(in_double(ConvNet), shorter)) < 1e-9


def test_head_epochs_train_the_head_alone():
    recipe = Recipe(epochs=1, head_epochs=2, batch_size=50, lr=0.01)
    weights, _ = joint(ConvNet, [recipe, recipe.model_copy(update={"frozen": ("[!h]*",)})])
    torch.manual_seed(generator(0, "init").initial_seed())
    fresh = ConvNet().state_dict()
    for name, value in fresh.items():
        assert torch.equal(weights[1][name], value) == (not name.startswith("head")), name
        assert not torch.equal(weights[0][name], value), name
    watching = Watching()
    JointTrainer([ConvNet], [recipe], DATA, watch=watching).run()
    head = [("head", 1, 1), ("head", 1, 2), ("head", 2, 3), ("head", 2, 4)]
    points = [(point.phase, point.epoch, point.step) for point in watching.points]
    assert points == [*head, ("fit", 1, 1), ("fit", 1, 2)]


def test_frozen_parameters_stay():
    def make() -> nn.Module:
        model = ConvNet()
        model.body.requires_grad_(False)
        return model

    recipe = Recipe(epochs=1, head_epochs=1, batch_size=50, frozen=("norm.*",))
    weights, _ = joint(make, [recipe, recipe])
    torch.manual_seed(generator(0, "init").initial_seed())
    for name, value in make().state_dict().items():
        stays = name.startswith(("body.", "norm."))
        assert torch.equal(weights[0][name], value) == stays, name


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_are_alive_at_a_time(at_once: int):
    """Beside the one module that all models of a kind are computed with."""
    alive: list[weakref.ref] = []

    def make() -> nn.Module:
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        model = Mlp()
        alive.append(weakref.ref(model))
        return model

    recipes = [Recipe(epochs=1, batch_size=50)] * 5
    counts: list[int] = []

    def look(steps: int) -> None:
        counts.append(int(re.search(r"train at once: (\d+)", trainer.plan)[1]))  # pyright: ignore

    trainer = JointTrainer([make] * 5, recipes, DATA, at_once=at_once, watch=Watching(look))
    assert len(trainer.run()) == 5
    assert max(counts) == at_once
    assert len(alive) == 5


def test_the_watch_and_the_curves():
    recipes = [
        Recipe(epochs=2, batch_size=5, seed=0, keep="best"),
        Recipe(epochs=3, batch_size=20, seed=1, head_epochs=1),
        Recipe(epochs=3, batch_size=20, seed=2, optimizer="sgd", lr=1e30),
    ]
    watching = Watching()
    assert isinstance(watching, Watch)
    trainer = JointTrainer([Mlp] * 3, recipes, DATA, names=["a", "b", "c"], watch=watching)
    results = trainer.run()
    assert (watching.names, watching.total) == (["a", "b", "c"], 40 + 20 + 15)
    assert watching.steps == watching.total
    assert watching.ended == 1
    assert watching.points == trainer.curves
    of = {name: [p for p in trainer.curves if p.name == name] for name in "abc"}
    assert [p.step for p in of["a"]] == list(range(2, 41, 2))
    assert [p.state for p in of["a"]] == ["training"] * 19 + ["done"]
    assert [p.tune_accuracy is None for p in of["a"]] == ([True] * 9 + [False]) * 2
    assert of["a"][-1].epoch == 2
    assert of["b"][-1].tune_loss == results[1].tune_loss
    assert of["c"][-1].state == "failed"
    assert not math.isfinite(of["c"][-1].loss)
    assert all(p.grad_norm > 0 and p.seconds > 0 for p in of["a"] + of["b"])
    assert all(0 <= p.lr <= 1e-3 for p in of["a"])
    assert max(p.lr for p in of["a"]) > 0.9e-3


def test_points_say_what_happened():
    """One step of plain SGD without decay: loss, norm and lr are those of the formula."""
    make = in_double(Mlp)
    recipe = Recipe(
        optimizer="sgd", momentum=0, lr=0.5, batch_size=100, epochs=2, weight_decay=0,
        clip_norm=0.01, schedule="linear", warmup=0,
    )  # fmt: skip
    trainer = JointTrainer([make] * 2, [recipe, recipe.model_copy(update={"seed": 1})], DATA)
    trainer.run()
    torch.manual_seed(generator(0, "init").initial_seed())
    model = make()
    pixels = DATA.fit.normalise(DATA.fit.pixels(torch.arange(100))).double()
    loss = F.cross_entropy(model(pixels), DATA.fit.labels)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = trainer.curves[0]
    assert first.loss == pytest.approx(loss.item(), rel=1e-6)
    assert first.grad_norm == pytest.approx(norm.item(), rel=1e-6), "before clipping"
    assert (first.lr, trainer.curves[2].lr) == (0.5, 0.25)


# --- images ---


def test_images_are_read_once_for_all_models():
    reads: list[Tensor] = []
    data = Data(images("fit", 40, 0, reads=reads), images("tune", 10, 1))
    recipes = [Recipe(batch_size=20, epochs=3, seed=s, mixup=0.1 * s) for s in range(6)]
    JointTrainer([Mlp] * 6, recipes, data)
    reads.clear()
    joint(Mlp, recipes, data)
    batches = [read for read in reads if len(read) > 1]
    assert [len(read) for read in batches if len(read) > 20] == [120] * 6
    assert sum(len(read) for read in batches) <= 7 * 120


def test_a_large_image_is_decoded_once_for_all_that_see_it():
    reads: list[Tensor] = []
    data = Data(images("fit", 12, 0, reads=reads, side=128), images("tune", 4, 1, side=128))
    recipes = [Recipe(batch_size=12, epochs=2, seed=s) for s in range(3)]
    joint(lambda: Mlp(width=4, side=128), recipes, data)
    batches = [read for read in reads if len(read) > 1]
    assert all(len(read.unique()) == len(read) for read in batches)
    # Each model looks at its first batch when it is built.
    assert len([read for read in batches if len(read) == 12]) <= 2 + 3


def test_a_large_image_is_decoded_once_for_several_kinds():
    reads: list[Tensor] = []
    data = Data(images("fit", 12, 0, reads=reads, side=128), images("tune", 4, 1, side=128))
    recipes = [Recipe(batch_size=12, epochs=2, seed=s) for s in range(2)]
    makes = [lambda: Mlp(width=4, side=128), lambda: Mlp(width=6, side=128)]
    JointTrainer(makes, recipes, data).run()
    batches = [read for read in reads if len(read) == 12]
    assert len(batches) <= 2 + len(makes), "each step of each kind decodes anew"


# --- who leaves early ---


def test_patience_ends_a_training():
    still = Recipe(lr=1e-12, batch_size=20, epochs=9, patience=2, weight_decay=0)
    watching = Watching()
    kept = Kept()
    results = JointTrainer(
        [Mlp] * 3,
        [still, still.model_copy(update={"patience": 4, "keep": "best"}), Recipe(batch_size=20)],
        DATA,
        kept,
        watch=watching,
    ).run()
    assert [(r.epochs, r.state) for r in results] == [(3, "done"), (1, "done"), (5, "done")]
    last = {p.name: p for p in watching.points}
    assert (last["model 0"].epoch, last["model 1"].epoch) == (3, 5)
    assert kept.last.keys() == {0, 1, 2}
    assert watching.steps == watching.total == 9 * 5 + 9 * 5 + 5 * 5


def test_halving_one_after_another_is_asha():
    recipes = [
        Recipe(batch_size=20, epochs=4, seed=s, lr=[3e-2, 1e-5, 1e-2, 1e-4, 2e-2][s])
        for s in range(5)
    ]
    halving = Halving(first_epochs=1, factor=2, at_once=1)
    kept = Kept()
    trainer = JointTrainer([ConvNet] * 5, recipes, DATA, kept, halving=halving)
    results = trainer.run()
    rungs = Rungs(halving)
    for index, result in enumerate(results):
        scores = {
            p.epoch: p.tune_accuracy
            for p in trainer.curves
            if p.name == f"model {index}" and p.tune_accuracy is not None
        }
        left = [e for e in (1, 2) if e in scores and not rungs.stays(f"{index}", e, scores[e])]
        assert (result.state == "stopped") == bool(left)
        if left:
            assert (result.epochs, max(scores)) == (left[0], left[0])
            assert f"after epoch {left[0]}" in result.reason
            assert "1/2" in result.reason
        else:
            assert (result.epochs, result.reason) == (4, "")
    assert {result.state for result in results} == {"done", "stopped"}
    assert sorted(kept.last) == [r.index for r in results if r.state == "done"]


def test_halving_gives_the_place_of_one_that_leaves_to_the_next():
    recipes = [Recipe(batch_size=20, epochs=3, seed=s) for s in range(7)]
    alive = []

    def look(steps: int) -> None:
        alive.append(int(re.search(r"train at once: (\d+)", trainer.plan)[1]))  # pyright: ignore

    watching = Watching(look)
    trainer = JointTrainer(
        [Mlp] * 7, recipes, DATA, halving=Halving(factor=2, at_once=3), watch=watching
    )
    results = trainer.run()
    assert max(alive) == 3
    assert sum(result.state == "stopped" for result in results) >= 2
    assert watching.steps == watching.total
    first = [
        next(i for i, p in enumerate(trainer.curves) if p.name == f"model {m}") for m in range(7)
    ]
    assert first == sorted(first)


# --- who fails ---


def test_a_loss_that_is_not_finite_names_model_and_step():
    recipes = [Recipe(epochs=1, batch_size=20), Recipe(optimizer="sgd", lr=1e30, batch_size=20)]
    with pytest.raises(FleetError, match=r"^07: the loss is not finite at step 2 .*lr 1e\+30"):
        train([Mlp, Mlp], recipes, DATA, names=["06", "07"], progress=False)
    kept = Kept()
    results = JointTrainer([Mlp] * 2, recipes, DATA, kept).run()
    assert [r.state for r in results] == ["done", "failed"]
    assert re.match(r"the loss is not finite at step 2 with lr 1e\+30; lower lr", results[1].reason)
    assert math.isnan(results[1].tune_accuracy)
    assert kept.last.keys() == {0}


def test_train_names_every_model_that_failed():
    bad = Recipe(optimizer="sgd", lr=1e30, batch_size=20, epochs=1)
    with pytest.raises(FleetError, match=r"^a: the loss .*; c: the loss") as error:
        train([Mlp] * 3, [bad, Recipe(batch_size=20), bad], DATA, names=list("abc"), progress=False)
    assert "b:" not in str(error.value)


def test_a_model_that_fails_at_the_very_end():
    """The last step makes weights that no loss of training sees, but that of tune does."""
    recipe = Recipe(
        optimizer="sgd", lr=1e30, batch_size=100, epochs=1, warmup=0, schedule="constant"
    )
    _, results = joint(Mlp, [recipe, Recipe(epochs=1, batch_size=100, seed=1)])
    assert [result.state for result in results] == ["failed", "done"]
    assert "on tune is not finite after epoch 1" in results[0].reason


def test_one_that_fails_in_its_head_epochs():
    recipe = Recipe(optimizer="sgd", lr=1e30, batch_size=20, epochs=1, head_epochs=1)
    weights, results = joint(ConvNet, [recipe, Recipe(epochs=1, batch_size=20, seed=1)])
    assert [result.state for result in results] == ["failed", "done"]
    assert re.match(r"the loss is not finite at step [23] ", results[0].reason)
    assert weights.keys() == {1}


def test_all_fail():
    _, results = joint(Mlp, [Recipe(optimizer="sgd", lr=1e30, batch_size=20)] * 2)
    assert [result.state for result in results] == ["failed"] * 2


# --- bad input ---


def test_all_problems_of_all_recipes_are_named():
    recipes = [Recipe(batch_size=101), Recipe(batch_size=10, shift=6), Recipe(batch_size=10)]
    with pytest.raises(FleetError) as error:
        JointTrainer([Mlp] * 3, recipes, DATA, names=["a", "b", "c"])
    message = str(error.value)
    assert "a (number 0): the fit split has 100 images, one batch takes 101; lower" in message
    assert "b (number 1): shift is 6, the images are 6 pixels wide; use less" in message
    assert "c" not in message.replace("batch", "").replace("pixel", "").split()
    assert JointTrainer([Mlp], [Recipe(batch_size=101, drop_last=False)], DATA)


def test_a_problem_of_many_models_is_said_once():
    with pytest.raises(FleetError) as error:
        JointTrainer([Mlp] * 16, [Recipe(batch_size=101)] * 16, DATA)
    message = str(error.value)
    assert message.count("one batch takes 101") == 1
    assert message.startswith("model 0 (number 0): the fit split has 100 images")
    assert message.endswith(
        "(so too model 1 (number 1), model 2 (number 2), model 3 (number 3) and 12 more)"
    )


def test_counts_and_names():
    recipes = [Recipe(batch_size=10)] * 2
    with pytest.raises(FleetError, match="1 models, 2 recipes"):
        JointTrainer([Mlp], recipes, DATA)
    with pytest.raises(FleetError, match="1 data sets: give one"):
        JointTrainer([Mlp] * 2, recipes, [DATA])
    with pytest.raises(FleetError, match="several models are named 'twin'; give each"):
        JointTrainer([Mlp] * 2, recipes, DATA, names=["twin", "twin"])
    with pytest.raises(FleetError, match="tune split is empty"):
        JointTrainer([Mlp] * 2, recipes, Data(DATA.fit, DATA.tune.subset(torch.arange(0))))


def test_no_models():
    assert JointTrainer([], [], DATA).run() == []


def first_of(makes: Sequence, recipe: Recipe, data: Data = DATA) -> str:
    with pytest.raises(FleetError) as error:
        JointTrainer(makes, [recipe] * len(makes), data, names=["fine", "odd"]).run()
    return str(error.value)


def test_heads_that_do_not_fit_the_classes():
    short = first_of([Mlp, lambda: Mlp(classes=2)], Recipe(batch_size=20))
    assert short.startswith("odd: labels go up to 2, but Mlp has 2 logits; give it a head with 3")
    wider, results = joint(lambda: Mlp(classes=7), [Recipe(batch_size=20, epochs=1)])
    assert results[0].state == "done"
    assert wider[0]["head.weight"].shape == (7, 24)
    stranger = Data(DATA.fit, some_data(classes=5).tune)
    assert "odd: labels go up to 4" in first_of(
        [lambda: Mlp(classes=5), Mlp], Recipe(batch_size=20), stranger
    )


def test_models_that_return_no_logits():
    found = first_of([Mlp, lambda: nn.Conv2d(1, 3, 3)], Recipe(batch_size=20))
    assert found.startswith("odd: Conv2d returns [1, 3, 4, 4] for one image, wanted logits")


def test_patterns_that_freeze_nothing_or_everything():
    found = first_of([ConvNet, Mlp], Recipe(batch_size=20, frozen=("norm.*",)))
    assert found.startswith("odd: frozen: 'norm.*' matches no parameter; use names or patterns")
    found = first_of([ConvNet, Mlp], Recipe(batch_size=20, frozen=("*",)))
    assert found.startswith("fine: every parameter is frozen; leave some")
    found = first_of([ConvNet, Mlp], Recipe(batch_size=20, frozen=("heda.*",)))
    assert "'head.weight'" in found or "'head.bias'" in found


def test_head_epochs_of_a_model_without_a_head():
    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    found = first_of([Mlp, convolutions], Recipe(batch_size=20, head_epochs=1))
    assert "odd" in found
    assert "Sequential has neither get_classifier() nor a linear layer" in found
    assert "set head_epochs: 0" in found


def test_images_that_the_model_does_not_take():
    found = first_of([Mlp, lambda: nn.Sequential(nn.Flatten(), nn.Linear(49, 3))],
                     Recipe(batch_size=20))  # fmt: skip
    assert found.startswith("odd: ")


class Looks(Mlp):
    """Branches on its images, which no function of stacked tensors can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.mean().item() > 0 else 1)


def test_a_model_that_looks_at_numbers_trains_too():
    recipes = [Recipe(lr=0.01, batch_size=20, epochs=2, seed=s) for s in range(2)]
    weights, _ = joint(in_double(Looks), recipes)
    for index, recipe in enumerate(recipes):
        assert difference(weights[index], alone(in_double(Looks), recipe)) < 1e-9


@pytest.mark.parametrize("wrong", [{"at_once": 0}, {"checkpoints_every": 0}, {"snapshot_steps": 0}])
def test_numbers_that_mean_nothing(wrong: dict, tmp_path):
    (name,) = wrong
    with pytest.raises(FleetError, match=name):
        JointTrainer([Mlp], [Recipe(batch_size=20)], DATA, snapshot=tmp_path / "s", **wrong).run()


def test_finds_the_classifier_head():
    import timm

    named = timm.create_model("resnet10t", num_classes=7)
    assert classifier_head(named) is named.get_classifier()
    net = ConvNet()
    assert classifier_head(net) is net.head
    with pytest.raises(FleetError, match=re.escape("Conv2d has neither get_classifier() nor")):
        classifier_head(nn.Conv2d(1, 1, 1))


def test_a_result_is_a_value():
    result = TrainResult(0, 1, 0.5, 0.7, 1.0)
    assert (result.state, result.reason) == ("done", "")
    assert result == TrainResult(0, 1, 0.5, 0.7, 1.0)
