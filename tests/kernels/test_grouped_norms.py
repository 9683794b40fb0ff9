import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import grouped_batch_norm, grouped_layer_norm, reference
from kernels.cpu import norms
from kernels.errors import KernelError
from tests.kernels.grouped import (
    SHARED,
    assert_agree,
    assert_equal,
    assert_rounds_no_worse,
    operand,
    unchecked,  # noqa: F401
)


def layer_norm_over(shape, function=grouped_layer_norm, **settings):
    return lambda x, weight, bias: function(x, shape, weight, bias, **settings)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)])
@pytest.mark.parametrize("shape", [(7,), (3, 2)])
def test_layer_norm_equals_the_loop(shared, rows, shape):
    x = operand(3, *rows, *shape, shared=shared[0])
    weight, bias = (operand(3, *shape, shared=own) for own in shared[1:])
    functions = layer_norm_over(shape), layer_norm_over(shape, reference.grouped_layer_norm)
    assert_agree(*functions, x, weight, bias)
    assert_agree(*functions, x, weight, None)
    assert_agree(*functions, x, None, bias)
    assert_agree(*functions, x, None, None)


@pytest.mark.parametrize("models", [1, 2, 11])
def test_layer_norm_without_gradients(models):
    x, weight, bias = operand(models, 2, 3, 5, strided=True), operand(models, 5), operand(models, 5)
    wanted = layer_norm_over((5,), reference.grouped_layer_norm, eps=1e-3)(x, weight, bias)
    before = x.clone()
    with torch.no_grad():
        found = layer_norm_over((5,), eps=1e-3)(x, weight, bias)
    assert_equal(found, wanted)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 50])
def test_layer_norm_in_bf16_rounds_no_worse_than_the_loop(rows):
    functions = layer_norm_over((64,)), layer_norm_over((64,), reference.grouped_layer_norm)
    assert_rounds_no_worse(*functions, operand(4, rows, 64), operand(4, 64), operand(4, 64))


def test_normalisation_takes_half_activations_with_float32_parameters():
    x, weight = operand(2, 3, 8).bfloat16(), operand(2, 8).float()
    assert grouped_layer_norm(x, (8,), weight, weight).dtype == torch.bfloat16
    statistics = weight, weight.abs(), weight, weight
    for training in (False, True):
        assert grouped_batch_norm(x, *statistics, training=training).dtype == torch.bfloat16


def test_layer_norm_under_autocast_on_cuda_gives_float32_as_torch_does():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(2, 8, device="cuda")
        assert norms.grouped_layer_norm(x, (8,), weight).dtype == torch.bfloat16
        torch.set_autocast_enabled("cuda", True)
        try:
            wanted = torch.nn.functional.layer_norm(x, (8,), weight[0])
            found = norms.grouped_layer_norm(x, (8,), weight, weight)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert found.dtype == wanted.dtype == torch.float32


IMAGES = [(2, 5), (1, 5), (3, 5, 4), (2, 5, 4, 3), (1, 5, 1, 1), (2, 5, 2, 3, 2)]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_equals_the_loop(shared, image, channels_last):
    x = operand(3, *image, shared=shared[0])
    if channels_last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    mean = operand(3, 5, shared=shared[1])
    weight, bias = operand(3, 5, shared=shared[2]), operand(3, 5)

    def both(function, **settings):
        return lambda x, *of_model: function(x, mean, mean.exp(), *of_model, **settings)

    functions = [both(f, eps=0.1) for f in (grouped_batch_norm, reference.grouped_batch_norm)]
    assert_agree(*functions, x, weight, bias)
    assert_agree(*functions, x, weight, None)
    assert_agree(*functions, x, None, None)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("image", [(2, 5), (3, 5, 4), (2, 5, 4, 3), (1, 5, 2, 3, 2)])
