"""One rule for norm buffers (BatchNorm's running statistics) in learning, evaluating, cooking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from inputs.data import ImageSet
from inputs.models import check_norm_buffers, norm_buffer_names
from merge.align import recalibrate_norms
from soups.errors import SoupError
from soups.ingredients import Zoo
from soups.recalibration import recalibrate_group

Rule = Literal["uniform", "convex", "recalibrate"]
Groups = dict[str, tuple[str, ...]]

RECALIBRATION_IMAGES = 2048
RECALIBRATION_BATCH = 256


class NormBuffers:
    """The float buffers of a model and their values in every ingredient.

    `uniform`: mixed once with equal weights over the ingredients of the soup, then constant;
    `convex`: follow the coefficients of their layer, clipped to the simplex;
    `recalibrate`: start uniform and are estimated again on *fit* for the weights at hand.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        zoo: Zoo,
        fit: ImageSet,
    ):
        self.rule: Rule = rule
        mixed = set(zoo.preflight.mixed)
        self.names = tuple(name for name, _ in model.named_buffers() if name in mixed)
        self._model = model
        self._fit = fit
        self._buffers = dict(model.named_buffers())
        self.order = list(model.state_dict())
        self._values = {
            name: torch.stack([k.read(name).double() for k in zoo.checkpoints])
            for name in self.names
        }
        first = zoo.checkpoints[0]
        self._stored = {name: first.tensors[name].dtype for name in self.names}
        self._base = {n: zoo.base.read(n).double() for n in self.names} if zoo.base else {}
        self._check_variances(zoo)

    def columns(self, groups: Groups, matrix: np.ndarray) -> tuple[Groups, np.ndarray]:
        """The buffers' groups and their coefficients [ingredients, buffer groups]."""
        if not self.names:
            return {}, np.zeros((len(matrix), 0))
        if self.rule != "convex":
            members = np.any(matrix != 0, axis=1)
            return {"norm buffers": self.names}, _share(matrix) * _mean_of(members)[:, None]
        followed: dict[str, list[str]] = {}
        for name in self.names:
            followed.setdefault(self._group_of(name, groups), []).append(name)
        order = list(groups)
        own = matrix[:, [order.index(group) for group in followed]]
        clipped = np.clip(own, 0.0, None)
        of_base = np.clip(1.0 - own.sum(axis=0), 0.0, None)
        named = {f"norm buffers of {group}": tuple(names) for group, names in followed.items()}
        return named, clipped / (clipped.sum(axis=0) + of_base)

    def mix(
        self, names: Sequence[str], columns: Float64[np.ndarray, "models sources"]
    ) -> dict[str, Float[Tensor, "models ..."]]:
        """Buffers in each model; the sources are the ingredients, then the base where known."""
        shapes = [self._values[name].shape[1:] for name in names]
        weights = torch.from_numpy(columns)
        values = torch.cat([self._values[name].flatten(1) for name in names], dim=1)
        mixed = weights[:, : len(values)] @ values
        if self._base:
            base = torch.cat([self._base[name].flatten() for name in names])
            mixed += torch.outer(weights[:, -1], base)
        found = {}
        parts = mixed.split([shape.numel() for shape in shapes], dim=1)
        for name, part, shape in zip(names, parts, shapes, strict=True):
            buffer = self._buffers[name]
            rounded = part.to(self._stored[name]).to(buffer.device, buffer.dtype)
            found[name] = rounded.view(-1, *shape)
        return found

    @property
    def nbytes(self) -> int:
        """What the buffers of one model take."""
        return sum(self._buffers[name].nbytes for name in self.names)

    def recalibrated(
        self, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor], *, together: int
    ) -> dict[str, Float[Tensor, "models ..."]]:
        """The running statistics of many models, as `recalibrate` estimates those of one.

        `stacked` and `shared` are the models' tensors, as a Group takes them; `together` of them
        run at once.
        """
        models = len(next(iter(stacked.values())))
        device = next(iter(stacked.values())).device
        parts = []
        for start in range(0, models, together):
            own = {name: tensor[start : start + together] for name, tensor in stacked.items()}
            batches = (i.to(device) for i, _ in self._calibration().batches(RECALIBRATION_BATCH))
            parts.append(recalibrate_group(self._model, own, shared, batches))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, tensor in joined.items():
            if not bool(tensor.isfinite().all()) or ("running_var" in name and tensor.min() <= 0):
                raise SoupError(
                    f"{name!r}: the estimated running statistics of a candidate are not finite, or "
                    "a variance is not positive; look for NaN or infinity in the weights, or mix "
                    "norm buffers with norm_buffers: uniform"
                )
        return joined

    @torch.no_grad()
    def follow(self, groups: Groups, matrix: np.ndarray, *, first_step: bool) -> None:
        """Bring the model's buffers to the rule while a learner moves the weights.

        Called before every step; what is constant within an epoch is done at its first step.
        """
        if not self.names or not (first_step or self.rule == "convex"):
            return
        buffer_groups, columns = self.columns(groups, matrix)
        state = dict(self._model.named_buffers())
        for column, names in zip(columns.T, buffer_groups.values(), strict=True):
            weights = torch.from_numpy(np.ascontiguousarray(column))
            for name in names:
                mixed = torch.tensordot(weights, self._values[name], dims=1)
                if self._base and (of_base := 1.0 - weights.sum()):
                    mixed += of_base * self._base[name]
                state[name].copy_(mixed)
        self.recalibrate()

    @torch.no_grad()
    def recalibrate(self) -> None:
        """Estimate the running statistics on the first images of *fit*, if that is the rule."""
        if self.rule != "recalibrate" or not self.names:
            return
        recalibrate_norms(self._model, self._calibration().batches(RECALIBRATION_BATCH))
        check_norm_buffers(self._model)

    def _calibration(self) -> ImageSet:
        return self._fit.subset(torch.arange(min(len(self._fit), RECALIBRATION_IMAGES)))

    def _check_variances(self, zoo: Zoo) -> None:
        """SoupError that names every file with a running variance that is not positive."""
        variances = {n for n in norm_buffer_names(self._model) if n.endswith("running_var")}
        problems = []
        for name in sorted(variances & set(self.names)):
            every = [*zip(zoo.checkpoints, self._values[name], strict=True)]
            if zoo.base is not None:
                every.append((zoo.base, self._base[name]))
            for checkpoint, values in every:
                wrong = values[~(values > 0)]
                if wrong.numel():
                    problems.append(
                        f"{checkpoint.path}: {wrong.numel()} of {values.numel()} variances in "
                        f"{name!r} are not positive, the first is {wrong[0]:g}; leave this "
                        f"checkpoint out, or carry the tensor with skip: [{name!r}]"
                    )
        if problems:
            raise SoupError("\n".join(problems))

    def _group_of(self, buffer: str, groups: Groups) -> str:
        """The group of the buffer's own module, else of the nearest parameter in the model, those
        before it first."""
        of_tensor = {name: group for group, names in groups.items() for name in names}
        module = buffer.rpartition(".")[0]
        own = [group for name, group in of_tensor.items() if name.rpartition(".")[0] == module]
        if own:
            return own[0]
        place = self.order.index(buffer)
        nearest = [*reversed(self.order[:place]), *self.order[place:]]
        return next(of_tensor[name] for name in nearest if name in of_tensor)


def _mean_of(members: np.ndarray) -> np.ndarray:
    return members / max(members.sum(), 1)


def _share(matrix: np.ndarray) -> float:
    """The part of the soup that is not the base; exactly 1 where there is none of it."""
    share = float(np.clip(matrix.sum(axis=0).mean(), 0.0, 1.0))
    return 1.0 if np.isclose(share, 1.0, rtol=0, atol=1e-9) else share
