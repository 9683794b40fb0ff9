"""What a group refuses, and what it says."""

import pytest
import torch
from torch import nn

from fleet import Group, refuse_training
from fleet.errors import FleetError


def net(width: int = 4, *, stride: int = 1, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=stride),
        nn.BatchNorm2d(width),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


def nets(*settings) -> list[nn.Module]:
    models = [net(**one) for one in settings]
    for model in models:
        model(torch.zeros(2, 1, 6, 6))
        model.eval()
    return models


def stacked(model: nn.Module, count: int = 2) -> dict[str, torch.Tensor]:
    return {name: torch.stack([t] * count) for name, t in model.state_dict().items()}


def fails(match: str, make, *args, **kwargs) -> None:
    with pytest.raises(FleetError, match=match):
        make(*args, **kwargs)


def test_models_of_other_architectures():
    fails(
        r"'0\.weight' is \[4, 1, 3, 3\].* in model 0 and \[5, 1, 3, 3\].* in model 2",
        Group.of,
        nets({}, {}, {"width": 5}),
    )
    fails(
        "'0' is Conv2d.*in model 0 and Conv2d.*stride=\\(2, 2\\).*in model 1",
        Group.of,
        nets({}, {"stride": 2}),
    )
    extra = nets({})[0]
    extra.append(nn.ReLU())
    fails("'5' is nothing in model 0 and ReLU", Group.of, [nets({})[0], extra])
    fails("'5' is ReLU.* in model 0 and nothing", Group.of, [extra, nets({})[0]])


def test_models_of_other_dtypes_and_modes():
    first, second = nets({}, {})
    fails(
        r"'0\.weight' is .*float32 on cpu.* and .*float64 on cpu",
        Group.of,
        [first, second.double()],
    )
    first, second = nets({}, {})
    fails("in train mode in model 1", Group.of, [first, second.train()])
    fails("no models", Group.of, [])


def test_models_that_differ_in_dropout_alone_are_alike_when_evaluated():
    assert Group.of(nets({}, {"dropout": 0.5})).models == 2


def test_names():
    (model,) = nets({})
    fails(
        "'1.wieght' is not a parameter.*did you mean '1.weight'",
        Group,
        model,
        {"1.wieght": torch.zeros(2, 4)},
    )
    fails("no tensor is stacked", Group, model, {})
    tensors = stacked(model)
    fails(
        "'0.bias' is both stacked and shared",
        Group,
        model,
        tensors,
        shared={"0.bias": torch.zeros(4)},
    )


def test_shapes_dtypes_and_numbers_of_models():
    (model,) = nets({})
    tensors = stacked(model)
    fails(
        r"'1\.bias' is \[3, 4\], wanted \[2, 4\]",
        Group,
        model,
        tensors | {"1.bias": torch.zeros(3, 4)},
    )
    fails(
        r"'1\.bias' is \[2, 5\], wanted \[2, 4\]",
        Group,
        model,
        tensors | {"1.bias": torch.zeros(2, 5)},
    )
    fails(r"wanted a leading axis of models", Group, model, {"1.bias": torch.zeros(())})
    fails(r"wanted a leading axis of models", Group, model, {"1.bias": torch.zeros(0, 4)})
    fails(
        r"'1\.bias' is torch.float64, the model's own is torch.float32",
        Group,
        model,
        tensors | {"1.bias": torch.zeros(2, 4).double()},
    )
    fails(
        r"'1\.weight' is \[5\], wanted \[4\]",
        Group,
        model,
        {"0.bias": torch.zeros(2, 4)},
        shared={"1.weight": torch.zeros(5)},
    )
    fails(
        r"'0\.bias' is on meta, '1\.bias' is on cpu",
        Group,
        model,
        {"1.bias": torch.zeros(2, 4), "0.bias": torch.zeros(2, 4, device="meta")},
    )


def test_tied_tensors_that_differ():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    fails(
        "'1.weight' and '0.weight' are one tensor",
        Group,
        model,
        {"0.weight": torch.zeros(2, 3, 3), "1.weight": torch.ones(2, 3, 3)},
    )


def test_inputs_without_a_model_axis():
    (model,) = nets({})
    group = Group(model, stacked(model))
    fails(
        r"an input is \[3, 1, 6, 6\], wanted a leading axis of 2 models",
        group,
        torch.zeros(3, 1, 6, 6),
        each=True,
    )


def test_training_with_dropout():
    (model,) = nets({"dropout": 0.5})
    group = Group(model.train(), stacked(model))
    fails("'2' \\(Dropout\\) in train mode: each model would draw", group, torch.zeros(2, 1, 6, 6))


def test_training_with_shared_running_statistics():
    (model,) = nets({})
    names = {name: t for name, t in stacked(model).items() if "running" not in name}
    group = Group(model.train(), names)
    fails("'1' in train mode.*stack '1.running_mean'", group, torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_in_forward(training):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(2)

    model = Noisy(3, 2).train(training)
    group = Group(model, {"weight": torch.zeros(4, 2, 3)})
    fails("draws random numbers", group, torch.zeros(1, 3))


def test_outputs_in_which_tensors_cannot_be_found():
    class Boxed(nn.Linear):
        def forward(self, x):
            return type("Box", (), {"y": super().forward(x)})()

    group = Group(Boxed(3, 2), {"weight": torch.zeros(4, 2, 3)})
    fails("returns a Box, in which tensors cannot be found", group, torch.zeros(1, 3))


def test_refuse_training():
    (model,) = nets({"dropout": 0.5})
    refuse_training(model)
    fails("'1' \\(BatchNorm2d\\), '2' \\(Dropout\\) in train mode", refuse_training, model.train())
    refuse_training(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(0.0)).train())
    attention = nn.MultiheadAttention(4, 2, dropout=0.1)
    fails("MultiheadAttention", refuse_training, attention)
    fails("and 2 more", refuse_training, nn.Sequential(*(nn.Dropout() for _ in range(5))))
