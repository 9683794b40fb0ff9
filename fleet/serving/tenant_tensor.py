"""A weight that looks like the base's, and is each tenant's own where rows are computed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fleet.serving.owned import NoRuleError, Own, PerTenant
from fleet.serving.rules import rule_for

# What is asked of the base's tensor and holds for every tenant's.
DESCRIPTIONS = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "storage_offset"),
    *("is_signed", "is_inference", "is_shared", "__hash__", "__repr__"),
}


class TenantTensor(Tensor):
    """The base's tensor with `per_tenant`, whose values the model's operations take.

    Made for a batch, and handed to the model in the place of a weight.
    """

    per_tenant: PerTenant

    @staticmethod
    def of(value: PerTenant) -> TenantTensor:
        """`value` as the model is given it."""
        made = value.base.detach().as_subclass(TenantTensor)
        made.per_tenant = value
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunctionSubclass():
            if name in DESCRIPTIONS:
                return func(*args, **kwargs)
            if name == "__get__":
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):
                    return found
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            return _computed(func, name, args, kwargs)


def _computed(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    leaves = [leaf.per_tenant if isinstance(leaf, TenantTensor) else leaf for leaf in leaves]
    tenants = [leaf for leaf in leaves if isinstance(leaf, PerTenant)]
    layout = tenants[0].layout
    names = tuple(dict.fromkeys(n for tenant in tenants for n in tenant.names))
    rule = rule_for(func)
    try:
        if rule is not None:
            given, named = pytree.tree_unflatten(leaves, spec)
            length = rule.length(*given, **named)
        else:
            plain = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
            length = len(plain[0]) if plain else None
        known = rule is not None
        if length is not None and layout.sites.is_rows(name, names, length, layout.rows, known):
            if rule is None:
                raise NoRuleError(f"{name} of {_said(names)}: there is no rule for it", names)
            given, named = pytree.tree_unflatten(leaves, spec)
            return rule.compute(layout, *given, **named)
        return _of_each(func, name, leaves, spec)
    except (MemoryError, torch.OutOfMemoryError, NoRuleError):
        raise
    except Exception as error:
        raise NoRuleError(f"{name} of {_said(names)}: {error}", names) from error


def _of_each(func: Callable[..., Any], name: str, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """What has no rows, computed of each tenant's value."""
    tenants = [leaf for leaf in leaves if isinstance(leaf, PerTenant)]
    layout = tenants[0].layout
    names = tuple(dict.fromkeys(n for tenant in tenants for n in tenant.names))
    if name.endswith("_") and not name.endswith("__"):
        raise NoRuleError(f"{name} of {_said(names)}: it writes into a weight", names)

    def compute(segment: int | None) -> list[Tensor]:
        values = [_value(leaf, segment) for leaf in leaves]
        given, named = pytree.tree_unflatten(values, spec)
        found, shape = pytree.tree_flatten(func(*given, **named))
        if not all(isinstance(one, Tensor) for one in found):
            raise NoRuleError(f"{name} of {_said(names)}: it looks at values", names)
        shapes.append(shape)
        return found

    shapes: list[pytree.TreeSpec] = []
    of_base = compute(None)
    made: dict[Any, list[Own]] = {}
    owns: list[list[Own] | None] = []
    for segment in range(len(layout.counts)):
        key = tuple(_identity(tenant, segment) for tenant in tenants)
        if not any(key):
            owns.append(None)
            continue
        if key not in made:
            made[key] = [
                Own(one, shape=None if one.shape == base.shape else one.shape)
                for one, base in zip(compute(segment), of_base, strict=True)
            ]
        owns.append(made[key])
    through = tuple(f"{name}({one})" for one in names)
    results = [
        TenantTensor.of(
            PerTenant(through, base, [None if own is None else own[k] for own in owns], layout)
        )
        for k, base in enumerate(of_base)
    ]
    return pytree.tree_unflatten(results, shapes[0])


def _value(leaf: Any, segment: int | None) -> Any:
    if not isinstance(leaf, PerTenant):
        return leaf
    return leaf.base if segment is None else leaf.dense(segment)


def _identity(tenant: PerTenant, segment: int) -> Any:
    """Equal for segments that have the same value; None for the base's."""
    own = tenant.owns[segment]
    if own is None or own.is_base:
        return None
    if own.decode is None and own.term is None:
        return id(own.value)
    return -1 - segment


def _said(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def origin(name: str) -> str:
    """The model's tensor in a name like `reshape(expand(cls_token))`."""
    return name.rpartition("(")[2].rstrip(")")
