"""Sentences as rows of token numbers, for a tokenizer that is trained on *fit*."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inputs.data import ImageSet, LearningData
from inputs.errors import InputError
from inputs.extras import missing_extra
from inputs.text.corpus import Sentence

try:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordPieceTrainer
except ModuleNotFoundError as error:
    raise InputError(missing_extra("text", __name__, [str(error.name)])) from error

__all__ = ["PADDING", "TokenSet", "learning_data", "token_set", "train_tokenizer"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PADDING = SPECIAL.index("[PAD]")
VOCABULARY = 4000
TOKENS = 32


def train_tokenizer(sentences: Iterable[Sentence], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A WordPiece tokenizer of at most so many tokens, trained on the sentences of *fit*.

    Lower case; a sentence is `[CLS] … [SEP]`. The same sentences give the same tokenizer.
    """
    texts = [sentence.text for sentence in sentences if sentence.split == "fit"]
    tokenizer = _tokenizer({})
    normal = [tokenizer.normalizer.normalize_str(text) for text in texts]
    letters = sorted(set("".join(normal)) - {" "})
    # The trainer numbers letters in the order of a hash table, and breaks ties by number.
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if vocabulary < len(first):
        raise InputError(
            f"vocabulary: found {vocabulary}, wanted at least {len(first)}: the special tokens and "
            "each letter, at the beginning of a word and inside"
        )
    trainer = WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=first, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Letters were special to the trainer alone.
    return _tokenizer(tokenizer.get_vocab())


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    ends = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


class TokenSet(ImageSet):
    """The sentences of one split, for everything that takes an ImageSet, such as JointTrainer.

    Token numbers are where images have pixels, [1, 1, tokens]; normalised, they are floats.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        labels: Int[Tensor, " rows"],
        tokens: Int[Tensor, "rows tokens"],
    ) -> None:
        rows = torch.arange(len(tokens))
        super().__init__(name, classes, labels, rows, lambda indices: tokens[indices, None, None])
        self.tokens = tokens

    def pixels(self, indices: Int[Tensor, " batch"]) -> Int[Tensor, "batch 1 1 tokens"]:
        """The token numbers of the sentences at `indices`."""
        return self.tokens[indices, None, None]

    def normalise(
        self, pixels: Int[Tensor, "batch 1 1 tokens"]
    ) -> Float[Tensor, "batch 1 1 tokens"]:
        """Token numbers as floats, which hold them exactly."""
        return pixels.to(torch.float32)

    def sentences(self) -> list[Int[Tensor, " _"]]:
        """The token numbers of each sentence, without padding."""
        return [row[row != PADDING] for row in self.tokens]

    def subset(self, indices: Int[Tensor, " batch"]) -> TokenSet:
        """The sentences at `indices` as a set of their own."""
        return TokenSet(self.name, self.classes, self.labels[indices], self.tokens[indices])


def token_set(
    sentences: Iterable[Sentence],
    tokenizer: Tokenizer,
    classes: Sequence[str],
    split: str,
    *,
    tokens: int = TOKENS,
) -> TokenSet:
    """The sentences of a split that are from the modules `classes`, labelled by their place there.

    Rows are cut and padded to so many `tokens`. Raises InputError for a class without a sentence.
    """
    own = [s for s in sentences if s.split == split and s.module in classes]
    missing = [name for name in classes if all(s.module != name for s in own)]
    if missing:
        raise InputError(f"{split}: no sentence is from {', '.join(missing)}; leave them out")
    rows = torch.full((len(own), tokens), PADDING)
    for row, found in zip(rows, tokenizer.encode_batch([s.text for s in own]), strict=True):
        numbers = found.ids
        if len(numbers) > tokens:
            numbers = [*numbers[: tokens - 1], numbers[-1]]
        row[: len(numbers)] = torch.tensor(numbers)
    labels = torch.tensor([list(classes).index(s.module) for s in own])
    return TokenSet(split, tuple(classes), labels, rows)


def learning_data(
    sentences: Sequence[Sentence],
    tokenizer: Tokenizer,
    classes: Sequence[str],
    *,
    tokens: int = TOKENS,
) -> LearningData:
    """Fit, tune and select of the modules `classes`; InputError as `token_set`."""
    fit, tune, select = (
        token_set(sentences, tokenizer, classes, split, tokens=tokens)
        for split in ("fit", "tune", "select")
    )
    return LearningData(fit, tune, select, tuple(classes))
