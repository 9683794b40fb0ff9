import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.averages import Average

STEPS, PER_EPOCH = 24, 6


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 7)).to(
        dtype
    )


def disturb(module: nn.Module, step: int) -> None:
    """What a step of training does to the state: all of it changes, integers too."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator).to(value.dtype))
            else:
                value.add_(1)


def taken(step: int, recipe: Recipe) -> bool:
    """Whether the weights after `step` belong to the average."""
    if recipe.swa_start is None:
        return True
    return (step + 1) % PER_EPOCH == 0 and step + 1 >= recipe.swa_start * STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{"ema_decay": 0.9}, {"ema_decay": 0.4}, {"swa_start": 0.5}, {"swa_start": 0.0}]
)
def test_gives_the_bits_of_averaged_model(settings, dtype):
    recipe, module = Recipe(**settings), model(dtype)
    if recipe.ema_decay is None:
        average_fn = get_swa_multi_avg_fn()
    else:
        average_fn = get_ema_multi_avg_fn(recipe.ema_decay)
    # torch averages counters, or fails to; here they are copied.
    del module.get_submodule("1")._buffers["num_batches_tracked"]
    expected = AveragedModel(module, multi_avg_fn=average_fn, use_buffers=True)
    average = Average.of(recipe, module.state_dict())
    assert average is not None
    for step in range(STEPS):
        disturb(module, step)
        average.update(module.state_dict(), step, STEPS, PER_EPOCH)
        if taken(step, recipe):
            expected.update_parameters(module)
    wanted, found = expected.module.state_dict(), average.value()
    assert found.keys() == wanted.keys()
    # torch rounds 1 / count to float32, also where the weights are float64.
    rounded = dtype == torch.float64 and recipe.swa_start is not None
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6 * rounded, atol=1e-6 * rounded)


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"swa_start": 0.5}])
def test_counters_are_copied(settings):
    module = model()
    average = Average(Recipe(**settings), module.state_dict())
    for step in range(STEPS):
        disturb(module, step)
        average.update(module.state_dict(), step, STEPS, PER_EPOCH)
    found = average.value()["1.num_batches_tracked"]
    assert found.dtype == torch.int64
    assert found == STEPS


def test_a_recipe_without_averages_has_none():
    assert Average.of(Recipe(), model().state_dict()) is None
    assert Average.state_bytes(Recipe(), model().state_dict()) == 0


@pytest.mark.parametrize(
    ("start", "epochs"), [(0.0, [1, 2, 3, 4]), (0.5, [2, 3, 4]), (0.6, [3, 4]), (0.99, [4])]
)
def test_swa_is_the_mean_over_the_ends_of_epochs(start, epochs):
    recipe = Recipe(swa_start=start)
    average = Average(recipe, {"w": torch.zeros(1, dtype=torch.float64)})
    for step in range(STEPS):
        weights = torch.tensor([0.1 * (step + 1)], dtype=torch.float64)
        average.update({"w": weights}, step, STEPS, PER_EPOCH)
    mean = sum(0.1 * epoch * PER_EPOCH for epoch in epochs) / len(epochs)
    assert average.value()["w"].item() == pytest.approx(mean, rel=1e-14)


def test_swa_takes_the_last_weights_where_no_epoch_ends():
    average = Average(Recipe(swa_start=0.9), {"w": torch.zeros(1)})
    for step in range(4):
        average.update({"w": torch.tensor([float(step)])}, step, steps=4, steps_per_epoch=6)
    assert average.value()["w"].item() == 3.0


def test_before_the_first_weights_it_replaces_nothing():
    average = Average(Recipe(swa_start=0.5), {"w": torch.ones(2)})
    average.update({"w": torch.ones(2)}, 0, STEPS, PER_EPOCH)
    assert average.value() == {}


def test_half_precision_is_summed_in_float32():
    # One step of bfloat16 at 1 is 2^-8: in bfloat16 no step of this average would move it.
    average = Average(Recipe(ema_decay=0.99), {"w": torch.ones(1, dtype=torch.bfloat16)})
    for step in range(200):
        weights = torch.ones(1, dtype=torch.bfloat16) * (1.0 if step == 0 else 1.0625)
        average.update({"w": weights}, step, 200, 200)
    exact = 1.0625 - 0.0625 * 0.99**199
    assert average.tensors()["average/w"].dtype == torch.float32
    assert average.tensors()["average/w"].item() == pytest.approx(exact, rel=1e-5)
    assert average.value()["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"swa_start": 0.25}])
def test_goes_on_from_its_tensors(settings):
    def run(stop: int | None) -> dict[str, Tensor]:
        recipe, module = Recipe(**settings), model()
        average = Average(recipe, module.state_dict())
        for step in range(STEPS):
            if step == stop:
                saved = {name: value.clone() for name, value in average.tensors().items()}
                average = Average(recipe, model().state_dict())
                average.load(saved)
            disturb(module, step)
            average.update(module.state_dict(), step, STEPS, PER_EPOCH)
        return average.value()

    whole = run(None)
    for stop in (0, 1, 11, 23):
        resumed = run(stop)
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_another_models_average_is_refused():
    average = Average(Recipe(ema_decay=0.9), {"w": torch.zeros(2)})
    saved = Average(Recipe(ema_decay=0.9), {"w": torch.ones(3)}).tensors()
    with pytest.raises(FleetError, match=r"average/w' has shape \[3\], wanted \[2\]"):
        average.load(saved)


def test_follows_views_that_are_written_in_place():
    stack = torch.zeros(3, 4)
    average = Average(Recipe(ema_decay=0.5), {"w": stack[1]})
    stack[1] = 1.0
    average.update({"w": stack[1]}, 0, 2, 1)
    stack[1] = 3.0
    average.update({"w": stack[1]}, 1, 2, 1)
    assert torch.equal(average.value()["w"], torch.full((4,), 2.0))
    assert torch.equal(stack[1], torch.full((4,), 3.0))


def test_state_bytes_are_what_it_holds():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        recipe, state = Recipe(ema_decay=0.9), model(dtype).state_dict()
        held = Average(recipe, state).tensors()
        bytes_held = sum(value.nbytes for name, value in held.items() if name != "count")
        assert Average.state_bytes(recipe, state) == bytes_held
