"""A tokenizer that *fit* alone decides, and its rows as a set of images."""

from __future__ import annotations

import pytest
import torch

from inputs.errors import InputError
from inputs.text.corpus import Sentence
from inputs.text.tokens import PADDING, SPECIAL, learning_data, token_set, train_tokenizer

CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
WORDS = ["the", "parser", "reads", "files", "of", "any", "size", "and", "returns", "what", "lies"]
MODULES = ("os", "json", "re")


@pytest.fixture(scope="module")
def sentences():
    order = torch.Generator().manual_seed(0)
    made = []
    for place in range(90):
        words = [WORDS[k] for k in torch.randperm(len(WORDS), generator=order)[:6].tolist()]
        split = ("fit", "tune", "select", "report")[place % 4]
        made.append(Sentence(" ".join(words), MODULES[place % 3], "any", split))
    return made


@pytest.fixture(scope="module")
def tokenizer(sentences):
    return train_tokenizer(sentences, 120)


def test_the_same_sentences_give_the_same_tokenizer(sentences, tokenizer):
    for _ in range(5):
        assert train_tokenizer(sentences, 120).get_vocab() == tokenizer.get_vocab()


def test_fit_alone_decides(sentences, tokenizer):
    fit = [sentence for sentence in sentences if sentence.split == "fit"]
    others = [Sentence("quite other words", "os", "any", "report")] * 50
    assert train_tokenizer(fit + others, 120).get_vocab() == tokenizer.get_vocab()


def test_special_tokens_are_first_and_letters_are_plain(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() <= 120
    found = tokenizer.encode("The PARSER qqq")
    assert found.tokens == ["[CLS]", "the", "parser", "[UNK]", "[SEP]"]
    assert tokenizer.encode("filesize").tokens != tokenizer.encode("file size").tokens


def test_a_vocabulary_without_room_for_the_letters(sentences):
    with pytest.raises(InputError, match="vocabulary: found 20, wanted at least"):
        train_tokenizer(sentences, 20)


def test_rows_are_cut_and_padded(sentences, tokenizer):
    short = token_set(sentences, tokenizer, MODULES, "report", tokens=5)
    long = token_set(sentences, tokenizer, MODULES, "report", tokens=40)
    assert (short.tokens[:, 0] == CLS).all()
    assert (short.tokens[:, -1] == SEP).all()
    assert torch.equal(short.tokens[:, :4], long.tokens[:, :4])
    assert (long.tokens[:, -1] == PADDING).all()
    rows = long.sentences()
    assert all(int(row[-1]) == SEP and PADDING not in row for row in rows)


def test_a_set_of_images(sentences, tokenizer):
    rows = token_set(sentences, tokenizer, ("re", "os"), "fit", tokens=16)
    own = [s for s in sentences if s.split == "fit" and s.module in ("re", "os")]
    assert rows.labels.tolist() == [("re", "os").index(s.module) for s in own]
    pixels, _ = next(rows.batches(4))
    assert pixels.shape == (4, 1, 1, 16)
    assert torch.equal(pixels[:, 0, 0].long(), rows.tokens[:4])
    part = rows.subset(torch.tensor([3, 1]))
    assert torch.equal(part.pixels(torch.tensor([0])), rows.pixels(torch.tensor([3])))
    assert part.labels.tolist() == [rows.labels[3], rows.labels[1]]
    assert part.digest() != rows.digest()


def test_floats_hold_every_token(tokenizer, sentences):
    rows = token_set(sentences, tokenizer, MODULES, "fit")
    numbers = torch.arange(100_000).view(-1, 1, 1, 1)
    assert torch.equal(rows.normalise(numbers).long(), numbers)


def test_learning_data_has_no_report(sentences, tokenizer):
    data = learning_data(sentences, tokenizer, MODULES)
    assert [rows.name for rows in (data.fit, data.tune, data.select)] == ["fit", "tune", "select"]
    assert data.classes == MODULES
    assert "report" not in vars(data)


def test_a_class_without_sentences(sentences, tokenizer):
    with pytest.raises(InputError, match="tune: no sentence is from csv; leave them out"):
        token_set(sentences, tokenizer, ("os", "csv"), "tune")
