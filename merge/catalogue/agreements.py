"""Agreement: which elements of the deltas to keep, from how the models compare there."""

from __future__ import annotations

from pydantic import Field

from merge.method import Method, MethodSettings, Reach, per_model


class Sce(MethodSettings):
    """`select_topk` is the part of the elements that is kept, by their variance over the models.

    Where the mean squares of the deltas sum to less than `equal_below`, the weights are equal.
    `int8_mask` is accepted and changes nothing.
    """

    select_topk: float = Field(1.0, ge=0, le=1)
    equal_below: float = Field(1e-6, ge=0)
    int8_mask: bool = False

    @property
    def acts_on(self) -> Reach | None:
        return "tensors" if self.select_topk < 1 else None


class Magmax(MethodSettings):
    """`lambda` scales the merged delta."""

    lambda_: float = Field(1.0, alias="lambda")


class Consensus(MethodSettings):
    """`k` is the least number of models that must select an element.

    A larger `mask_lambda` lets a model select fewer elements; `lambda` scales the merged delta.
    """

    mask_lambda: float = per_model(0.4, ge=0)
    k: int = Field(2, ge=0)
    lambda_: float = Field(1.0, alias="lambda")


class Lines(MethodSettings):
    """The sum of the deltas is scaled by `alpha` in the first layer, `alpha + beta` in the last.

    `alpha` unset is 1/N for N models; `beta` unset is 1 − alpha.
    """

    alpha: float | None = None
    beta: float | None = None


class Pcb(MethodSettings):
    """`density` is the part of the elements that keeps a weight, in each model.

    Magnitudes are clamped to what lies between the quantiles `clamp` and 1 − `clamp`.
    """

    density: float = Field(0.1, gt=0, le=1)
    clamp: float = Field(1e-4, ge=0, lt=0.5)
    lambda_: float = Field(1.0, alias="lambda")


AGREEMENTS = (
    Method(
        name="sce",
        summary="Keeps the elements in which the models differ most, weighs the models by the "
        "energy of what is left, and erases what is against the elected sign.",
        formula="W = b + Σ c_k e_k τ̂_k / Σ c_k e_k, c_k = mean(τ̂_k²) / Σ_j mean(τ̂_j²), "
        "e_k = [sign τ̂_k = sign Σ_j τ̂_j], τ̂: only where the variance is in the top select_topk",
        paper="2408.07990",
        settings=Sce,
        function="merge.methods.agreements:sce",
        measure="merge.methods.agreements:measure_sce",
        departs="equal_below 1e-6 is larger than the energy of many fine-tunes, whose models then "
        "weigh the same; the paper's is equal_below: 0. The paper selects a part of the elements, "
        "10 % in its experiments (select_topk: 0.1).",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="magmax",
        summary="Of each element, the delta of the largest magnitude; of equal ones the positive.",
        formula="W = b + λ τ_j, j = argmax_k |τ_k|",
        paper="2403.01753",
        settings=Magmax,
        function="merge.methods.agreements:magmax",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="consensus",
        summary="The sum of the deltas, without the elements that fewer than k models select.",
        formula="W = b + λ m τ, τ = Σ τ_k, m = [Σ_k [|τ_k| ≥ mask_lambda_k |τ − τ_k|] ≥ k]",
        paper="2405.07813",
        settings=Consensus,
        function="merge.methods.agreements:consensus",
        models=(2, None),
        departs="The paper chooses mask_lambda for each model from 0.2 to 0.6, and lambda, on "
        "validation data. With k above the number of models the base is the result.",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="lines",
        summary="The sum of the deltas, scaled linearly with the depth of the layer.",
        formula="W = b + (alpha + beta d) Σ τ_k, d from 0 in the first layer to 1 in the last",
        paper="2410.17146",
        settings=Lines,
        function="merge.methods.agreements:lines",
        depth=True,
        departs="The paper tunes beta for several models and has beta = 1 − alpha for one, which "
        "is the default here. Its code scales what stands after the last layer by alpha; here that "
        "is at depth 1.",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="pcb",
        summary="Weighs each element by its own magnitude and by its agreement with the others, "
        "and drops the low weights.",
        formula="W = b + λ Σ s_k τ_k / Σ s_k, s_k = norm(top_density(exp(N norm(|τ_k|)²) "
        "tanh(τ_k Σ_j τ_j))), norm to [0, 1]",
        paper="2410.02396",
        settings=Pcb,
        function="merge.methods.agreements:pcb",
        models=(2, None),
        acts_on="tensors",
        departs="Per tensor; the paper normalises over the whole model. As its code: the paper's "
        "text balances the models with a sum of softmaxes where the code has tanh. The paper tunes "
        "lambda.",
        laws=frozenset({"identity", "order"}),
    ),
)
