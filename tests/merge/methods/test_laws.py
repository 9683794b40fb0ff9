"""What holds for every merge method there is: whoever adds one is tested here at once."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from merge.errors import MergeError
from merge.method import Method
from merge.part import Part
from merge.plain import measure_whole
from merge.registry import METHODS

# Values of settings that have no default, or one that leaves little to test; three values are one
# for each model. QUICK are used always.
TYPICAL = {
    "t": 0.3,
    "weight": (0.2, 0.5, 0.4),
    "density": 0.5,
    "gamma": 0.1,
    "epsilon": 0.1,
    "lambda_": 0.7,
    "scale": 1.5,
    "select_topk": 0.5,
    "alpha": 0.4,
    "beta": 0.9,
    "filter_wise": True,
}
QUICK = {"iterations": 5}

SHAPES = [(), (1,), (17,), (0,), (0, 4), (6, 5), (5, 1), (1, 5), (4, 3, 3, 2)]
PART = Part("layer.weight", seed=7, models=("one", "two", "three"))


@dataclass(frozen=True)
class Case:
    """A method with or without a base, at one choice of its settings."""

    method: Method
    base: bool
    settings: dict[str, Any]

    def __str__(self) -> str:
        chosen = [f"{name}={value}" for name, value in self.settings.items() if name not in QUICK]
        return "-".join([self.method.name, *(["base"] if self.base else []), *chosen])

    @property
    def models(self) -> int:
        most = self.method.models[1]
        return 3 if most is None else min(most, 3)

    def inputs(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, apart: float = 0.1
    ) -> tuple[Tensor | None, list[Tensor]]:
        """A base and models at a distance from it."""
        generator = torch.Generator().manual_seed(11)
        base = torch.randn(shape, generator=generator)
        tensors = [
            (base + apart * torch.randn(shape, generator=generator)).to(dtype)
            for _ in range(self.models)
        ]
        return base.to(dtype) if self.base else None, tensors

    def statistics(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """What the method wants to have been gathered; of inputs, only those of a matrix are."""
        kind = self.method.statistics
        if kind == "gram" and tensors and tensors[0].ndim != 2:
            return []
        return None if kind is None else [_statistic(kind, k, t) for k, t in enumerate(tensors)]

    @property
    def acts_on(self) -> str:
        settings = self.method.settings_of(self.settings, self.models)
        return self.method.acts_on_with(settings[0])

    def merge(
        self,
        base: Tensor | None,
        tensors: Sequence[Tensor],
        *,
        part: Part = PART,
        **changes: Any,
    ) -> Tensor:
        return self.method(
            base,
            tensors,
            statistics=self.statistics(tensors),
            part=part,
            **{**self.settings, **changes},
        )


def _statistic(kind: str, model: int, tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(model)
    if kind == "fisher":
        return torch.rand(tensor.shape, generator=generator).to(tensor.device)
    inputs = torch.randn(3 * tensor.shape[1] + 1, tensor.shape[1], generator=generator)
    return (inputs.T @ inputs).to(tensor.device)


def typical(method: Method, name: str) -> Any:
    """A value of this setting; one for each model where there are several."""
    assert name in TYPICAL, f"{method.name}: give a typical value of {name!r} in TYPICAL"
    value = TYPICAL[name]
    most = method.models[1]
    return value[: most and min(most, 3)] if isinstance(value, tuple) else value


def defaults(method: Method) -> dict[str, Any]:
    """The settings that have to be given, and what makes the tests quick."""
    quick = {name: value for name, value in QUICK.items() if name in method.settings.model_fields}
    return quick | {name: typical(method, name) for name in sorted(method.required)}


def variants(method: Method) -> Iterator[dict[str, Any]]:
    """The defaults; each other choice of a switch or word alone; all other choices; typical values.

    One with a choice may have a default value of a number that hides it: all come with typical
    values, too.
    """
    plain = defaults(method)
    fields = method.settings.model_fields
    usual = plain | {name: typical(method, name) for name in TYPICAL if name in fields}
    yield plain
    if usual != plain:
        yield usual
    schema = method.settings.model_json_schema(by_alias=False)["properties"]
    others: dict[str, list[Any]] = {}
    for name, info in fields.items():
        words = [word for one in _schemas(schema[name]) for word in one.get("enum", [])]
        choices = [False, True] if info.annotation is bool else words
        others[name] = [choice for choice in choices if choice != info.default]
    for name, choices in others.items():
        yield from (usual | {name: choice} for choice in choices)
    flipped = {name: choices[-1] for name, choices in others.items() if choices}
    if len(flipped) > 1:
        yield usual | flipped


def _schemas(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A setting's JSON schema, and those of what it may be instead."""
    return [schema, *schema.get("anyOf", [])]


