"""What proposes populations of candidates, and learns from their order."""

from __future__ import annotations

import numpy as np
from cmaes import CMA, SepCMA
from jaxtyping import Float64

from soups.learners.hyperplane import Hyperplane, whole_columns
from soups.learners.registry import CmaEs, RandomSearch

Matrix = Float64[np.ndarray, "ingredients groups"]
Population = Float64[np.ndarray, "candidates ingredients groups"]

# Above this many coefficients a full covariance costs more than it learns in the usual budgets.
FULL_COVARIANCE = 100
# Steps towards random soups, as parts of the way.
SHORTEST, LONGEST = 0.01, 0.5


class RandomSoups:
    """The best so far, new soups, and steps from the best so far to new soups."""

    def __init__(self, start: Matrix, settings: RandomSearch, stream: np.random.Generator):
        self._best, self._settings, self._stream = start, settings, stream
        self.population = settings.population

    def ask(self) -> Population:
        """The next candidates."""
        settings, count = self._settings, self.population - 1
        local = round(settings.local * count)
        steps = np.ones((count, 1, 1))
        steps[:local] = self._log_uniform((SHORTEST, LONGEST), (local, 1, 1))
        moved = self._best + steps * (self._soups(count) - self._best)
        return whole_columns(np.concatenate([self._best[None], moved]))

    def tell(self, candidates: Population, order: list[int]) -> None:
        """Take in their order, the best first."""
        self._best = candidates[order[0]]

    def centre(self) -> Matrix:
        """Where it now expects the best."""
        return self._best

    def _soups(self, count: int) -> Population:
        ingredients, groups = self._best.shape
        dense = self._log_uniform(self._settings.concentration, (count, 1, 1))
        parts = self._stream.standard_gamma(np.broadcast_to(dense, (count, ingredients, groups)))
        # With a small concentration all parts may round to zero: then one ingredient has it all.
        parts[:, self._stream.integers(ingredients), :] += np.finfo(float).tiny
        return parts / parts.sum(axis=1, keepdims=True)

    def _log_uniform(self, ends: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
        low, high = np.log(ends)
        return np.exp(self._stream.uniform(low, high, shape))


class Evolution:
    """CMA-ES, with its covariance diagonal (SepCMA) where there are many coefficients."""

    def __init__(self, start: Matrix, settings: CmaEs, seed: int):
        self._plane = Hyperplane(start, settings.bounds)
        dimensions = self._plane.dimensions
        full = settings.covariance == "full" or (
            settings.covariance == "auto" and dimensions <= FULL_COVARIANCE
        )
        # The package wants two dimensions at least; a second one that does nothing is harmless.
        self._search = (CMA if full else SepCMA)(
            mean=np.zeros(max(2, dimensions)),
            sigma=settings.sigma / np.sqrt(max(1, len(start) - 1)),
            seed=seed,
            population_size=settings.population,
        )
        self._points = np.zeros((0, 0))
        self.population = self._search.population_size

    def ask(self) -> Population:
        """The next candidates."""
        self._points = np.stack([self._search.ask() for _ in range(self.population)])
        candidates = self._plane.candidates(self._points[:, : self._plane.dimensions])
        self._points[:, : self._plane.dimensions] = self._plane.points(candidates)
        return candidates

    def tell(self, candidates: Population, order: list[int]) -> None:
        """Take in their order, the best first."""
        ranks = np.empty(len(order))
        ranks[order] = np.arange(len(order))
        self._search.tell(list(zip(self._points, ranks.tolist(), strict=True)))

    def centre(self) -> Matrix:
        """Where it now expects the best."""
        centre = self._search.mean[None, : self._plane.dimensions]
        return self._plane.candidates(centre)[0]
