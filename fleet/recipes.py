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
    """Hyper-parameters of one training run on *fit*.

    The weights that are kept are those of the model itself, or one mean of them: `ema_decay` or
    `swa_start`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """`sgd` has Nesterov's momentum."""
    lr: PositiveFloat = 1e-3
    """The learning rate after the warm-up."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled for `adamw`, an L2 penalty for `adam` and `sgd`; vectors and biases do not decay.
    """
    momentum: Fraction = 0.9
    """SGD's."""
    beta1: Fraction = 0.9
    """Adam's and AdamW's, for the mean of gradients."""
    beta2: Fraction = 0.999
    """Adam's and AdamW's, for the mean of their squares."""
    eps: PositiveFloat = 1e-8
    """Adam's and AdamW's, added to the root of that."""
    sam_rho: PositiveFloat | None = None
    """Take the gradient at w + ρ g/‖g‖ with this ρ (SAM, 2010.01412)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How lr goes on after the warm-up: down to 0 as half a cosine or evenly, or not at all."""
    warmup: Fraction = 0.1
    """The fraction of the steps in which lr rises linearly."""
    epochs: PositiveInt = 5
    """Passes over *fit*."""
    batch_size: PositiveInt = 128
    """Images in a step."""
    drop_last: bool = True
    """Leave out what is less than a batch at the end of an epoch; else that batch is smaller."""
    label_smoothing: Fraction = 0.0
    """The part of each target that is spread evenly over the classes."""
    clip_norm: PositiveFloat | None = None
    """A gradient with a larger L2 norm, over all tensors, is scaled down to it."""
    flip: bool = False
    """Mirror each image left to right with probability ½."""
    shift: NonNegativeInt = 0
    """Move each image by up to so many pixels each way; the border is filled by reflection."""
    noise: NonNegativeFloat = 0.0
    """The standard deviation of the noise that is added to normalised pixels."""
    mixup: NonNegativeFloat = 0.0
    """The α of Beta(α, α) by which two images and their targets are mixed (1710.09412); 0 for not
    at all."""
    frozen: tuple[str, ...] = ()
    """Globs of tensors that are not trained; modules that are frozen as a whole keep their norm
    buffers."""
    head_epochs: NonNegativeInt = 0
    """Epochs before `epochs` in which the classifier head alone is trained (LP-FT, 2202.10054)."""
    ema_decay: Fraction | None = None
    """Keep the exponential mean of the weights, with this factor on what was (norm buffers too)."""
    swa_start: Fraction | None = None
    """Keep the mean of the weights at the ends of the epochs after this fraction of the steps (SWA,
    1803.05407)."""
    patience: PositiveInt | None = None
    """End the training after so many epochs without a better accuracy on *tune*."""
    keep: Literal["last", "best"] = "last"
    """The weights of the last epoch, or of the one with the best accuracy on *tune*."""
    seed: NonNegativeInt = 0
    """Draws the order of the images and what is done to them; for the base also its first weights.
    """

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
