"""Subspaces: deltas of matrices merged by their singular vectors, or by what they act on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merge.method import Method, MethodSettings, per_model

Convolutions = Literal["average", "matrix"]

AVERAGED = (
    "Vectors, scalars and, by default, convolutions [out, in, …] are averaged; convolutions: "
    "matrix takes them as [out, in·…]."
)


class Isotropic(MethodSettings):
    """`lambda` scales the merged delta; convolutions are averaged or taken as [out, in·…]."""

    lambda_: float = Field(1.0, alias="lambda")
    convolutions: Convolutions = "average"


class IsotropicTasks(Isotropic):
    """`common_space_fraction` is the part of the singular vectors that all models share."""

    common_space_fraction: float = Field(0.8, ge=0, le=1)


class TaskSingularVectors(Isotropic):
    """`lambda` scales the merged delta; convolutions are averaged or taken as [out, in·…]."""


class Knots(MethodSettings):
    """`merge` is how the aligned coordinates are merged, `density` the part that each model keeps.

    The largest are kept by `ties`, random ones, rescaled, by `dare_linear` and `dare_ties`.
    `weight` is relative: the weights are divided by their sum.
    Singular values up to `drop_below` count as zero; `lambda` scales the merged delta.
    """

    merge: Literal["linear", "ties", "dare_linear", "dare_ties"] = "ties"
    weight: float = per_model(1.0)
    density: float = per_model(0.2, gt=0, le=1)
    lambda_: float = Field(1.0, alias="lambda")
    drop_below: float = Field(1e-5, ge=0)
    convolutions: Convolutions = "matrix"


class Wudi(MethodSettings):
    """Steps and step size of Adam; convolutions are averaged or taken as [out, in·…]."""

    iterations: int = Field(300, ge=0)
    lr: float = Field(1e-5, gt=0)
    convolutions: Convolutions = "average"


SUBSPACES = (
    Method(
        name="iso_c",
        summary="The sum of the deltas with all singular values replaced by their mean.",
        formula="W = b + λ σ̄ U Vᵀ, U diag(σ) Vᵀ = Σ τ_k, σ̄ = mean(σ)",
        paper="2502.04959",
        settings=Isotropic,
        function="merge.methods.subspaces:iso_c",
        acts_on="tensors",
        others=AVERAGED,
        departs="The paper tunes lambda. Directions whose singular value is zero stay zero: their "
        "vectors are arbitrary.",
        laws=frozenset({"identity", "order", "mean"}),
    ),
    Method(
        name="iso_cts",
        summary="As iso_c, with the least singular vectors of the sum replaced by those of each "
        "model outside of what they have in common.",
        formula="W = b + λ σ̄ P Qᵀ; P, Q: the orthogonal matrices nearest to [U_1 … U_N U], "
        "[V_1 … V_N V]; U, V of Σ τ_k; U_k, V_k of τ_k − U Uᵀ τ_k",
        paper="2502.04959",
        settings=IsotropicTasks,
        function="merge.methods.subspaces:iso_cts",
        acts_on="tensors",
        others=AVERAGED,
        departs="The paper tunes lambda. Directions whose singular value is zero are left out: "
        "their vectors are arbitrary.",
        laws=frozenset({"identity", "order", "mean"}),
    ),
    Method(
        name="tsv_m",
        summary="The leading singular vectors of each delta, made orthogonal to the others'.",
        formula="W = b + λ P diag(σ_1 … σ_N) Qᵀ; P, Q: the orthogonal matrices nearest to "
        "[U_1 … U_N], [V_1 … V_N]; U_k, σ_k, V_k: the leading r/N of τ_k's r",
        paper="2412.00081",
        settings=TaskSingularVectors,
        function="merge.methods.subspaces:tsv_m",
        acts_on="tensors",
        others=AVERAGED,
        departs="Each model has at least one singular vector, also with more models than singular "
        "values. Vectors that depend on each other are whitened within their span.",
        laws=frozenset({"identity", "order", "mean"}),
    ),
    Method(
        name="knots",
        summary="Merges the deltas in coordinates that they share: one SVD of them side by side.",
        formula="W = b + λ U merge(σ V_1ᵀ, …, σ V_Nᵀ), U diag(σ) [V_1ᵀ … V_Nᵀ] = [τ_1 … τ_N]",
        paper="2410.19735",
        settings=Knots,
        function="merge.methods.knots:knots",
        acts_on="tensors",
        draws=True,
        others="Vectors and scalars are averaged by weight; convolutions [out, in, …] are taken as "
        "[out, in·…], with convolutions: average they are averaged too.",
        departs="Per tensor; the paper's code ranks the coordinates of all layers together, and "
        "joins a bias to its matrix. The paper tunes lambda (its code has 0.6), and keeps "
        "density: 0.9 with dare_ties.",
        laws=frozenset({"identity", "mean"}),
    ),
    Method(
        name="wudi",
        summary="Adam on the interference of the merged delta with each delta's row space.",
        formula="W = b + argmin_τ Σ ‖(τ − τ_k) τ_kᵀ‖² / ‖τ_k‖², from Σ τ_k on",
        paper="2503.08099",
        settings=Wudi,
        function="merge.methods.wudi:wudi",
        acts_on="tensors",
        copies=3,
        others=AVERAGED,
        departs="The step size is that of the paper's vision models; its code for language models "
        "has lr: 2e-5.",
        laws=frozenset({"identity", "order", "mean"}),
    ),
)
