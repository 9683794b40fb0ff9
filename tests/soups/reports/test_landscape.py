"""Lines and planes against weights that are interpolated directly."""

import csv

import numpy as np
import pytest
import torch

from soups.learners.registry import Uniform
from soups.reports.geometry import Frame, distance, weight_grams
from soups.reports.landscape import line, plane, positions
from soups.reports.material import Material
from soups.reports.registry import Line, Plane
from tests.soups.conftest import load_checkpoint, open_session

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def material(kitchen, tmp_path) -> Material:
    """Two soups over the small zoo, one of them in two groups; norm buffers follow the weights."""
    session = open_session(kitchen, tmp_path, norm_buffers="convex")
    tensors = list(session.numels)
    layers = {"first": tuple(tensors[:3]), "rest": tuple(tensors[3:])}
    matrix = np.array([[0.7, 0.1], [0.1, 0.1], [0.1, 0.1], [0.1, 0.2], [0.0, 0.5]])
    session.begin("report/test", tmp_path)
    return Material(
        session,
        {
            "uniform": session.coefficients(session.whole_model(), np.full((5, 1), 0.2), Uniform()),
            "layers": session.coefficients(layers, matrix, Uniform()),
        },
    )


def state_at(material: Material, name: str) -> dict[str, torch.Tensor]:
    """The weights and buffers of a named point, in float64."""
    session = material.session
    if name in material.soups:
        session.load(material.soups[name])
    else:
        zoo = session.zoo
        load_checkpoint(
            session, zoo.base if name == "base" else zoo.checkpoints[zoo.names.index(name)]
        )
    state = session.model.state_dict()
    return {n: t.double().clone() for n, t in state.items() if t.is_floating_point()}


