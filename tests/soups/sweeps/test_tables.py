"""Tables and the picture over several runs, from tables of known numbers."""

import csv
import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from inputs.config import DataConfig
from soups.config import SweepConfig
from soups.hierarchy import PairedRun, hierarchical_interval
from soups.sweeps.caption import caption
from soups.sweeps.tables import (
    RunResult,
    compare,
    comparison_tables,
    mean_table,
    report_images,
    write_tables,
)

ZOOS, SPLITS, IMAGES, SIZES = ("bn", "ln"), ("0", "1", "2"), ("250", "1000"), ("4", "8")


def settings(**changes) -> SweepConfig:
    axes = {
        "zoo": {zoo: {"zoo.path": zoo} for zoo in ZOOS},
        "split": {"keys": ["seed"], "values": [0, 1, 2]},
        "images": {"keys": ["data.select.count"], "values": [250, 1000]},
        "ingredients": {"keys": "zoo.subset", "values": [4, 8]},
    }
    return SweepConfig.model_validate({"axes": axes} | changes)


def row(learner: str, right: np.ndarray, **values) -> dict[str, str]:
    found = {"learner": learner, "kind": "soup", "report_accuracy": right.mean()}
    found |= {"select_accuracy": 0.9, "out_of_fold_accuracy": "", "seconds": 2.0}
    found |= {"forward_passes": 4, "backward_passes": 1}
    return {key: str(value) for key, value in (found | values).items()}


@pytest.fixture
def runs() -> list[RunResult]:
    """Greedy is right on 70%, pooled on the same and some more, uniform on fewer."""
    rng = np.random.default_rng(0)
    found = []
    for zoo, split, images, size in itertools.product(ZOOS, SPLITS, IMAGES, SIZES):
        greedy = rng.random(300) < 0.7
        pooled = greedy | (rng.random(300) < (0.2 if zoo == "bn" else 0.05))
        uniform = greedy & (rng.random(300) < 0.9)
        right = {"greedy": greedy, "pooled": pooled, "uniform": uniform}
        labels = {"zoo": zoo, "split": split, "images": images, "ingredients": size}
        rows = tuple(row(learner, outcome) for learner, outcome in right.items())
        found.append(RunResult(labels, rows, right, "the same"))
    return found


def test_a_comparison_is_over_the_runs_that_it_names(runs: list[RunResult]):
    found = {
        (one.learner, one.zoo, tuple(one.fixed.items())): one for one in compare(runs, settings())
    }
    # Two learners, in two zoos and all, over all, by each axis, and by both at once.
    assert len(found) == 2 * 3 * (1 + 2 + 2 + 4)
    one = found["pooled", "bn", (("images", "250"), ("ingredients", "8"))]
    chosen = [
        run
        for run in runs
        if run.labels["zoo"] == "bn"
        and run.labels["images"] == "250"
        and run.labels["ingredients"] == "8"
    ]
    assert (one.runs, one.splits, one.ahead) == (3, 3, 3)
    differences = [run.right["pooled"].mean() - run.right["greedy"].mean() for run in chosen]
    assert one.mean == pytest.approx(np.mean(differences))
    assert one.interval.low < one.mean < one.interval.high
    overall = found["uniform", "all", ()]
    assert (overall.runs, overall.splits, overall.ahead) == (24, 6, 0)
    assert overall.interval.high < 0
    paired = [
        PairedRun(
            run.labels["zoo"],
            run.labels["split"],
            "the same",
            run.right["uniform"].astype(float) - run.right["greedy"],
        )
        for run in runs
    ]
    assert (overall.mean, overall.interval) == hierarchical_interval(paired, seed=0)


def test_a_learner_that_some_runs_lack_is_compared_where_it_is(runs: list[RunResult]):
    for run in runs[::2]:
        del run.right["pooled"]  # type: ignore[attr-defined]
    found = [one for one in compare(runs, settings()) if one.learner == "pooled"]
    assert all(one.fixed.get("ingredients") in (None, "8") for one in found)
    assert {one.runs for one in found if not one.fixed} == {6, 12}


