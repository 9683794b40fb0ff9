from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleet.errors import FleetError
from fleet.serving.bound import BoundModel
from fleet.serving.inputs import InputReader
from fleet.serving.owned import Layout, NoRuleError, Own, PerTenant
from fleet.serving.products import Products
from fleet.serving.tenant_tensor import TenantTensor
from fleet.serving.trial import Plan, check_takes, tried
from tests.fleet.serving import zoo

CPU = torch.device("cpu")


class Made(nn.Module):
    """A layer, and something done with another weight."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.other = nn.Parameter(zoo.numbers(*shape, seed=1))
        self.head = nn.Linear(12, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.first(x), self.other))


def plan_of(model: nn.Module, *inputs: Tensor) -> tuple[BoundModel, Plan]:
    bound = BoundModel(model, zoo.tensors_of(model), CPU, torch.float64)
    reader = InputReader(model, bound.dtype, CPU)
    asked = [reader.read(place, "t", given) for place, given in enumerate(inputs)]
    with torch.inference_mode():
        return bound, tried(bound, reader.together(asked))


def rows(*shape: int, count: int = 2) -> list[Tensor]:
    return [zoo.numbers(*shape, seed=place) for place in range(count)]


USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "scaled": (lambda x, w: x * w, (12,)),
    "added on the left": (lambda x, w: w + x, (1, 12)),
    "in place": (lambda x, w: x.add_(w), (12,)),
    "written into": (lambda x, w: torch.mul(x, w).div_(2), (12,)),
    "reshaped": (lambda x, w: x * w.view(3, 4).t().reshape(-1), (12,)),
    "made of two": (lambda x, w: x * (w[:12] + w[12:] * 2), (24,)),
    "multiplied": (lambda x, w: x @ w, (12, 12)),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w), (12, 12)),
    "linear of a part": (lambda x, w: F.linear(x, w[:12], w[12]), (13, 12)),
    "expanded": (
        lambda x, w: torch.cat([w.expand(len(x), -1, -1), x[:, None]], 1).sum(1),
        (1, 3, 12),
    ),
    "repeated": (lambda x, w: x + w.repeat(len(x), 2), (1, 6)),
    "expanded as": (lambda x, w: x - w.expand_as(x), (12,)),
    "of more entries": (lambda x, w: (x.view(-1, 6) * w).view(x.shape), (6,)),
    "large": (lambda x, w: (x[:, None] + w).mean(1), (2000, 12)),
    "large in place": (lambda x, w: x[:, None].repeat(1, 2000, 1).mul_(w).mean(1), (2000, 12)),
    "of fixed numbers": (lambda x, w: x + F.embedding(torch.arange(1), w), (3, 12)),
    "normalised": (lambda x, w: F.rms_norm(x, (12,), w), (12,)),
    "grouped": (lambda x, w: F.group_norm(x, 3, w, w + 1), (12,)),
    "where": (lambda x, w: torch.where(x > 0, x, w), (12,)),
    "clipped by what it is": (lambda x, w: x * w.clamp(-1, 1).softmax(0), (12,)),
    "described": (lambda x, w: x * w.numel() * len(w) + w.shape[0] + w.dim(), (12,)),
}


@pytest.mark.parametrize("use", USES)
def test_uses_with_a_rule(use):
    _, plan = plan_of(Made(*[USES[use][0], *USES[use][1]]), *rows(12))
    assert not plan.reasons
    assert plan.heads == {"head.weight", "head.bias"}


WITHOUT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str]] = {
    "looked at": (lambda x, w: x * float(w.sum()), (12,), "values|rule"),
    "decided by": (lambda x, w: x if w.sum() > 0 else -x, (12,), "values"),
    "einsum": (lambda x, w: torch.einsum("ri,oi->ro", x, w), (12, 12), "there is no rule"),
    "joined": (lambda x, w: torch.cat([x, w])[:-1], (1, 12), "there is no rule"),
}


@pytest.mark.parametrize("use", WITHOUT)
def test_uses_without_one_are_told_by_name(use, caplog):
    compute, shape, why = WITHOUT[use]
    with caplog.at_level(logging.WARNING):
        _, plan = plan_of(Made(compute, *shape), *rows(12))
    assert set(plan.reasons) == {"other"}
    assert len(caplog.records) == 1
    assert "Made: tenants that own 'other' run alone" in caplog.text
    assert re.search(why, plan.reasons["other"])


def test_a_weight_that_is_used_behind_our_back_is_found(caplog):
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return self.head(self.first(x))

    _, plan = plan_of(Hidden(), *rows(12))
    assert set(plan.reasons) == {"first.weight", "first.bias", "head.weight", "head.bias"}
    assert "not those of its tenants alone" in plan.reasons["first.bias"]
    assert len(caplog.records) == 1


def test_a_length_that_the_rows_divide_is_no_row():
    def positions(x: Tensor, w: Tensor) -> Tensor:
        return x + F.embedding(torch.arange(60), w).view(5, 12, 12).sum((0, 1))

    _, plan = plan_of(Made(positions, 60, 12), *rows(12))
    assert not plan.reasons
    assert plan.sites["embedding", "other"] is False


def test_heads_are_not_what_comes_before_a_softmax():
    class Probabilities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).softmax(-1)

    _, plan = plan_of(Probabilities(), *rows(12))
    assert not plan.reasons
    assert not plan.heads


def test_what_was_not_met_is_refused_when_it_comes():
    bound, plan = plan_of(Made(lambda x, w: x * w, 12), *rows(12))
    layout = Layout([1, 1], plan, Products([]), CPU)
    owns = [Own(torch.ones(12, dtype=torch.float64)), None]
    weight = TenantTensor.of(PerTenant(("other",), bound.base["other"], owns, layout))
    x = torch.ones(2, 12, dtype=torch.float64)
    assert torch.equal((x * weight)[0], x[0])
    with pytest.raises(NoRuleError, match="sub of 'other': was not met"):
        _ = x - weight
    with pytest.raises(NoRuleError, match="3 entries for 2 rows"):
        _ = torch.ones(3, 12, dtype=torch.float64) * weight


def test_inputs_that_the_model_does_not_take():
    model = Made(lambda x, w: x * w, 12)
    bound = BoundModel(model, zoo.tensors_of(model), CPU, None)
    reader = InputReader(model, bound.dtype, CPU)
    given = reader.together([reader.read(0, "t", torch.ones(11))])
    with pytest.raises(FleetError, match=r"request 0: the model does not take inputs \[11\]"):
        check_takes(bound, given, "request 0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: base.pop("head.bias"), "the base has no 'head.bias'"),
        (lambda base: base.update(heat=torch.ones(1)), "has 'heat', which the model has not"),
        (lambda base: base.update({"other": torch.ones(3)}), r"'other' is \[3\] in the base"),
    ],
)
def test_a_model_that_is_not_the_bases(change, message):
    model = Made(lambda x, w: x * w, 12)
    base = zoo.tensors_of(model)
    change(base)
    with pytest.raises(FleetError, match=message):
        BoundModel(model, base, CPU, None)
