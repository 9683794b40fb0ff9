import pytest
from pydantic import ValidationError

from fleet.recipes import Recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"lr": float("inf")},
        {"weight_decay": -0.1},
        {"momentum": 1.0},
        {"warmup": 1.0},
        {"epochs": 0},
        {"batch_size": 0},
        {"label_smoothing": 1.0},
        {"clip_norm": 0.0},
        {"shift": -1},
        {"keep": "bset"},
        {"optimizer": "adamv"},
        {"learning_rate": 0.1},
    ],
)
def test_refuses_impossible_values(wrong: dict):
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate(wrong)
    assert [problem["loc"] for problem in error.value.errors()] == [tuple(wrong)]


def test_names_every_problem():
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"lr": -1, "epochs": 0, "noise": float("nan")})
    assert {problem["loc"] for problem in error.value.errors()} == {
        ("lr",),
        ("epochs",),
        ("noise",),
    }
