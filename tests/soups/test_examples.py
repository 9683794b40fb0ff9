"""What a run keeps of each report image, in one file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from inputs.data import ImageSet
from soups.errors import SoupError
from soups.examples import ReportExamples, RowOutcomes, disagreements, thumbnails


def made(rows: int = 40, shown: int = 3) -> ReportExamples:
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=rows)
    return ReportExamples(
        labels,
        tuple(f"Klasse {k} é" for k in range(10)),
        np.arange(shown) * 2,
        rng.integers(256, size=(shown, 3, 8, 6), dtype=np.uint8),
        {
            name: RowOutcomes.of(3 * rng.normal(size=(rows, 10)), labels)
            for name in ("greedy", "a/b", "labels")
        },
    )


def test_outcomes_of_known_logits():
    found = RowOutcomes.of(np.log([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]), np.array([0, 0, 1]))
    assert found.predicted.tolist() == [0, 1, 0]
    assert found.confidence == pytest.approx([0.9, 0.6, 0.5], rel=1e-6)
    assert found.nll == pytest.approx(-np.log([0.9, 0.4, 0.5]), rel=1e-6)
    huge = RowOutcomes.of(np.array([[1e5, 0.0]]), np.array([1]))
    assert (huge.confidence[0], huge.nll[0]) == (1.0, 1e5)
    with pytest.raises(SoupError, match="found 40000 classes"):
        RowOutcomes.of(np.zeros((1, 40_000)), np.array([0]))


def test_examples_come_back(tmp_path: Path):
    examples = made()
    examples.save(tmp_path / "examples.npz")
    found = ReportExamples.load(tmp_path / "examples.npz")
    for name in ("labels", "indices", "thumbnails"):
        wanted, got = getattr(examples, name), getattr(found, name)
        assert got.dtype == wanted.dtype
        assert np.array_equal(got, wanted)
    assert found.classes == examples.classes
    assert [*found.rows] == [*examples.rows]
    for row, outcomes in examples.rows.items():
        for name, values in vars(outcomes).items():
            got = getattr(found.rows[row], name)
            assert got.dtype == values.dtype
            assert np.array_equal(got, values)
        assert np.array_equal(found.right(row), outcomes.predicted == examples.labels)
    found.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "examples.npz").read_bytes()


def test_a_file_of_something_else_is_named(tmp_path: Path):
    path = tmp_path / "examples.npz"
    with pytest.raises(SoupError, match=r"examples\.npz: there is no such file; run"):
        ReportExamples.load(path)
    made().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    broken = [
        arrays | {"greedy/nll": arrays["greedy/nll"][:-1]},
        arrays | {"greedy/nll": arrays["greedy/nll"].astype(np.float64)},
        arrays | {"indices": arrays["indices"] + 1000},
        {name: own for name, own in arrays.items() if name != "greedy/nll"},
        {name: own for name, own in arrays.items() if name != "labels"},
        arrays | {"more": arrays["labels"]},
    ]
    for content in broken:
        np.savez(path, allow_pickle=False, **content)
        with pytest.raises(SoupError, match=r"examples\.npz: not a file of examples"):
            ReportExamples.load(path)
    for junk in (b"", b"not a zip", b"PK\x03\x04broken"):
        path.write_bytes(junk)
        with pytest.raises(SoupError, match=r"examples\.npz: not a file of examples"):
            ReportExamples.load(path)


def test_images_are_shown_where_rows_disagree():
    right = [np.array(own, dtype=bool) for own in ([1, 1, 0, 0, 1], [1, 0, 0, 1, 1])]
    assert disagreements(right).tolist() == [1, 3]
    rng = np.random.default_rng(0)
    many = [rng.random(5000) < 0.7 for _ in range(4)]
    shown = disagreements(many)
    assert len(shown) == 500
    assert np.array_equal(shown, np.unique(shown))
    assert set(shown) <= set(disagreements(many, most=5000))
    assert np.array_equal(shown, disagreements(many))
    # They are drawn from all of the set, and not from its start.
    assert shown.max() > 4500


def images(height: int, width: int) -> ImageSet:
    pixels = torch.full((4, 3, height, width), 100, dtype=torch.uint8)
    pixels[2, :, :, : width // 2] = 200
    return ImageSet(
        "report", ("a",), torch.zeros(4, dtype=torch.long), torch.arange(4), lambda r: pixels[r]
    )


def test_thumbnails_are_what_the_model_sees_at_64_px_at_most():
    small = images(8, 6)
    chosen = np.array([2, 0])
    assert np.array_equal(thumbnails(small, chosen), small.pixels(torch.tensor([2, 0])).numpy())
    found = thumbnails(images(224, 112), chosen)
    assert found.shape == (2, 3, 64, 32)
    assert found.dtype == np.uint8
    assert (found[1] == 100).all()
    assert (found[0][:, :, :14] == 200).all()
    assert (found[0][:, :, 18:] == 100).all()
    assert thumbnails(images(224, 224), chosen[:0]).shape[0] == 0


def test_ten_thousand_images_and_fourteen_rows_stay_below_three_megabytes(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=10_000)
    # Confident as models on CIFAR-10 are; pixels of noise are the worst that can be compressed.
    logits = rng.normal(size=(10_000, 10)) + 6 * np.eye(10)[labels]
    rows = {
        str(row): RowOutcomes.of(logits + rng.normal(size=logits.shape), labels)
        for row in range(14)
    }
    pixels = rng.integers(256, size=(500, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "examples.npz"
    ReportExamples(labels, ("x",) * 10, np.arange(500), pixels, rows).save(path)
    assert path.stat().st_size < 3e6
