"""What a run will cost: block sizes that fit the budget, and predictions that can be checked."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inputs.config import Settings
from soups.errors import SoupError
from soups.learners.registry import (
    LEARNERS,
    BestSingle,
    Greedy,
    GreedyFull,
    Learned,
    Mehl,
    MehlLayerwise,
    RandomSearch,
    Uniform,
    WiseFT,
    ZerothOrder,
)
from soups.plan import (
    Costs,
    _fold_greedy,
    check_budget,
    measure_activations,
    plan_learners,
    plan_table,
)
from soups.session import IngredientScores
from tests.soups.learners.test_learners import learn, session_of

MIB = 2**20
# One copy of the weights is 4 MiB; model, images and activations take 30 MiB.
COSTS = Costs(
    ingredients=10,
    weights=MIB,
    ingredient_bytes=4 * MIB,
    in_use=20 * MIB,
    activations=10 * MIB,
    budget=100 * MIB,
)


@pytest.mark.parametrize(
    ("budget", "size", "blocks"), [(38, 1, 10), (41, 1, 10), (42, 2, 5), (46, 3, 4), (900, 10, 1)]
)
def test_the_block_is_the_largest_that_fits(budget: int, size: int, blocks: int):
    costs = dataclasses.replace(COSTS, budget=budget * MIB)
    plan = plan_learners({"mehl": Mehl()}, costs)["mehl"]
    assert (plan.block_size, plan.blocks) == (size, blocks)
    # The model and the images, the activations, the centre, and the rows.
    assert plan.peak_bytes == (20 + 10 + 4 + 4 * size) * MIB
    assert plan.forward_passes == plan.backward_passes == blocks * 5
    assert plan.read_bytes == 20 * 4 * MIB  # the mean, then each ingredient once


@given(
    budget=st.integers(1, 2000),
    ingredients=st.integers(2, 80),
    asked=st.none() | st.integers(1, 100),
    outer=st.integers(1, 3),
)
def test_the_predicted_peak_is_in_the_budget_or_the_plan_is_refused(
    budget: int, ingredients: int, asked: int | None, outer: int
):
    costs = dataclasses.replace(COSTS, budget=budget * MIB, ingredients=ingredients)
    learners = {"mehl": MehlLayerwise(block_size=asked, outer_epochs=outer)}
    least = 34 + 4 * (min(asked, ingredients) if asked else 1)
    if budget < least:
        with pytest.raises(SoupError, match="memory_budget"):
            plan_learners(learners, costs)
        return
    plan = plan_learners(learners, costs)["mehl"]
    assert plan.peak_bytes <= costs.budget
    assert plan.block_size is not None
    assert plan.blocks == outer * -(-ingredients // plan.block_size)
    if asked:
        assert plan.block_size == min(asked, ingredients)
    elif plan.block_size < ingredients:
        assert plan.peak_bytes + 4 * MIB > costs.budget


@pytest.mark.parametrize(
    ("precision", "rows"), [("fp32", 4), ("bf16", 8), ("int8", 15), ("int4", 31), ("sign", 126)]
)
def test_the_memory_of_four_rows_holds_more_in_fewer_bits(precision: str, rows: int):
    """Scales take 1 of 512 bytes of int8 rows, 1 of 65 of sign rows."""
    costs = dataclasses.replace(COSTS, budget=50 * MIB, ingredients=200)
    settings = MehlLayerwise.model_validate({"precision": precision, "outer_epochs": 2})
    plan = plan_learners({"mehl": settings}, costs)["mehl"]
    assert plan.block_size == rows
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "sign": 1}[precision]
    scale_bits = 32 / 2048 if precision in ("int8", "int4", "sign") else 0
    # The model and the images, the activations, the centre, and the rows.
    assert plan.peak_bytes == 34 * MIB + rows * MIB * (bits + scale_bits) / 8
    # The mean; in each outer epoch every ingredient, and again to fold it as it is.
    reads = 1 + 2 * (1 if precision == "fp32" else 2)
    assert plan.read_bytes == reads * 200 * 4 * MIB
    blocks = 2 * -(-200 // rows)
    assert plan.backward_passes == 5 * blocks
    # The rounded weights and the originals are evaluated once each.
    assert plan.forward_passes == 5 * blocks + (0 if precision == "fp32" else 2)


def test_too_small_a_budget_names_every_row_and_what_would_do():
    costs = dataclasses.replace(COSTS, budget=37 * MIB)
    learners = {"all": Learned(), "mehl": Mehl(), "uniform": Uniform(), "greedy": Greedy()}
    with pytest.raises(SoupError) as refused:
        plan_learners(learners, costs)
    text = str(refused.value)
    assert "memory_budget: 37.0 MiB is too small" in text
    assert "mehl needs 38.0 MiB" in text
    assert "all needs 70.0 MiB" in text
    assert "uniform needs" not in text
    assert "raise the budget" in text


def test_a_budget_below_the_model_is_refused_at_once():
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    check_budget(model, in_use=20 * MIB, budget=28 * MIB)
    with pytest.raises(
        SoupError, match=r"memory_budget: 27\.0 MiB is too small.* 28\.0 MiB in all"
    ):
        check_budget(model, in_use=20 * MIB, budget=27 * MIB)


def test_activations_are_what_autograd_keeps():
    rows, wide = 256, 512
    model = nn.Sequential(nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, 10))
    images, labels = torch.randn(rows, 64), torch.zeros(rows, dtype=torch.int64)
    found = measure_activations(model, images, labels)
    # Images, the ReLU's result, log-softmax and labels; then the largest gradient.
    kept = 4 * rows * 64 + 4 * rows * wide + 4 * rows * 10 + 8 * rows
    assert found == pytest.approx(kept + 4 * 64 * wide, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_predict_what_a_step_was_measured_to_hold():
    """Against torch's allocator: what a forward pass has taken and not given back."""
    rows, head = 128, 16 * 28 * 28
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(head, 10),
    )
    images, labels = torch.randn(rows, 3, 32, 32), torch.zeros(rows, dtype=torch.int64)
    predicted = measure_activations(model, images, labels)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as trace:
        loss = nn.functional.cross_entropy(model(images), labels)
    held = sum(event.self_cpu_memory_usage for event in trace.key_averages())
    del loss
    # The images were there before, and the largest gradient comes after.
    assert predicted - images.nbytes - 4 * head * 10 == pytest.approx(held, rel=0.05)


