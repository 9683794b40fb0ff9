"""Text tenants are trained jointly like models of images: adapters and heads of their own."""

from __future__ import annotations

import pytest
import torch

from fleet.alike import named_tensors
from fleet.recipes import Recipe
from fleet.train import JointTrainer, evaluate
from inputs.text.corpus import read_corpus
from inputs.text.encoder import add_adapters, bert_mini
from inputs.text.tokens import learning_data, token_set, train_tokenizer

SMALL = {"tokens": 24, "layers": 2, "width": 64, "heads": 2}
TASKS = (("email", "tkinter"), ("asyncio", "xml"), ("logging", "tkinter"))


@pytest.mark.slow
def test_adapters_learn_which_module_a_sentence_is_from():
    domains = {"any": sorted({module for task in TASKS for module in task})}
    sentences = read_corpus(domains=domains)
    tokenizer = train_tokenizer(sentences, 1500)
    sizes = {**SMALL, "vocabulary": tokenizer.get_vocab_size()}
    every = learning_data(sentences, tokenizer, domains["any"], tokens=24)
    weights = {}

    def keep(model, result, final):
        weights.update({n: t.clone() for n, t in named_tensors(model).items()})

    recipe = Recipe(lr=3e-3, epochs=4, batch_size=32, weight_decay=0.01)
    JointTrainer([lambda: bert_mini(num_classes=5, **sizes)], [recipe], every, keep).run()
    base = {name: t for name, t in weights.items() if "classifier" not in name}

    def make():
        model = bert_mini(num_classes=2, **sizes)
        model.load_state_dict(base, strict=False)
        return add_adapters(model, 4, [1])

    sets = [learning_data(sentences, tokenizer, task, tokens=24) for task in TASKS]
    recipes = [Recipe(lr=5e-3, epochs=2, batch_size=32, seed=seed) for seed in range(3)]
    accuracies = {}

    def check(model, result, final):
        rows = token_set(sentences, tokenizer, TASKS[result.index], "report", tokens=24)
        most = float(rows.labels.bincount().max() / len(rows))
        accuracies[result.index] = evaluate(model, rows)[0], most
        for name, tensor in named_tensors(model).items():
            assert name not in base or torch.equal(tensor, base[name]), name

    JointTrainer([make] * 3, recipes, sets, check).run()
    assert len(accuracies) == 3
    assert all(found > most + 0.1 for found, most in accuracies.values()), accuracies