def direct(material: Material, state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Accuracy and loss on *select* of a model with this state."""
    session = material.session
    session.model.load_state_dict(state, strict=False)
    logits, labels = session.logits(), session.select.labels
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return (logits.argmax(1) == labels).double().mean().item(), loss


def flat(material: Material, state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in material.session.numels])


def table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize(
    ("points", "margin", "wanted"),
    [
        (2, 0.0, [0, 1]),
        (3, 0.5, [-0.5, 0, 0.5, 1, 1.5]),
        (5, 0.3, [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]),
        (11, 0.3, np.arange(-3, 14) / 10),
    ],
)
def test_positions_hold_both_ends(points, margin, wanted):
    np.testing.assert_allclose(positions(points, margin), wanted, **EXACT)


@pytest.mark.parametrize("base", [True, False])
def test_grams_are_the_inner_products_of_the_weights(kitchen, tmp_path, monkeypatch, base):
    monkeypatch.setattr("soups.reports.geometry.SLICE", 101)
    files = [str(kitchen / "zoo" / f"{k:02d}.safetensors") for k in range(3)]
    zoo = {"path": kitchen / "zoo", "ingredients": files}
    zoo |= {"base": str(kitchen / "zoo" / "base.safetensors")} if base else {}
    session = open_session(kitchen, tmp_path, zoo=zoo)
    grams = weight_grams(session)
    assert grams.shape == (len(session.numels), 3, 3)
    origin = session.zoo.base or session.zoo.checkpoints[0]
    for gram, name in zip(grams, session.numels, strict=True):
        rows = torch.stack(
            [
                (c.read(name).double() - origin.read(name).double()).flatten()
                for c in session.zoo.checkpoints
            ]
        )
        np.testing.assert_allclose(gram, (rows @ rows.T).numpy(), rtol=1e-12, atol=1e-14)


def test_distances_are_those_of_the_weights(material):
    for a, b in (("base", "uniform"), ("layers", "02"), ("03", "03")):
        found = distance(material.point(a), material.point(b), material.grams)
        apart = flat(material, state_at(material, a)) - flat(material, state_at(material, b))
        assert found == pytest.approx(apart.norm().item(), rel=1e-5, abs=1e-6)


def test_the_frame_is_that_of_gram_schmidt_in_weight_space(material):
    names = ("base", "01", "layers")
    a, b, c = (flat(material, state_at(material, name)) for name in names)
    right = (b - a) / (b - a).norm()
    up = (c - a) - (c - a) @ right * right
    up /= up.norm()
    frame = Frame.through(*(material.point(name) for name in names), material.grams)
    assert frame is not None
    for name in (*names, "uniform", "00", "04"):
        apart = flat(material, state_at(material, name)) - a
        x, y = (apart @ right).item(), (apart @ up).item()
        off = (apart - x * right - y * up).norm().item()
        assert frame.place(material.point(name)) == pytest.approx((x, y, off), abs=2e-5)


def test_three_points_on_a_line_have_no_frame(material):
    a, b = material.point("base"), material.point("uniform")
    grams = material.grams
    assert Frame.through(a, b, 0.3 * a + 0.7 * b, grams) is None
    assert Frame.through(a, b, a, grams) is None
    assert Frame.through(a, a, b, grams) is None
    assert Frame.through(a, b, material.point("00"), grams) is not None


def test_a_line_is_what_interpolated_weights_score(material, tmp_path):
    settings = Line(between=[("base", "layers"), ("layers", "02")], points=3, margin=0.5)
    files = line(material, settings, tmp_path / "line")
    assert [file.name for file in files] == ["line.csv", "line.png", "line.svg"]
    count = 2 * 5 * len(material.session.select)
    assert material.session.examples_forward == count
    rows = table(files[0])
    assert [row["to"] for row in rows] == ["layers"] * 5 + ["02"] * 5
    for row in rows:
        t = float(row["position"])
        if not 0 <= t <= 1:
            continue  # beyond the ends norm buffers are clipped to the simplex
        first, last = state_at(material, row["from"]), state_at(material, row["to"])
        mixed = {name: (1 - t) * first[name] + t * last[name] for name in first}
        accuracy, loss = direct(material, mixed)
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-9)
        assert float(row["loss"]) == pytest.approx(loss, abs=2e-5)
        length = (flat(material, last) - flat(material, first)).norm().item()
        assert float(row["distance"]) == pytest.approx(t * length, rel=1e-5)


def test_a_plane_is_what_interpolated_weights_score(kitchen, tmp_path):
    """With the statistics estimated again from the weights, every point is known directly."""
    session = open_session(kitchen, tmp_path, norm_buffers="recalibrate")
    session.begin("report/plane", tmp_path)
    uniform = session.coefficients(session.whole_model(), np.full((5, 1), 0.2), Uniform())
    material = Material(session, {"uniform": uniform})
    names = ("base", "01", "uniform")
    settings = Plane(through=names, resolution=4, margin=0.2)
    files = plane(material, settings, tmp_path / "plane")
    assert [f.name for f in files] == ["plane.csv", "plane_points.csv", "plane.png", "plane.svg"]
    rows, marks = table(files[0]), table(files[1])
    assert len(rows) == 16
    assert [mark["name"] for mark in marks[:3]] == list(names)
    assert {mark["kind"] for mark in marks} == {"corner", "ingredient"}
    assert len(marks) == 3 + 4
    states = [state_at(material, name) for name in names]
    origin, right, third = (flat(material, state) for state in states)
    right = (right - origin) / (right - origin).norm()
    up = (third - origin) - (third - origin) @ right * right
    up /= up.norm()
    xs = sorted({float(row["x"]) for row in rows})
    width = float(marks[1]["x"])
    assert xs[0] == pytest.approx(-0.2 * width, rel=1e-6)
    assert xs[-1] == pytest.approx(1.2 * width, rel=1e-6)
    for row in rows[::5]:
        mixed = origin + float(row["x"]) * right + float(row["y"]) * up
        parts = mixed.split([*session.numels.values()])
        shapes = [states[0][name].shape for name in session.numels]
        weights = {
            name: part.reshape(shape)
            for name, part, shape in zip(session.numels, parts, shapes, strict=True)
        }
        session.model.load_state_dict(weights, strict=False)
        session.norms.recalibrate()
        accuracy, loss = direct(material, {})
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-9)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)


def test_a_plane_through_points_on_a_line_is_a_warning(material, tmp_path, caplog):
    material.soups["same"] = material.soups["uniform"]
    settings = Plane(through=("base", "uniform", "same"))
    assert plane(material, settings, tmp_path / "plane") == []
    (warning,) = material.session.record["warnings"]
    assert "base, uniform, same are on one line" in warning
    assert warning in caplog.text
    assert material.session.examples_forward == 0
