"""Task vectors: sums of deltas to the base, thinned out, with or without a vote on the sign."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from merge.method import Law, Method, MethodSettings, per_model


class TaskArithmetic(MethodSettings):
    """`weight` and `lambda` are factors on the deltas; `normalize` divides by the weights' sum.

    `int8_mask` is there for files that have it and changes nothing; here as well `density` and
    `rescale`.
    """

    weight: float = per_model(1.0)
    lambda_: float = Field(1.0, alias="lambda")
    normalize: bool = False
    density: float = per_model(1.0, ge=0, le=1)
    rescale: bool = False
    int8_mask: bool = False


class Elected(MethodSettings):
    """`elect`: the sign with the larger sum of weighted deltas, or of more models.

    `normalize` divides by the weights of the models that agree with it, or by their `count`.
    """

    elect: Literal["sum", "count"] = "sum"
    normalize_by: Literal["weights", "count"] = "weights"


class Ties(Elected, TaskArithmetic):
    """`density` is the share of elements that stay, of each tensor or of all of the model.

    `rescale` brings the sum of magnitudes back to what it was.
    """

    normalize: bool = True
    scope: Literal["tensor", "model"] = "tensor"

    @property
    def over_model(self) -> tuple[Any, ...] | None:
        return (self.density, self.rescale) if self.scope == "model" else None


class Breadcrumbs(TaskArithmetic):
    """`density` is the share of elements that stay, after the share `gamma` of the largest went.

    `rescale` brings the sum of magnitudes back to what it was.
    """

    gamma: float = per_model(0.01, ge=0, le=1)


class BreadcrumbsTies(Elected, Breadcrumbs):
    """`breadcrumbs` with the vote of `ties`."""


class Dare(TaskArithmetic):
    """`density` is the probability with which an element stays.

    `rescale` brings the sum of magnitudes back to what it was, or divides by the probability.
    """

    rescale: bool = True
    rescale_by: Literal["norm", "probability"] = "norm"


class DareTies(Elected, Dare):
    """`dare_linear` with the vote of `ties`."""


class DellaLinear(Dare):
    """The smallest magnitude of a row stays with probability density − epsilon, the largest with
    density + epsilon."""

    epsilon: float = per_model(0.15, ge=0)

    @model_validator(mode="after")
    def _check_window(self) -> DellaLinear:
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if 0 < self.density < 1 and not 0 < low <= high < 1:
            raise ValueError(
                f"density {self.density:g} ± epsilon {self.epsilon:g} is {low:g} to {high:g}; "
                "wanted probabilities between 0 and 1: choose a smaller epsilon"
            )
        return self


class Della(Elected, DellaLinear):
    """`della_linear` with the vote of `ties`."""

    normalize: bool = True


_FUNCTIONS = "merge.methods.task_vectors"
_MEASURES = "merge.methods.sparsify"
_LAWS: frozenset[Law] = frozenset({"identity", "order"})
_ROWS = "A row is [out, …] flattened from the second axis on; vectors and scalars are one row."

TASK_VECTORS = (
    Method(
        name="task_arithmetic",
        summary="Weighted sum of the deltas, added to the base.",
        formula="W = b + λ Σ a_k (w_k − b)",
        paper="2212.04089",
        settings=TaskArithmetic,
        function=f"{_FUNCTIONS}:task_arithmetic",
        laws=_LAWS,
    ),
    Method(
        name="ties",
        summary="Trimmed deltas, of which those that have the elected sign are averaged.",
        formula="W = b + λ Σ_agree a_k τ_k / Σ_agree a_k,  τ_k = top(w_k − b)",
        paper="2306.01708",
        settings=Ties,
        function=f"{_FUNCTIONS}:ties",
        measure=f"{_MEASURES}:measure_largest",
        places=True,
        departs="Trims each tensor by itself and divides by weights; the paper trims over all of "
        "the model and divides by the number of models that agree: scope: model, normalize_by: "
        "count (and density: 0.2).",
        laws=_LAWS,
    ),
    Method(
        name="dare_linear",
        summary="Weighted sum of deltas of which a random share is dropped.",
        formula="W = b + λ Σ a_k s_k (m_k ⊙ (w_k − b)),  P(m_k = 1) = density",
        paper="2311.03099",
        settings=Dare,
        function=f"{_FUNCTIONS}:dare_linear",
        measure=f"{_MEASURES}:measure_drops",
        draws=True,
        departs="Rescales to the l1 norm of the delta; the paper divides by the density: "
        "rescale_by: probability.",
        laws=_LAWS,
    ),
    Method(
        name="dare_ties",
        summary="Deltas of which a random share is dropped, then the vote of ties.",
        formula="W = b + λ Σ_agree a_k s_k (m_k ⊙ (w_k − b)),  P(m_k = 1) = density",
        paper="2311.03099",
        settings=DareTies,
        function=f"{_FUNCTIONS}:dare_ties",
        measure=f"{_MEASURES}:measure_drops",
        draws=True,
        departs="Rescales to the l1 norm of the delta, and sums what agrees; the papers divide by "
        "the density and by the number of models that agree: rescale_by: probability, normalize: "
        "true, normalize_by: count.",
        laws=_LAWS,
    ),
    Method(
        name="della",
        summary="Deltas dropped by chance, small ones rather than large ones; the vote of ties.",
        formula="W = b + λ Σ_agree a_k s_k (m_k ⊙ (w_k − b)) / Σ_agree a_k,  "
        "P(m_k = 1) = density − ε + 2ε·rank/(m − 1)",
        paper="2406.11617",
        settings=Della,
        function=f"{_FUNCTIONS}:della",
        acts_on="rows",
        measure=f"{_MEASURES}:measure_ranked_drops",
        draws=True,
        others=_ROWS,
        departs="Rescales to the l1 norm of the delta and divides by weights; the paper divides by "
        "the probabilities and by the number of models that agree: rescale_by: probability, "
        "normalize_by: count. Its ε is the whole width of the window: half of it is epsilon here. "
        "mergekit ranks convolutions [out, in, …] along `in` alone, and vectors, as here, whole.",
        laws=_LAWS,
    ),
    Method(
        name="della_linear",
        summary="Weighted sum of deltas dropped by chance, small ones rather than large ones.",
        formula="W = b + λ Σ a_k s_k (m_k ⊙ (w_k − b)),  "
        "P(m_k = 1) = density − ε + 2ε·rank/(m − 1)",
        paper="2406.11617",
        settings=DellaLinear,
        function=f"{_FUNCTIONS}:della_linear",
        acts_on="rows",
        measure=f"{_MEASURES}:measure_ranked_drops",
        draws=True,
        others=_ROWS,
        departs="Rescales to the l1 norm of the delta; the paper divides by the probabilities: "
        "rescale_by: probability. Its ε is the whole width of the window: half of it is epsilon "
        "here. mergekit ranks convolutions [out, in, …] along `in` alone.",
        laws=_LAWS,
    ),
    Method(
        name="breadcrumbs",
        summary="Weighted sum of deltas without their largest and smallest magnitudes.",
        formula="W = b + λ Σ a_k τ_k,  τ_k = band(w_k − b)",
        paper="2312.06795",
        settings=Breadcrumbs,
        function=f"{_FUNCTIONS}:breadcrumbs",
        measure=f"{_MEASURES}:measure_band",
        places=True,
        departs="With density: 1 nothing is removed, whatever gamma. Unlike mergekit, at least "
        "one element of a tensor stays.",
        laws=_LAWS,
    ),
    Method(
        name="breadcrumbs_ties",
        summary="Deltas without their largest and smallest magnitudes, then the vote of ties.",
        formula="W = b + λ Σ_agree a_k τ_k,  τ_k = band(w_k − b)",
        paper="2312.06795",
        settings=BreadcrumbsTies,
        function=f"{_FUNCTIONS}:ties",
        measure=f"{_MEASURES}:measure_band",
        places=True,
        departs="With density: 1 nothing is removed, whatever gamma. Unlike mergekit, at least "
        "one element of a tensor stays.",
        laws=_LAWS,
    ),
)
