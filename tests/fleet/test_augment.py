import pytest
import torch
from scipy import stats

from fleet.augment import beta, flip_and_shift, move


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_every_image_is_a_mirrored_and_moved_original(flip: bool, shift: int):
    images = torch.randn(40, 2, 5, 7)
    moved = flip_and_shift(images, flip=flip, shift=shift, generator=seeded())
    found = set()
    for before, after in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(before, [shift] * 4, mode="reflect")
        for down in range(2 * shift + 1):
            for across in range(2 * shift + 1):
                window = padded[:, down : down + 5, across : across + 7]
                for mirrored in (False, True) if flip else (False,):
                    if torch.equal(window.flip(2) if mirrored else window, after):
                        found.add((down, across, mirrored))
                        break
    # Each image was found at one place at least, and the places differ between images.
    assert len(found) >= min(12, (2 * shift + 1) ** 2 * (2 if flip else 1))
    assert moved.shape == images.shape


def test_flips_half_of_the_images():
    images = torch.arange(4.0).expand(2000, 1, 1, 4)
    flipped = flip_and_shift(images, flip=True, shift=0, generator=seeded())[:, 0, 0, 0] == 3
    assert 0.45 < flipped.double().mean() < 0.55


def test_beta_is_the_inverse_of_its_distribution():
    alphas = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    uniform = torch.tensor([0.1, 0.25, 0.9], dtype=torch.float64)
    drawn = beta(alphas, uniform)
    for alpha, share, weight in zip(alphas, uniform, drawn, strict=True):
        assert stats.beta(alpha, alpha).cdf(weight) == pytest.approx(float(share), rel=1e-9)
    assert drawn[1] == uniform[1]
    assert beta(alphas[:1], torch.zeros(1, dtype=torch.float64)).item() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_moves_pixels_of_any_type(dtype):
    images = torch.arange(24).view(2, 1, 3, 4).to(dtype)
    moved = move(images, torch.tensor([[1, 0], [-1, 2]]), torch.tensor([False, True]))
    assert moved.dtype == dtype
    assert moved[0, 0].tolist() == [[5, 4, 5, 6], [9, 8, 9, 10], [5, 4, 5, 6]]
    assert moved[1, 0].tolist() == [[13, 12, 13, 14], [17, 16, 17, 18], [21, 20, 21, 22]]
