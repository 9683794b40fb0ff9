"""Squared gradients of a classifier's log-likelihood, image by image."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

Labels = Literal["sampled", "true"]


class SquaredGradients:
    """`Σ (∂ log p(y|x) / ∂w)²` for every parameter w, image by image, in fp32.

    Up to `at_once` images are taken together where torch can map the model's operations;
    `one_by_one` says why, if they are not. y is the image's class (`labels: true`), or drawn from
    the model's own softmax (`sampled`).
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, Tensor], labels: Labels, at_once: int
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._labels = labels
        self._at_once = at_once
        self.one_by_one = "" if at_once > 1 else "memory_budget"  # why, if so
        self.totals = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in parameters.items()
        }

    def add(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        choices: Float[Tensor, " batch"] | Int[Tensor, " batch"],
    ) -> None:
        """Add a batch; `choices` are labels, or the uniform numbers that draw them."""
        done = 0
        while done < len(pixels):
            part = slice(done, done + (1 if self.one_by_one else self._at_once))
            gradients = self._gradients(pixels[part], choices[part])
            if gradients is None:
                continue
            for name, gradient in gradients.items():
                self.totals[name].add_(gradient.float().square().sum(0))
            done = part.stop

    def _gradients(self, pixels: Tensor, choices: Tensor) -> dict[str, Tensor] | None:
        """Gradients [image, …], or None if these images are to be taken one by one."""
        if self.one_by_one:
            own = {n: p.detach().requires_grad_() for n, p in self._parameters.items()}
            gradients = torch.autograd.grad(
                self._log_likelihood(own, pixels[0], choices[0]),
                [*own.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            return {n: g[None] for n, g in zip(own, gradients, strict=True)}
        try:
            # Fused attention has no rule for a batch of gradients.
            with sdpa_kernel(SDPBackend.MATH):
                mapped = vmap(grad(self._log_likelihood), in_dims=(None, 0, 0))
                return mapped(self._parameters, pixels, choices)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Which operations torch can map is not known beforehand; a broken model raises again.
            self.one_by_one = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.info("Fisher information, one image after another: %s", self.one_by_one)
            return None

    def _log_likelihood(
        self, parameters: dict[str, Tensor], image: Tensor, choice: Tensor
    ) -> Tensor:
        logits = functional_call(self._model, parameters, (image[None],))[0]
        values = logits.float().log_softmax(0)
        if self._labels == "sampled":
            below = values.detach().exp().cumsum(0) <= choice
            choice = below.sum().clamp(max=len(values) - 1)
        return values.gather(0, choice[None])[0]
