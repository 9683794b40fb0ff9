"""Folds: every row once, every class in its share, and what is said where images are few."""

import logging
import re

import pytest
import torch

from inputs.randomness import generator
from soups.errors import SoupError
from soups.folds import fold_count, split_folds


def labels_of(*counts: int) -> torch.Tensor:
    """So many images of each class, in no order."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("counts", [(10, 10, 10), (1, 13, 4, 9), (7, 0, 2)])
def test_every_row_is_in_one_fold_and_every_class_in_its_share(counts, count):
    labels = labels_of(*counts)
    folds = split_folds(labels, count, generator(0, "folds"))
    assert len(folds) == count
    assert torch.cat(folds).sort().values.equal(torch.arange(len(labels)))
    assert all(fold.equal(fold.sort().values) for fold in folds)
    sizes = torch.tensor([len(fold) for fold in folds])
    shares = torch.stack([labels[fold].bincount(minlength=len(counts)) for fold in folds])
    assert sizes.max() - sizes.min() <= 1
    assert (shares.max(0).values - shares.min(0).values).max() <= 1


def test_folds_follow_their_stream():
    labels = labels_of(20, 20)
    first, again, other = (split_folds(labels, 4, generator(0, name)) for name in ("a", "a", "b"))
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert not all(x.equal(y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("count", [0, 4])
def test_folds_without_images_are_refused(count):
    with pytest.raises(SoupError, match=rf"found {count} for 3 images"):
        split_folds(torch.tensor([0, 1, 1]), count, generator(0, "folds"))


@pytest.mark.parametrize(
    ("counts", "found", "said"),
    [
        ((50, 60), 5, None),
        ((50, 3), 3, "x.folds: 3 folds instead of 5, since class 1 has 3 images in select"),
        ((50, 0, 2), 2, "since class 2 has 2 images in select"),
        ((1, 1, 1), 3, "since select has 3 images"),
        ((50, 1), 5, r"1 classes have one image in select \(1\)"),
        ((1, 1), 2, "2 folds instead of 5"),
    ],
)
def test_too_few_images_of_a_class_give_fewer_folds(counts, found, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert fold_count(labels_of(*counts), 5, where="x.folds") == found
    if said is None:
        assert not caplog.messages
    else:
        assert any(re.search(said, message) for message in caplog.messages)


def test_with_that_many_folds_no_training_part_misses_a_class():
    labels = labels_of(40, 4, 9)
    count = fold_count(labels, 6, where="x")
    for fold in split_folds(labels, count, generator(0, "folds")):
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[fold] = False
        assert set(labels[rest].tolist()) == set(labels[fold].tolist()) == {0, 1, 2}


def test_one_image_cannot_be_cross_fitted():
    with pytest.raises(SoupError, match="at least 2 images, and select has 1"):
        fold_count(torch.tensor([3]), 5, where="out_of_fold")
