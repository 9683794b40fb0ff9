"""How one model is trained, as settings; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from inputs.config import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Recipe(Settings):
    """Hyper-parameters of one training run on *fit*; `keep: best` chooses the epoch on *tune*.

    `momentum` is SGD's (Nesterov); `beta1`, `beta2` and `eps` are Adam's and AdamW's, and Adam's
    `weight_decay` is an L2 penalty. `sam_rho` takes the gradient at w + ρ g/‖g‖ (SAM, 2010.01412).
    `warmup` is the fraction of the steps in which lr rises linearly. Without `drop_last` the last
    batch of an epoch may be smaller.

    `shift` is in pixels, `noise` the standard deviation on normalised pixels, `mixup` the α of
    Beta(α, α) (1710.09412). `frozen` are glob patterns of tensors that are not trained.
    `head_epochs` come before `epochs` and train the classifier head alone (LP-FT, 2202.10054).

    The weights that are kept are the last, or their exponential mean with `ema_decay`, or their
    mean at the ends of the epochs after the fraction `swa_start` of the steps (SWA, 1803.05407).
    `patience` ends the training after so many epochs without a better accuracy on *tune*.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    momentum: Fraction = 0.9
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    sam_rho: PositiveFloat | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.1
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 128
    drop_last: bool = True
    label_smoothing: Fraction = 0.0
    clip_norm: PositiveFloat | None = None
    flip: bool = False
    shift: NonNegativeInt = 0
    noise: NonNegativeFloat = 0.0
    mixup: NonNegativeFloat = 0.0
    frozen: tuple[str, ...] = ()
    head_epochs: NonNegativeInt = 0
    ema_decay: Fraction | None = None
    swa_start: Fraction | None = None
    patience: PositiveInt | None = None
    keep: Literal["last", "best"] = "last"
    seed: NonNegativeInt = 0

    @field_validator("frozen")
    @classmethod
    def _names_something(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if "" in patterns:
            raise ValueError("an empty pattern names no tensor; leave it out")
        return patterns

    @model_validator(mode="after")
    def _one_average(self) -> Recipe:
        if self.ema_decay is not None and self.swa_start is not None:
            raise ValueError(
                f"ema_decay is {self.ema_decay:g} and swa_start {self.swa_start:g}: the weights "
                "are averaged in one way; leave one of the two out"
            )
        return self
