"""Variants that the model does not take are refused by name, and the others answered."""

from __future__ import annotations

import pytest
import torch

from fleet.errors import FleetError
from fleet.tenants import Tenants
from fleet.variants import Store, Variant
from tests.fleet.serving import zoo

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
WIDTH = SIZES["hidden_size"]


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store", zoo.tensors_of(zoo.text_model(**SIZES)))
    store.add(Variant("good", "base", {}), {})
    return store


def add_bottleneck(store, module, activation="relu", width=WIDTH):
    made = {"down": torch.ones(2, width), "down_bias": torch.ones(2)}
    made |= {"up": torch.ones(width, 2), "up_bias": torch.ones(width)}
    record, own = zoo.parts("bottleneck", made, {"activation": activation})
    store.add(Variant("bad", "base", {}, adapters={module: record}), own)


def refused(store, message):
    text = {"input_ids": torch.tensor([1, 2, 3])}
    with Tenants(store, zoo.text_model(**SIZES), memory_budget=None) as tenants:
        with pytest.raises(FleetError, match=message):
            tenants.predict([("good", text), ("bad", text)])
        assert len(tenants.predict([("good", text)])) == 1


def test_an_adapter_after_a_module_that_the_model_has_not(store):
    add_bottleneck(store, "bert.encoder.layer.7.output")
    refused(store, r"'bad'.*which the model has not; the nearest is 'bert.encoder.layer.0.output'")


def test_an_adapter_with_another_activation(store):
    add_bottleneck(store, "bert.encoder.layer.0.output", activation="swish")
    refused(store, r"'bad'.*activation 'swish', wanted relu or gelu")


def test_a_tensor_that_the_model_has_not(store):
    record, own = zoo.encoded("plain", torch.ones(3), None)
    store.add(Variant("bad", "base", {"classifier.biases": record}), own)
    refused(store, r"'bad'.*'classifier.biases', which the model has not; the nearest is 'class")


def test_an_adapter_for_another_width(store):
    add_bottleneck(store, "bert.encoder.layer.0.output", width=WIDTH + 1)
    refused(store, "tenant 'bad': the model does not run with its weights")
