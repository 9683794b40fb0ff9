import json
import os

import pytest
import safetensors.torch
import torch

from inputs.tensor_cache import Decoded, cache_file, read_decoded, write_decoded


@pytest.fixture
def decoded():
    return Decoded(
        torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2), torch.tensor([1, 0]), ("a", "b")
    )


def test_what_is_written_is_read(tmp_path, decoded):
    file = tmp_path / "deep" / "x.safetensors"
    write_decoded(file, decoded, "s")
    assert [entry.name for entry in file.parent.iterdir()] == ["x.safetensors"]
    for signature in ("s", None):
        found = read_decoded(file, signature)
        assert found is not None
        assert torch.equal(found.pixels, decoded.pixels)
        assert torch.equal(found.labels, decoded.labels)
        assert found.classes == decoded.classes
    assert read_decoded(file, "other") is None
    assert read_decoded(tmp_path / "none.safetensors", "s") is None


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_file_is_no_cache(tmp_path, decoded, caplog, keep):
    file = tmp_path / "x.safetensors"
    write_decoded(file, decoded, "s")
    file.write_bytes(file.read_bytes()[:keep])
    assert read_decoded(file, "s") is None
    assert "corrupt image cache" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (
            {"pixels": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)},
            {"classes": '["a"]', "signature": "s"},
        ),
        (
            {"pixels": torch.zeros(2, 1, 2, 2), "labels": torch.zeros(2).long()},
            {"classes": '["a"]', "signature": "s"},
        ),
        (
            {"pixels": torch.zeros(2, 1, 2, 2, dtype=torch.uint8), "labels": torch.ones(2).long()},
            {"classes": '["a"]', "signature": "s"},
        ),
        (
            {"pixels": torch.zeros(2, 1, 2, 2, dtype=torch.uint8), "labels": torch.zeros(2).long()},
            None,
        ),
    ],
)
def test_a_file_of_other_tensors_is_no_cache(tmp_path, caplog, tensors, metadata):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, file, metadata)
    assert read_decoded(file, "s") is None
    assert "corrupt image cache" in caplog.text


def test_a_failed_write_leaves_what_was_there(tmp_path, decoded):
    file = tmp_path / "x.safetensors"
    write_decoded(file, decoded, "s")
    before = file.read_bytes()
    broken = Decoded(decoded.pixels.transpose(2, 3), decoded.labels, decoded.classes)
    with pytest.raises(ValueError, match="contiguous"):
        write_decoded(file, broken, "t")
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_is_named_by_what_decides_its_content(data_config):
    base = data_config("org/animals")
    same = data_config("org/animals/", shifts={"noise": [1]}, mean=[0.1])
    assert cache_file(base, "train") == cache_file(same, "train")
    others = [
        data_config("org/plants"),
        data_config("org/animals", size=9),
        data_config("org/animals", channels=1),
        data_config("org/animals", image_column="img"),
        data_config("org/animals", label_column="img"),
    ]
    files = {cache_file(config, "train") for config in [base, *others]} | {cache_file(base, "test")}
    assert len(files) == 7
    assert cache_file(base, "train").name.startswith("animals-train-")
    assert json.dumps(str(base.cache))
