import copy
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.optimizers import Ascent, ModelOptimizer, clip, gradient_norms

RECIPES = {
    "adamw": Recipe(optimizer="adamw", weight_decay=0.1),
    "adamw, other betas": Recipe(optimizer="adamw", beta1=0.8, beta2=0.95, eps=1e-5),
    "adam": Recipe(optimizer="adam", weight_decay=0.02),
    "sgd": Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.03),
    "sgd with momentum": Recipe(optimizer="sgd", momentum=0.9, weight_decay=0.03),
    "no decay": Recipe(optimizer="adamw", weight_decay=0.0),
}
SHAPES = {
    "embed": (1, 3, 7),
    "conv.weight": (5, 3, 3, 3),
    "conv.bias": (5,),
    "norm.weight": (5,),
    "scale": (),
    "stacked.bias": (3, 11),
    "head.weight": (10, 131),
    "head.one": (10, 1),
    "nothing": (0, 4),
}
SLOTS = 3


def stacked(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(SLOTS, *shape, generator=generator, dtype=dtype)
        for name, shape in SHAPES.items()
    }


def one(stack: Mapping[str, Tensor], slot: int) -> dict[str, Tensor]:
    return {name: value[slot] for name, value in stack.items()}


def torch_optimizer(recipe: Recipe, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The loop that a person would write: two groups, torch's own fused optimizer."""
    decaying = [p for n, p in parameters.items() if p.ndim > 1 and not n.endswith("bias")]
    others = [p for n, p in parameters.items() if p.ndim <= 1 or n.endswith("bias")]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=1.0,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            fused=True,
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def backwards(value: Tensor) -> Tensor:
    return torch.permute(value, tuple(reversed(range(value.ndim))))


def rate(step: int) -> float:
    return 0.02 / (1 + step % 5)


def expected_weights(
    recipe: Recipe, start: Mapping[str, Tensor], gradients: list[dict[str, Tensor]]
) -> dict[str, nn.Parameter]:
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = torch_optimizer(recipe, parameters)
    for step, of_step in enumerate(gradients):
        for name, parameter in parameters.items():
            parameter.grad = of_step[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return parameters


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", RECIPES)
def test_gives_the_bits_of_torch_optim_and_leaves_other_slots_alone(kind, dtype):
    recipe, stack = RECIPES[kind], stacked(dtype)
    before = copy.deepcopy(stack)
    gradients = [one(stacked(dtype, seed=step + 1), slot=2) for step in range(50)]
    optimizer = ModelOptimizer(recipe, one(stack, 1))
    for step, of_step in enumerate(gradients):
        optimizer.step(of_step, rate(step))
    assert_same(one(stack, 1), expected_weights(recipe, one(before, 1), gradients))
    for slot in (0, 2):
        assert_same(one(stack, slot), one(before, slot))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "sgd with momentum"])
def test_gradients_may_lie_in_memory_in_any_order(kind):
    # The fused CPU kernels do not look at strides, and traced backwards give transposed gradients.
    recipe, stack = RECIPES[kind], stacked(torch.float32)
    before = copy.deepcopy(stack)
    gradients = [one(stacked(torch.float32, seed=step + 1), slot=0) for step in range(4)]
    turned = [
        {name: backwards(backwards(value).contiguous()) for name, value in of_step.items()}
        for of_step in gradients
    ]
    turned[1] = {name: value.new_zeros(()).expand(value.shape) for name, value in turned[1].items()}
    gradients[1] = {name: torch.zeros_like(value) for name, value in gradients[1].items()}
    optimizer = ModelOptimizer(recipe, one(stack, 0))
    for step, of_step in enumerate(turned):
        optimizer.step(of_step, rate(step))
    assert_same(one(stack, 0), expected_weights(recipe, one(before, 0), gradients))


