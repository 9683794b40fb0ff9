"""Small real image sets on disk."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inputs.config import DataConfig

SIDE = 8


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pixels():
    """uint8 images [60, height, width, 3]; the first pixel of each holds its number."""
    images = np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(60)
    return images


@pytest.fixture
def parquet_folder(tmp_path, pixels):
    """A folder as the Hub lays it out: train in two shards of 20, test with 20, three classes."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    folder = tmp_path / "animals"
    folder.mkdir()
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog", "eel"])})
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]
    for shard, name in enumerate(names):
        rows = range(20 * shard, 20 * shard + 20)
        columns = {
            "img": [{"bytes": _png(pixels[row]), "path": None} for row in rows],
            "label": [row % 3 for row in rows],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def write_parquet(tmp_path, pixels):
    """write_parquet(name, columns) → file, with an `image` column as pyarrow alone writes it."""

    def write(name: str, columns: dict, images: np.ndarray | None = None) -> Path:
        count = len(next(iter(columns.values())))
        stored = [
            {"bytes": _png(image)} for image in (pixels if images is None else images)[:count]
        ]
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": stored, **columns}), file)
        return file

    return write


@pytest.fixture
def image_folder(tmp_path, pixels):
    """train/<class>/*.png with 6 images of cat and dog, test/ with 2 of dog alone."""
    folder = tmp_path / "photos"
    for row, name in enumerate(["train/cat"] * 6 + ["train/dog"] * 6 + ["test/dog"] * 2):
        file = folder / name / f"{row:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_png(pixels[row]))
    return folder


@pytest.fixture
def data_config(tmp_path):
    """data_config(path, **changes) → a DataConfig with splits of train and test."""

    def make(path: str | Path, **changes) -> DataConfig:
        settings = {
            "path": str(path),
            "fit": {"from": "train", "count": 12},
            "tune": {"from": "train", "fraction": 0.25},
            "select": {"from": "train", "fraction": 0.25},
            "report": {"from": "test"},
            "cache": tmp_path / "cache",
        }
        return DataConfig(**{**settings, **changes})

    return make
