import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from inputs.errors import InputError
from inputs.sources import find_split, known_splits

BUDGET = 2**30


def _pixels(config, split, budget=BUDGET):
    source = find_split(config, split)
    return source.open(budget)(torch.arange(len(source.labels)))


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("budget", [BUDGET, 1])
def test_parquet_in_the_layout_of_the_hub(parquet_folder, data_config, pixels, budget):
    config = data_config(parquet_folder)
    assert known_splits(config) == ["test", "train"]
    train = find_split(config, "train")
    assert train.classes == ("cat", "dog", "eel")
    assert train.labels.tolist() == [row % 3 for row in range(40)]
    assert torch.equal(_pixels(config, "train", budget), _tensor(pixels[:40]))
    assert torch.equal(_pixels(config, "test", budget), _tensor(pixels[40:]))
    assert len(list(config.cache.glob("*.safetensors"))) == (2 if budget == BUDGET else 0)


def test_rows_in_any_order_with_repeats(parquet_folder, data_config, pixels):
    for budget in (1, BUDGET):
        read = find_split(data_config(parquet_folder), "train").open(budget)
        assert torch.equal(read(torch.tensor([7, 3, 7])), _tensor(pixels[[7, 3, 7]]))
        assert read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)
        with pytest.raises(IndexError):
            read(torch.tensor([3, 40]))


@pytest.mark.parametrize("size", [8, 11])
def test_images_in_memory_are_copied_by_row(data_config, size):
    read = find_split(data_config("digits", size=size), "all").open(BUDGET)
    every = read(torch.arange(1797))
    rows = torch.tensor([5, 0, 5, 1796])
    found = read(rows)
    assert torch.equal(found, every[rows])
    assert found.is_contiguous()
    found.zero_()
    assert torch.equal(read(rows), every[rows])
    with pytest.raises(IndexError):
        read(torch.tensor([1797]))


def test_the_cache_is_read_again_and_follows_its_source(parquet_folder, data_config, caplog):
    config = data_config(parquet_folder)
    before = _pixels(config, "train")
    (file,) = config.cache.glob("*.safetensors")
    made = file.stat().st_mtime_ns
    assert torch.equal(_pixels(config, "train"), before)
    assert file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(_pixels(config, "train"), before)
    assert "corrupt image cache" in caplog.text
    shard = parquet_folder / "train-00001-of-00002.parquet"
    os.remove(shard)
    assert len(_pixels(config, "train")) == 20


