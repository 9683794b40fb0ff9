"""A merge's `align`: the units of its models permuted before, norm buffers estimated after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from inputs.data import LearningData, load_learning_data
from inputs.models import build_model, norm_buffer_names
from merge.align import align_checkpoints, recalibrate_norms
from merge.checkpoints import Checkpoint, CheckpointWriter, open_checkpoint
from merge.errors import MergeError
from merge.planning.config import AlignConfig, MergeConfig
from merge.statistics.gathering import load_weights

RECALIBRATION_IMAGES = 2048
RECALIBRATION_BATCH = 128
READ_BYTES = 8 << 20


class Alignment:
    """The model that the config's checkpoints are of, and images for it where there are any."""

    def __init__(self, config: MergeConfig, settings: AlignConfig) -> None:
        self._config = config
        self._settings = settings
        self._data: LearningData | None = None
        if settings.data is not None:
            self._data = load_learning_data(settings.data, memory_budget=config.memory_budget)
        classes = len(self._data.classes) if self._data is not None else settings.classes
        if classes is None:
            raise MergeError(
                "align.classes: missing; wanted the number of classes of the model, or `data`"
            )
        channels = settings.data.channels if settings.data is not None else self._image.shape[1]
        torch.manual_seed(config.seed)
        self._model: nn.Module = build_model(
            settings.model, classes=classes, channels=channels, root=Path.cwd()
        ).eval()

    @property
    def recalibrates(self) -> bool:
        """Whether norm buffers are estimated again after the merge."""
        return self._settings.recalibrate

    @property
    def _image(self) -> Tensor:
        if self._data is not None:
            return next(iter(self._data.fit.batches(1)))[0]
        assert self._settings.image is not None
        return torch.zeros(1, *self._settings.image)

    def align(self, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """Each checkpoint with its units moved to those of the base, or of the first model."""
        references = list(checkpoints)
        first = next(ref for ref in references if ref != self._config.base_model)
        reference = first
        if self._settings.reference == "base":
            if self._config.base_model is None:
                raise MergeError("align.reference: found 'base', but there is no base_model")
            reference = self._config.base_model
        aligned = align_checkpoints(
            self._model,
            self._image,
            [checkpoints[ref] for ref in references],
            reference=references.index(reference),
            iterations=self._settings.iterations,
            seed=self._config.seed,
        )
        return dict(zip(references, aligned, strict=True))

    def recalibrate(self, folder: Path) -> str:
        """Estimate the norm buffers of the merged weights in `folder` on *fit*; a note on it."""
        assert self._data is not None
        names = norm_buffer_names(self._model)
        if not names:
            return "recalibrate: the model keeps no running statistics"
        with open_checkpoint(folder, names=[*self._model.state_dict()]) as merged:
            load_weights(self._model, merged)
        images = self._data.fit
        some = images.subset(torch.arange(min(len(images), RECALIBRATION_IMAGES)))
        count = recalibrate_norms(self._model, some.batches(RECALIBRATION_BATCH))
        state = {name: t.detach() for name, t in self._model.state_dict().items() if name in names}
        for file in folder.glob("*.safetensors"):
            _replace(file, state)
        return f"the running statistics of {count} norms were estimated on {len(some)} images"


def _replace(file: Path, values: Mapping[str, Tensor]) -> None:
    """Write the file again with these tensors in the place of its own."""
    with open_checkpoint(file, prefixes=()) as old:
        if not values.keys() & old.tensors.keys():
            return
        infos = list(old.tensors.values())
        with CheckpointWriter(file, infos, metadata={"format": "pt"}) as writer:
            for info in infos:
                if info.name in values:
                    writer.write(info.name, values[info.name].to(info.dtype))
                    continue
                step = READ_BYTES // info.dtype.itemsize
                for start in range(0, max(info.numel, 1), step):
                    stop = min(start + step, info.numel)
                    part = old.read(info.name, start=start, stop=stop)
                    writer.write(info.name, part, start=start)
