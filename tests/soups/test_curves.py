"""Curves as a table and as a picture, and TensorBoard's event files."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import soups.curves
from fleet.recipes import Recipe
from fleet.training.trainee import Point
from inputs.figures import GREY, ORANGE, picture_files
from soups.curves import CURVES_FILE, PICTURE_FILE, TYPES, Curves, read_curves
from soups.errors import SoupError
from soups.event_files import EventFiles, remove_event_files
from soups.plots.training import draw_curves

IMAGES = 100


def points_of(
    name: str, epochs: int, recipe: Recipe, *, speed: float = 0.5, state: str = "done"
) -> list[Point]:
    """What a training without noise would give: two points in each epoch."""
    batches = IMAGES / recipe.batch_size
    per_epoch = math.floor(batches) if recipe.drop_last else math.ceil(batches)
    phases = [("head", recipe.head_epochs), ("fit", epochs)]
    found = []
    for phase, count in phases:
        for half in range(1, 2 * count + 1):
            step = half * per_epoch // 2
            loss = 2 * math.exp(-speed * step / per_epoch)
            scored = half % 2 == 0
            last = phase == "fit" and half == 2 * count
            found.append(
                Point(
                    name=name,
                    phase=phase,  # pyright: ignore[reportArgumentType]
                    epoch=(half + 1) // 2,
                    step=step,
                    loss=loss,
                    lr=1e-3,
                    grad_norm=1.0,
                    tune_accuracy=1 - 0.4 * loss if scored else None,
                    tune_loss=loss if scored else None,
                    seconds=0.1 * half,
                    state=state if last else "training",  # pyright: ignore[reportArgumentType]
                )
            )
    return found


def written(folder: Path, recipes: dict[str, Recipe], points: list[Point]) -> pd.DataFrame:
    Curves(folder, recipes, IMAGES).finish(points)
    return read_curves(folder / CURVES_FILE)


def test_a_row_for_each_point(tmp_path: Path):
    recipe = Recipe(batch_size=10, epochs=2)
    points = points_of("00", 2, recipe)
    table = written(tmp_path, {"00": recipe}, points)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == TYPES
    assert table["trained_epochs"].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert table["step"].tolist() == [5, 10, 15, 20]
    assert table["state"].tolist() == ["training"] * 3 + ["done"]
    assert table["loss"].tolist() == [point.loss for point in points]
    assert np.isnan(table["tune_accuracy"]).tolist() == [True, False, True, False]


@pytest.mark.parametrize(("drop_last", "per_epoch"), [(True, 3), (False, 4)])
def test_epochs_have_as_many_steps_as_the_recipe_makes(
    tmp_path: Path, drop_last: bool, per_epoch: int
):
    recipe = Recipe(batch_size=30, epochs=1, drop_last=drop_last, head_epochs=2)
    points = points_of("00", 1, recipe)
    table = written(tmp_path, {"00": recipe}, points)
    ends = table[table["tune_accuracy"].notna()]
    assert ends["step"].tolist() == [per_epoch, 2 * per_epoch, per_epoch]
    assert ends["trained_epochs"].tolist() == [-1, 0, 1]


def test_models_that_were_trained_before_stay(tmp_path: Path):
    recipe = Recipe(batch_size=10)
    first = {"base": points_of("base", 3, recipe), "00": points_of("00", 1, recipe)}
    written(tmp_path, {"base": recipe, "00": recipe}, [*chain(*first.values())])
    again = {"00": points_of("00", 2, recipe), "01": points_of("01", 2, recipe)}
    table = written(tmp_path, {"00": recipe, "01": recipe}, [*chain(*again.values())])
    assert table.groupby("name").size().to_dict() == {"base": 6, "00": 4, "01": 4}


def test_the_picture_is_drawn_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe(batch_size=10)
    points = points_of("00", 1, recipe)
    curves = Curves(tmp_path, {"00": recipe}, IMAGES)
    curves.write(points)
    assert {file.name for file in tmp_path.iterdir()} == {CURVES_FILE}
    monkeypatch.setattr(soups.curves, "SECONDS_BETWEEN_PICTURES", 0.0)
    curves.write(points)
    pictures = {file.name for file in picture_files(PICTURE_FILE)}
    assert {file.name for file in tmp_path.iterdir()} == {CURVES_FILE, *pictures}


def test_no_points_no_files(tmp_path: Path):
    Curves(tmp_path, {"00": Recipe()}, IMAGES).finish([])
    assert not list(tmp_path.iterdir())
    assert read_curves(tmp_path / CURVES_FILE).empty


@pytest.mark.parametrize("content", [b"", b"no parquet at all, and long enough to look at"])
def test_another_file_in_the_place_of_the_table(tmp_path: Path, content: bytes):
    (tmp_path / CURVES_FILE).write_bytes(content)
    with pytest.raises(SoupError, match=r"curves\.parquet: is not a table of curves"):
        Curves(tmp_path, {}, IMAGES)
    pd.DataFrame({"name": ["00"]}).to_parquet(tmp_path / CURVES_FILE)
    with pytest.raises(SoupError, match="'phase'"):
        Curves(tmp_path, {}, IMAGES)


# --- the picture ---------------------------------------------------------------------------------


def picture(folder: Path, trained: dict[str, list[Point]], recipe: Recipe) -> Figure:
    table = written(folder, dict.fromkeys(trained, recipe), [*chain(*trained.values())])
    return draw_curves(table)


def names_in(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_all_models_are_drawn_the_best_first(tmp_path: Path):
    recipe = Recipe(batch_size=10)
    trained = {f"{i:02d}": points_of(f"{i:02d}", 4, recipe, speed=0.2 + 0.1 * i) for i in range(16)}
    figure = picture(tmp_path, trained, recipe)
    left, right = figure.axes
    assert len(left.lines) == len(right.lines) == 16
    accuracy = 100 * (1 - 0.8 * math.exp(-1.7 * 4))
    assert names_in(figure)[0] == f"15  {accuracy:.1f}%"
    assert [name[:2] for name in names_in(figure)] == [f"{i:02d}" for i in reversed(range(16))]
    best = next(line for line in right.lines if str(line.get_label()).startswith("15"))
    np.testing.assert_allclose(np.asarray(best.get_xdata()), [1, 2, 3, 4])
    assert float(np.asarray(best.get_ydata())[-1]) == pytest.approx(accuracy)
    assert len({to_hex(line.get_color()) for line in right.lines}) == 16


def test_losses_are_means_of_the_epoch_before(tmp_path: Path):
    recipe = Recipe(batch_size=10, head_epochs=1)
    points = points_of("00", 2, recipe)
    left, _ = picture(tmp_path, {"00": points}, recipe).axes
    line = left.lines[0]
    np.testing.assert_allclose(np.asarray(line.get_xdata()), [-0.5, 0, 0.5, 1, 1.5, 2])
    a, b, c, d, e, f = (point.loss for point in points)
    means = [a, (a + b) / 2, c, (c + d) / 2, (d + e) / 2, (e + f) / 2]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), means)


def test_names_and_page_do_not_touch(tmp_path: Path):
    recipe = Recipe(batch_size=10)
    trained = {f"{i:02d}": points_of(f"{i:02d}", 2, recipe, speed=0.01 * i) for i in range(72)}
    figure = picture(tmp_path, trained, recipe)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    names = legend.get_window_extent()
    assert names.y0 >= 0
    assert names.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert axes.get_window_extent().x1 <= names.x0
        assert axes.get_window_extent().width > 300
    assert sum("between" in name for name in names_in(figure)) == 1
    assert "(32 between)" in names_in(figure)[19]


def test_one_that_left_is_marked_and_does_not_spoil_the_page(tmp_path: Path):
    recipe = Recipe(batch_size=10)
    failed = points_of("01", 2, recipe, speed=-30.0, state="failed")
    failed[-1] = Point(**(vars(failed[-1]) | {"loss": float("inf"), "tune_accuracy": None}))
    trained = {
        "00": points_of("00", 4, recipe),
        "01": failed,
        "02": points_of("02", 1, recipe, state="stopped"),
    }
    figure = picture(tmp_path, trained, recipe)
    left, _ = figure.axes
    low, high = left.get_ylim()
    assert low < 2 * math.exp(-2)
    assert 1.5 < high < 5
    crosses = [line for line in left.lines if line.get_marker() == "x"]
    assert [float(np.asarray(c.get_xdata())[0]) for c in crosses] == [1.0, 2.0]
    assert float(np.asarray(crosses[1].get_ydata())[0]) == pytest.approx(high)
    assert [to_hex(c.get_color()) for c in crosses] == [to_hex(GREY), to_hex(ORANGE)]
    assert names_in(figure)[1:] == ["02 stopped", "01 failed"]


def test_models_without_scores_or_losses_can_be_drawn(tmp_path: Path):
    recipe = Recipe(batch_size=10)
    bare = [
        Point(**(vars(p) | {"loss": float("nan"), "tune_accuracy": None}))
        for p in points_of("00", 1, recipe, state="failed")
    ]
    assert names_in(picture(tmp_path, {"00": bare}, recipe)) == ["00 failed"]


# --- TensorBoard ---------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_event_files_have_every_point_of_every_model(tmp_path: Path):
    pytest.importorskip("tensorboard")
    recipe = Recipe(batch_size=10, head_epochs=1)
    files = EventFiles(tmp_path / "events")
    files.begin(["00", "01"], 100, 0)
    for name in ("00", "01"):
        for point in points_of(name, 2, recipe):
            files.point(point)
    files.advance(10)
    files.end()
    (tmp_path / "events/notes.txt").write_text("mine")
    own = scalars(tmp_path / "events/00")
    assert set(own) == {
        "train/loss",
        "train/lr",
        "train/gradient norm",
        "tune/accuracy",
        "tune/loss",
    }
    assert [step for step, _ in own["train/loss"]] == [5, 10, 15, 20]
    assert [step for step, _ in own["tune/accuracy"]] == [10, 20]
    assert own["train/loss"][-1][1] == pytest.approx(2 * math.exp(-1))
    assert [step for step, _ in scalars(tmp_path / "events/01/head")["train/loss"]] == [5, 10]
    remove_event_files(tmp_path / "events")
    assert [file.name for file in (tmp_path / "events").rglob("*")] == ["notes.txt"]


def test_going_on_purges_what_came_after(tmp_path: Path):
    pytest.importorskip("tensorboard")
    points = points_of("00", 3, Recipe(batch_size=10))
    for part in (points[:5], points[2:]):  # killed after five points, saved after two
        files = EventFiles(tmp_path)
        for point in part:
            files.point(point)
        files.end()
    assert [step for step, _ in scalars(tmp_path / "00")["train/loss"]] == [5, 10, 15, 20, 25, 30]
    remove_event_files(tmp_path / "nowhere")
    remove_event_files(tmp_path)
    assert not tmp_path.exists()
