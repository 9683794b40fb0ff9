"""Averages: points between the models, or on the sphere through them."""

from __future__ import annotations

from pydantic import Field

from merge.method import Method, MethodSettings, Reach, per_model


class Linear(MethodSettings):
    """`normalize` divides the weights by their sum."""

    weight: float = per_model(1.0)
    normalize: bool = True


class Passthrough(MethodSettings):
    """`scale` multiplies the tensor."""

    scale: float | None = per_model(None)


class Nearswap(MethodSettings):
    """`t` is the furthest that a weight may move away from the base."""

    t: float = Field(ge=0)


class ModelStock(MethodSettings):
    """`filter_wise` takes the angles of each slice along the first axis, not of the tensor."""

    filter_wise: bool = False

    @property
    def acts_on(self) -> Reach | None:
        return "rows" if self.filter_wise else None


class Slerp(MethodSettings):
    """`t` is the fraction of the way from the base to the model."""

    t: float


class NuSlerp(MethodSettings):
    """With `nuslerp_flatten` a tensor is one vector; without, each run along its last axis is.

    `nuslerp_row_wise` then takes the runs along the first axis instead.
    """

    weight: float = per_model(1.0)
    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False

    @property
    def acts_on(self) -> Reach | None:
        if self.nuslerp_flatten:
            return None
        return "tensors" if self.nuslerp_row_wise else "rows"


class MultiSlerp(MethodSettings):
    """`normalize_weights` divides the weights by their sum; `eps` is the shortest direction."""

    weight: float = per_model(1.0)
    normalize_weights: bool = True
    eps: float = Field(1e-8, gt=0)


class Karcher(MethodSettings):
    """`tol` is the step, in radians, at which the iteration ends."""

    max_iter: int = Field(10, ge=0)
    tol: float = Field(1e-5, gt=0)


AVERAGES = (
    Method(
        name="linear",
        summary="Weighted mean of the models.",
        formula="W = Σ a_k w_k / Σ a_k",
        paper="2203.05482",
        settings=Linear,
        function="merge.methods.averages:linear",
        base="ignored",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="passthrough",
        summary="One model as it is; with slices, layers of several models in a stack.",
        formula="W = scale · w",
        paper="https://github.com/arcee-ai/mergekit#passthrough",
        settings=Passthrough,
        function="merge.methods.averages:passthrough",
        base="ignored",
        models=(1, 1),
        laws=frozenset({"identity"}),
    ),
    Method(
        name="nearswap",
        summary="The model's weights, kept within a distance of the base's.",
        formula="W = min(max(w, b − t), b + t)",
        paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        settings=Nearswap,
        function="merge.methods.averages:nearswap",
        models=(1, 1),
        laws=frozenset({"identity"}),
    ),
    Method(
        name="model_stock",
        summary="The mean of the models, drawn to the base the more their deltas disagree.",
        formula="W = b + t (mean w_k − b),  t = K cosθ / (1 + (K − 1) cosθ)",
        paper="2403.19522",
        settings=ModelStock,
        function="merge.methods.averages:model_stock",
        models=(2, None),
        gram="deltas",
        others=(
            "any shape is one vector; filter_wise: a vector is one filter, a convolution has one "
            "for each output channel (mergekit: for each run along the last axis)"
        ),
        departs=(
            "the paper is of two models; of more, cosθ is the mean over the pairs of deltas. Where "
            "the denominator is 0 the result is the base. Small deltas have their own angle, which "
            "mergekit makes larger where two norms multiply to less than 1e-6"
        ),
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="slerp",
        summary="Between the base and one model along the arc, not the chord.",
        formula="W = (sin((1 − t)θ) b + sin(tθ) w) / sinθ",
        paper="https://en.wikipedia.org/wiki/Slerp",
        settings=Slerp,
        function="merge.methods.spheres:slerp",
        models=(1, 1),
        gram="tensors",
        others="any shape is one vector; (1 − t) b + t w where |cosθ| > 0.9995",
        laws=frozenset({"identity"}),
    ),
    Method(
        name="nuslerp",
        summary="Between two models along the arc; with a base, of their deltas.",
        formula="W = b + (sin((1 − t)θ) τ_1 + sin(tθ) τ_2) / sinθ,  t = a_2 / (a_1 + a_2)",
        paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
        settings=NuSlerp,
        function="merge.methods.spheres:nuslerp",
        base="optional",
        models=(2, 2),
        gram="deltas",
        others="any shape is one vector; (1 − t) τ_1 + t τ_2 where sinθ < 0.001",
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="multislerp",
        summary="The mean direction at the mean length; with a base, of the deltas.",
        formula="W = b + (Σ a_k |τ_k|) · s / |s|,  s = Σ a_k τ_k / |τ_k|",
        paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        settings=MultiSlerp,
        function="merge.methods.spheres:multislerp",
        base="optional",
        gram="deltas",
        others="any shape is one vector",
        departs=(
            "at the mean direction the mean of the tangents is 0, so the step along it is left out"
        ),
        laws=frozenset({"identity", "order"}),
    ),
    Method(
        name="karcher",
        summary="The point of the sphere nearest to the models' directions, at their mean length.",
        formula="W = mean |w_k| · argmin_m Σ θ(m, w_k)²,  |m| = 1",
        paper="2603.04972",
        settings=Karcher,
        function="merge.methods.spheres:karcher",
        base="ignored",
        gram="tensors",
        others="any shape is one vector",
        laws=frozenset({"identity", "order"}),
    ),
)
