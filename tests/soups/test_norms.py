"""The three rules for norm buffers, against plain formulas."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soups.errors import SoupError
from soups.norms import RECALIBRATION_BATCH
from tests.soups.conftest import load_checkpoint, make_config, open_session

BUFFERS = ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var")


def values(session, name: str) -> np.ndarray:
    """The buffer in every ingredient, in float64 [ingredients, channels]."""
    return np.stack([k.read(name).double().numpy() for k in session.zoo.checkpoints])


def buffer(session, name: str) -> np.ndarray:
    return dict(session.model.named_buffers())[name].double().numpy().copy()


def test_uniform_is_the_mean_over_the_members(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    matrix = np.array([[0.7], [0.0], [0.3], [0.0], [0.0]])
    groups = session.whole_model()
    session.norms.follow(groups, matrix, first_step=True)
    for name in BUFFERS:
        wanted = (values(session, name)[0] + values(session, name)[2]) / 2
        np.testing.assert_allclose(buffer(session, name), wanted, rtol=1e-6)
    held = buffer(session, BUFFERS[0])
    session.norms.follow(groups, matrix[::-1].copy(), first_step=False)
    assert np.array_equal(buffer(session, BUFFERS[0]), held)  # constant within an epoch


def test_uniform_gives_the_base_its_share(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path)
    matrix = np.full((5, 1), 0.3 / 5)
    session.norms.follow(session.whole_model(), matrix, first_step=True)
    assert session.zoo.base is not None
    for name in BUFFERS:
        base = session.zoo.base.read(name).double().numpy()
        wanted = 0.3 * values(session, name).mean(axis=0) + 0.7 * base
        np.testing.assert_allclose(buffer(session, name), wanted, rtol=1e-6)


@pytest.mark.parametrize("grouping", ["tensor", "layer"])
def test_convex_follows_the_clipped_coefficients_of_its_own_layer(
    kitchen: Path, tmp_path: Path, grouping: str
):
    from soups.groups import group_tensors

    session = open_session(kitchen, tmp_path, norm_buffers="convex")
    groups = group_tensors(session.numels, grouping)
    draws = np.random.default_rng(0)
    matrix = draws.normal(size=(5, len(groups)))
    matrix /= matrix.sum(axis=0)
    order = list(groups)
    for layer in ("1", "4"):
        own = order.index(layer if grouping == "layer" else f"{layer}.weight")
        matrix[:, own] = {"1": [0.5, 0.9, -0.4, 0.0, 0.0], "4": [0, 0, 0.2, 0.8, 0.0]}[layer]
    session.norms.follow(groups, matrix, first_step=False)
    wanted = {"1": np.array([0.5, 0.9, 0, 0, 0]) / 1.4, "4": np.array([0, 0, 0.2, 0.8, 0])}
    for name in BUFFERS:
        mixed = wanted[name[0]] @ values(session, name)
        np.testing.assert_allclose(buffer(session, name), mixed, rtol=1e-6)
    buffer_groups, columns = session.norms.columns(groups, matrix)
    assert sorted(n for names in buffer_groups.values() for n in names) == sorted(BUFFERS)
    assert (columns >= 0).all()
    np.testing.assert_allclose(columns.sum(axis=0), 1)


def test_recalibrate_equals_batch_norms_that_saw_the_same_images(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    load_checkpoint(session, session.zoo.checkpoints[0])
    plain = copy.deepcopy(session.model)
    momenta = [m.momentum for m in session.model.modules() if isinstance(m, nn.BatchNorm2d)]
    session.norms.recalibrate()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the last batch alone
    plain.train()
    plain[6].eval()  # dropout
    fit = session.norms._fit
    wanted = dict.fromkeys(BUFFERS, 0.0)
    with torch.no_grad():
        for images, _ in fit.batches(RECALIBRATION_BATCH):
            plain(images)
            share = len(images) / len(fit)
            wanted = {n: w + share * plain.state_dict()[n].double() for n, w in wanted.items()}
    assert len(fit) % RECALIBRATION_BATCH
    state = session.model.state_dict()
    for name in BUFFERS:
        torch.testing.assert_close(state[name].double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in session.model.modules())
    after = [m.momentum for m in session.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert after == momenta
    assert len(fit) < 2048  # all of it was seen


def test_recalibrate_leaves_training_modes_as_they_were(kitchen: Path, tmp_path: Path):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    session.model.train()
    session.model[3].eval()
    modes = [module.training for module in session.model.modules()]
    session.norms.recalibrate()
    assert [module.training for module in session.model.modules()] == modes


def test_a_variance_that_is_not_positive_is_named(kitchen: Path, tmp_path: Path):
    tensors = load_file(kitchen / "zoo" / "03.safetensors")
    tensors["4.running_var"][[2, 5]] = torch.tensor([0.0, -2.0])
    save_file(tensors, tmp_path / "bad.safetensors")
    good = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in range(2)]
    zoo = {"path": kitchen / "zoo", "ingredients": [*good, str(tmp_path / "bad.safetensors")]}
    with pytest.raises(SoupError, match=r"bad\.safetensors: 2 of 12 variances in '4.running_var'"):
        open_session(kitchen, tmp_path, zoo=zoo)
    session = open_session(kitchen, tmp_path, zoo=zoo | {"skip": ["4.running_var"]})
    assert "4.running_var" not in session.norms.names


STANDARDISED = """
import torch
from torch import nn


class Standardise(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1]))

    def forward(self, images):
        return images - self.mean


def build(num_classes):
    return nn.Sequential(
        Standardise(),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, num_classes),
    )
"""


def test_convex_buffers_of_modules_without_weights_follow_the_nearest(tmp_path: Path):
    from soups.groups import group_tensors
    from soups.zoo import save_weights

    (tmp_path / "net.py").write_text(STANDARDISED)
    scope: dict = {}
    exec(STANDARDISED, scope)
    for k in range(3):
        torch.manual_seed(k)
        net = scope["build"](10)
        net[0].mean += k
        net[2].running_mean += k
        save_weights(net, tmp_path / f"{k}.safetensors")
    zoo = {"path": tmp_path}
    session = open_session(tmp_path, tmp_path / "out", zoo=zoo, norm_buffers="convex")
    groups = group_tensors(session.numels, "layer")
    assert list(groups) == ["1", "5"]
    matrix = np.array([[0.2, 1.0], [0.3, 0.0], [0.5, 0.0]])
    session.norms.follow(groups, matrix, first_step=True)
    np.testing.assert_allclose(buffer(session, "0.mean"), [0.1 + 1.3], rtol=1e-6)
    np.testing.assert_allclose(buffer(session, "2.running_mean"), [1.3] * 4, rtol=1e-6)


def test_the_config_names_the_three_rules(kitchen: Path):
    for rule in ("uniform", "convex", "recalibrate"):
        assert make_config(kitchen, norm_buffers=rule).norm_buffers == rule
