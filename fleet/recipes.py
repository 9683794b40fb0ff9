"""How one model is trained, as settings; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from inputs.config import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Recipe(Settings):
    """Hyper-parameters of one training run on *fit*; `keep: best` chooses the epoch on *tune*.

    `momentum` is SGD's (Nesterov); AdamW keeps its usual betas. `warmup` is the fraction of the
    steps in which lr rises linearly. `shift` is in pixels, `noise` the standard deviation on
    normalised pixels, `mixup` the α of Beta(α, α) (1710.09412). `head_epochs` come before
    `epochs` and train the classifier head alone (LP-FT, 2202.10054).
    """

    model_config = ConfigDict(allow_inf_nan=False)

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    momentum: Fraction = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.1
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 128
    label_smoothing: Fraction = 0.0
    clip_norm: PositiveFloat | None = None
    flip: bool = False
    shift: NonNegativeInt = 0
    noise: NonNegativeFloat = 0.0
    mixup: NonNegativeFloat = 0.0
    head_epochs: NonNegativeInt = 0
    keep: Literal["last", "best"] = "last"
    seed: NonNegativeInt = 0
