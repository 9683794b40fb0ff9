"""Only the first token, where nothing looks at the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fleet.serving.bound import BoundModel
from fleet.serving.inputs import InputReader, Together
from tests.fleet.serving import zoo

CPU = torch.device("cpu")


class Reads(nn.Module):
    """A layer for every token, attention, another layer, and what is read from it."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + (x @ x.mT).softmax(-1) @ x
        return self.head(self.read(x + self.last(x)))


def learned(model: nn.Module, *given: Tensor | dict[str, Tensor]) -> tuple[BoundModel, Together]:
    bound = BoundModel(model, zoo.tensors_of(model), CPU, None)
    reader = InputReader(model, bound.dtype, CPU)
    inputs = reader.together([reader.read(k, "t", one) for k, one in enumerate(given)])
    with torch.inference_mode():
        bound.learn_tail(inputs)
    return bound, inputs


def tail(bound: BoundModel, inputs: Together) -> tuple[str, ...]:
    return bound._tails[inputs.form]


READ: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "the first token": (lambda x: x[:, 0], ("last",)),
    "the first token, then all that there are": (lambda x: x[:, :1].mean(1), ("last",)),
    "every token": (lambda x: x, ()),
    "their mean": (lambda x: x.mean(1), ()),
    "the last token": (lambda x: x[:, -1], ()),
    "the first, and as many as there are": (lambda x: x[:, 0] * x.shape[1], ("last",)),
    "the first, and a little of the others": (lambda x: x[:, 0] + 1e-9 * x.mean(1), ()),
}


@pytest.mark.parametrize("read", READ)
def test_what_the_answer_is_read_from(read):
    bound, inputs = learned(Reads(READ[read][0]).double(), *zoo.numbers(3, 4, 6, seed=0))
    assert tail(bound, inputs) == READ[read][1]


def test_the_first_token_of_encoders():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = zoo.text_model(torch.float64, **sizes)
    tokens = [{"input_ids": torch.arange(1, 1 + count)} for count in (1, 1)]
    bound, inputs = learned(text, *tokens)
    assert tail(bound, inputs)[:2] == (
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.output",
    )
    image = zoo.image_model("vit", torch.float64)
    bound, inputs = learned(image, *zoo.numbers(2, 3, 32, 32, seed=0))
    assert tail(bound, inputs)[0] == "blocks.1.attn.proj"
    assert "blocks.1.mlp" in tail(bound, inputs)
    bound, inputs = learned(zoo.image_model("resnet"), *zoo.numbers(2, 3, 32, 32, seed=0))
    assert tail(bound, inputs) == ()


def test_answers_stay_the_same_and_the_others_are_not_computed():
    model = zoo.text_model(torch.float64, hidden_size=32, num_hidden_layers=2)
    given = {"input_ids": torch.randint(1, 500, (9, 7))}
    with torch.no_grad():
        wanted = model(**given).logits
    rows = [{"input_ids": ids} for ids in given["input_ids"]]
    bound, inputs = learned(model, *rows)
    lengths: list[int] = []
    dense = bound.modules["bert.encoder.layer.1.intermediate.dense"]
    dense.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.inference_mode():
        torch.testing.assert_close(bound.forward(inputs), wanted, rtol=0, atol=1e-12)
    assert lengths == [1]
    masked = {"attention_mask": torch.ones(9, 7, dtype=torch.int64)}
    with torch.inference_mode():
        bound.forward(Together((), given | masked, 7))
    assert lengths == [1, 7]  # nobody tried what a mask changes
