"""Many candidates in one pass score what each scores alone, within the memory that there is."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fleet import FleetError
from merge.align import recalibrate_norms
from soups import evaluate as module
from soups.activations import _Alive, forward_bytes
from soups.candidates import Candidates, Files
from soups.errors import SoupError
from soups.evaluate import Need, even_batch, evenly, fit, images_at_once
from soups.learners.registry import MehlLayerwise
from soups.recalibration import recalibrate_group
from tests.soups.conftest import load_checkpoint, open_session
from tests.soups.test_candidates import draw, reads, whole

__all__ = ["reads"]


@pytest.fixture(params=["in turn", "as a group"])
def way(request, monkeypatch) -> str:
    """Both ways of running several models."""
    worth = 0 if request.param == "as a group" else 10**12
    monkeypatch.setattr(module, "WORTH_RECORDING_BYTES", worth)
    monkeypatch.setattr(module, "WORTH_RECORDING_BATCHES", 0)
    return request.param


def one_by_one(session, matrices, groups, *, rest: float = 0.0) -> torch.Tensor:
    """The logits of each candidate's exact weights, as cooking makes them."""
    found = []
    for matrix in matrices:
        session.load(session.coefficients(groups, matrix, MehlLayerwise(), with_base=bool(rest)))
        found.append(session.logits())
    return torch.stack(found)


def check(scores, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """The same losses; the same decisions but where the top two logits are within 1e-4."""
    wanted = module.Scores.of(logits, labels)
    torch.testing.assert_close(scores.losses, wanted.losses, rtol=1e-4, atol=1e-4)
    top = logits.topk(2, dim=2).values
    clear = top[..., 0] - top[..., 1] > 1e-4
    assert clear.float().mean() > 0.99
    assert scores.right[clear].equal(wanted.right[clear])


@pytest.mark.parametrize("rest", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["uniform", "convex", "recalibrate"])
def test_scores_are_those_of_the_exact_weights_one_by_one(kitchen, tmp_path, way, rule, rest):
    session = open_session(kitchen, tmp_path, norm_buffers=rule)
    groups, matrices = draw(session, "layer", 5, rest=rest)
    matrices[3:, :, :3] = matrices[3, :, :3]  # two that share their first layers
    scores = session.evaluate(matrices, groups)
    assert session.examples_forward == 5 * len(session.select)
    check(scores, one_by_one(session, matrices, groups, rest=rest), session.select.labels)


def test_a_score_does_not_depend_on_what_else_is_in_the_call(kitchen, tmp_path, way):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 6)
    together = session.evaluate(matrices, groups)
    for members in ([4], [5, 0, 4], [2, 2]):
        some = session.evaluate(matrices[members], groups)
        assert some.right.equal(together.right[members])
        torch.testing.assert_close(some.losses, together.losses[members], rtol=1e-5, atol=1e-5)


def test_batches_and_chunks_do_not_change_decisions(kitchen, tmp_path, way):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "tensor", 5)
    whole_pass = session.evaluate(matrices, groups)
    for batch_size in (1, 7, 200):
        session.passes.batch_size = batch_size
        some = session.evaluate(matrices, groups, session.probe(30))
        assert some.right.equal(whole_pass.right[:, :30])
        torch.testing.assert_close(some.losses, whole_pass.losses[:, :30], rtol=1e-5, atol=1e-5)
    session.passes.batch_size = 64
    need = Need(0, 4 * sum(session.numels.values()), session.passes.image_bytes(session.select))
    for models in (1, 2, 3):
        session.passes.room = lambda models=models: need(models, 64) + 4096
        some = session.evaluate(matrices, groups)
        assert some.right.equal(whole_pass.right)
        assert session.passes._together <= models


def test_ingredients_have_their_own_buffers_whatever_the_rule(kitchen, tmp_path, way):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    scores = session.evaluate_ingredients()
    for k, checkpoint in enumerate(session.zoo.checkpoints):
        load_checkpoint(session, checkpoint)
        assert scores.accuracies[k] == session.accuracy()


def test_a_session_under_a_small_budget_reads_again_and_scores_the_same(kitchen, tmp_path, reads):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 6)
    wanted = session.evaluate(matrices, groups)
    assert session.sources.held
    session.begin("row", tmp_path)
    assert not session.sources.held
    weights = 4 * sum(session.numels.values())
    image = session.passes.image_bytes(session.select)
    session.in_use = 0
    session.memory_budget = Need(0, weights, image)(2, 1)
    reads.clear()
    found = session.evaluate(matrices, groups)
    assert not session.sources.held
    assert {file for file, _, _ in reads} >= {"00", "01", "02", "03", "04"}
    assert found.right.equal(wanted.right)


def test_files_score_what_their_weights_score(kitchen, tmp_path, way):
    session = open_session(kitchen, tmp_path)
    paths = [kitchen / "zoo" / f"{k:02d}.safetensors" for k in (1, 4, 2)]
    files = Files(session.model, paths, session.zoo.tied)
    scores = module.evaluate(session.chunks, files, session.select)
    for m, k in enumerate((1, 4, 2)):
        load_checkpoint(session, session.zoo.checkpoints[k])
        assert scores.accuracies[m] == session.accuracy()


