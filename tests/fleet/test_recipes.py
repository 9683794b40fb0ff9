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
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"sam_rho": 0.0},
        {"schedule": "step"},
        {"ema_decay": 1.0},
        {"swa_start": -0.5},
        {"patience": 0},
        {"drop_last": "perhaps"},
        {"frozen": [""]},
        {"frozen": "head.*"},
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


def test_weights_are_averaged_in_one_way():
    with pytest.raises(ValidationError, match=r"ema_decay is 0\.9 and swa_start 0\.5"):
        Recipe(ema_decay=0.9, swa_start=0.5)
    assert Recipe(ema_decay=0.0).swa_start is None


def test_what_older_configs_said_means_the_same():
    new = ("beta1", "beta2", "eps", "sam_rho", "drop_last", "frozen", "ema_decay", "swa_start")
    torch_defaults = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    off = {"sam_rho": None, "drop_last": True, "frozen": (), "ema_decay": None, "swa_start": None}
    recipe = Recipe()
    assert {name: getattr(recipe, name) for name in new} == torch_defaults | off
    assert recipe.patience is None


def test_comes_back_from_json():
    recipe = Recipe(optimizer="adam", frozen=("stem.*", "*.bias"), sam_rho=0.05, swa_start=0.75)
    dumped = recipe.model_dump(mode="json")
    assert Recipe.model_validate(dumped) == recipe
    scalars = (str, int, float, type(None))
    assert all(isinstance(v, scalars) for name, v in dumped.items() if name != "frozen")
    assert dumped["frozen"] == ["stem.*", "*.bias"]
    hash(recipe)
