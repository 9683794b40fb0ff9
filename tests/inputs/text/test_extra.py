"""Without the extra `text` the corpus is there, and what needs more says what to install."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from inputs.config import FactoryModel
from inputs.errors import InputError
from inputs.models import build_model

REMEDY = r"pip install 'model-soups-toolkit\[text\]'"


@pytest.fixture
def without(monkeypatch):
    """As if a package were not installed, and nothing of `inputs.text` imported yet."""

    def hidden(package):
        monkeypatch.setitem(sys.modules, package, None)
        for module in [name for name in sys.modules if name.startswith("inputs.text.")]:
            monkeypatch.delitem(sys.modules, module)

    return hidden


@pytest.mark.parametrize(
    ("package", "module"),
    [("tokenizers", "tokens"), ("tokenizers", "encoder"), ("transformers", "encoder")],
)
def test_what_is_missing_is_named_with_the_extra(without, package, module):
    without(package)
    with pytest.raises(InputError, match=rf"inputs\.text\.\w+ needs {package}: {REMEDY}"):
        importlib.import_module(f"inputs.text.{module}")


def test_a_config_with_the_text_model_says_it_too(without):
    without("transformers")
    config = FactoryModel(source="factory", factory="inputs.text.encoder:bert_mini")
    with pytest.raises(InputError, match=f"needs transformers: {REMEDY}"):
        build_model(config, classes=3, channels=1, root=Path())


def test_the_corpus_needs_nothing(without):
    without("tokenizers")
    without("transformers")
    assert importlib.import_module("inputs.text.corpus").read_corpus