@pytest.mark.parametrize("kind", RECIPES)
def test_moves_to_another_slot(kind):
    recipe, stack = RECIPES[kind], stacked(torch.float32)
    start = {name: value.clone() for name, value in one(stack, 2).items()}
    gradients = [one(stacked(torch.float32, seed=step + 1), slot=0) for step in range(9)]
    optimizer = ModelOptimizer(recipe, one(stack, 2))
    for step, of_step in enumerate(gradients):
        if step == 4:
            for value in stack.values():
                value[0] = value[2]
                value[2] = torch.nan
            optimizer.bind(one(stack, 0))
        if step == 6:
            # Channels last: the same values, their moments follow.
            turned = one(stack, 0)
            turned["conv.weight"] = turned["conv.weight"].contiguous(
                memory_format=torch.channels_last
            )
            optimizer.bind(turned)
            stack["conv.weight"] = turned["conv.weight"][None]
        optimizer.step(of_step, rate(step))
    assert_same(one(stack, 0), expected_weights(recipe, start, gradients))


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_goes_on_from_its_tensors(kind, stop):
    recipe, stack = RECIPES[kind], stacked(torch.float32)
    start = {name: value.clone() for name, value in one(stack, 1).items()}
    gradients = [one(stacked(torch.float32, seed=step + 1), slot=0) for step in range(8)]
    optimizer = ModelOptimizer(recipe, one(stack, 1))
    for step, of_step in enumerate(gradients):
        if step == stop:
            saved = {name: value.clone() for name, value in optimizer.tensors().items()}
            optimizer = ModelOptimizer(recipe, one(stack, 1))
            optimizer.load(saved)
        optimizer.step(of_step, rate(step))
    assert_same(one(stack, 1), expected_weights(recipe, start, gradients))


def test_names_of_the_state():
    parameters = {"a.weight": torch.zeros(2, 2)}
    assert list(ModelOptimizer(RECIPES["adam"], parameters).tensors()) == [
        "steps",
        "exp_avg/a.weight",
        "exp_avg_sq/a.weight",
    ]
    assert list(ModelOptimizer(RECIPES["sgd"], parameters).tensors()) == ["steps"]
    assert list(ModelOptimizer(RECIPES["sgd with momentum"], parameters).tensors()) == [
        "steps",
        "momentum/a.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", RECIPES)
def test_state_bytes_are_what_it_holds(kind, dtype):
    recipe, parameters = RECIPES[kind], one(stacked(dtype), 0)
    held = ModelOptimizer(recipe, parameters).tensors()
    held_bytes = sum(value.nbytes for name, value in held.items() if name != "steps")
    counter = 0 if recipe.optimizer == "sgd" else 4
    assert ModelOptimizer.state_bytes(recipe, parameters) == held_bytes + counter
    meta = {name: value.to("meta") for name, value in parameters.items()}
    assert ModelOptimizer.state_bytes(recipe, meta) == held_bytes + counter


