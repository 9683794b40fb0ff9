"""The table of measured times, and the command that measures anew."""

import json

import pytest
import torch

from kernels import grouped_linear, measure
from kernels.cpu import convolution, linear, strategies

SHAPE = (4, 2, 3, 5)
ROW = {"threads": 1, "shape": list(SHAPE), "times": {"batched": 3.0, "columns": 2.0}}


@pytest.fixture(autouse=True)
def fresh_tables():
    strategies.table.cache_clear()
    strategies._choose.cache_clear()
    yield
    strategies.table.cache_clear()
    strategies._choose.cache_clear()


def write_own(linear_rows):
    path = strategies.measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"linear": linear_rows, "conv2d": []}))


def test_the_packages_table_knows_every_strategy():
    known = {
        "linear": set(linear.STRATEGIES),
        "conv2d": set(convolution.STRATEGIES),
    }
    for op, rows in strategies.table().items():
        assert set().union(*(row.times for row in rows)) == known[op]
        assert all(row.times.keys() <= known[op] for row in rows)


def test_the_fastest_available_strategy_of_the_nearest_row():
    far = {"threads": 1, "shape": [4, 200, 3, 5], "times": {"batched": 1.0, "columns": 2.0}}
    write_own([ROW, far])
    x = torch.zeros(1)
    assert strategies.choose("linear", x, (4, 3, 3, 5), ("batched", "columns")) == "columns"
    assert strategies.choose("linear", x, (4, 3, 3, 5), ("batched",)) == "batched"
    assert strategies.choose("linear", x, (4, 90, 3, 5), ("batched", "columns")) == "batched"
    assert strategies.choose("linear", x.to("meta"), SHAPE, ("batched", "columns")) == "batched"


def test_rows_of_as_many_threads_come_first():
    two = {"threads": 2, "shape": [9, 9, 9, 9], "times": {"batched": 1.0, "columns": 2.0}}
    write_own([ROW, two])
    assert strategies._choose("linear", SHAPE, ("batched", "columns"), 1) == "columns"
    assert strategies._choose("linear", SHAPE, ("batched", "columns"), 2) == "batched"


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "shape": [1, 2]}],
        [{**ROW, "times": {}}],
        [{**ROW, "times": {"batched": -1.0}}],
        [{**ROW, "threads": "many"}],
        ["batched"],
        None,
    ],
)
def test_a_malformed_table_is_ignored_with_a_warning(rows, caplog):
    write_own(rows)
    assert strategies.table()["conv2d"]
    assert "is ignored" in caplog.text
    assert "kernels.measure" in caplog.text


def test_measuring_writes_a_table_that_is_used(monkeypatch):
    shapes = {"linear": SHAPE, "conv2d": (2, 1, 4, 4, 1, 4, 9)}
    points = {op: (measure.POINTS[op][0], [shape]) for op, shape in shapes.items()}
    monkeypatch.setattr(measure, "POINTS", points)
    write_own([{**ROW, "threads": 2}])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    measure.main(["--seconds", "0"])
    strategies.table.cache_clear()
    first, second = strategies.table()["linear"]
    assert first.threads == 1
    assert set(first.times) == set(linear.STRATEGIES)
    assert second == strategies.Measured(2, SHAPE, ROW["times"])
    assert set(strategies.table()["conv2d"][0].times) == set(convolution.STRATEGIES)
    assert grouped_linear(torch.zeros(4, 2, 3), torch.zeros(4, 5, 3)).shape == (4, 2, 5)
