"""A small text encoder of transformers' BERT, and adapters of low rank on its upper layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from inputs.errors import InputError
from inputs.extras import missing_extra
from inputs.text.tokens import PADDING

try:
    from transformers import BertConfig, BertModel
except ModuleNotFoundError as error:
    raise InputError(missing_extra("text", __name__, [str(error.name)])) from error

__all__ = ["LowRankLinear", "TextClassifier", "add_adapters", "bert_mini"]


class TextClassifier(nn.Module):
    """Logits for rows of token numbers [rows, tokens]; padding is not attended to.

    Takes the images of a TokenSet [rows, 1, 1, tokens] too, floats that hold the numbers. Tensors
    are named as in transformers' BertForSequenceClassification.
    """

    def __init__(self, config: BertConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens: how many there are."""
        return self.bert.get_input_embeddings()

    def forward(
        self,
        input_ids: Shaped[Tensor, "rows ..."],
        attention_mask: Shaped[Tensor, "rows tokens"] | None = None,
    ) -> Float[Tensor, "rows classes"]:
        ids = input_ids.flatten(1).long()
        seen = ids != PADDING if attention_mask is None else attention_mask.bool()
        # A mask of four axes is taken as it is; of one with two, the values would be looked at.
        return self.classifier(self.bert(ids, attention_mask=seen[:, None, None]).pooler_output)


def bert_mini(
    *,
    num_classes: int,
    vocabulary: int,
    tokens: int = 64,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
) -> TextClassifier:
    """BERT-mini (1908.08962) without dropout, for at most so many `tokens`.

    Also a config's factory: `model: {source: factory, factory: "inputs.text.encoder:bert_mini"}`.
    """
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
        pad_token_id=PADDING,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return TextClassifier(config, num_classes)


class LowRankLinear(nn.Linear):
    """y = W x + b + scale · up (down x) (LoRA, 2106.09685); `down` and `up` alone are trained.

    `up` is 0 at first.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        down = torch.randn(rank, linear.in_features) / linear.in_features**0.5
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))
        self.scale = scale

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        delta = F.linear(F.linear(input, self.down), self.up)
        return F.linear(input, self.weight, self.bias) + self.scale * delta


def add_adapters(
    model: TextClassifier, rank: int, layers: Sequence[int], *, scale: float = 2.0
) -> TextClassifier:
    """Freeze all but the head, and put adapters on the queries and values of some layers.

    Raises InputError for a rank of 0 and for layers that the model has not.
    """
    count = model.config.num_hidden_layers
    if rank < 1 or not set(layers) <= set(range(count)):
        raise InputError(
            f"adapters of rank {rank} on layers {list(layers)}: wanted a rank of at least 1, and "
            f"layers from 0 to {count - 1}"
        )
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for layer in layers:
        for part in ("query", "value"):
            name = f"bert.encoder.layer.{layer}.attention.self.{part}"
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, LowRankLinear(linear, rank, scale))
    return model
