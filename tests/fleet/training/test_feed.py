import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fleet.errors import FleetError
from fleet.recipes import Recipe
from fleet.training.feed import Feed, load, targets
from inputs.data import ImageSet
from inputs.randomness import generator

CLASSES = 5


def some_images(
    count: int = 23, shape: tuple[int, ...] = (2, 6, 7), seed: int = 0, reads: list | None = None
) -> ImageSet:
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *shape), generator=draws, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count,), generator=draws)

    def read(rows: torch.Tensor) -> torch.Tensor:
        if reads is not None:
            reads.append(rows)
        return pixels[rows]

    names = tuple(map(str, range(CLASSES)))
    return ImageSet(
        "fit", names, labels, torch.arange(count), read, mean=(0.4, 0.5), std=(0.2, 0.3)
    )


IMAGES = some_images()


def feed(images: ImageSet = IMAGES, stream: str = "fit", epochs: int = 3, **recipe) -> Feed:
    return Feed(images, Recipe(**{"batch_size": 8, **recipe}), CLASSES, stream, epochs)


def test_steps_with_and_without_the_last_batch():
    whole, ragged = feed(), feed(drop_last=False)
    assert (whole.steps_per_epoch, whole.steps) == (2, 6)
    assert (ragged.steps_per_epoch, ragged.steps) == (3, 9)
    assert [ragged.rows(step) for step in range(4)] == [8, 8, 7, 8]
    assert [len(ragged.indices(step)) for step in range(4)] == [8, 8, 7, 8]
    assert feed(batch_size=50, drop_last=False).rows(1) == 23


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    one = feed(drop_last=False)
    epochs = [torch.cat([one.indices(e * 3 + step) for step in range(3)]) for e in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(23))
    assert not torch.equal(epochs[0], epochs[1])
    wanted = torch.randperm(23, generator=generator(0, "fit/1/order"))
    assert torch.equal(epochs[1], wanted)
    assert not torch.equal(feed(stream="head").indices(0), one.indices(0))
    assert not torch.equal(feed(seed=1).indices(0), one.indices(0))


def test_plain_pixels_are_the_normalised_images():
    feeds = [feed(seed=s, label_smoothing=0.1) for s in range(3)]
    assert all(one.plain for one in feeds)
    batch = load(feeds, [0, 3, 5])
    for m, (one, step) in enumerate(zip(feeds, [0, 3, 5], strict=True)):
        indices = one.indices(step)
        assert torch.equal(batch.pixels[m], IMAGES.normalise(IMAGES.pixels(indices)))
    assert torch.equal(targets(feeds, [0, 3, 5], torch.float32), batch.targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_cross_entropy_of_the_targets_is_torchs(smoothing, mixup):
    one = feed(label_smoothing=smoothing, mixup=mixup)
    batch = load([one], [1], dtype=torch.float64)
    labels = IMAGES.labels[one.indices(1)]
    logits = torch.randn(8, CLASSES, dtype=torch.float64)
    wanted = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if mixup:
        weight, partners = parts_of_mixup(one, 1)
        second = F.cross_entropy(logits, labels[partners], label_smoothing=smoothing)
        wanted = weight * wanted + (1 - weight) * second
    found = F.cross_entropy(logits, batch.targets[0])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch.targets.sum(2), torch.ones(1, 8, dtype=torch.float64))


def parts_of_mixup(one: Feed, step: int) -> tuple[float, torch.Tensor]:
    """λ and partners, told from pixels alone."""
    own = load([feed(seed=one.recipe.seed)], [step], dtype=torch.float64).pixels[0].flatten(1)
    mixed = load([one], [step], dtype=torch.float64).pixels[0].flatten(1)
    partners, weights = [], []
    for image, result in zip(own, mixed, strict=True):
        along = own - image
        shares = ((result - image) * along).sum(1) / along.square().sum(1).clamp(min=1e-9)
        misses = (image + shares[:, None] * along - result).square().sum(1)
        partners.append(int(misses.argmin()))
        weights.append(1 - shares[partners[-1]])
    moved = [w for place, w in enumerate(weights) if partners[place] != place]
    assert max(moved) - min(moved) < 1e-9
    return float(moved[0]), torch.tensor(partners)


def test_mixups_weights_are_beta_and_partners_any():
    many = feed(some_images(2000), mixup=0.4, batch_size=2, epochs=1)
    drawn, swapped = [], 0
    for step in range(400):
        soft = targets([many], [step], torch.float64)[0]
        labels = many.images.labels[many.indices(step)]
        if labels[0] == labels[1]:
            continue
        weight = float(soft[0, labels[0]])
        if weight < 1:
            drawn.append(weight)
        swapped += weight < 1
    different = sum(
        bool(many.images.labels[many.indices(s)].unique().numel() == 2) for s in range(400)
    )
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert stats.binomtest(swapped, different, 0.5).pvalue > 1e-3


