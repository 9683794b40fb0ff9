"""Tenants of BERT-mini on the docstrings of the standard library: a base, trained on all modules;
for each domain some, trained jointly, that tell a few of its modules apart; all in a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from adapted import adapted_variant
from tokenizers import Tokenizer
from torch import Tensor, nn

from fleet.alike import named_tensors
from fleet.recipes import Recipe
from fleet.train import JointTrainer, TrainResult
from fleet.variants import Node, Store
from inputs.randomness import generator
from inputs.text.corpus import DOMAINS, Sentence, read_corpus
from inputs.text.encoder import TextClassifier, add_adapters, bert_mini
from inputs.text.tokens import learning_data, token_set, train_tokenizer

CLASSES = 3
RANK = 8
SCALE = 2.0
ADAPTED = (2, 3)


@dataclass(frozen=True)
class TextTenants:
    """A store of trained tenants, and what they were trained on.

    `classes` are the modules that each tells apart, by its name; a tenant's node is its domain.
    """

    store: Store
    sentences: Sequence[Sentence]
    tokenizer: Tokenizer
    classes: dict[str, tuple[str, ...]]

    def model(self) -> TextClassifier:
        """The base's architecture."""
        return _model(self.tokenizer, len(_modules(self.sentences)))

    def asked(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The tokens of a tenant's *report* sentences, without padding, and their labels."""
        rows = token_set(self.sentences, self.tokenizer, self.classes[name], "report")
        return rows.sentences(), rows.labels

    def typical(self, domain: str | None = None) -> list[Tensor]:
        """The tokens of *fit*, of a domain's modules or of all."""
        modules = sorted({s.module for s in self.sentences if domain in (None, s.domain)})
        return token_set(self.sentences, self.tokenizer, modules, "fit").sentences()


def make_text_tenants(
    folder: Path, *, per_domain: int = 2, base_epochs: int = 3, epochs: int = 6, seed: int = 0
) -> TextTenants:
    """Train the base, then all tenants at once."""
    sentences = read_corpus()
    tokenizer = train_tokenizer(sentences)
    modules = _modules(sentences)
    kept: dict[int, dict[str, Tensor]] = {}

    def keep(model: nn.Module, result: TrainResult, final: bool) -> None:
        kept[result.index] = {name: t.clone() for name, t in named_tensors(model).items()}

    recipe = Recipe(lr=1e-3, epochs=base_epochs, batch_size=64, weight_decay=0.01, seed=seed)
    data = learning_data(sentences, tokenizer, modules)
    JointTrainer([lambda: _model(tokenizer, len(modules))], [recipe], data, keep).run()
    base = kept.pop(0)
    classes = {
        f"{domain}{number}": _some_of(sentences, domain, f"{seed}/{number}")
        for domain in DOMAINS
        for number in range(per_domain)
    }

    def make() -> nn.Module:
        model = _model(tokenizer, CLASSES)
        model.load_state_dict(
            {k: t for k, t in base.items() if "classifier" not in k}, strict=False
        )
        return add_adapters(model, RANK, ADAPTED, scale=SCALE)

    recipe = Recipe(lr=2e-3, epochs=epochs, batch_size=32, weight_decay=0.01, seed=seed)
    sets = [learning_data(sentences, tokenizer, own) for own in classes.values()]
    JointTrainer([make] * len(classes), [recipe] * len(classes), sets, keep).run()
    store = Store.create(folder, base)
    for domain in DOMAINS:
        store.add_node(Node(domain, "base", {}), {})
    for place, name in enumerate(classes):
        _add(store, name, name.rstrip("0123456789"), kept[place])
    return TextTenants(store, sentences, tokenizer, classes)


def _add(store: Store, name: str, node: str, state: dict[str, Tensor]) -> None:
    """A trained tenant: its adapters, and its head."""
    adapted = [key.removesuffix(".down") for key in state if key.endswith(".down")]
    factors = {
        module: {part: state[f"{module}.{part}"] for part in ("down", "up")} for module in adapted
    }
    head = {key: state[key] for key in ("classifier.weight", "classifier.bias")}
    store.add(*adapted_variant(name, node, factors, head, CLASSES, SCALE))


def _model(tokenizer: Tokenizer, classes: int) -> TextClassifier:
    return bert_mini(num_classes=classes, vocabulary=tokenizer.get_vocab_size())


def _modules(sentences: Sequence[Sentence]) -> list[str]:
    return sorted({sentence.module for sentence in sentences})


def _some_of(sentences: Sequence[Sentence], domain: str, name: str) -> tuple[str, ...]:
    own = sorted({s.module for s in sentences if s.domain == domain})
    order = torch.randperm(len(own), generator=generator(0, f"{domain}/{name}"))
    return tuple(sorted(own[place] for place in order[:CLASSES].tolist()))