def test_without_zoos_and_splits_all_runs_are_one(runs: list[RunResult]):
    axes = {"images": {"keys": "data.select.count", "values": [250, 1000]}}
    own = [
        RunResult({"images": run.labels["images"]}, run.rows, run.right, run.images)
        for run in (runs[0], runs[2])
    ]
    found = [*compare(own, settings(axes=axes))]
    assert {one.zoo for one in found} == {"all"}
    assert {one.splits for one in found} == {1}
    assert len(found) == 2 * (1 + 2)


def test_the_files(runs: list[RunResult], tmp_path: Path):
    text = write_tables(tmp_path, runs, settings(compare=["greedy", "uniform"]))
    table = pd.read_csv(tmp_path / "runs.csv")
    assert len(table) == 24 * 3
    assert table["images"].unique().tolist() == [250, 1000]
    found = pd.read_csv(tmp_path / "comparisons.csv")
    assert set(found["baseline"]) == {"greedy", "uniform"}
    overall = found[(found["zoo"] == "all") & (found["images"] == "all")]
    expected = 100 * np.mean(
        [run.right["pooled"].mean() - run.right["greedy"].mean() for run in runs]
    )
    chosen = overall[
        (overall["baseline"] == "greedy")
        & (overall["learner"] == "pooled")
        & (overall["ingredients"] == "all")
    ]
    assert chosen["mean_points"].item() == pytest.approx(expected)
    assert chosen["low_points"].item() < expected < chosen["high_points"].item()
    written = (tmp_path / "comparisons.md").read_text()
    assert text in written
    assert "24 runs over 3 splits and 2 zoos; 300 report images" in written
    assert "Two zoos are taken as they are" in written
    for baseline in ("greedy", "uniform"):
        picture = tmp_path / "pictures" / f"comparisons_{baseline}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    first = picture.read_bytes()
    write_tables(tmp_path, runs, settings(compare=["greedy", "uniform"]))
    assert picture.read_bytes() == first


def test_learner_seeds_are_draws_within_a_split(runs: list[RunResult]):
    """As splits are: they get no column, and where there is one split they take its place."""
    renamed = [
        RunResult({**run.labels, "split": "0", "seed": run.labels["split"]}, *rest)
        for run in runs
        for rest in [(run.rows, run.right, run.images)]
    ]
    axes = settings().model_dump()["axes"] | {"seed": {"keys": ["seed"], "values": [0, 1, 2]}}
    del axes["split"]
    both = axes | {"split": {"keys": ["data.select_seed"], "values": [0]}}
    by_split = [*compare(runs, settings())]
    for own in (axes, both):
        found = [*compare(renamed, settings(axes=own))]
        assert [one.fixed for one in found] == [one.fixed for one in by_split]
        for one, other in zip(found, by_split, strict=True):
            assert (one.mean, one.interval, one.splits) == (
                other.mean,
                other.interval,
                other.splits,
            )
            assert (one.spread.splits, one.spread.seeds) == (None, other.spread.splits)
            assert (one.spread.zoos is None) == (one.zoo != "all")
            assert one.spread.images == other.spread.images


def test_the_spread_of_each_difference_is_told(runs: list[RunResult], tmp_path: Path):
    write_tables(tmp_path, runs, settings())
    found = pd.read_csv(tmp_path / "comparisons.csv", dtype={"images": str, "ingredients": str})
    all_runs = found[(found["images"] == "all") & (found["ingredients"] == "all")]
    of_zoos = all_runs.set_index(["zoo", "learner"])["spread_zoos_points"]
    # Pooled is 6 points ahead in one zoo and 1.5 in the other; splits and images add little.
    assert of_zoos["all", "pooled"] == pytest.approx(100 * 0.045 / np.sqrt(2), abs=0.8)
    assert np.isnan(of_zoos["bn", "pooled"])
    assert found["spread_learner_seeds_points"].isna().all()
    assert (found["spread_images_points"] > 0).all()
    text = (tmp_path / "comparisons.md").read_text()
    _, table = text.split("## Spread of the difference to greedy, standard deviations in points")
    lines = [line for line in table.splitlines() if line.startswith("| all") and "pooled" in line]
    ((zoos, splits, seeds, images),) = [line.split("|")[3:7] for line in lines]
    assert float(zoos) == pytest.approx(of_zoos["all", "pooled"], abs=0.005)
    assert float(splits) < float(zoos)
    assert seeds.strip() == ""
    assert float(images) > 0
    assert "an axis `seed` would tell them apart" in text


