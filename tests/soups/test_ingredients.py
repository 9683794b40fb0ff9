"""Some of a zoo's ingredients, drawn by a seed."""

from pathlib import Path

import pytest

from inputs.models import build_model
from soups.errors import SoupError
from soups.ingredients import draw_subset, open_zoo
from tests.soups.conftest import make_config

PATHS = [f"{k:02d}.safetensors" for k in range(16)]


def test_a_subset_keeps_its_order_and_is_in_every_larger_one():
    for seed in range(5):
        few, more = draw_subset(PATHS, 4, seed), draw_subset(PATHS, 8, seed)
        assert len(few) == 4
        assert few == sorted(few)
        assert set(few) < set(more)
    assert draw_subset(PATHS, 16, 3) == PATHS
    drawn = {tuple(draw_subset(PATHS, 4, seed)) for seed in range(20)}
    assert len(drawn) > 15
    # Every ingredient can be drawn.
    assert {path for subset in drawn for path in subset} == set(PATHS)


def test_a_subset_larger_than_the_zoo():
    with pytest.raises(SoupError, match=r"zoo\.subset: 17 is more than the 16 ingredients"):
        draw_subset(PATHS, 17, 0)


def test_only_the_subset_is_opened(kitchen: Path, tmp_path: Path):
    config = make_config(kitchen)
    model = build_model(config.model, classes=10, channels=1, root=kitchen)
    chosen = config.zoo.model_copy(update={"subset": 2})
    zoos = [
        open_zoo(
            chosen, model, cache=tmp_path / "scans", memory_budget=2**30, progress=False, seed=seed
        )
        for seed in range(4)
    ]
    for seed, zoo in enumerate(zoos):
        expected = draw_subset([f"{k:02d}" for k in range(5)], 2, seed)
        assert list(zoo.names) == expected
        assert len(zoo.checkpoints) == len(zoo.ingredients) == 2
        assert zoo.base is not None
    assert len({zoo.names for zoo in zoos}) > 1