def test_flips_and_shifts_move_pixels_before_they_are_normalised():
    one = feed(flip=True, shift=2, batch_size=23)
    moved = load([one], [0]).pixels[0]
    originals = IMAGES.normalise(IMAGES.pixels(one.indices(0)))
    found = set()
    for before, after in zip(originals, moved, strict=True):
        padded = F.pad(before, [2] * 4, mode="reflect")
        windows = {
            (down, across): padded[:, down : down + 6, across : across + 7]
            for down in range(5)
            for across in range(5)
        }
        places = [
            (place, mirrored)
            for place, window in windows.items()
            for mirrored in (False, True)
            if torch.equal(window.flip(2) if mirrored else window, after)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 10


def test_noise_has_its_deviation_at_every_step():
    feeds = [feed(some_images(400), noise=sigma, batch_size=400) for sigma in (0.0, 0.1, 2.0)]
    plain = load(feeds[:1], [0]).pixels[0]
    first, second = (load(feeds, [step] * 3).pixels for step in (0, 1))
    assert torch.equal(first[0], plain)
    for sigma, noisy in zip((0.1, 2.0), first[1:], strict=True):
        noise = noisy - plain
        assert noise.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(noise.mean().item()) < 0.02 * sigma
    assert not torch.equal(first[1] - plain, second[1] - load(feeds[:1], [1]).pixels[0])


SOME_RECIPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "flip": st.booleans(),
        "shift": st.integers(0, 3),
        "noise": st.sampled_from([0.0, 0.2]),
        "mixup": st.sampled_from([0.0, 0.3]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
    }
)
OTHER_IMAGES = some_images(17, seed=1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(SOME_RECIPES, st.integers(0, 5), st.booleans()), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_model_sees_the_same_alone_with_others_and_out_of_order(models, dtype):
    feeds = [feed(OTHER_IMAGES if other else IMAGES, **recipe) for recipe, _, other in models]
    steps = [step for _, step, _ in models]
    batch = load(feeds, steps, dtype=dtype)
    assert batch.pixels.dtype == batch.targets.dtype == dtype
    for m, ((recipe, step, other), together) in enumerate(zip(models, feeds, strict=True)):
        fresh = feed(OTHER_IMAGES if other else IMAGES, **recipe)
        load([fresh], [(step + 3) % 6])
        alone = load([fresh], [step], dtype=dtype)
        assert torch.equal(batch.pixels[m], alone.pixels[0])
        assert torch.equal(batch.targets[m], alone.targets[0])
        assert torch.equal(targets([together], [step], dtype), alone.targets)


def test_one_read_for_each_set():
    reads: list = []
    shared = some_images(reads=reads)
    feeds = [feed(shared, seed=s) for s in range(4)]
    reads.clear()
    load(feeds, [0, 1, 2, 3])
    assert [len(rows) for rows in reads] == [32]


def test_large_images_are_decoded_once_where_several_models_see_them():
    reads: list = []
    large = some_images(shape=(2, 100, 100), reads=reads)
    feeds = [feed(large, seed=s, batch_size=20) for s in range(4)]
    reads.clear()
    batch = load(feeds, [0] * 4)
    (rows,) = reads
    assert len(rows) == len(rows.unique()) <= 23
    for m, one in enumerate(feeds):
        assert torch.equal(batch.pixels[m], large.normalise(large.pixels(one.indices(0))))


def test_reading_leaves_the_images_as_they_are():
    pixels = torch.randint(0, 256, (23, 2, 6, 7), dtype=torch.uint8)
    before = pixels.clone()
    held = ImageSet(
        "fit", IMAGES.classes, IMAGES.labels, torch.arange(23), pixels.__getitem__, std=(0.5,)
    )
    recipes = [{"flip": True, "shift": 1, "noise": 0.1, "mixup": 0.2}, {}]
    load([feed(held, **recipe) for recipe in recipes], [0, 0])
    assert torch.equal(pixels, before)


def test_what_cannot_be_one_batch():
    with pytest.raises(FleetError, match=r"\[7, 8\] rows"):
        load([feed(drop_last=False), feed()], [2, 1])
    with pytest.raises(FleetError, match=r"\[5, 6\] classes"):
        load([feed(), Feed(IMAGES, Recipe(batch_size=8), 6, "fit", 1)], [0, 0])


def test_a_set_that_does_not_fit():
    with pytest.raises(FleetError, match="has 23 images, one batch takes 24; lower batch_size"):
        feed(batch_size=24)
    with pytest.raises(FleetError, match="a label 4, the model 4 classes"):
        Feed(IMAGES, Recipe(batch_size=8), 4, "fit", 1)


def test_a_batch_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load([feed()], [0]).pixels = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]
