"""What a merge method declares: its settings, what it needs, what it promises; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from inputs.config import Settings, nearest
from merge.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from merge.part import Part

Reach = Literal["elements", "rows", "tensors"]
"""What one value of the result may depend on: see `Method`."""

Products = Literal["tensors", "deltas"]
"""Whose inner products a method wants: the base's and the tensors', or the deltas'."""

Law = Literal["identity", "order", "mean"]
"""What a method may promise of its default settings.

`identity`: equal inputs (base included) give exactly that tensor. `order`: the order of the
models, with their settings, does not matter. `mean`: what is no matrix is averaged.
"""


class MethodSettings(Settings):
    """A method's settings, for one tensor and one model; numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)

    @property
    def acts_on(self) -> Reach | None:
        """What the function acts on with these settings, where they change it.

        It then sees all that it needs, and gets None for `gram`.
        """
        return None

    @property
    def over_model(self) -> tuple[Any, ...] | None:
        """Where all of a model is measured at once: the settings that the measure goes by.

        Tensors of a model that differ in these are measured apart.
        """
        return None


def per_model(default: Any = ..., **rules: Any) -> Any:
    """A setting that each model may have a value of its own for; `rules` are pydantic's."""
    return Field(default, json_schema_extra={"per_model": True}, **rules)


@dataclass(frozen=True)
class Method:
    """One merge method: a pure function of the tensors of one name, and what there is to know.

    `function` is `module:name`, called as `function(base, tensors, **settings)` with contiguous
    tensors of one dtype (fp32, or fp64) and one shape; settings that are per model come as tuples.
    `models` are the least and the most models besides the base.

    `acts_on`: `elements`, any slice of the flat tensors gives that slice of the result, and the
    tensors may come flat; `rows`, whole rows [row, ...] are needed; `tensors`, all of it. Settings
    may say otherwise: ask `acts_on_with` and `gram_with`.

    What more the function gets, by name:
    - `measured`, with `measure`: what was measured of each model, a tuple. `measure(numel=…,
      **settings of that model)` gives something with `passes`, functions that are each to be shown
      the whole tensor in slices, in order, as `see(start, base, tensor)` (of whole rows where the
      method acts on these), and then `result()`. No passes where there is nothing to measure. Where
      the settings say so (`over_model`), it is shown all tensors of the model that share them.
    - `gram`: the float64 inner products of the whole tensors ([base, *tensors] or the deltas).
    - `part`, with `draws` for its random numbers, with `places` for its `start` alone; `measure`
      then gets `part` and `model`, the model's place, too.
    - `depth`: where the tensor stands among the layers, 0 in the first and before it, 1 in the last
      and after it.
    - `statistics`: what must have been gathered for each model, one tensor per model, or None where
      there are none of this tensor.

    `copies`: with whole tensors the function holds so many for each source, and four.
    """

    name: str
    summary: str
    formula: str
    paper: str
    settings: type[MethodSettings]
    function: str
    base: Literal["required", "optional", "ignored"] = "required"
    models: tuple[int, int | None] = (1, None)
    acts_on: Reach = "elements"
    measure: str | None = None
    gram: Products | None = None
    draws: bool = False
    places: bool = False
    depth: bool = False
    statistics: Literal["fisher", "gram"] | None = None
    copies: int = 2
    others: str = ""
    departs: str = ""
    laws: frozenset[Law] = field(default_factory=frozenset)

    @property
    def takes_part(self) -> bool:
        """Whether the function gets `part`."""
        return self.draws or self.places

    @cached_property
    def per_model(self) -> frozenset[str]:
        """The names of the settings that each model may have its own value for."""
        return frozenset(
            name
            for name, info in self.settings.model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("per_model")
        )

    @cached_property
    def spelled(self) -> dict[str, str]:
        """The name of each setting as a config spells it → its name in Python."""
        return {info.alias or name: name for name, info in self.settings.model_fields.items()}

    @property
    def required(self) -> frozenset[str]:
        """The Python names of the settings that have no default."""
        fields = self.settings.model_fields.items()
        return frozenset(name for name, info in fields if info.default is PydanticUndefined)

    def acts_on_with(self, settings: MethodSettings) -> Reach:
        """What the function acts on with these settings."""
        return settings.acts_on or self.acts_on

    def gram_with(self, settings: MethodSettings) -> Products | None:
        """The inner products that the function wants with these settings."""
        return None if settings.acts_on else self.gram

    def check_inputs(self, *, models: int, base: bool) -> list[str]:
        """What is wrong with so many models besides the base, or with its presence."""
        least, most = self.models
        wanted = f"{least}" if most == least else f"at least {least}"
        if most is not None and most != least:
            wanted = f"{least} to {most}"
        problems = []
        if self.base == "required" and not base:
            problems.append(
                f"merge_method {self.name!r} works on differences to a base; name it with "
                "base_model"
            )
        if models < least or (most is not None and models > most):
            besides = "" if self.base == "ignored" else " besides the base"
            problems.append(
                f"merge_method {self.name!r} takes {wanted} models{besides}, found {models}"
            )
        return problems

    def load(self, reference: str) -> Any:
        """The function that `module:name` stands for."""
        module, _, name = reference.partition(":")
        return getattr(import_module(module), name)

    def arguments(self, settings: Sequence[MethodSettings]) -> dict[str, Any]:
        """The keyword arguments of the function, from the settings of each model."""
        return {
            name: tuple(getattr(one, name) for one in settings)
            if name in self.per_model
            else getattr(settings[0], name)
            for name in self.settings.model_fields
        }

    def __call__(
        self,
        base: Tensor | None,
        tensors: Sequence[Tensor],
        *,
        statistics: Sequence[Tensor] | None = None,
        part: Part | None = None,
        **settings: Any,
    ) -> Tensor:
        """Merge plain tensors of one shape; the result has their dtype.

        A setting that is per model may be one value, or a sequence of one for each. `statistics`
        are one for each tensor, or [] where nothing was gathered of it. `part` names the tensor and
        the seed of random methods. Raises MergeError on wrong settings or shapes.
        """
        from merge.plain import merge_tensors

        return merge_tensors(
            self, base, tensors, statistics=statistics, part=part, settings=settings
        )

    def settings_of(self, given: Mapping[str, Any], models: int) -> list[MethodSettings]:
        """Settings for each model from keyword arguments; MergeError that names what is wrong."""
        unknown = [n for n in given if n not in self.spelled and n not in self.spelled.values()]
        if unknown:
            hint = nearest(unknown[0], self.spelled.values())
            raise MergeError(f"{self.name}: unknown setting {unknown[0]!r}{hint}")
        many = {n: v for n, v in given.items() if isinstance(v, (list, tuple))}
        for name, values in many.items():
            if self.spelled.get(name, name) not in self.per_model:
                raise MergeError(f"{self.name}: {name!r} is one value for all models")
            if len(values) != models:
                raise MergeError(
                    f"{self.name}: {name!r} has {len(values)} values, wanted one for each of "
                    f"{models} models"
                )
        try:
            return [
                self.settings(**{n: many[n][k] if n in many else v for n, v in given.items()})
                for k in range(models)
            ]
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})"
                for e in error.errors(include_url=False)
            )
            raise MergeError(f"{self.name}: {problems}") from error
