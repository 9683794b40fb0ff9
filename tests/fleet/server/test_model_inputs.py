from typing import Any

import pytest
import torch

from fleet.server.model_inputs import TokenInputs
from fleet.server.refusals import RefusedError
from tests.fleet.server.fakes import IMAGE, image_inputs

TEXT = TokenInputs(vocabulary=100, longest=4, types=2)


def refusal(inputs: Any, value: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        inputs.from_json([value])
    return caught.value


def test_numbers_are_the_models_input():
    first, second = image_inputs().from_json([IMAGE, [[[1, 2], [3, 4]]]])
    assert first.dtype == torch.float32
    assert torch.equal(first, torch.tensor(IMAGE))
    assert torch.equal(second, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "inputs[0]: is no list; wanted numbers [1, 2, 2]: channels, height, width"),
        ("abc", "inputs[0]: is no list"),
        ({"a": 1}, "inputs[0]: is no list"),
        ([], "found numbers [0]; wanted numbers [1, 2, 2]"),
        ([[0.0, 1.0], [2.0, 3.0]], "found numbers [2, 2]; wanted numbers [1, 2, 2]"),
        ([[[0.0, 1.0], [2.0]]], "lists of unequal lengths"),
        ([[[0.0, 1.0], 2.0]], "lists of unequal lengths"),
        ([[["0", "1"], ["2", "3"]]], "holds what is no number"),
        ([[[0.0, None], [2.0, 3.0]]], "holds what is no number"),
        ([[[True, False], [True, False]]], "holds what is no number"),
        ([[[0, 10**40], [0, 0]]], "holds what is no number"),
        ([[[{}, 1], [2, 3]]], "holds what is no number"),
        ([[[0.0, float("nan")], [2.0, 3.0]]], "found NaN or infinite numbers"),
        ([[[0.0, float("-inf")], [2.0, 3.0]]], "found NaN or infinite numbers"),
        ([[[0.0, 1e39], [2.0, 3.0]]], "found NaN or infinite numbers"),
    ],
)
def test_numbers_that_are_refused(value: Any, message: str):
    error = refusal(image_inputs(), value)
    assert error.status == 422
    assert message in str(error)


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1.0]
    for _ in range(depth):
        value = [value]
    return value


def test_lists_nested_deeper_than_arrays_are():
    assert refusal(image_inputs(), nested(150)).status == 422


def test_token_ids():
    (text,) = TEXT.from_json([{"input_ids": [1, 99, 0], "attention_mask": [1, 1, 0]}])
    assert {key: ids.tolist() for key, ids in text.items()} == {
        "input_ids": [1, 99, 0],
        "attention_mask": [1, 1, 0],
    }
    assert {ids.dtype for ids in text.values()} == {torch.int64}
    (text,) = TEXT.from_json([{"input_ids": [1], "token_type_ids": [1]}])
    assert text["token_type_ids"].tolist() == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "no object with 'input_ids'; wanted {'input_ids': [tokens]"),
        ({}, "no object with 'input_ids'"),
        ({"input_ids": [1], "labels": [1]}, "unknown key 'labels'"),
        ({"input_ids": []}, "found numbers [0]; wanted 1 to 4 integers from 0 to 99"),
        ({"input_ids": [1] * 5}, "found integers [5]; wanted 1 to 4 integers"),
        ({"input_ids": [[1]]}, "found integers [1, 1]; wanted 1 to 4"),
        ({"input_ids": [1.0]}, "found numbers [1]; wanted 1 to 4 integers"),
        ({"input_ids": ["1"]}, "holds what is no number"),
        ({"input_ids": [True]}, "holds what is no number"),
        ({"input_ids": 1}, "input_ids: is no list"),
        ({"input_ids": [100]}, "found 100 to 100; wanted 1 to 4 integers from 0 to 99"),
        ({"input_ids": [1, -1]}, "found -1 to 1; wanted"),
        ({"input_ids": [2**64]}, "no number"),
        ({"input_ids": [2**63]}, "found 9223372036854775808"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "lists of lengths"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "hides every token"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "found 1 to 2; wanted"),
        ({"input_ids": [1], "token_type_ids": [2]}, "found 2 to 2; wanted"),
    ],
)
def test_token_ids_that_are_refused(value: Any, message: str):
    error = refusal(TEXT, value)
    assert error.status == 422
    assert message in str(error)


def test_a_model_of_texts_takes_no_images():
    with pytest.raises(RefusedError, match="takes token ids as JSON, no images") as caught:
        TEXT.from_files([b""])
    assert caught.value.status == 415


def test_types_only_where_the_model_has_them():
    without = TokenInputs(vocabulary=10, longest=4)
    value = {"input_ids": [1], "token_type_ids": [0]}
    assert "unknown key 'token_type_ids'" in str(refusal(without, value))