def bases(method: Method) -> list[bool]:
    return {"required": [True], "ignored": [False], "optional": [False, True]}[method.base]


METHOD_LIST = list(METHODS.values())
DEFAULTS = [Case(m, base, defaults(m)) for m in METHOD_LIST for base in bases(m)]
CASES = list(
    {
        str(case): case
        for m in METHOD_LIST
        for base in bases(m)
        for case in (Case(m, base, variant) for variant in variants(m))
    }.values()
)


def promising(law: str) -> list[Case]:
    return [case for case in DEFAULTS if law in case.method.laws]


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits, the sign of zeros included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


# --- what each declares --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_LIST, ids=list(METHODS))
def test_the_row_is_filled_in(method: Method) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
    assert method.summary.endswith(".")
    assert method.formula.startswith("W")
    assert re.fullmatch(r"\d{4}\.\d{4,5}|https://\S+", method.paper)
    assert method.measure is None or callable(method.load(method.measure))


@pytest.mark.parametrize("method", METHOD_LIST, ids=list(METHODS))
def test_the_function_takes_the_settings_and_what_is_declared(method: Method) -> None:
    declared = {
        "measured": method.measure is not None,
        "gram": method.gram is not None,
        "part": method.takes_part,
        "depth": method.depth,
        "statistics": method.statistics is not None,
    }
    given = {*method.settings.model_fields, *(name for name, there in declared.items() if there)}
    parameters = inspect.signature(method.load(method.function)).parameters
    assert list(parameters)[:2] == ["base", "tensors"]
    takes = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert takes <= given
    # Some share one settings class and leave to their measure what it alone needs.
    assert takes == given or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


