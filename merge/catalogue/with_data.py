"""With data: averages weighted by what was gathered from each model on images."""

from __future__ import annotations

from pydantic import Field

from merge.method import Method, MethodSettings, per_model


class Fisher(MethodSettings):
    """`floor` is the least Fisher value; where all of them vanish, the weighted mean is taken."""

    weight: float = per_model(1.0, ge=0)
    floor: float = Field(0.0, ge=0)


class RegMean(MethodSettings):
    """`scale_off_diagonal` multiplies what is off the diagonal of each Gram matrix."""

    weight: float = per_model(1.0, ge=0)
    scale_off_diagonal: float = Field(0.9, ge=0, le=1)


WITH_DATA = (
    Method(
        name="fisher",
        summary="Mean of the models, each element weighted by its diagonal Fisher information.",
        formula="W = Σ λ_k F_k w_k / Σ λ_k F_k",
        paper="2111.09832",
        settings=Fisher,
        function="merge.methods.with_data:fisher",
        base="ignored",
        statistics="fisher",
        others="Tensors without Fisher values (buffers) are averaged with the weights.",
        departs=(
            "The paper's formula has no floor; its authors' code has 1e-6 and divides each weight "
            "by the norm of the model's Fisher values: floor: 1e-6, and as weight 1/norm, with the "
            "norm that the statistics record."
        ),
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="regmean",
        summary="The linear layers whose outputs are nearest to those of every model.",
        formula="Wᵀ = (Σ λ_k G̃_k)⁻¹ Σ λ_k G̃_k W_kᵀ, G̃ = α·G + (1−α)·diag G",
        paper="2212.09849",
        settings=RegMean,
        function="merge.methods.with_data:regmean",
        base="ignored",
        acts_on="tensors",
        statistics="gram",
        others=(
            "Convolutions are linear layers on patches; what has no Gram matrix (biases, norms, "
            "embeddings) is averaged with the weights."
        ),
        departs=(
            "Gram matrices are means over rows, as in the authors' code; the paper sums: as weight "
            "the number of rows, which the statistics record. The paper averages convolutions."
        ),
        laws=frozenset({"identity", "order"}),
    ),
)
