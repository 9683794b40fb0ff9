"""Memory: what a step takes, how it is made to fit, and that the prediction is true."""

import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.train import JointTrainer
from fleet.training.plan import Manner, kept_bytes, manner_of
from fleet.training.step import Kernel, parts_of
from fleet.training.trainee import Trainee
from tests.fleet.training.plain_loop import (
    ConvNet,
    Kept,
    Mlp,
    Watching,
    alone,
    difference,
    in_double,
    joint,
    same,
    some_data,
)

DATA = some_data(fit=128, tune=20)
MIB = 1 << 20


class Deep(nn.Module):
    """Most of its memory is activations, and sizes are multiples of 64 numbers but at the ends."""

    def __init__(self, layers: int = 6, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(36, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x.flatten(1)))
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


RECIPES = [Recipe(lr=0.01, batch_size=64, epochs=3, seed=s) for s in range(6)]


@cache
def kernel_of(make) -> tuple[Kernel, dict[str, Tensor], list[str]]:
    """A kernel, which keeps what it has measured, the tensors of its model, and who is trained."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    return Kernel(model, parts_of(model, names)), state, names


def manner(make=Deep, budget: int | None = None, models: int = 6, rows: int = 64) -> Manner:
    kernel, state, names = kernel_of(make)
    dtype = next(kernel.model.parameters()).dtype
    trainee = Trainee(0, "it", RECIPES[0], DATA, classes=3, dtype=dtype)
    return manner_of(
        kernel,
        {name: tensor[None] for name, tensor in state.items()},
        torch.zeros(1, rows, 1, 6, 6, dtype=dtype),
        torch.zeros(1, rows, 3, dtype=dtype),
        kept=kept_bytes(trainee.recipe, state, names),
        models=models,
        budget=budget,
        threads=1,
        name="it",
    )


def test_kept_is_weights_optimizer_averages_and_the_best():
    model = ConvNet()
    state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    weights = sum(tensor.nbytes for tensor in state.values())
    trained = sum(p.nbytes for _, p in model.named_parameters())
    names = [name for name, _ in model.named_parameters()]

    def kept(**recipe) -> int:
        made = Trainee(
            0, "it", Recipe(**recipe), some_data(fit=128), classes=3, dtype=torch.float32
        )
        return kept_bytes(made.recipe, state, names)

    assert kept(optimizer="sgd", momentum=0) == weights
    assert kept(optimizer="sgd") == weights + trained
    assert kept() == weights + 2 * trained + 4
    assert kept(optimizer="sgd", momentum=0, keep="best") == 2 * weights
    assert kept(optimizer="sgd", momentum=0, sam_rho=0.1) == weights + trained
    assert kept(optimizer="sgd", momentum=0, ema_decay=0.9) == 2 * weights


def test_less_memory_means_fewer_then_checkpointing_then_smaller_parts():
    rows = 512
    free = manner(rows=rows)
    assert (free.width, free.micro_batches, free.checkpointing) == (6, 1, False)
    found = []
    budget = 6 * free.step_bytes + 2 * MIB
    while True:
        try:
            one = manner(budget=budget, rows=rows)
        except FleetError:
            break
        assert one.peak_bytes <= budget
        found.append((one.checkpointing, one.micro_batches, -one.width))
        budget = int(budget * 0.75)
    kinds = list(dict.fromkeys((checkpointing, parts) for checkpointing, parts, _ in found))
    assert kinds[:3] == [(False, 1), (True, 1), (True, 2)]
    assert kinds == sorted(kinds)
    plain = [-width for checkpointing, _, width in found if not checkpointing]
    assert plain == sorted(plain, reverse=True)
    assert plain[-1] == 1


def test_too_little_for_one_says_how_much_one_takes():
    with pytest.raises(FleetError) as error:
        manner(budget=10_000)
    assert str(error.value).startswith(
        "it: memory_budget is 9.77 KiB, one model with batches of 64"
    )
    assert "raise memory_budget or lower batch_size" in str(error.value)
    with pytest.raises(FleetError, match="BatchNorm a batch is not cut"):
        manner(make=ConvNet, budget=10_000)


def test_what_it_says_one_takes_is_enough():
    with pytest.raises(FleetError) as error:
        manner(budget=10_000)
    found = re.search(r"takes ([\d.]+) ([KM])iB", str(error.value))
    assert found is not None
    needed = float(found[1]) * {"K": 1024, "M": MIB}[found[2]]
    assert manner(budget=int(needed * 1.01)).width == 1
    with pytest.raises(FleetError):
        manner(budget=int(needed * 0.98))


def test_batch_norm_sees_whole_batches():
    free = manner(make=ConvNet)
    budget = 6 * free.step_bytes
    while budget > 1000:
        try:
            assert manner(make=ConvNet, budget=budget).micro_batches == 1
        except FleetError:
            break
        budget = int(budget * 0.8)


@cache
def budgets() -> dict[str, int]:
    """A budget for each way to save memory that the planner has."""
    free, found = manner(), dict[str, int]()
    budget = 6 * free.step_bytes
    while budget > 10_000:
        try:
            one = manner(budget=budget)
        except FleetError:
            break
        if one.micro_batches > 1:
            found.setdefault("parts", budget)
        elif one.checkpointing:
            found.setdefault("checkpointing", budget)
        elif one.width < 6:
            found["fewer"] = budget
        budget = int(budget * 0.94)
    return found


@pytest.mark.parametrize("way", ["fewer", "checkpointing"])
def test_saving_memory_changes_no_bit(way: str):
    plans: list[str] = []

    def look(steps: int) -> None:
        plans.append(trainer.plan)

    kept = Kept()
    budget = budgets()[way]
    trainer = JointTrainer(
        [Deep] * 6, RECIPES, DATA, kept, memory_budget=budget, watch=Watching(look)
    )
    assert [result.state for result in trainer.run()] == ["done"] * 6
    assert ("activations computed again" in plans[0]) == (way == "checkpointing")
    # Alone each is a group of one as well, so that nothing is rounded in another way.
    width = int(re.findall(r"(\d+) computed together", plans[0])[0])
    assert 1 <= width < 6
    expected, _ = joint(Deep, RECIPES, DATA, at_once=1 if width == 1 else None)
    assert all(same(kept.last[index], expected[index]) for index in range(6))


def test_parts_of_a_batch_give_the_gradient_of_all_of_it():
    make, rows = in_double(Deep), 512
    budget = manner(make, rows=rows).step_bytes
    while (one := manner(make, rows=rows, budget=budget)).micro_batches == 1:
        budget = int(budget * 0.9)
    assert one.micro_batches > 1
    plans: list[str] = []

    def look(steps: int) -> None:
        plans.append(trainer.plan)

    data, kept = some_data(fit=rows + 40, tune=20), Kept()
    recipes = [
        Recipe(lr=0.01, batch_size=rows, drop_last=False, epochs=3, seed=s, label_smoothing=0.1)
        for s in range(2)
    ]
    trainer = JointTrainer(
        [make] * 2, recipes, data, kept, memory_budget=budget, watch=Watching(look)
    )
    trainer.run()
    assert re.search(r"batches in \d parts", plans[0])
    for index in range(2):
        assert difference(kept.last[index], alone(make, recipes[index], data)) < 1e-9


def test_a_smaller_budget_lets_models_wait_and_builds_each_once():
    built: list[int] = []
    alive: list[int] = []

    def make() -> nn.Module:
        built.append(1)
        return Mlp(width=256)

    def look(steps: int) -> None:
        alive.append(int(re.search(r"train at once: (\d+)", trainer.plan)[1]))  # pyright: ignore

    recipes = [Recipe(batch_size=16, epochs=1 + s % 3, seed=s) for s in range(6)]
    weights = 4 * (36 * 256 + 256 + 3 * 256 + 3)
    budget = 2 * 3 * weights + 6 * weights
    trainer = JointTrainer([make] * 6, recipes, DATA, memory_budget=budget, watch=Watching(look))
    assert [result.state for result in trainer.run()] == ["done"] * 6
    assert 1 < max(alive) < 6
    assert len(built) == 6


def test_the_largest_batch_must_fit_too():
    """The first model of a kind does not say how much the others take."""
    large = Recipe(batch_size=128, epochs=1)
    small = Recipe(batch_size=2, epochs=1)
    budget = manner(make=ConvNet, rows=128, models=1).peak_bytes // 4
    assert JointTrainer([ConvNet], [small], DATA, memory_budget=budget).run()
    with pytest.raises(FleetError, match="large: memory_budget is"):
        JointTrainer([ConvNet], [large], DATA, memory_budget=budget, names=["large"]).run()
    with pytest.raises(FleetError, match="large: memory_budget is"):
        JointTrainer(
            [ConvNet] * 2, [small, large], DATA, memory_budget=budget, names=["small", "large"]
        ).run()


MEASURE = """
    import re, sys
    import torch
    from torch import nn

    torch.set_num_threads(1)
    from fleet.recipes import Recipe
    from fleet.train import JointTrainer
    from inputs.budget import peak_resident_bytes, resident_bytes
    from tests.fleet.training.plain_loop import Mlp, Watching, some_data
    from tests.fleet.training.test_plan import Deep

    net, batch, models, budget = sys.argv[1], *map(int, sys.argv[2:])
    data = some_data(side=16 if net == "conv" else 6, fit=2 * batch, tune=20)

    def conv():
        layers = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))

    make = {"wide": lambda: Mlp(width=100_000), "deep": lambda: Deep(16, 256), "conv": conv}[net]
    # The library of convolutions keeps some megabytes of its own from its first call on.
    small = {"wide": Mlp, "deep": Deep, "conv": conv}[net]
    JointTrainer([small] * 2, [Recipe(batch_size=2, epochs=1)] * 2, data).run()
    before = resident_bytes()
    plans = []
    recipes = [Recipe(batch_size=batch, epochs=3, seed=s) for s in range(models)]
    trainer = JointTrainer(
        [make] * models, recipes, data, memory_budget=budget or None,
        watch=Watching(lambda steps: plans.append(trainer._predicted_bytes())),
    )
    trainer.run()
    print(max(plans), peak_resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "batch", "models", "budget"),
    [
        ("wide", 16, 8, 0),
        ("deep", 1024, 3, 0),
        ("deep", 1024, 3, 70 * MIB),
        ("conv", 128, 2, 0),
    ],
)
def test_the_peak_is_as_predicted(tmp_path: Path, net: str, batch: int, models: int, budget: int):
    script = tmp_path / "measure.py"
    script.write_text(textwrap.dedent(MEASURE))
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, str(script), net, str(batch), str(models), str(budget)], cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    predicted, measured = map(int, run.stdout.split())
    assert measured > 20 * MIB, "too little to tell"
    assert 0.5 < measured / predicted < 1.5
    if budget:
        assert predicted <= budget