def test_the_table_is_readable():
    learners = {"mehl": Mehl(), "int4": Mehl(precision="int4"), "uniform": Uniform()}
    plans = plan_learners(learners, COSTS)
    table = plan_table(plans).set_index("learner")
    assert table.loc["mehl", "predicted peak"] == "74.0 MiB"
    assert table.loc["mehl", "block size"] == 10
    assert table.loc["mehl", "precision"] == "fp32"
    assert table.loc["int4", "precision"] == "int4"
    assert table.loc["int4", "predicted peak"] == "39.0 MiB"
    assert table.loc["uniform", "block size"] == table.loc["uniform", "precision"] == ""


def test_cross_fitting_comes_on_top():
    costs = dataclasses.replace(COSTS, select=1000, budget=10**9)
    learners = {
        "uniform": Uniform(),
        "best": BestSingle(),
        "random": RandomSearch(evaluations=100, population=25),
        "learned": Learned(epochs=3),
        "mehl": Mehl(block_size=5, inner_epochs=2),
        "full": GreedyFull(),
    }
    alone, plans = plan_learners(learners, costs), plan_learners(learners, costs, folds=5)
    found = {
        row: (plan.out_of_fold_forward_passes, plan.out_of_fold_backward_passes)
        for row, plan in plans.items()
    }
    assert found == {
        "uniform": (1, 0),
        "best": (10 + 1, 0),  # the ingredients' scores are known image by image
        "random": (4 * 103 + 1, 0),  # five soups, each on four fifths of the images
        "learned": (4 * 3 + 1, 4 * 3),
        "mehl": (4 * 4 + 1, 4 * 4),
        "full": (0, 0),  # it has folds of its own
    }
    for row, plan in plans.items():
        assert (plan.forward_passes, plan.peak_bytes) == (
            alone[row].forward_passes,
            alone[row].peak_bytes,
        )
    table = plan_table(plans).set_index("learner")
    assert table.loc["mehl", "out of fold"] == "17 + 16"
    assert table.loc["full", "out of fold"] == ""
    assert "out of fold" not in plan_table(alone)


@given(
    budget=st.integers(1, 400),
    ingredients=st.integers(2, 80),
    image=st.integers(0, 4 * MIB),
    batch=st.integers(1, 512),
)
def test_evaluating_is_planned_within_the_budget_or_refused(
    budget: int, ingredients: int, image: int, batch: int
):
    costs = dataclasses.replace(
        COSTS,
        budget=budget * MIB,
        ingredients=ingredients,
        sources=ingredients + 1,
        image=image,
        batch_size=batch,
    )
    # The soup that grows, and one candidate on one image.
    if budget * MIB < (20 + 4 + 4) * MIB + image:
        with pytest.raises(SoupError, match="greedy needs"):
            plan_learners({"greedy": Greedy()}, costs)
        return
    plan = plan_learners({"greedy": Greedy()}, costs)["greedy"]
    assert plan.peak_bytes <= costs.budget
    held = 2 * (ingredients + 1) * 4 <= budget - 20
    assert (plan.read_bytes == (2 * ingredients + 1) * 4 * MIB) == held


