"""Where images come from: the embedded digits, local files, or the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inputs.config import DataConfig, nearest
from inputs.errors import InputError
from inputs.tensor_cache import Decoded, cache_file, read_decoded, write_decoded

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PixelReader", "SourceSplit", "find_split", "known_splits"]

PixelReader = Callable[[Int[Tensor, " batch"]], UInt8[Tensor, "batch channels height width"]]

_IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
}
_SPLIT_FOLDERS = {
    "train",
    "training",
    "test",
    "testing",
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
}
# train-00000-of-00001.parquet, test-0.parquet, validation.parquet
_PARQUET_NAME = re.compile(r"(?P<split>.*?)(?:[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?)?\.parquet")
_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[\w./-]+))?")
# The tensor cache is used up to this share of the memory budget.
_BUDGET_SHARE = 4


@dataclass(frozen=True)
class SourceSplit:
    """One split of a source: its labels now, its pixels when they are asked for.

    `open(memory_budget)` returns a function from row numbers to pixels; it decodes all images
    into the tensor cache if they fit, else each call decodes its own.
    """

    labels: Int[Tensor, " rows"]
    classes: tuple[str, ...]
    open: Callable[[int], PixelReader]


@runtime_checkable  # so that argument types can be checked under test
class _Source(Protocol):
    def splits(self) -> list[str] | None:
        """The names of the splits; None where only opening one can tell."""
        ...

    def signature(self, split: str) -> str | None:
        """Which images are there now; None where they are out of reach."""
        ...

    def rows(self, split: str, config: DataConfig) -> Dataset: ...


def known_splits(config: DataConfig) -> list[str] | None:
    """The names of the source's splits; None where only opening one can tell."""
    return ["all"] if config.path == "digits" else _locate(config.path).splits()


def find_split(config: DataConfig, split: str) -> SourceSplit:
    """The labels and classes of `split` of the source, with a door to its pixels.

    Raises InputError on a source or a split that is not there, and on columns that are missing or
    could be several.
    """
    if config.path == "digits":
        digits = _digits(config)
        return SourceSplit(digits.labels, digits.classes, lambda _: _reader_of(digits.pixels))
    source = _locate(config.path)
    file, signature = cache_file(config, split), source.signature(split)
    decoded = read_decoded(file, signature)
    if decoded is not None:
        pixels = decoded.pixels
        return SourceSplit(
            decoded.labels,
            decoded.classes,
            lambda budget: (
                _reader_of(pixels)
                if pixels.numel() * _BUDGET_SHARE <= budget
                else _open_rows(source, split, config)[2]
            ),
        )
    labels, classes, decoder = _open_rows(source, split, config)

    def open_pixels(memory_budget: int) -> PixelReader:
        if decoder.total_bytes() * _BUDGET_SHARE > memory_budget:
            return decoder
        pixels = decoder.all()
        write_decoded(file, Decoded(pixels, labels, classes), signature or "")
        return _reader_of(pixels)

    return SourceSplit(labels, classes, open_pixels)


def _reader_of(pixels: UInt8[Tensor, "rows channels height width"]) -> PixelReader:
    """Reads images that are in memory; index_select copies them ten times faster than [] does."""
    return lambda rows: pixels.index_select(0, rows)


def _open_rows(source: _Source, split: str, config: DataConfig):
    from inputs.decode import Decoder, find_columns, read_labels

    where = f"data.path={config.path}, split {split!r}"
    rows = source.rows(split, config)
    if len(rows) == 0:
        raise InputError(f"{where}: found no rows; wanted images")
    image_column, label_column = find_columns(rows, config, where)
    labels, classes = read_labels(rows, label_column, where)
    return labels, classes, Decoder(rows, image_column, config, where)


def _digits(config: DataConfig) -> Decoded:
    from sklearn.datasets import load_digits

    content: Any = load_digits()
    pixels = torch.from_numpy(content.images * (255 / 16)).round_().to(torch.uint8)
    pixels = pixels.unsqueeze(1).repeat(1, config.channels, 1, 1)
    if config.size not in (None, 8):
        from torchvision.transforms.v2 import functional as F

        pixels = F.resize(pixels, [config.size, config.size], antialias=True)
    labels = torch.from_numpy(content.target).to(torch.int64)
    return Decoded(pixels, labels, tuple(str(name) for name in content.target_names))


def _locate(path: str) -> _Source:
    place = Path(path)
    if place.is_file():
        if place.suffix != ".parquet":
            raise InputError(
                f"data.path: {path} is a file; wanted a .parquet file, a folder, or a Hub id"
            )
        return _Parquet(path, [place])
    if place.is_dir():
        parquet = sorted(place.rglob("*.parquet"))
        if parquet:
            return _Parquet(path, parquet)
        return _ImageFolder(path)
    hub = _HUB_ID.fullmatch(path)
    # `data/cifar` is a slip of the pen where there is a folder `data`, not a question to the Hub.
    if hub and (place.parent == Path() or not place.parent.exists()):
        return _Hub(hub["id"], hub["revision"])
    return _Absent(path)