@pytest.mark.parametrize("statistics", [False, True])
def test_batch_norm_in_training_equals_the_loop(shared, image, statistics):
    x = operand(3, *image, shared=shared[0])
    weight, bias = (operand(3, 5, shared=own) for own in shared[1:])
    running = []

    def train(function):
        def run(x, weight, bias):
            seeded = torch.Generator().manual_seed(1)
            mean, variance = torch.rand(2, len(x), 5, dtype=x.dtype, generator=seeded)
            running.append((mean, variance))
            given = (mean, variance) if statistics else (None, None)
            return function(x, *given, weight, bias, training=statistics, momentum=0.3)

        return run

    functions = train(grouped_batch_norm), train(reference.grouped_batch_norm)
    assert_agree(*functions, x, weight, bias)
    assert_agree(*functions, x, None, bias)
    for found, wanted in zip(*running[:2], strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("strided", [False, True])
def test_running_statistics_are_those_of_the_module(strided):
    modules = [nn.BatchNorm2d(5, momentum=0.2).double() for _ in range(3)]
    x = operand(3, 2, 5, 3, 4)
    mean, variance = torch.zeros(3, 5).double(), torch.ones(3, 5).double()
    if strided:
        mean, variance = mean.repeat(1, 2)[:, ::2], variance.t().contiguous().t()
    for _ in range(2):
        found = grouped_batch_norm(x, mean, variance, training=True, momentum=0.2)
        wanted = torch.stack([m(t) for m, t in zip(modules, x, strict=True)])
        assert_equal(found, wanted)
    assert_equal(mean, torch.stack([module.running_mean for module in modules]))
    assert_equal(variance, torch.stack([module.running_var for module in modules]))


def test_a_shared_input_updates_each_models_own_statistics():
    x, mean = operand(1, 4, 5), operand(3, 5)
    before, variance = mean.clone(), mean.exp()
    found = grouped_batch_norm(x, mean, variance, training=True, momentum=0.5)
    assert_equal(mean, (before + x[0].mean(0)) / 2)
    assert_equal(found, reference.grouped_batch_norm(x.expand(3, 4, 5), None, None))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_in_bf16_rounds_no_worse_than_the_loop(training):
    def together(x, weight, bias):
        statistics = bias.clone(), weight.abs()
        return grouped_batch_norm(x, *statistics, weight, bias, training=training)

    def loop(x, weight, bias):
        of_models = zip(x, bias.clone(), weight.abs(), weight, bias, strict=True)
        return torch.stack([nn.functional.batch_norm(*own, training=training) for own in of_models])

    operands = operand(3, 8, 16, 6, 6), operand(3, 16) + 3, operand(3, 16)
    assert_rounds_no_worse(together, loop, *operands)


@pytest.mark.usefixtures("unchecked")
def test_layer_norms_that_do_not_fit():
    x = torch.zeros(3, 4, 5)
    with pytest.raises(KernelError, match=r"x \[3, 4, 5\], weight \[3, 4\]; wanted normalized"):
        grouped_layer_norm(x, (5,), torch.zeros(3, 4))
    with pytest.raises(KernelError, match=r"normalized_shape \[6\] at the end of x"):
        grouped_layer_norm(x, (6,))
    with pytest.raises(KernelError, match="a leading model axis"):
        grouped_layer_norm(x, (5,), torch.zeros(2, 5))
    with pytest.raises(KernelError, match="wanted one dtype"):
        grouped_layer_norm(x, (5,), torch.zeros(3, 5).double())


@pytest.mark.usefixtures("unchecked")
def test_batch_norms_that_do_not_fit():
    x, own = torch.zeros(3, 4, 5, 2), torch.zeros(3, 5)
    with pytest.raises(KernelError, match=r"running_mean \[3, 4\].* wanted x \[models"):
        grouped_batch_norm(x, own[:, :4], own)
    with pytest.raises(KernelError, match="both running_mean and running_var"):
        grouped_batch_norm(x, own, None)
    with pytest.raises(KernelError, match="running statistics of each model"):
        grouped_batch_norm(x, own[:1], own[:1], training=True)
    with pytest.raises(KernelError, match="more than one value per channel"):
        grouped_batch_norm(torch.zeros(3, 1, 5, 1), own, own, training=True)
    with pytest.raises(KernelError, match="as many running means"):
        grouped_batch_norm(x[:1], own, own[:1], training=True)