def test_a_carried_cache_needs_no_other_library(parquet_folder, data_config):
    config = data_config(parquet_folder)
    for split in ("train", "test"):
        _pixels(config, split)
    code = f"""
import sys
for name in ("datasets", "PIL", "sklearn", "torchvision", "pyarrow"):
    sys.modules[name] = None
from inputs.config import DataConfig
from inputs.data import load_learning_data, load_report_data
config = DataConfig.model_validate_json({config.model_dump_json(by_alias=True)!r})
data = load_learning_data(config, memory_budget={BUDGET})
assert next(data.fit.batches(4))[0].shape == (4, 3, 8, 8)
assert len(load_report_data(config, memory_budget={BUDGET})["report"]) == 20
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    parquet_folder.rename(parquet_folder.with_name("gone"))
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_of_other_writers_and_named_columns(write_parquet, data_config, pixels):
    labels = ["b", "a", "c", "b"]
    file = write_parquet("data/train.parquet", {"name": labels, "id": [4, 3, 2, 1]})
    with pytest.raises(
        InputError, match=r"2 columns that may be the label: name, id; .*data\.label"
    ):
        find_split(data_config(file), "train")
    config = data_config(file, label_column="name")
    source = find_split(config, "train")
    assert source.classes == ("a", "b", "c")
    assert source.labels.tolist() == [1, 0, 2, 1]
    assert torch.equal(_pixels(config, "train"), _tensor(pixels[:4]))
    source = find_split(data_config(file.parent, label_column="id"), "train")
    assert source.classes == ("1", "2", "3", "4")
    assert source.labels.tolist() == [3, 2, 1, 0]
    with pytest.raises(
        InputError, match=r"data\.label_column: no column 'nam'; did you mean 'name'"
    ):
        find_split(data_config(file, label_column="nam"), "train")


def test_parquet_in_folders_of_splits(write_parquet, data_config, tmp_path):
    write_parquet("set/default/train/0000.parquet", {"y": [0, 1]})
    write_parquet("set/default/test/0000.parquet", {"y": [0]})
    config = data_config(tmp_path / "set")
    assert known_splits(config) == ["test", "train"]
    assert len(find_split(config, "train").labels) == 2
    write_parquet("set/other/train/0000.parquet", {"y": [0, 1]})
    with pytest.raises(InputError, match=r"several sets with a split 'train', in .*name one"):
        known_splits(config)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"y": [0, None]}, "column 'y' holds NoneType, int; wanted labels"),
        ({"y": [0, -1]}, None),
        ({"z": [0.5, 1.5]}, "found no label column among image, z"),
    ],
)
def test_labels_that_are_none(write_parquet, data_config, columns, text):
    file = write_parquet("train.parquet", columns)
    if text is None:  # an undeclared -1 is a class like any other
        assert find_split(data_config(file), "train").classes == ("-1", "0")
        return
    with pytest.raises(InputError, match=text):
        find_split(data_config(file), "train")


def test_hidden_labels_are_refused(tmp_path, data_config, pixels):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a"])})
    image = Image.fromarray(pixels[0])
    rows = Dataset.from_dict({"image": [image, image], "label": [0, -1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        InputError, match=r"1 of 2 images have no label in 'label', the first in row 1"
    ):
        find_split(data_config(tmp_path / "train.parquet"), "train")


def test_a_truncated_parquet_file(parquet_folder, data_config):
    file = parquet_folder / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet cannot be read as parquet"):
        find_split(data_config(parquet_folder), "test")


def test_image_folders_with_splits(image_folder, data_config, pixels):
    config = data_config(image_folder)
    assert known_splits(config) == ["test", "train"]
    train, test = find_split(config, "train"), find_split(config, "test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    assert test.labels.tolist() == [1, 1]
    assert torch.equal(_pixels(config, "train"), _tensor(pixels[:12]))
    assert torch.equal(_pixels(config, "test", budget=1), _tensor(pixels[12:14]))


def test_image_folders_of_classes_alone(image_folder, data_config):
    config = data_config(image_folder / "train")
    assert known_splits(config) == ["train"]
    assert find_split(config, "train").classes == ("cat", "dog")
    (image_folder / "other").mkdir()
    with pytest.raises(
        InputError, match=r"mixes folders of splits and others \(other, test, train\)"
    ):
        known_splits(data_config(image_folder))


def test_a_folder_without_images(tmp_path, data_config):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="has no parquet files and no folders of images"):
        known_splits(data_config(tmp_path / "empty"))


def test_size_and_channels(image_folder, data_config, pixels):
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(image_folder / "test" / "dog" / "x.png")
    with pytest.raises(
        InputError, match=r"row 2 is 20x12, the one in row 0 is 8x8; set data\.size"
    ):
        _pixels(data_config(image_folder), "test")
    assert _pixels(data_config(image_folder, size=6), "test").shape == (3, 3, 6, 6)
    grey = _pixels(data_config(image_folder, channels=1), "train")
    expected = np.array(Image.fromarray(pixels[0]).convert("L"))
    assert grey.shape == (12, 1, 8, 8)
    assert torch.equal(grey[0, 0], torch.from_numpy(expected))


def test_files_that_are_no_images(image_folder, data_config):
    bad = image_folder / "test" / "dog" / "99.png"
    bad.write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"split 'test': the image in row 2 \(.*99\.png\) cannot be d"
    ):
        _pixels(data_config(image_folder), "test")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(bad)
    with pytest.raises(InputError, match="has mode 'I;16'; wanted 8 bits per channel"):
        _pixels(data_config(image_folder), "test")


def test_a_path_that_is_not_there(tmp_path, data_config, parquet_folder):
    config = data_config(tmp_path / "animal")
    with pytest.raises(InputError, match=r"no file or folder '.*animal'; did you mean '.*animals'"):
        find_split(config, "train")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(
        InputError, match=r"x\.csv is a file; wanted a \.parquet file, a folder, or a H"
    ):
        find_split(data_config(tmp_path / "x.csv"), "train")


def test_a_hub_id_that_cannot_be_reached(data_config):
    config = data_config("no-such-org/no-such-set")
    code = f"""
from inputs.config import DataConfig
from inputs.sources import find_split
find_split(DataConfig.model_validate_json({config.model_dump_json(by_alias=True)!r}), "train")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "InputError: data.path: found no file or folder 'no-such-org/no-such-set'" in run.stderr


def test_digits(data_config):
    config = data_config("digits", channels=1)
    assert known_splits(config) == ["all"]
    source = find_split(config, "all")
    images = source.open(BUDGET)(torch.arange(1797))
    assert images.shape == (1797, 1, 8, 8)
    assert (images.dtype, int(images.max())) == (torch.uint8, 255)
    assert source.classes == tuple("0123456789")
    assert source.labels[:4].tolist() == [0, 1, 2, 3]
    large = find_split(data_config("digits", size=16), "all").open(BUDGET)(torch.arange(2))
    assert large.shape == (2, 3, 16, 16)
