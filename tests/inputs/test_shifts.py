from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs.data import ImageSet
from inputs.shifts import Shift, shift_image

KINDS = get_args(Shift)


def _images(rows=20, channels=3, side=16):
    content = torch.randint(
        0, 256, (rows, channels, side // 4, side // 4), generator=torch.Generator().manual_seed(0)
    )
    return content.repeat_interleave(4, -1).repeat_interleave(4, -2).to(torch.uint8)


def _set(pixels):
    rows = torch.arange(len(pixels))
    return ImageSet("report", ("a", "b"), rows % 2, rows, pixels.__getitem__)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(20)), batch_size=st.integers(1, 20))
def test_order_and_batch_size_change_nothing(kind, order, batch_size):
    shifted = _set(_images()).shifted(kind, 3, seed=0)
    whole = shifted.pixels(torch.arange(20))
    order = torch.tensor(order)
    parts = [shifted.pixels(part) for part in order.split(batch_size)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert torch.equal(shifted.subset(order[:3]).pixels(torch.arange(3)), whole[order[:3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_more_severity_changes_more(kind, channels, side):
    images = _images(channels=channels, side=side)
    base = _set(images)
    distances = [
        (base.shifted(kind, severity, seed=0).pixels(torch.arange(20)).float() - images.float())
        .abs()
        .mean()
        for severity in range(1, 6)
    ]
    assert distances[0] > 0.5
    # Rotated blocks overlap by chance, so rotation is only compared at its ends.
    assert distances[0] < distances[4]
    if kind != "rotation":
        assert distances == sorted(distances)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_type_stay(kind):
    image = torch.randint(0, 256, (3, 7, 5), dtype=torch.uint8)
    shifted = shift_image(image, kind, 5, seed=0, row=0)
    assert (shifted.shape, shifted.dtype) == (image.shape, image.dtype)


def test_noise_has_the_size_it_says():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    for severity in (1, 2):
        noise = shift_image(grey, "noise", severity, seed=0, row=4).float() - 128
        assert noise.std() / 255 == pytest.approx(0.06 * severity, rel=0.03)


def test_each_row_and_seed_has_its_own_noise():
    grey = torch.full((1, 8, 8), 128, dtype=torch.uint8)
    made = [shift_image(grey, "noise", 1, seed=s, row=r) for s, r in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_rotation_goes_both_ways():
    image = torch.zeros(1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4] = 255
    tops = {
        bool(shift_image(image, "rotation", 5, seed=0, row=row)[0, :, :4].sum() > 0)
        for row in range(20)
    }
    assert tops == {True, False}
