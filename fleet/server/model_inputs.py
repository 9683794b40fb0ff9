"""What a model takes: numbers or token ids from JSON, images from files; checked before work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleet.server.images import Preprocessing
from fleet.server.refusals import RefusedError

__all__ = ["ImageInputs", "ModelInputs", "TokenInputs"]


class ModelInputs(ABC):
    """From what a client sent to what the model takes.

    Raises RefusedError (400, 413, 415, 422) where that is wrong. `from_json` and `from_files` may
    run in several threads at once.
    """

    @abstractmethod
    def from_json(self, values: Sequence[Any]) -> list[Any]:
        """Inputs given as JSON."""

    @abstractmethod
    def from_files(self, files: Sequence[bytes]) -> list[Any]:
        """Inputs given as files of images."""


@dataclass(frozen=True)
class ImageInputs(ModelInputs):
    """Images [channels, size, size] in fp32; in JSON as the model sees them: normalised numbers."""

    preprocessing: Preprocessing

    def from_json(self, values: Sequence[Any]) -> list[Tensor]:
        """One tensor [channels, size, size] per nested list of numbers."""
        return [self._image(value, f"inputs[{index}]") for index, value in enumerate(values)]

    def from_files(self, files: Sequence[bytes]) -> list[Tensor]:
        """Decoded, resized, cropped and normalised, as images were in training."""
        return self.preprocessing.images(files)

    def _image(self, value: Any, where: str) -> Tensor:
        shape = (self.preprocessing.channels, self.preprocessing.size, self.preprocessing.size)
        wanted = f"wanted numbers {list(shape)}: channels, height, width"
        found = _numbers(value, where, wanted)
        if found.shape != shape:
            raise RefusedError(422, f"{where}: found numbers {list(found.shape)}; {wanted}")
        with np.errstate(over="ignore"):  # what fp32 cannot hold is refused as infinite
            image = found.astype(np.float32)
        if not np.isfinite(image).all():
            raise RefusedError(422, f"{where}: found NaN or infinite numbers; wanted finite ones")
        return torch.from_numpy(image)


@dataclass(frozen=True)
class TokenInputs(ModelInputs):
    """Token ids of one text: `{"input_ids": […], "attention_mask": […]}`, the mask if need be.

    Ids are below `vocabulary`, texts at most `longest` tokens; `types` is the number of token
    types, 0 where the model has none.
    """

    vocabulary: int
    longest: int
    types: int = 0

    def from_json(self, values: Sequence[Any]) -> list[dict[str, Tensor]]:
        """One dictionary of int64 tensors [tokens] per object of lists."""
        return [self._text(value, f"inputs[{index}]") for index, value in enumerate(values)]

    def from_files(self, files: Sequence[bytes]) -> list[Any]:
        """RefusedError: a text model takes no images."""
        raise RefusedError(415, "this model takes token ids as JSON, no images")

    def _text(self, value: Any, where: str) -> dict[str, Tensor]:
        below = {"input_ids": self.vocabulary, "attention_mask": 2}
        if self.types:
            below["token_type_ids"] = self.types
        wanted = f"wanted {{{', '.join(f'{key!r}: [tokens]' for key in below)}}}"
        if not isinstance(value, dict) or "input_ids" not in value:
            raise RefusedError(422, f"{where}: no object with 'input_ids'; {wanted}")
        strangers = [key[:40] for key in value if key not in below]
        if strangers:
            raise RefusedError(422, f"{where}: unknown key {strangers[0]!r}; {wanted}")
        text = {key: self._ids(ids, f"{where}.{key}", below[key]) for key, ids in value.items()}
        lengths = {key: len(ids) for key, ids in text.items()}
        if len(set(lengths.values())) > 1:
            raise RefusedError(422, f"{where}: lists of lengths {lengths}; wanted one length")
        if "attention_mask" in text and not text["attention_mask"].any():
            raise RefusedError(
                422, f"{where}.attention_mask: hides every token; wanted one that is 1"
            )
        return text

    def _ids(self, value: Any, where: str, below: int) -> Tensor:
        wanted = f"wanted 1 to {self.longest} integers from 0 to {below - 1}"
        ids = _numbers(value, where, wanted)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= len(ids) <= self.longest:
            kind = "integers" if ids.dtype.kind in "iu" else "numbers"
            raise RefusedError(422, f"{where}: found {kind} {list(ids.shape)}; {wanted}")
        if ids.min() < 0 or ids.max() >= below:
            raise RefusedError(422, f"{where}: found {ids.min()} to {ids.max()}; {wanted}")
        return torch.from_numpy(ids.astype(np.int64))


def _numbers(value: Any, where: str, wanted: str) -> np.ndarray:
    """Nested lists of numbers as an array; RefusedError for ragged lists and for other things."""
    if not isinstance(value, list):
        raise RefusedError(422, f"{where}: is no list; {wanted}")
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError) as error:  # ragged, nested too deep
        raise RefusedError(422, f"{where}: lists of unequal lengths; {wanted}") from error
    if found.dtype.kind not in "iuf":
        raise RefusedError(422, f"{where}: holds what is no number; {wanted}")
    return found