# --- tensors in, a tensor out --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_shape_gives_a_finite_tensor_of_it_and_leaves_the_inputs(
    case: Case, shape: tuple[int, ...]
) -> None:
    base, tensors = case.inputs(shape)
    sources = [*tensors, *([base] if base is not None else [])]
    before = [source.clone() for source in sources]
    result = case.merge(base, tensors)
    assert (result.shape, result.dtype) == (torch.Size(shape), torch.float32)
    assert bool(result.isfinite().all())
    assert all(same(now, then) for now, then in zip(sources, before, strict=True))
    if result.numel():
        assert result.data_ptr() not in {source.data_ptr() for source in sources}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_transposed_view_is_like_its_copy(case: Case) -> None:
    base, tensors = case.inputs((5, 6))
    views = [tensor.t().contiguous().t() for tensor in tensors]
    base_view = None if base is None else base.t().contiguous().t()
    assert same(case.merge(base_view, views), case.merge(base, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dtype_is_kept(case: Case, dtype: torch.dtype) -> None:
    base, tensors = case.inputs((6, 5), dtype)
    result = case.merge(base, tensors)
    assert result.dtype == dtype
    assert bool(result.isfinite().all())


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_mixed_dtypes_give_the_promoted_one(case: Case) -> None:
    base, tensors = case.inputs((6, 5), torch.float16)
    tensors[-1] = tensors[-1].to(torch.bfloat16)
    sources = [*tensors, *([base] if base is not None else [])]
    wanted = torch.float16
    for source in sources:
        wanted = torch.promote_types(wanted, source.dtype) if len(sources) > 1 else source.dtype
    assert case.merge(base, tensors).dtype == wanted


@pytest.mark.parametrize("shape", [(), (9,), (6, 5), (4, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_models_give_finite_numbers(case: Case, shape: tuple[int, ...]) -> None:
    base, tensors = case.inputs(shape, apart=0.0)
    assert bool(case.merge(base, tensors).isfinite().all())
    tensors = [torch.zeros_like(tensor) for tensor in tensors]
    base = None if base is None else torch.zeros_like(base)
    assert bool(case.merge(base, tensors).isfinite().all())


# --- slices and random numbers -------------------------------------------------------------------


def call(
    case: Case,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    statistics: Sequence[Tensor] | None,
    part: Part,
    whole: dict[str, Any],
) -> Tensor:
    """The method's function itself, with what was measured of the whole tensors."""
    extras = dict(whole)
    if statistics is not None:
        extras["statistics"] = tuple(statistics) or None
    if case.method.takes_part:
        extras["part"] = part
    if case.method.depth:
        extras["depth"] = part.depth
    arguments = case.method.arguments(case.method.settings_of(case.settings, case.models))
    return case.method.load(case.method.function)(base, tensors, **arguments, **extras)


@pytest.mark.parametrize("shape", [(), (13, 37), (5, 7, 3, 3), (40_000,), (1, 301)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.acts_on != "tensors"], ids=str)
def test_slices_give_the_bits_of_the_whole(case: Case, shape: tuple[int, ...]) -> None:
    settings = case.method.settings_of(case.settings, case.models)
    base, tensors = case.inputs(shape)
    statistics = case.statistics(tensors)
    measured = measure_whole(case.method, base, tensors, settings, PART)
    whole = call(case, base, tensors, statistics, PART, measured)

    flat = case.acts_on == "elements"
    row = 1 if flat else math.prod(shape[1:])
    count = math.prod(shape) // row
    cut_up = flat or len(shape) > 1
    stops = sorted({1, count // 3, count // 3 + 1, count - 2, count} - {0, -1}) if cut_up else [1]

    def cut(tensor: Tensor, start: int, stop: int) -> Tensor:
        if not cut_up:
            return tensor
        return (tensor.reshape(-1) if flat else tensor)[start:stop].contiguous()

    start = 0
    for stop in stops:
        found = call(
            case,
            None if base is None else cut(base, start, stop),
            [cut(tensor, start, stop) for tensor in tensors],
            None if statistics is None else [cut(one, start, stop) for one in statistics],
            replace(PART, start=start * row),
            measured,
        )
        assert same(found, cut(whole, start, stop)), f"from {start} to {stop}"
        start = stop


DRAWING = [case for case in CASES if case.method.draws]


@pytest.mark.parametrize("case", DRAWING, ids=str)
def test_the_same_seed_gives_the_same_bits(case: Case) -> None:
    base, tensors = case.inputs((6, 50))
    assert same(case.merge(base, tensors), case.merge(base, tensors))


@pytest.mark.parametrize("name", sorted({case.method.name for case in DRAWING}))
def test_another_seed_or_tensor_or_model_gives_other_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = Part._bits

    def count(part: Part, model: int, numbers: int) -> Any:
        drawn.append(numbers)
        return draw(part, model, numbers)

    monkeypatch.setattr(Part, "_bits", count)
    cases = [case for case in DRAWING if case.method.name == name]
    for other in (
        replace(PART, seed=8),
        replace(PART, name="other.weight"),
        replace(PART, models=("four", "five", "six")),
    ):
        changed = []
        drawn.clear()
        for case in cases:
            base, tensors = case.inputs((6, 50))
            changed.append(
                not same(case.merge(base, tensors), case.merge(base, tensors, part=other))
            )
        # Some want to know no more than the place of a slice.
        assert any(changed) == bool(drawn)


# --- what they promise ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (17,), (0,), (9, 7), (4, 3, 3, 2), (90, 100)], ids=str)
@pytest.mark.parametrize("case", promising("identity"), ids=str)
def test_identity(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, tensors = case.inputs(shape, dtype, apart=0.0)
    assert torch.equal(case.merge(base, tensors), tensors[0])


@pytest.mark.parametrize("shape", [(17,), (9, 7), (4, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("case", promising("order"), ids=str)
def test_order(case: Case, shape: tuple[int, ...]) -> None:
    base, tensors = case.inputs(shape)
    statistics = case.statistics(tensors)
    values = {
        name: value
        for name in case.method.per_model
        if name in TYPICAL and isinstance(value := typical(case.method, name), tuple)
    }
    order = [2, 0, 1][-case.models :] if case.models == 3 else list(range(case.models))[::-1]

    def merge(order: Sequence[int]) -> Tensor:
        chosen = {name: [value[k] for k in order] for name, value in values.items()}
        return case.method(
            base,
            [tensors[k] for k in order],
            statistics=[statistics[k] for k in order] if statistics else statistics,
            part=replace(PART, models=[PART.models[k] for k in order]),
            **{**case.settings, **chosen},
        )

    wanted = merge(range(case.models))
    torch.testing.assert_close(merge(order), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [(), (1,), (17,)], ids=str)
@pytest.mark.parametrize("case", promising("mean"), ids=str)
def test_mean(case: Case, shape: tuple[int, ...]) -> None:
    base, tensors = case.inputs(shape)
    wanted = torch.stack(tensors).double().mean(0).float()
    torch.testing.assert_close(case.merge(base, tensors), wanted, rtol=1e-6, atol=1e-6)


# --- what they refuse ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.method.base == "required"], ids=str)
def test_a_missing_base_is_named(case: Case) -> None:
    _, tensors = case.inputs((3,))
    with pytest.raises(MergeError, match="base_model"):
        case.merge(None, tensors)


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.method.base == "ignored"], ids=str)
def test_a_base_that_would_be_ignored_is_refused(case: Case) -> None:
    _, tensors = case.inputs((3,))
    with pytest.raises(MergeError, match="base"):
        case.merge(tensors[0], tensors)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_wrong_counts_of_models_are_refused(case: Case) -> None:
    base, tensors = case.inputs((3,))
    least, most = case.method.models
    with pytest.raises(MergeError, match=rf"takes .*{least}.* found {least - 1}"):
        case.merge(base, tensors[: least - 1])
    if most is not None:
        with pytest.raises(MergeError, match=rf"takes .*{most}.* found {most + 1}"):
            case.merge(base, [*tensors, *tensors][: most + 1])


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_unequal_shapes_and_integers_are_refused(case: Case) -> None:
    base, tensors = case.inputs((3,))
    sources = [*tensors, *([base] if base is not None else [])]
    if len(sources) > 1:
        with pytest.raises(MergeError, match="one shape"):
            case.merge(base, [tensors[0][:2], *tensors[1:]])
    with pytest.raises(MergeError, match="floating point"):
        case.merge(base, [tensors[0].int(), *tensors[1:]])


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_an_unknown_setting_is_named(case: Case) -> None:
    base, tensors = case.inputs((3,))
    with pytest.raises(MergeError, match="'wieght'"):
        case.merge(base, tensors, wieght=1.0)


def _wrong_values() -> Iterator[Any]:
    """Each setting with values just outside of what it may be."""
    for case in DEFAULTS:
        schema = case.method.settings.model_json_schema(by_alias=False)["properties"]
        for name in case.method.settings.model_fields:
            wrong: list[Any] = [math.nan, [], "no such word"]
            for one in _schemas(schema[name]):
                wrong += [one["minimum"] - 1] if "minimum" in one else []
                wrong += [one["maximum"] + 1] if "maximum" in one else []
                wrong += [one[k] for k in ("exclusiveMinimum", "exclusiveMaximum") if k in one]
            for value in wrong:
                yield pytest.param(case, name, value, id=f"{case.method.name}-{name}-{value}")


@pytest.mark.parametrize(("case", "name", "value"), [*_wrong_values()])
def test_a_setting_out_of_bounds_is_named(case: Case, name: str, value: Any) -> None:
    base, tensors = case.inputs((3,))
    with pytest.raises(MergeError, match=re.escape(name.rstrip("_"))):
        case.merge(base, tensors, **{name: value})


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_gives_the_same(case: Case) -> None:
    for shape in ((), (17,), (33, 20), (4, 3, 3, 2)):
        base, tensors = case.inputs(shape)
        there = [tensor.cuda() for tensor in tensors]
        result = case.merge(None if base is None else base.cuda(), there)
        assert result.is_cuda
        wanted = case.merge(base, tensors)
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-4, atol=1e-4)