# --- recalibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 5])
def test_statistics_of_many_models_are_those_of_each(kitchen, tmp_path, together):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    groups, matrices = draw(session, "layer", 5)
    matrices[1:, :, 0] = matrices[0, :, 0]
    plain = Candidates(matrices, groups, session.sources, session.norms, own_buffers=True)
    weights = plain.weights(range(5))
    assert "0.weight" in weights.shared
    found = session.norms.recalibrated(weights.stacked, weights.shared, together=together)
    assert found.keys() == set(session.norms.names)
    before = copy.deepcopy(session.model.state_dict())
    momenta = [m.momentum for m in session.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert momenta == [0.1, 0.1]
    assert not any(module.training for module in session.model.modules())
    for m in range(5):
        model = copy.deepcopy(session.model)
        model.load_state_dict(before | whole(weights, m))
        recalibrate_norms(model, session.norms._calibration().batches(256))
        for name, values in found.items():
            wanted = model.state_dict()[name]
            torch.testing.assert_close(values[m], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_of_batches_of_any_size_are_the_mean_over_examples():
    torch.manual_seed(0)
    linear, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(linear, norm).eval()
    stacked = {"0.weight": torch.randn(3, 4, 3)}
    x = torch.randn(23, 3)
    found = recalibrate_group(model, stacked, {}, x.split(10))
    hidden = torch.einsum("ni,moi->mno", x, stacked["0.weight"]) + linear.bias
    means = torch.stack([part.mean(1) * part.shape[1] for part in hidden.split(10, 1)]).sum(0) / 23
    torch.testing.assert_close(found["1.running_mean"], means, rtol=1e-5, atol=1e-6)
    assert norm.running_mean is not None
    assert norm.running_mean.eq(0).all()


# --- memory ---------------------------------------------------------------------------------------


def test_activations_are_counted_as_they_come_and_go():
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 50), nn.Linear(50, 2)).eval()
    images = torch.randn(3, 8)
    # The ReLU's input and result are alive together, beside the images.
    assert forward_bytes(model, images) == 4 * 3 * (8 + 100 + 100)


def test_a_pass_takes_no_more_than_was_predicted(kitchen, tmp_path, way):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 4)
    models = Candidates(matrices, groups, session.sources, session.norms)
    need = Need(*models.bytes_of(range(4)), session.passes.image_bytes(session.select))
    session.passes.batch_size = 64
    with _Alive() as alive:
        module.evaluate(session.passes.chunks, models, session.select)
    results = 5 * 4 * len(session.select)
    assert alive.peak <= need(4, 64) + results + module_scratch(session)


def module_scratch(session) -> int:
    """Rows of all sources of the largest tensor, once as they are and once as differences."""
    return 2 * 8 * 4 * max(session.numels.values())


@given(
    own=st.integers(1, 10**6),
    shared=st.integers(0, 10**6),
    image=st.integers(1, 10**5),
    room=st.integers(0, 10**8),
    models=st.integers(1, 40),
    batch=st.integers(1, 512),
)
def test_chunks_fit_or_are_refused_with_what_would_do(own, shared, image, room, models, batch):
    need = Need(shared, own, image)

    def best(m: int) -> int:
        return images_at_once(m, image=image, batch_size=batch, device="cpu")

    if need(1, 1) > room:
        with pytest.raises(SoupError, match=r"memory_budget: .* are left for evaluating"):
            fit(need, room, models, best)
        return
    together, images = fit(need, room, models, best)
    assert need(together, images) <= room
    assert 1 <= together <= models
    assert 1 <= images <= batch
    if together < models:
        assert need(together + 1, best(together + 1)) > room


def test_a_budget_too_small_for_one_model_and_one_image_says_so(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 2)
    session.in_use = session.memory_budget - 1000
    with pytest.raises(SoupError, match=r"1000 B are left .* one candidate on one image needs"):
        session.evaluate(matrices, groups)


@given(st.integers(1, 60), st.integers(1, 20))
def test_parts_are_few_and_even(count, most):
    parts = evenly(list(range(count)), most)
    assert [m for part in parts for m in part] == list(range(count))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-count // most)
    size = even_batch(count, most)
    assert size <= most
    assert -(-count // size) == -(-count // most)


# --- what is refused ------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_refused(kitchen, tmp_path):
    session = open_session(kitchen, tmp_path)
    groups, matrices = draw(session, "layer", 2)
    session.model.train()
    with pytest.raises(FleetError, match="train mode"):
        session.evaluate(matrices, groups)
    session.model.eval()
    session.model.get_submodule("6").train()  # dropout alone
    with pytest.raises(FleetError, match="train mode"):
        session.evaluate(matrices, groups)


def test_evaluating_leaves_the_model_as_it_is(kitchen: Path, tmp_path: Path, way):
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    load_checkpoint(session, session.zoo.checkpoints[0])
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    groups, matrices = draw(session, "layer", 3)
    session.evaluate(matrices, groups)
    for name, tensor in session.model.state_dict().items():
        if "tracked" not in name:
            assert tensor.equal(before[name]), name


def test_scores_of_logits_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 3.0]]])
    scores = module.Scores.of(logits, torch.tensor([0, 1]))
    assert scores.right.tolist() == [[True, True], [False, True]]
    np.testing.assert_allclose(scores.accuracies, [1.0, 0.5])
    by_hand = [np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)), 3 + 2 * np.log1p(np.exp(-3))]
    np.testing.assert_allclose(scores.mean_losses, np.array(by_hand) / 2, rtol=1e-6)


def test_what_is_not_a_number_is_not_right():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[[nan, nan], [nan, 0.0], [inf, 0.0], [0.0, -inf]]])
    assert module.Scores.of(logits, torch.tensor([0, 0, 0, 0])).right.tolist() == [
        [False, False, False, True]
    ]


def test_at_the_table_a_short_room_is_no_reason_to_stop(kitchen, tmp_path, caplog):
    session = open_session(kitchen, tmp_path)
    paths = [kitchen / "zoo" / f"{k:02d}.safetensors" for k in (1, 4)]
    files = Files(session.model, paths, session.zoo.tied)
    session.in_use = session.memory_budget
    members = [c.members for c in session.chunks(files, [session.select], refuse=False)]
    assert members == [[0], [1]]
    assert "going on all the same" in caplog.text
