"""MEHL on rows in fewer bits: what stays exact, what comes close, and the memory that it takes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.deltas import Mixture, row_bytes
from soups.errors import SoupError
from soups.learners import mehl as module
from tests.soups.learners.test_learners import learn, session_of

PRECISIONS = ["bf16", "int8", "int4", "sign"]
ALL_AT_ONCE = {"inner_epochs": 1, "batch_size": 64, "block_size": 5}


def compressed(kitchen, folder, precision, settings=ALL_AT_ONCE, **changes):
    """A session over the small zoo for `mehl_layerwise` with rows in that precision."""
    settings = settings | {"precision": precision}
    return session_of(kitchen, folder, "mehl_layerwise", settings, **changes)


@pytest.mark.parametrize(
    ("precision", "rule"),
    [*((p, "uniform") for p in PRECISIONS), ("int4", "convex"), ("int8", "recalibrate")],
)
def test_coefficients_times_originals_are_the_weights_that_the_learner_held(
    kitchen, tmp_path, monkeypatch, precision, rule
):
    held = {}

    def close(mixture, original=Mixture.close):
        held.update({n: p.detach().clone() for n, p in mixture.model.named_parameters()})
        original(mixture)

    monkeypatch.setattr(Mixture, "close", close)
    settings = ALL_AT_ONCE | {"block_size": 3, "outer_epochs": 2}
    session, settings = compressed(kitchen, tmp_path, precision, settings, norm_buffers=rule)
    coefficients = learn(session, settings)
    for column in coefficients.matrix.T[: len(held)]:
        assert column.sum() == pytest.approx(1, abs=1e-9)
    for name, weights in held.items():
        parts = zip(coefficients.column(name), session.zoo.checkpoints, strict=True)
        wanted = sum(a * k.read(name).double() for a, k in parts)
        assert (weights.double() - wanted).norm() <= 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_ingredients_give_that_ingredient(kitchen, tmp_path, precision):
    path = str(kitchen / "zoo" / "00.safetensors")
    zoo = {"path": kitchen / "zoo", "ingredients": [path, path, path], "base": path}
    session, settings = compressed(kitchen, tmp_path, precision, zoo=zoo)
    session.load(learn(session, settings))
    for name, parameter in session.model.named_parameters():
        own = session.zoo.checkpoints[0].read(name)
        torch.testing.assert_close(parameter.detach(), own, rtol=0, atol=0, msg=name)
    assert set(session.record["largest_row_error"].values()) == {0.0}


def test_coefficients_come_close_to_those_of_fp32(second_kitchen, tmp_path):
    """Distances are parts of the way from the mean to the coefficients of fp32."""
    settings = ALL_AT_ONCE | {"inner_epochs": 3}
    exact = learn(*session_of(second_kitchen, tmp_path / "fp32", "mehl_layerwise", settings)).matrix
    way = np.linalg.norm(exact - 1 / len(exact))
    most = {"bf16": 0.01, "int8": 0.01, "int4": 0.1, "sign": 0.6}
    distances = {}
    for precision in most:
        found = learn(*compressed(second_kitchen, tmp_path / precision, precision, settings)).matrix
        distances[precision] = np.linalg.norm(found - exact) / way
        assert 0 < distances[precision] < most[precision]
    assert distances["int8"] < distances["int4"] < distances["sign"]


@pytest.mark.parametrize(("precision", "block_size"), [("int4", 5), ("sign", 2)])
def test_a_killed_run_goes_on_to_the_same_bits_and_the_same_record(
    kitchen, tmp_path, monkeypatch, precision, block_size
):
    settings = ALL_AT_ONCE | {"outer_epochs": 2, "block_size": block_size}
    session, chosen = compressed(kitchen, tmp_path / "whole", precision, settings)
    whole = learn(session, chosen)

    class KilledError(Exception):
        pass

    saved = module.save_progress
    blocks = session.record["blocks"]
    for stop_after in (1, blocks):
        folder = tmp_path / f"killed{stop_after}"

        def save_and_die(*arguments, stop_after=stop_after):
            saved(*arguments)
            if arguments[2].blocks_done == stop_after:
                raise KilledError

        monkeypatch.setattr(module, "save_progress", save_and_die)
        with pytest.raises(KilledError):
            learn(*compressed(kitchen, folder, precision, settings))
        monkeypatch.setattr(module, "save_progress", saved)
        again, chosen = compressed(kitchen, folder, precision, settings)
        assert learn(again, chosen).to_json() == whole.to_json()
        assert again.record == session.record
        assert again.examples_forward == session.examples_forward
        assert again.examples_backward == session.examples_backward


@pytest.mark.parametrize("rule", ["uniform", "convex", "recalibrate"])
def test_the_record_says_what_was_lost(kitchen, tmp_path, rule):
    session, settings = compressed(kitchen, tmp_path, "sign", norm_buffers=rule)
    groups = session.groups(settings)
    coefficients = learn(session, settings)
    record = json.loads(json.dumps(session.record))
    weights = sum(session.numels.values())
    assert record["precision"] == "sign"
    # Tensors shorter than a run have scales of their own: each takes at most two more here.
    assert 0 <= record["row_bytes"] - 5 * row_bytes(weights, "sign") <= 5 * 10 * len(session.numels)
    assert list(record["largest_row_error"]) == list(groups)
    assert all(0 < error < 1 for error in record["largest_row_error"].values())
    session.load(coefficients)
    assert record["originals_select_accuracy"] == session.accuracy()
    difference = record["originals_select_accuracy"] - record["compressed_select_accuracy"]
    assert record["originals_minus_compressed"] == difference
    # One epoch forward and back, then an evaluation of each of the two sets of weights.
    assert session.examples_backward == len(session.select)
    assert session.examples_forward == 4 * len(session.select)


def test_the_compressed_accuracy_is_that_of_the_rounded_rows(kitchen, tmp_path, monkeypatch):
    evaluated, rounded = [], []

    def accuracy(session, groups, matrix, original=module._accuracy):
        evaluated.append([p.detach().double() for p in session.model.parameters()])
        return original(session, groups, matrix)

    def apply_originals(mixture, ingredients, coefficients, original=Mixture.apply_originals):
        held = mixture.rows.unpack().double()
        start = mixture.weights.data_ptr()
        for parameter, a in zip(mixture.model.parameters(), coefficients.T, strict=True):
            first = (parameter.data_ptr() - start) // 4
            own = slice(first, first + parameter.numel())
            rounded.append(mixture.centre[own].double() + a.double() @ held[:, own])
        original(mixture, ingredients, coefficients)

    monkeypatch.setattr(module, "_accuracy", accuracy)
    monkeypatch.setattr(Mixture, "apply_originals", apply_originals)
    session, settings = compressed(kitchen, tmp_path, "sign")
    learn(session, settings)
    evaluated.append([p.detach().double() for p in session.model.parameters()])
    for compressed_weights, original_weights, wanted in zip(*evaluated, rounded, strict=True):
        torch.testing.assert_close(compressed_weights.flatten(), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(original_weights.flatten(), wanted, rtol=1e-5, atol=1e-6)


def test_the_originals_accuracy_is_that_of_weights_as_they_are_stored(kitchen, tmp_path):
    paths = []
    for k in range(3):
        tensors = load_file(kitchen / "zoo" / f"{k:02d}.safetensors")
        half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
        paths.append(str(tmp_path / f"{k}.safetensors"))
        save_file(half, paths[-1])
    zoo = {"path": tmp_path, "ingredients": paths}
    settings = ALL_AT_ONCE | {"block_size": 3}
    session, settings = compressed(kitchen, tmp_path / "out", "int8", settings, zoo=zoo)
    learn(session, settings)
    assert session.record["originals_select_accuracy"] == session.accuracy()
    for parameter in session.model.parameters():
        assert parameter.equal(parameter.bfloat16().float())


def test_a_descent_that_leaves_the_numbers_is_refused(kitchen, tmp_path):
    settings = ALL_AT_ONCE | {"lr": 1e30, "warmup": 0.0}
    session, settings = compressed(kitchen, tmp_path, "int8", settings)
    with pytest.raises(SoupError, match=r"learners\.mehl_layerwise: the loss .* lower .*\.lr"):
        learn(session, settings)


SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from inputs.budget import peak_resident_bytes, resident_bytes
from merge.checkpoints import open_checkpoint
from soups.deltas import Mixture
from soups.groups import group_tensors
from torch import nn

path, precision, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = nn.Sequential(nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1500))
groups = group_tensors({n: p.numel() for n, p in model.named_parameters()}, "tensor")
images = torch.randn(4, 1500)
model(images).square().sum().backward()
model.zero_grad()
ingredients = [open_checkpoint(path)] * count
before = resident_bytes()
with Mixture(model, groups, count, precision=precision) as mixture:
    mixture.start_at_mean(ingredients[:1])
    mixture.centre.mul_(0.9)
    mixture.load_block(ingredients)
    mixture.apply(torch.zeros(count, len(groups)))
    mixture.gradient(model(images).square().sum())
    print(peak_resident_bytes() - before, mixture.row_bytes)
"""


@pytest.mark.slow
def test_rows_in_memory_take_what_was_predicted(tmp_path):
    """Fresh processes with 24 rows of 4.5 M weights: peaks over what the process held before."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    state = {n: torch.randn(1500, 1500) if "weight" in n else torch.randn(1500) for n in names}
    save_file(state, tmp_path / "model.safetensors")
    weights, count = sum(t.numel() for t in state.values()), 24
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
    peaks = {}
    for precision in ("fp32", "int8", "int4", "sign"):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.safetensors")]
        done = subprocess.run(
            [*command, precision, str(count)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        peak, held = map(int, done.stdout.split())
        assert held == pytest.approx(count * row_bytes(weights, precision), rel=0.01)
        # Beside the rows: the flat weights and the centre, a gradient, and what is read at a time.
        assert held <= peak <= held + (2 + 1 + 1) * 4 * weights
        peaks[precision] = peak - 2 * 4 * weights
    for precision, factor in {"int8": 3.5, "int4": 6, "sign": 12}.items():
        assert peaks["fp32"] > factor * peaks[precision]