def test_the_tables_read_as_they_should(runs: list[RunResult]):
    found = [*compare(runs, settings())]
    text = comparison_tables(found, settings())
    assert "## Report accuracy minus that of greedy, points [95%], by images" in text
    assert "by ingredients" in text
    lines = [line for line in text.splitlines() if line.startswith("| bn    | pooled")]
    assert len(lines) == 2
    overall = next(
        one for one in found if (one.learner, one.zoo, one.fixed) == ("pooled", "bn", {})
    )
    assert f"{100 * overall.mean:+.2f} [" in lines[0].split("|")[-2]
    means = mean_table(runs, settings())
    assert "| bn    | greedy" in means
    # No run was cross-fitted: the column is empty, and not a mean of nothing.
    cells = next(csv.reader(io.StringIO(means.splitlines()[4]), delimiter="|"))
    assert cells[5].strip() == ""
    assert cells[4].strip() == "90.00"


def test_which_runs_share_their_report():
    def images(**changes) -> str:
        parts = {
            "path": "digits",
            "fit": {"from": "train", "count": 5},
            "tune": {"from": "train", "count": 5},
            "select": {"from": "train", "count": 5},
            "report": {"from": "test"},
        }
        return report_images(DataConfig.model_validate(parts | changes))

    plain = images()
    assert images(select_seed=3, size=24, select={"from": "train", "count": 9}) == plain
    assert images(split_seed=1) != plain
    assert images(report={"from": "test", "count": 2}) != plain
    inside = {"report": {"from": "train", "count": 5}}
    assert images(**inside, select_seed=3) != images(**inside, select_seed=4)
    assert images(**inside) != images(**inside, select={"from": "train", "count": 9})


def test_a_baseline_with_nothing_to_compare_has_no_picture(runs: list[RunResult], tmp_path: Path):
    for run in runs:
        for learner in ("pooled", "uniform"):
            del run.right[learner]  # type: ignore[attr-defined]
    stale = tmp_path / "pictures" / "comparisons_greedy.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_tables(tmp_path, runs, settings())
    assert not stale.exists()
    assert len(pd.read_csv(tmp_path / "comparisons.csv")) == 0


def test_the_caption_says_what_is_missing_and_what_flatters(runs: list[RunResult]):
    def told(of: list[RunResult], **changes) -> str:
        return caption(of, settings(**changes))

    whole = told(runs)
    assert "missing" not in whole
    assert "flattering" not in whole
    assert "resampled with its runs in all zoos" in whole
    found = told(runs[3:])
    assert "21 runs over 3 splits and 2 zoos" in found
    assert "3 of 24 runs are missing" in found
    assert "was read" not in whole
    read = [dataclasses.replace(run, readings=1) for run in runs]
    assert "*report* was read 24 times by 24 runs, once by each." in told(read)
    read[0] = dataclasses.replace(read[0], readings=3)
    assert "*report* was read 26 times by 24 runs, at most 3 times by one." in told(read)
    cross_fitted = [row("pooled", runs[0].right["pooled"], out_of_fold_own=True)]
    own = RunResult(runs[0].labels, tuple(cross_fitted), runs[0].right, runs[0].images)
    assert "“Out of fold” of pooled is on the folds by which" in told([own, *runs[1:]])
    axes = settings().model_dump()["axes"] | {
        "zoo": {z: {"zoo.path": z} for z in ("bn", "ln", "x")}
    }
    found = told(runs, axes=axes)
    assert "zoos are resampled too, whole" in found
    assert "Two zoos" not in found


def test_a_comparison_of_nothing_has_no_row():
    assert [*compare([], settings())] == []
    assert "| zoo" in comparison_tables([], settings())
