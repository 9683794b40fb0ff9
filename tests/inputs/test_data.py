from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs.config import DataConfig
from inputs.data import ImageSet, load_learning_data, load_report_data
from inputs.errors import InputError

BUDGET = 2**30
CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def _all(fraction):
    return {"from": "all", "fraction": fraction}


@settings(max_examples=10, deadline=None)
@given(shares=st.lists(st.floats(0.1, 1), min_size=4, max_size=4), seed=st.integers(0, 3))
def test_digits_splits_share_no_image(shares, seed):
    fit, tune, select, report = (_all(share / sum(shares)) for share in shares)
    config = DataConfig(
        path="digits", fit=fit, tune=tune, select=select, report=report, split_seed=seed, channels=1
    )
    data = load_learning_data(config, memory_budget=BUDGET)
    sets = [
        data.fit,
        data.tune,
        data.select,
        load_report_data(config, memory_budget=BUDGET)["report"],
    ]
    rows = torch.cat([images._rows for images in sets])
    assert len(rows) == len(rows.unique())
    assert sum(map(len, sets)) == len(rows) <= 1797


@pytest.fixture
def digits(data_config):
    parts = {name: _all(0.25) for name in ("fit", "tune", "select", "report")}
    return data_config("digits", channels=1, shifts={"noise": [1, 5], "blur": [2]}, **parts)


def test_the_same_config_gives_the_same_images(digits):
    first = load_learning_data(digits, memory_budget=BUDGET)
    second = load_learning_data(digits, memory_budget=BUDGET)
    rows = torch.arange(20)
    assert torch.equal(first.select.pixels(rows), second.select.pixels(rows))
    other = digits.model_copy(update={"split_seed": 1})
    third = load_learning_data(other, memory_budget=BUDGET)
    assert not torch.equal(first.select.pixels(rows), third.select.pixels(rows))


def test_learning_data_holds_no_report(digits):
    data = load_learning_data(digits, memory_budget=BUDGET)
    names = {value.name for value in vars(data).values() if isinstance(value, ImageSet)}
    assert names == {"fit", "tune", "select"}
    report = load_report_data(digits, memory_budget=BUDGET)
    assert list(report) == ["report", "report_noise_1", "report_noise_5", "report_blur_2"]
    assert all(images.name == name for name, images in report.items())
    assert torch.equal(report["report"].labels, report["report_noise_5"].labels)


def test_batches_in_order_and_shuffled(digits):
    images = load_learning_data(digits, memory_budget=BUDGET).tune
    batches = list(images.batches(100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 100, 49]
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert len(list(images.batches(100, drop_last=True))) == 4
    seed = torch.Generator().manual_seed(3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    shuffled = list(images.batches(100, generator=seed))
    assert torch.equal(torch.cat([labels for _, labels in shuffled]), images.labels[order])
    expected = images.normalise(images.pixels(order[:100]))
    assert torch.equal(shuffled[0][0], expected)


def test_normalise_is_per_channel():
    pixels = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    rows = torch.arange(4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    images = ImageSet("fit", ("a",), rows * 0, rows, pixels.__getitem__, mean=mean, std=std)
    found, _ = next(images.batches(4))
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_subset_of_a_subset(digits):
    images = load_learning_data(digits, memory_budget=BUDGET).select
    part = images.subset(torch.tensor([5, 3, 9])).subset(torch.tensor([2, 0]))
    assert len(part) == 2
    assert torch.equal(part.pixels(torch.arange(2)), images.pixels(torch.tensor([9, 5])))
    assert torch.equal(part.labels, images.labels[[9, 5]])


def test_labels_stay_with_their_images(parquet_folder, data_config):
    config = data_config(parquet_folder)
    data = load_learning_data(config, memory_budget=BUDGET)
    for images in (data.fit, data.tune, data.select):
        numbers = images.pixels(torch.arange(len(images)))[:, 0, 0, 0].long()
        assert torch.equal(numbers % 3, images.labels)
        assert numbers.max() < 40
    report = load_report_data(config, memory_budget=BUDGET)["report"]
    assert sorted(report.pixels(torch.arange(20))[:, 0, 0, 0].tolist()) == list(range(40, 60))


def test_classes_are_numbered_as_in_the_source_of_fit(write_parquet, data_config):
    file = write_parquet("set/train.parquet", {"name": ["c", "a", "b"] * 8})
    write_parquet("set/test.parquet", {"name": ["c", "c", "b"]})
    config = data_config(file.parent, fit={"from": "train", "fraction": 0.5})
    assert load_learning_data(config, memory_budget=BUDGET).classes == ("a", "b", "c")
    report = load_report_data(config, memory_budget=BUDGET)["report"]
    assert report.classes == ("a", "b", "c")
    assert sorted(report.labels.tolist()) == [1, 2, 2]
    write_parquet("set/test.parquet", {"name": ["c", "x", "b"]})
    with pytest.raises(
        InputError, match=r"split 'test' has classes that the source of \*fit\* has n.*x"
    ):
        load_report_data(config, memory_budget=BUDGET)


def test_an_unknown_split_names_the_nearest(parquet_folder, data_config):
    config = data_config(parquet_folder, report={"from": "tests"}, tune={"from": "trian"})
    with pytest.raises(InputError) as caught:
        load_learning_data(config, memory_budget=BUDGET)
    text = str(caught.value)
    assert "has no split 'trian'; did you mean 'train'?" in text
    assert "has no split 'tests'; did you mean 'test'?" in text


def test_overlapping_splits_are_found_before_decoding(parquet_folder, data_config):
    config = data_config(parquet_folder, fit={"from": "train"}, tune={"from": "train"})
    with pytest.raises(
        InputError, match="overlapping splits: 'train' has 40 images, and fit all, tun"
    ):
        load_learning_data(config, memory_budget=BUDGET)
    assert not list(config.cache.glob("*.safetensors"))
    config = data_config(parquet_folder, fit={"from": "train", "count": 41})
    with pytest.raises(InputError, match="fit count 41"):
        load_learning_data(config, memory_budget=BUDGET)


def test_a_class_without_images_is_a_warning(image_folder, data_config, caplog):
    config = data_config(
        image_folder,
        fit={"from": "train", "count": 6},
        tune={"from": "train", "count": 1},
        select={"from": "train", "count": 5},
    )
    load_learning_data(config, memory_budget=BUDGET)
    assert "data.tune: 1 of 2 classes have no image: " in caplog.text
    load_report_data(config, memory_budget=BUDGET)
    assert "data.report: 1 of 2 classes have no image: cat" in caplog.text


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"needs the CIFAR-10 parquet files in {CIFAR10}")
def test_cifar10(data_config):
    parts = {name: {"from": "test", "count": 100} for name in ("fit", "tune", "select", "report")}
    config = data_config(CIFAR10, **parts)
    # A budget of nothing: only the images that are asked for are decoded.
    data = load_learning_data(config, memory_budget=0)
    assert len(data.classes) == 10
    assert data.classes[0] == "airplane"
    images, labels = next(data.select.batches(50))
    assert images.shape == (50, 3, 32, 32)
    assert images.abs().max() <= 1
    assert len(labels.unique()) > 5
