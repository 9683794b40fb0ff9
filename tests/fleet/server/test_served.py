from pathlib import Path
from typing import Any

import pytest

from fleet.errors import FleetError
from fleet.server.limits import Limits
from fleet.server.model_inputs import ImageInputs, TokenInputs
from fleet.server.served import ServedModel, build_served
from inputs.config import TimmModel, load_config
from inputs.errors import InputError

RESNET = {
    "source": "timm",
    "name": "resnet10t",
    "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8, "stem_type": ""},
}
DIGITS = {"size": 8, "channels": 1, "mean": [0.3], "std": [0.38], "classes": 10}


def about(**changes: Any) -> dict[str, Any]:
    return {"model": RESNET, "data": DIGITS, **changes}


def build(served: ServedModel, root: Path = Path()) -> Any:
    return build_served(served, root, Limits())


def test_what_a_store_says_is_enough():
    model, inputs = build(ServedModel.from_about(about(), "store", None))
    assert isinstance(inputs, ImageInputs)
    (image,) = inputs.from_json([[[[0.5] * 8] * 8]])
    assert model(image[None]).shape == (1, 10)
    assert not model.training


def test_names_of_classes_are_counted_and_other_keys_left():
    data = {**DIGITS, "classes": ["no", "yes"], "path": "digits"}
    served = ServedModel.from_about(about(data=data), "store", None)
    assert served.data.classes == 2


def test_another_model_of_timm():
    served = ServedModel.from_about({"data": DIGITS}, "store", "resnet18")
    assert served.model == TimmModel(source="timm", name="resnet18")
    with pytest.raises(InputError, match="no model 'resnet-18'"):
        build(ServedModel.from_about({"data": DIGITS}, "store", "resnet-18"))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "store: its base record does not say model and data; say it with --model"),
        ({"model": RESNET}, "store: its base record does not say data"),
        (about(model={"source": "tim"}), "base record: model.source: found 'tim'"),
        (about(model=[1]), "store: base record: model"),
        (about(data=7), "store: base record: data"),
        (about(data={**DIGITS, "channels": 2}), "base record: data.channels: found 2"),
        (about(data={**DIGITS, "mean": [1, 2, 3]}), "`mean` has 3 numbers; wanted 1"),
        (about(data={**DIGITS, "classes": 0}), "base record: data.classes"),
        (
            about(model={"source": "factory", "factory": "evil.py:run"}),
            "its base is made by code, 'evil.py:run', which is not run because a store names it",
        ),
    ],
)
def test_records_that_do_not_say_it(found: dict[str, Any], message: str):
    with pytest.raises(FleetError) as caught:
        ServedModel.from_about(found, "store", None)
    assert message in str(caught.value)
    assert "say it with --model CONFIG.yaml" in str(caught.value)


def test_the_size_that_a_model_was_published_with():
    data = {key: value for key, value in DIGITS.items() if key != "size"}
    model = {"source": "timm", "name": "resnet10t"}
    _, inputs = build(ServedModel.from_about(about(model=model, data=data), "store", None))
    assert isinstance(inputs, ImageInputs)
    assert inputs.preprocessing.size == 176


def factory(tmp_path: Path, text: str, function: str) -> ServedModel:
    (tmp_path / "models.py").write_text(text)
    (tmp_path / "model.yaml").write_text(
        f"model: {{source: factory, factory: 'models.py:{function}'}}\ndata: {{classes: 2}}\n"
    )
    return load_config(tmp_path / "model.yaml", [], ServedModel)


def test_a_users_own_model_of_texts(tmp_path: Path):
    text = (
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "def bert(num_classes):\n"
        "    return BertForSequenceClassification(BertConfig(\n"
        "        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,\n"
        "        intermediate_size=8, max_position_embeddings=16, num_labels=num_classes))\n"
    )
    model, inputs = build(factory(tmp_path, text, "bert"), tmp_path)
    assert inputs == TokenInputs(vocabulary=50, longest=16, types=2)
    (one,) = inputs.from_json([{"input_ids": [1, 2, 49]}])
    assert model(input_ids=one["input_ids"][None]).logits.shape == (1, 2)


def test_models_that_do_not_say_what_they_take(tmp_path: Path):
    text = (
        "from torch import nn\n"
        "class Text(nn.Module):\n"
        "    def forward(self, input_ids): ...\n"
        "class Picture(nn.Module):\n"
        "    def forward(self, x): ...\n"
        "def text(num_classes): return Text()\n"
        "def picture(num_classes): return Picture()\n"
    )
    with pytest.raises(FleetError, match="the base, Text, takes token ids but does not say which"):
        build(factory(tmp_path, text, "text"), tmp_path)
    with pytest.raises(FleetError, match=r"their size is not known \(data.size\)"):
        build(factory(tmp_path, text, "picture"), tmp_path)