def test_refuses_other_parameters_and_missing_gradients_before_it_changes_anything():
    parameters = {"w": torch.ones(2, 3), "v": torch.ones(4, 5)}
    optimizer = ModelOptimizer(RECIPES["adamw"], parameters)
    with pytest.raises(FleetError, match=r"'w' has shape \[3, 3\], at the start it had \[2, 3\]"):
        optimizer.bind({"w": torch.ones(3, 3), "v": torch.ones(4, 5)})
    with pytest.raises(FleetError, match="'v' has shape nothing"):
        optimizer.bind({"w": torch.ones(2, 3)})
    with pytest.raises(FleetError, match=r"'w' has gaps in memory: shape \[2, 3\]"):
        optimizer.bind({"w": torch.ones(2, 6)[:, ::2], "v": torch.ones(4, 5)})
    with pytest.raises(FleetError, match="no gradient for 'v'"):
        optimizer.step({"w": torch.ones(2, 3)}, 0.1)
    assert torch.equal(parameters["w"], torch.ones(2, 3))
    assert optimizer.tensors()["steps"] == 0
    with pytest.raises(FleetError, match=r"saved 'exp_avg/v' has shape nothing, wanted \[4, 5\]"):
        optimizer.load(ModelOptimizer(RECIPES["adamw"], {"w": torch.ones(2, 3)}).tensors())


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    max_norm=st.floats(1e-3, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_clips_to_the_bits_of_clip_grad_norm(shapes, max_norm, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in gradients]
    for parameter, value in zip(parameters, gradients, strict=True):
        parameter.grad = value.clone()
    expected = nn.utils.clip_grad_norm_(parameters, max_norm)
    assert torch.equal(clip(gradients, max_norm), expected)
    for parameter, value in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(value, parameter.grad)


def test_without_a_limit_only_the_norm_is_taken():
    gradient = torch.tensor([3.0, 4.0])
    assert clip([gradient], None) == 5.0
    assert torch.equal(gradient, torch.tensor([3.0, 4.0]))
    assert clip([], 1.0) == 0.0


def test_clips_views_into_a_stack_and_nothing_else():
    stack = torch.full((3, 4), 10.0)
    clip([stack[1]], 1.0)
    assert torch.equal(stack[::2], torch.full((2, 4), 10.0))
    assert stack[1].norm().item() == pytest.approx(1.0, abs=1e-5)


def test_norms_of_each_model():
    gradients = stacked(torch.float64)
    found = gradient_norms(gradients)
    for slot in range(SLOTS):
        whole = torch.cat([value[slot].flatten() for value in gradients.values()])
        torch.testing.assert_close(found[slot], whole.norm(), rtol=1e-14, atol=0)
    single = gradient_norms(stacked(torch.float32))
    assert single[1].item() == pytest.approx(
        clip([value[1] for value in stacked(torch.float32).values()], None).item(), rel=1e-6
    )
    with pytest.raises(FleetError, match="no gradients"):
        gradient_norms({})


def test_the_norm_of_a_model_that_is_not_finite_stays_its_own():
    gradients = stacked(torch.float32)
    wanted = gradient_norms(gradients)
    gradients["head.weight"][1, 0, 0] = torch.inf
    found = gradient_norms(gradients)
    assert torch.equal(found.isfinite(), torch.tensor([True, False, True]))
    assert torch.equal(found[::2], wanted[::2])


def test_half_precision_norms_do_not_overflow():
    assert (
        gradient_norms({"w": torch.full((2, 100), 6e4, dtype=torch.float16)}).tolist()
        == [pytest.approx(6e5, rel=1e-3)] * 2
    )


def test_sam_climbs_along_the_gradient_and_comes_back_bit_for_bit():
    stack = stacked(torch.float32)
    before = copy.deepcopy(stack)
    gradients = one(stacked(torch.float32, seed=7), 0)
    kept = copy.deepcopy(gradients)
    parameters = one(stack, 1)
    ascent = Ascent()
    ascent.climb(parameters, gradients, 0.05)
    norm = torch.cat([value.flatten() for value in gradients.values()]).norm()
    for name, value in parameters.items():
        wanted = before[name][1] + 0.05 * gradients[name] / (norm + 1e-12)
        torch.testing.assert_close(value, wanted)
    moved = torch.cat([(stack[name][1] - before[name][1]).flatten() for name in stack])
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-4)
    with pytest.raises(FleetError, match="climbed already"):
        ascent.climb(parameters, gradients, 0.05)
    ascent.back()
    assert_same(stack, before)
    assert_same(gradients, kept)


@pytest.mark.parametrize("gradient", [0.0, float("nan"), float("inf")])
def test_sam_comes_back_from_gradients_without_direction(gradient):
    weights = torch.tensor([1.0, -2.0])
    ascent = Ascent()
    ascent.climb({"w": weights}, {"w": torch.full((2,), gradient)}, 0.1)
    if gradient == 0.0:
        assert torch.equal(weights, torch.tensor([1.0, -2.0]))
    ascent.back()
    assert torch.equal(weights, torch.tensor([1.0, -2.0]))


def test_sam_lowers_the_sharp_loss_of_a_small_regression():
    torch.manual_seed(0)
    inputs = torch.randn(64, 4, dtype=torch.float64)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64)
    parameters = {"w": torch.zeros(4, 1, dtype=torch.float64)}
    recipe = Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    optimizer, ascent = ModelOptimizer(recipe, parameters), Ascent()

    def gradients() -> dict[str, Tensor]:
        weights = parameters["w"].clone().requires_grad_()
        ((inputs @ weights - targets) ** 2).mean().backward()
        assert weights.grad is not None
        return {"w": weights.grad}

    for _ in range(200):
        ascent.climb(parameters, gradients(), 0.01)
        uphill = gradients()
        ascent.back()
        optimizer.step(uphill, 0.05)
    # SAM keeps circling at about lr · curvature · rho around the solution.
    assert ((inputs @ parameters["w"] - targets) ** 2).mean() < 1e-3


def test_the_first_step_of_momentum_keeps_the_sign_of_zero():
    recipe, start = RECIPES["sgd with momentum"], {"w": torch.full((2, 2), -0.0)}
    wanted = expected_weights(recipe, start, [copy.deepcopy(start)])["w"]
    ModelOptimizer(recipe, start).step(copy.deepcopy(start), rate(0))
    assert torch.equal(start["w"].signbit(), wanted.signbit())
