from __future__ import annotations

import pytest
import torch
from torch import nn

from fleet.errors import FleetError
from fleet.serving.inputs import InputReader
from tests.fleet.serving import zoo

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def text():
    return InputReader(zoo.text_model(**SMALL), torch.float32, CPU)


@pytest.fixture
def image():
    return InputReader(nn.Conv2d(3, 2, 3), torch.float64, CPU)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_tokens_are_padded_and_masked(text):
    given = [
        {"input_ids": ids(5, 6, 7)},
        {"input_ids": ids(8), "attention_mask": ids(1)},
        {"input_ids": ids(9, 4), "attention_mask": ids(1, 0)},
    ]
    asked = [text.read(place, "t", one) for place, one in enumerate(given)]
    assert len({one.kind for one in asked}) == 1
    found = text.together(asked)
    assert found.tokens == 3
    assert found.kwargs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert found.kwargs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_no_mask_where_all_are_of_one_length(text):
    asked = [text.read(k, "t", one) for k, one in enumerate([ids(5, 6), ids(7, 8)])]
    assert set(text.together(asked).kwargs) == {"input_ids"}


def test_other_arguments_go_apart(text):
    plain = text.read(0, "t", ids(5, 6))
    typed = text.read(1, "t", {"input_ids": ids(5, 6), "token_type_ids": ids(0, 1)})
    assert plain.kind != typed.kind
    assert text.together([typed]).kwargs["token_type_ids"].tolist() == [[0, 1]]


def test_images_are_cast_and_stacked_by_shape(image):
    asked = [image.read(k, "t", torch.ones(3, 4, 4 + k // 2)) for k in range(3)]
    assert asked[0].kind == asked[1].kind != asked[2].kind
    (found,) = image.together(asked[:2]).args
    assert found.shape == (2, 3, 4, 4)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hello", "found str; wanted a tensor"),
        ({}, "found dict; wanted a tensor"),
        ({"input_ids": [1, 2]}, "'input_ids' is list, wanted a tensor"),
        ({"input_ids": torch.tensor([1.0])}, "found torch.float32, wanted whole numbers"),
        ({"input_ids": ids(3, 512)}, "found 3 to 512, wanted 0 to 511"),
        ({"input_ids": ids(-1)}, "found -1 to -1"),
        ({"input_ids": torch.zeros(0, dtype=torch.int64)}, "at least 1"),
        ({"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, r"wanted \[tokens\]"),
        ({"input_ids": ids(1, 2), "attention_mask": ids(1)}, "of one length"),
        ({"input_ids": ids(1, 2), "attention_mask": ids(0, 0)}, "hides every token"),
        ({"input_ids": ids(1), "attention_mask": ids(2)}, "wanted 0 to 1"),
        ({"input_ids": ids(*[1] * 65)}, "has 65 tokens, the model takes 64"),
        ({"input_ids": ids(1), "pixels": ids(1)}, "the model takes no 'pixels'; wanted some of"),
        ({"attention_mask": ids(1)}, "wanted 'input_ids' too"),
        ({"input_ids": ids(1), "inputs_embeds": torch.tensor([float("nan")])}, "NaN"),
    ],
)
def test_texts_that_are_refused(text, given, message):
    with pytest.raises(FleetError, match=rf"request 7 \(tenant 'x'\).*{message}"):
        text.read(7, "x", given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((3, 4, 4), float("nan")), "48 of 48 numbers are NaN or infinite"),
        (torch.tensor([[[float("inf")]]]), "1 of 1 numbers are NaN or infinite"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "found torch.uint8, wanted torch.float64"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "found torch.complex64"),
        ({"pixels": torch.zeros(3)}, "the model takes no 'pixels'; wanted some of input"),
        (None, "found NoneType"),
    ],
)
def test_images_that_are_refused(image, given, message):
    with pytest.raises(FleetError, match=rf"request 0 \(tenant 'x'\).*{message}"):
        image.read(0, "x", given)
