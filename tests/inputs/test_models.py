import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from inputs.config import FactoryModel, OpenClipModel, TimmModel
from inputs.errors import InputError
from inputs.models import build_model, check_norm_buffers, norm_buffer_names

RESNET = TimmModel(source="timm", name="resnet10t", kwargs={"channels": [4, 4, 8, 8]})
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
}


def _build(config, root=".", classes=5, channels=3):
    from pathlib import Path

    torch.manual_seed(0)
    return build_model(config, classes=classes, channels=channels, root=Path(root)).eval()


def test_timm_with_lists_from_yaml():
    model = _build(RESNET, channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    kwargs = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}
    model = _build(TimmModel(source="timm", name="convnext_tiny", kwargs=kwargs))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_the_callers_seed_decides_the_weights():
    first, second = _build(RESNET).state_dict(), _build(RESNET).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("resnet10", {}, r"model\.name: timm has no model 'resnet10'; did you mean 'resnet10t'"),
        ("zzzzzz", {}, r"timm has no model 'zzzzzz'; see timm\.list_models"),
        (
            "resnet10t",
            {"foo": 1},
            r"timm could not build 'resnet10t' with kwargs .*'foo'.*TypeError",
        ),
        ("resnet10t", {"in_chans": 1}, r"model\.kwargs\.in_chans: found 1, wanted no such key"),
    ],
)
def test_timm_refuses(name, kwargs, text):
    with pytest.raises(InputError, match=text):
        _build(TimmModel(source="timm", name=name, kwargs=kwargs))


def _clip(**changes):
    return OpenClipModel(**{"source": "open_clip", "name": "ViT-B-32", "kwargs": CLIP, **changes})


def test_open_clip_names_its_tensors_as_the_public_zoo():
    model = _build(_clip())
    names = set(model.state_dict())
    assert {"classification_head.weight", "classification_head.bias"} <= names
    assert "model.visual.transformer.resblocks.0.attn.in_proj_weight" in names
    assert "model.visual.proj" in names
    assert all(name.startswith(("model.visual.", "classification_head.")) for name in names)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("form", ["safetensors", "pt", "bare", "transposed"])
def test_a_zero_shot_head_with_its_scale(tmp_path, form):
    head = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    file = tmp_path / ("head.safetensors" if form == "safetensors" else "head.pt")
    if form == "safetensors":
        safetensors.torch.save_file({"zeroshot": head, "scale": torch.ones(1)}, file)
    else:
        torch.save({"pt": {"w": head}, "bare": head, "transposed": head.T}[form], file)
    model = _build(_clip(head_weights=file.name, logit_scale=50.0), root=tmp_path)
    images = torch.randn(3, 3, 16, 16)
    features = model.model.visual(images)
    expected = 50 * nn.functional.normalize(features, dim=-1) @ head.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert (model.classification_head.bias == 0).all()


def test_features_as_they_are():
    model = _build(_clip(normalize_features=False))
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images), model.classification_head(model.model.visual(images)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"name": "ViT-B-33"},
            r"model\.name: open_clip has no model 'ViT-B-33'; did you mean 'ViT-",
        ),
        ({"kwargs": {"foo": 1}}, r"open_clip could not build 'ViT-B-32' with kwargs .*foo"),
        ({"head_weights": "none.pt"}, r"model\.head_weights: .*none\.pt: no such file"),
        ({"head_weights": "bad.pt"}, r"bad\.pt cannot be read"),
        ({"head_weights": "bad.safetensors"}, r"bad\.safetensors cannot be read"),
        (
            {"head_weights": "other.pt"},
            r"shapes \{'w': \(3, 16\)\}; wanted exactly one of .* = \[5, 16\]",
        ),
    ],
)
def test_open_clip_refuses(tmp_path, changes, text):
    (tmp_path / "bad.pt").write_bytes(b"no tensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    torch.save({"w": torch.zeros(3, 16)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=text):
        _build(_clip(**changes), root=tmp_path)


def test_open_clip_needs_colour():
    with pytest.raises(InputError, match=r"take 3 channels, found data\.channels: 1"):
        _build(_clip(), channels=1)


FACTORY = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Settings:
    width: int

def small_net(num_classes, width=4):
    width = Settings(width).width
    head = nn.LazyLinear(num_classes)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), head)

def fails(num_classes):
    raise KeyError("weights")

def gives_a_number(num_classes):
    return num_classes
"""


def _factory(text, **kwargs):
    return FactoryModel(source="factory", factory=text, kwargs=kwargs)


def test_a_factory_in_a_file(tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(FACTORY)
    model = _build(_factory("nets/mine.py:small_net", width=6), root=tmp_path)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert norm_buffer_names(model) == {"1.running_mean", "1.running_var"}
    absolute = _factory(f"{tmp_path}/nets/mine.py:small_net")
    assert type(_build(absolute)) is nn.Sequential


def test_a_factory_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(_build(_factory("my_own_nets:small_net")), nn.Module)
    del sys.modules["my_own_nets"]


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("mine.py", r"found 'mine\.py'; wanted `path/to/file\.py:function` or `package"),
        ("main.py:small_net", r"main\.py: no such file; did you mean '.*mine\.py'"),
        ("mine.py:smal_net", r"mine\.py has no function 'smal_net'; did you mean 'small_net'"),
        ("mine.py:fails", r"mine\.py:fails failed when it was called: KeyError: 'weights'"),
        ("mine.py:gives_a_number", r"returned a int; wanted a torch\.nn\.Module"),
        ("broken.py:f", r"broken\.py failed when it was imported: ZeroDivisionError"),
        (
            "no_such_package.x:f",
            r"no_such_package\.x failed when it was imported: ModuleNotFoundError",
        ),
    ],
)
def test_factories_that_fail(tmp_path, factory, text):
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match=text):
        _build(_factory(factory), root=tmp_path)


def test_an_error_in_a_factory_keeps_its_cause(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    with pytest.raises(InputError) as caught:
        _build(_factory("mine.py:fails"), root=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


class _OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))


def test_norm_buffers_of_all_kinds():
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.LayerNorm(2)),
        _OwnNorm(),
    )
    names = {f"{index}.running_{kind}" for index in (0, 2) for kind in ("mean", "var")}
    assert norm_buffer_names(model) == names
    assert norm_buffer_names(nn.BatchNorm1d(2)) == {"running_mean", "running_var"}
    assert norm_buffer_names(nn.Linear(2, 2)) == set()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_variance_that_is_not_positive(value):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_norm_buffers(model)
    model[1].running_var[1] = value
    with pytest.raises(
        InputError, match=r"'1\.running_var': 1 of 3 .* the first is \S+ at 1; wanted"
    ):
        check_norm_buffers(model)