def test_the_ingredients_are_read_again_only_where_they_do_not_fit():
    learners = {"best": BestSingle(), "line": WiseFT(), "uniform": Uniform()}
    plans = plan_learners(learners, dataclasses.replace(COSTS, sources=11))
    assert plans["best"].read_bytes == 10 * 4 * MIB
    assert plans["uniform"].read_bytes == 0
    # The line needs no scores of the ingredients: the soup's members and the base.
    assert plans["line"].read_bytes == 11 * 4 * MIB
    assert [plans[row].forward_passes for row in learners] == [10, 11, 0]


def test_searches_are_planned_on_the_images_that_they_see():
    costs = dataclasses.replace(COSTS, select=1000)
    learners = {
        "some": ZerothOrder(images=100, steps=10, directions=4),
        "all": ZerothOrder(images=5000, steps=10, directions=4),
        "random": RandomSearch(evaluations=100, population=30),
    }
    plans = plan_learners(learners, costs)
    # Then the start and the finalists on all images; nobody asks for the ingredients' own scores.
    assert plans["some"].forward_passes == 10 * 8 / 10 + 18
    assert plans["all"].forward_passes == 10 * 8 + 3
    assert plans["random"].forward_passes == 4 * 30 + 3


def test_greedy_full_is_planned_with_all_its_walks_in_one_call():
    effort = GreedyFull(folds=5).effort(10, 1000)
    assert effort.at_once == 6 * (2 * 10 + 1)  # two walks and greedy for each view
    assert not effort.scored
    assert GreedyFull().effort(3, 1000).candidates == 2**3 - 1


def measured(session):
    """What a run is planned from, as far as it counts passes."""
    return dataclasses.replace(
        COSTS,
        ingredients=len(session.zoo.checkpoints),
        sources=len(session.sources.checkpoints),
        weights=sum(session.numels.values()),
        select=len(session.select),
        classes=len(session.select.classes),
        tensors=len(session.numels),
        budget=10**9,
    )


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("images", "settings"),
    [
        # Four folds of 100 images are learned on in five whole batches of 60.
        (400, {"folds": 4, "batch_size": 60, "steps": 5, "block_size": 2}),
        (400, {"folds": 4, "batch_size": 60, "steps": 5, "levels": ["ingredient", "group"]}),
        (400, {"folds": 4, "batch_size": 60, "steps": 10, "starts": ["uniform", "greedy"]}),
        # Where batches and folds are uneven it is no more than planned.
        (449, {"folds": 3, "batch_size": 64, "steps": 7, "block_size": 4}),
    ],
)
def test_pooled_takes_the_passes_that_were_planned(kitchen, tmp_path, images, settings, refit):
    own = {"groups": "layer", "penalties": [10.0, 1.0], "lr": 0.05, "gate": 0.0, "refit": refit}
    session, settings = session_of(kitchen, tmp_path, "pooled", own | settings)
    session.select = session.select.subset(torch.arange(images))
    session.ingredients = IngredientScores.of(session.ingredients.right[:, :images], 0.0)
    plan = plan_learners({"pooled": settings}, measured(session))["pooled"]
    session.block_sizes = {"pooled": plan.block_size}
    learn(session, settings)
    forward, backward = session.examples_forward / images, session.examples_backward / images
    assert forward <= plan.forward_passes
    if images == 400 and not refit:
        assert backward == plan.backward_passes
    else:
        assert 0.6 * plan.backward_passes <= backward <= plan.backward_passes
    # All but greedy's walks, which may be shorter, is known.
    walks = _fold_greedy(settings, measured(session)).forward_passes
    assert forward >= plan.forward_passes - walks - (plan.backward_passes - backward)


@pytest.mark.parametrize("settings", [{}, {"block_size": 2, "linearisations": 2}])
def test_pooled_newton_takes_the_passes_that_were_planned(kitchen, tmp_path, settings):
    """Where no step has to be shortened: in a box that is wide enough."""
    own = {"groups": "layer", "folds": 3, "bounds": (-20.0, 20.0)}
    session, settings = session_of(kitchen, tmp_path, "pooled_newton", own | settings)
    plan = plan_learners({"newton": settings}, measured(session))["newton"]
    session.block_sizes = {"pooled_newton": plan.block_size}
    learn(session, settings)
    images = len(session.select)
    assert session.examples_backward / images == plan.backward_passes
    assert session.examples_forward / images <= plan.forward_passes
    walks = _fold_greedy(settings, measured(session)).forward_passes
    assert session.examples_forward / images >= plan.forward_passes - walks - 2


def test_no_learner_is_planned_without_saying_what_it_does():
    for row, learner in LEARNERS.items():
        plan = plan_learners({row: learner.settings()}, dataclasses.replace(COSTS, budget=10**9))
        assert (plan[row].forward_passes > 0) == (row != "uniform"), row

    class New(Settings):
        """A learner that has not been planned."""

    with pytest.raises(TypeError, match="New: how is it planned"):
        plan_learners({"new": New()}, COSTS)
