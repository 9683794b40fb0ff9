"""Sentences of a library: read, never run, each in one split."""

from __future__ import annotations

from collections import Counter

import pytest

from inputs.errors import InputError
from inputs.text.corpus import DOMAINS, SPLITS, read_corpus

ALPHA = '''
"""Alpha is the first of all Greek letters. It comes before beta, as e.g. in the alphabet!

>>> this is no sentence of any words at all

    Indented lines are
    joined to one sentence. Too short.
"""
raise SystemExit("was run")

class First:
    """This sentence is in two modules of the library."""

    async def run(self):
        """This one is here twice, in other letters."""

    def again(self):
        """This one is here TWICE: in other letters!"""
'''
BETA = '"""This sentence is in two modules of the library. Beta is only in this file here."""'
WANTED = {
    "Alpha is the first of all Greek letters.",
    "It comes before beta, as e.g. in the alphabet!",
    "Indented lines are joined to one sentence.",
    "This one is here twice, in other letters.",
    "Beta is only in this file here.",
}
GREEK = {"vowels": ["alpha"], "consonants": ["beta", "gamma"]}


@pytest.fixture
def library(tmp_path):
    (tmp_path / "alpha.py").write_text(ALPHA)
    (tmp_path / "beta" / "test").mkdir(parents=True)
    (tmp_path / "beta" / "__init__.py").write_text(BETA)
    (tmp_path / "beta" / "test" / "one.py").write_text('"""Tests are no part of the corpus."""')
    return tmp_path


def test_sentences_of_docstrings(library):
    found = read_corpus(library, GREEK, at_least=1)
    assert found == read_corpus(library, GREEK, at_least=1)
    assert {sentence.text for sentence in found} == WANTED
    assert Counter((s.module, s.domain) for s in found) == {
        ("alpha", "vowels"): 4,
        ("beta", "consonants"): 1,
    }


def test_modules_with_few_sentences_are_left_out(library):
    found = read_corpus(library, GREEK, at_least=2)
    assert {sentence.module for sentence in found} == {"alpha"}


def test_the_split_is_the_sentences_alone(library):
    both = {s.text: s.split for s in read_corpus(library, GREEK, at_least=1)}
    one = {s.text: s.split for s in read_corpus(library, {"vowels": ["alpha"]}, at_least=1)}
    assert one.keys() & both.keys()
    assert all(both[text] == split for text, split in one.items() if text in both)


def test_no_sources(tmp_path):
    with pytest.raises(InputError, match="no docstrings of alpha, beta, gamma; wanted the folder"):
        read_corpus(tmp_path, GREEK)


def test_a_file_that_is_no_python(library):
    (library / "gamma.py").write_text("def (")
    with pytest.raises(InputError, match=r"gamma\.py: is not Python 3"):
        read_corpus(library, GREEK)


def test_the_standard_library():
    found = read_corpus()
    splits = Counter(sentence.split for sentence in found)
    assert splits.keys() == SPLITS.keys()
    assert all(abs(splits[name] / len(found) - share) < 0.03 for name, share in SPLITS.items())
    words = {" ".join(filter(str.isalnum, s.text.lower())) for s in found}
    assert len(words) > 0.999 * len(found)
    modules = Counter(sentence.module for sentence in found)
    assert min(modules.values()) >= 60
    assert all(len(modules.keys() & set(own)) >= 3 for own in DOMAINS.values())