def _sign(base: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        name = file.relative_to(base) if file != base else file.name
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Parquet:
    """Files of parquet, put into splits by the names that the Hub gives them."""

    def __init__(self, path: str, files: list[Path]) -> None:
        self.path = path
        self.files: dict[str, list[Path]] = {}
        for file in files:
            name = _PARQUET_NAME.fullmatch(file.name)
            # default/train/0000.parquet: the folder says which split it is.
            split = (name["split"] if name else "") or file.parent.name
            self.files.setdefault(split, []).append(file)
        for split, members in self.files.items():
            folders = sorted({str(member.parent) for member in members})
            if len(folders) > 1:
                raise InputError(
                    f"data.path: {path} has several sets with a split {split!r}, in "
                    f"{', '.join(folders)}; name one of these folders"
                )

    def splits(self) -> list[str]:
        return sorted(self.files)

    def signature(self, split: str) -> str:
        return _sign(Path(self.path), self.files[split])

    def rows(self, split: str, config: DataConfig) -> Dataset:
        import datasets
        from datasets.exceptions import DatasetsError

        files: list[Any] = [str(file) for file in self.files[split]]
        try:
            rows = datasets.Dataset.from_parquet(files, cache_dir=str(config.cache / "arrow"))
        except (DatasetsError, ValueError) as error:
            raise InputError(
                f"data.path: {', '.join(files)} cannot be read as parquet: "
                f"{error.__cause__ or error}; fetch it again"
            ) from error
        assert isinstance(rows, datasets.Dataset)
        return rows


class _ImageFolder:
    """Folders of images named by their class, below train/ and test/ or on their own."""

    def __init__(self, path: str) -> None:
        base = Path(path)
        inside = sorted(entry for entry in base.iterdir() if entry.is_dir())
        if [entry.name for entry in inside] == ["data"]:
            base, inside = inside[0], sorted(e for e in inside[0].iterdir() if e.is_dir())
        split_folders = [entry for entry in inside if entry.name.lower() in _SPLIT_FOLDERS]
        if split_folders and len(split_folders) < len(inside):
            mixed = ", ".join(entry.name for entry in inside)
            raise InputError(
                f"data.path: {path} mixes folders of splits and others ({mixed}); wanted one "
                "folder for each class, or folders of splits alone with the classes below"
            )
        tops = {entry.name: entry for entry in split_folders} or {"train": base}
        self.base = base
        self.files: dict[str, list[Path]] = {}
        self.names: dict[str, list[str]] = {}
        for split, top in tops.items():
            files = sorted(
                file
                for file in top.glob("*/**/*")
                if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file()
            )
            self.files[split] = files
            self.names[split] = [file.relative_to(top).parts[0] for file in files]
        self.classes = sorted({name for names in self.names.values() for name in names})
        if not self.classes:
            raise InputError(
                f"data.path: {path} has no parquet files and no folders of images; wanted "
                "*.parquet, class/image.png or train/class/image.png"
            )

    def splits(self) -> list[str]:
        return sorted(self.files)

    def signature(self, split: str) -> str:
        return _sign(self.base, [file for files in self.files.values() for file in files])

    def rows(self, split: str, config: DataConfig) -> Dataset:
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=self.classes)}
        )
        columns = {
            "image": [str(file) for file in self.files[split]],
            "label": self.names[split],
        }
        return datasets.Dataset.from_dict(columns, features=features)


class _Hub:
    """A set on the Hugging Face Hub; a revision is named in the path, `id@revision`."""

    def __init__(self, identity: str, revision: str | None) -> None:
        self.identity = identity
        self.revision = revision

    def splits(self) -> None:
        return None

    def signature(self, split: str) -> None:
        # The cache file is named by id and revision; asking the Hub for more needs a network.
        return None

    def rows(self, split: str, config: DataConfig) -> Dataset:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            known = datasets.get_dataset_split_names(self.identity, revision=self.revision)
            if split not in known:
                raise InputError(unknown_split(config.path, split, known))
            rows = datasets.load_dataset(self.identity, split=split, revision=self.revision)
        except InputError:
            raise
        except (DatasetsError, OSError, ValueError) as error:
            raise InputError(
                f"data.path: found no file or folder {config.path!r} here, and the Hub gives no "
                f"set of that name: {error}; wanted `digits`, a Hub id, or a path"
            ) from error
        assert isinstance(rows, datasets.Dataset)
        return rows


class _Absent:
    """A path that is not there: all that can be had is what the cache holds of it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def splits(self) -> None:
        return None

    def signature(self, split: str) -> None:
        return None

    def rows(self, split: str, config: DataConfig) -> Dataset:
        place = Path(self.path)
        siblings = sorted(map(str, place.parent.glob("*"))) if place.parent.is_dir() else []
        close = nearest(place, siblings)
        guess = close if "did you mean" in close else ""
        raise InputError(
            f"data.path: no file or folder {self.path!r}{guess}; wanted `digits`, a Hub id, or a "
            "path"
        )


def unknown_split(path: str, split: str, known: list[str]) -> str:
    """What to say where a source has no split of that name."""
    return f"data.path={path}: has no split {split!r}{nearest(split, known)}"
