"""The encoder sees no padding, takes images of tokens, and learns; adapters change little of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from inputs.config import FactoryModel
from inputs.errors import InputError
from inputs.models import build_model
from inputs.text.encoder import add_adapters, bert_mini
from inputs.text.tokens import PADDING

SMALL = {"vocabulary": 50, "tokens": 16, "layers": 2, "width": 32, "heads": 2}


def model(classes: int = 3):
    torch.manual_seed(0)
    return bert_mini(num_classes=classes, **SMALL).eval()


def rows(count: int = 6, tokens: int = 12):
    ids = torch.randint(4, 50, (count, tokens), generator=torch.Generator().manual_seed(1))
    ids[1::2, 7:] = PADDING
    return ids


def test_padding_is_not_seen():
    ids = rows()
    with torch.no_grad():
        every = model()(ids)
        torch.testing.assert_close(model()(ids[1::2, :7]), every[1::2], rtol=1e-5, atol=1e-6)
        mask = (ids != PADDING).long()
        assert torch.equal(model()(torch.where(mask.bool(), ids, 9), mask), every)


def test_images_of_tokens_are_tokens():
    ids = rows()
    with torch.no_grad():
        assert torch.equal(model()(ids[:, None, None].float()), model()(ids))


def test_the_factory_of_a_config():
    config = FactoryModel(
        source="factory", factory="inputs.text.encoder:bert_mini", kwargs={"vocabulary": 50}
    )
    made = build_model(config, classes=7, channels=1, root=Path())
    assert made.classifier.out_features == 7
    assert len(made.bert.encoder.layer) == 4
    assert made.bert.embeddings.word_embeddings.weight.shape == (50, 256)


def test_adapters_begin_as_nothing_and_freeze_the_rest():
    ids, plain = rows(), model()
    with torch.no_grad():
        wanted = plain(ids)
        adapted = add_adapters(model(), 2, [1])
        assert torch.equal(adapted(ids), wanted)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    where = "bert.encoder.layer.1.attention.self."
    assert trained == {
        *(f"{where}{linear}.{part}" for linear in ("query", "value") for part in ("down", "up")),
        "classifier.weight",
        "classifier.bias",
    }
    assert plain.state_dict().keys() <= adapted.state_dict().keys()


def test_a_trained_adapter_is_its_delta_added():
    ids, adapted, plain = rows(), add_adapters(model(), 2, [0, 1], scale=0.5), model()
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if name.endswith(("query", "value")):
                module.up.normal_(generator=torch.Generator().manual_seed(len(name)))
                plain.get_submodule(name).weight += 0.5 * module.up @ module.down
        torch.testing.assert_close(adapted(ids), plain(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "layers"), [(0, [1]), (2, [2]), (2, [-1])])
def test_adapters_that_cannot_be(rank, layers):
    with pytest.raises(InputError, match="wanted a rank of at least 1, and layers from 0 to 1"):
        add_adapters(model(), rank, layers)


def test_learns_which_of_two_tokens_a_row_has():
    torch.manual_seed(0)
    ids = torch.randint(6, 50, (128, 10))
    labels = torch.arange(128) % 2
    ids[torch.arange(128), torch.randint(0, 10, (128,))] = 4 + labels
    learner = model(2).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(learner(ids), labels).backward()
        optimizer.step()
    with torch.no_grad():
        assert (learner.eval()(ids).argmax(1) == labels).double().mean() > 0.95
