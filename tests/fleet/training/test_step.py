import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fleet.errors import FleetError
from fleet.training.draws import fill
from fleet.training.step import Kernel, check_logits, parts_of
from tests.fleet.training.plain_loop import ConvNet, Mlp, vit

ROWS, CLASSES = 6, 3


def stacked_states(make, models: int = 3) -> dict[str, Tensor]:
    """Different weights for each model, stacked."""
    states = []
    for seed in range(models):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make().double()
        states.append(dict(model.named_parameters()) | dict(model.named_buffers()))
    return {n: torch.stack([s[n].detach() for s in states]) for n in states[0]}


def a_batch(models: int = 3, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randn(models, rows, 1, 6, 6, generator=draws, dtype=torch.float64)
    targets = torch.rand(models, rows, CLASSES, generator=draws, dtype=torch.float64)
    return pixels, targets / targets.sum(-1, keepdim=True)


def kernel_of(model: nn.Module, trained: list[str] | None = None, **settings) -> Kernel:
    names = [name for name, _ in model.named_parameters()] if trained is None else trained
    return Kernel(model, parts_of(model, names), **settings)


def by_autograd(model: nn.Module, state: dict[str, Tensor], pixels, targets):
    """One model's loss, gradients and buffers after the step."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    leaves = {n: state[n].requires_grad_() for n, _ in model.named_parameters()}
    loss = F.cross_entropy(functional_call(model, state, (pixels,)), targets)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return loss.detach(), gradients, {n: state[n] for n, _ in model.named_buffers()}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Mlp, ConvNet, vit], ids=["mlp", "convnet", "vit"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_is_each_models_own_autograd(make, training: bool):
    stacked = stacked_states(make)
    model = make().double().train(training)
    kernel = kernel_of(model)
    for seed in range(3):  # recorded, and replayed with other numbers
        pixels, targets = a_batch(seed=seed)
        outcome = kernel(stacked, {}, pixels, targets)
        statistics = {name for name, _ in model.named_buffers() if "running" in name}
        assert set(outcome.buffers) == (statistics if training else set())
        for m in range(3):
            own = {name: tensor[m] for name, tensor in stacked.items()}
            model.train(training)
            loss, gradients, buffers = by_autograd(model, own, pixels[m], targets[m])
            close(outcome.losses[m], loss)
            for name, gradient in gradients.items():
                close(outcome.gradients[name][m], gradient)
            for name, buffer in outcome.buffers.items():
                close(buffer[m], buffers[name])


def test_leaves_what_it_is_given_as_it_was():
    stacked = stacked_states(ConvNet)
    before = {name: tensor.clone() for name, tensor in stacked.items()}
    kernel = kernel_of(ConvNet().double())
    for seed in range(2):
        pixels, targets = a_batch(seed=seed)
        copies = pixels.clone(), targets.clone()
        kernel(stacked, {}, pixels, targets)
        assert torch.equal(pixels, copies[0])
        assert torch.equal(targets, copies[1])
    assert all(torch.equal(stacked[name], before[name]) for name in stacked)


def test_results_of_a_call_outlast_the_next():
    kernel = kernel_of(ConvNet().double())
    stacked = stacked_states(ConvNet)
    kernel(stacked, {}, *a_batch(seed=0))
    first = kernel(stacked, {}, *a_batch(seed=1))
    kept = {name: g.clone() for name, g in first.gradients.items()}
    kernel(stacked, {}, *a_batch(seed=2))
    assert all(torch.equal(first.gradients[name], kept[name]) for name in kept)


def test_shared_tensors_are_those_of_every_model():
    stacked = stacked_states(ConvNet)
    for name in ("body.weight", "norm.bias"):
        stacked[name] = stacked[name][:1].expand_as(stacked[name]).contiguous()
    trained = ["deeper.weight", "head.weight", "head.bias"]
    model = ConvNet().double()
    pixels, targets = a_batch()
    apart = kernel_of(model, trained)(stacked, {}, pixels, targets)
    shared = {name: stacked[name][0] for name in ("body.weight", "norm.bias")}
    rest = {name: tensor for name, tensor in stacked.items() if name not in shared}
    together = kernel_of(model, trained)(rest, shared, pixels, targets)
    close(together.losses, apart.losses)
    for name in trained:
        close(together.gradients[name], apart.gradients[name])
    for name, buffer in apart.buffers.items():
        close(together.buffers[name], buffer)


def test_modes_are_those_at_its_making():
    model = ConvNet(dropout=0.5).double()
    model.norm.eval()
    kernel = kernel_of(model)
    model.eval()
    stacked, (pixels, targets) = stacked_states(ConvNet), a_batch()
    draws = kernel.draws(pixels, targets, stacked, {})
    assert [draw.kind for draw in draws] == ["keep"]
    assert draws[0].probability == 0.5
    drawn = fill(draws, [1, 2, 3], ["fit/0"] * 3, [0] * 3, "cpu")
    outcome = kernel(stacked, {}, pixels, targets, drawn)
    assert {name.partition(".")[0] for name in outcome.buffers} == {"norm2"}
    others = fill(draws, [1, 2, 3], ["fit/0"] * 3, [1] * 3, "cpu")
    assert not torch.equal(kernel(stacked, {}, pixels, targets, others).losses, outcome.losses)


def test_dropout_by_the_masks_that_it_is_given():
    model = Mlp(dropout=0.25).double()
    kernel = kernel_of(model)
    stacked, (pixels, targets) = stacked_states(Mlp), a_batch()
    (draw,) = kernel.draws(pixels, targets, stacked, {})
    assert (draw.shape, draw.probability) == ((ROWS, 24), 0.75)
    (mask,) = drawn = fill([draw], [1, 2, 3], ["fit/0"] * 3, [4] * 3, "cpu")
    outcome = kernel(stacked, {}, pixels, targets, drawn)
    for m in range(3):
        body = F.linear(pixels[m].flatten(1), stacked["body.weight"][m], stacked["body.bias"][m])
        kept = F.gelu(body) * mask[m] / 0.75
        logits = F.linear(kept, stacked["head.weight"][m], stacked["head.bias"][m])
        close(outcome.losses[m], F.cross_entropy(logits, targets[m]))


def test_probe_finds_what_the_loss_depends_on():
    class Unused(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)

    model = Unused().double()
    stacked = {name: t.detach()[None] for name, t in model.named_parameters()}
    pixels, targets = a_batch(1)
    found, size = kernel_of(model).probe(pixels, targets, stacked)
    assert found == ("body.weight", "body.bias", "head.weight", "head.bias")
    gradients = sum(stacked[name].nbytes for name in found)
    assert gradients < size.step_bytes < 20 * gradients
    _, larger = kernel_of(model).probe(*a_batch(1, rows=600), stacked)
    assert larger.step_bytes > 3 * size.step_bytes
    assert larger.width < size.width


def test_what_cannot_be_recorded_is_computed_each_time(caplog):
    class Overwrites(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    stacked, model = stacked_states(Mlp), Overwrites().double()
    kernel = kernel_of(model)
    with caplog.at_level(logging.WARNING, "fleet.training.step"):
        for seed in range(3):
            pixels, targets = a_batch(seed=seed)
            outcome = kernel(stacked, {}, pixels.clone(), targets)
            for m in range(3):
                own = {name: tensor[m] for name, tensor in stacked.items()}
                loss, gradients, _ = by_autograd(model, own, pixels[m].clone(), targets[m])
                close(outcome.losses[m], loss)
                close(outcome.gradients["body.weight"][m], gradients["body.weight"])
    assert [r.message for r in caplog.records] == [
        "Overwrites is not captured: it writes into its arguments (aten.mul_.Tensor)"
    ]


def test_a_tied_weight_has_one_gradient():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(36, 36)
            self.again = nn.Linear(36, 36)
            self.again.weight = self.body.weight
            self.head = nn.Linear(36, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.again(torch.tanh(self.body(x.flatten(1))))))

    stacked = stacked_states(Tied)
    model = Tied().double()
    assert "again.weight" not in stacked
    pixels, targets = a_batch()
    outcome = kernel_of(model)(stacked, {}, pixels, targets)
    for m in range(3):
        own = {name: tensor[m] for name, tensor in stacked.items()}
        _, gradients, _ = by_autograd(model, own, pixels[m], targets[m])
        for name, gradient in gradients.items():
            close(outcome.gradients[name][m], gradient)


def test_says_what_is_wrong_with_logits():
    targets = torch.rand(ROWS, CLASSES)
    with pytest.raises(FleetError, match=r"Mlp returns \[6, 4\] for 6 images of 3 classes.*head"):
        check_logits(Mlp(), torch.rand(ROWS, 4), targets)
    with pytest.raises(FleetError, match="Mlp returns a dict, wanted logits"):
        check_logits(Mlp(), {"logits": targets}, targets)
    pixels, targets = a_batch()
    with pytest.raises(FleetError, match=r"returns \[6, 5\]"):
        kernel_of(Mlp(classes=5).double())(
            stacked_states(lambda: Mlp(classes=5)), {}, pixels, targets
        )


def test_parts_name_the_buffers_of_modules_in_train_mode():
    model = ConvNet()
    assert parts_of(model, ["head.weight"]).trained == ("head.weight",)
    assert len(parts_of(model, []).written) == 4
    assert parts_of(model, []).counted == ("norm.num_batches_tracked", "norm2.num_batches_tracked")
    model.norm.eval()
    assert parts_of(model, []).counted == ("norm2.num_batches_tracked",)
    assert all(name.startswith("norm2.") for name in parts_of(model, []).written)
    assert parts_of(model.eval(), []).written == ()
