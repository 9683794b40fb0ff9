"""Models from a config: timm, open_clip, or a user's own factory."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from inputs.config import FactoryModel, ModelConfig, OpenClipModel, TimmModel, nearest
from inputs.errors import InputError

__all__ = ["build_model", "check_norm_buffers", "norm_buffer_names"]


def build_model(config: ModelConfig, *, classes: int, channels: int, root: Path) -> nn.Module:
    """The model that `config` names, for `classes` classes and images of `channels` channels.

    Weights are drawn from torch's global generator, which the caller seeds. `root` is the folder
    that the config's relative paths (a factory, head weights) start from.

    Raises InputError on an unknown name, settings that the model refuses, or a factory that fails.
    """
    if isinstance(config, TimmModel):
        return _timm(config, classes, channels)
    if isinstance(config, OpenClipModel):
        return _open_clip(config, classes, channels, root)
    return _factory(config, classes, root)


def norm_buffer_names(model: nn.Module) -> set[str]:
    """The names of the running statistics (mean and variance) of BatchNorm-like modules."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in ("running_mean", "running_var")
        if isinstance(getattr(module, name, None), Tensor)
    }


def check_norm_buffers(model: nn.Module) -> None:
    """Raise InputError where a running variance is not finite and positive."""
    state = model.state_dict(keep_vars=True)
    for name in sorted(norm_buffer_names(model) & state.keys()):
        if not name.endswith("running_var"):
            continue
        wrong = ~(state[name].isfinite() & (state[name] > 0))
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            raise InputError(
                f"{name!r}: {int(wrong.sum())} of {wrong.numel()} running variances are not "
                f"positive, the first is {float(state[name].flatten()[first]):g} at {first}; "
                "wanted finite numbers above 0: mix norm buffers with norm_buffers: uniform, or "
                "estimate them anew with norm_buffers: recalibrate"
            )


def _tuples(value: Any) -> Any:
    """YAML has lists only; timm compares and unpacks tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _refuse(config: TimmModel | FactoryModel, *names: str) -> None:
    for name in names:
        if name in config.kwargs:
            raise InputError(
                f"model.kwargs.{name}: found {config.kwargs[name]!r}, wanted no such key: it "
                "follows from the data; take it out"
            )


def _timm(config: TimmModel, classes: int, channels: int) -> nn.Module:
    import timm

    _refuse(config, "num_classes", "in_chans")
    architecture = config.name.split(".")[0]
    if ":" not in config.name and not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models())
        # All 1,200 names would not help.
        close = close if "did you mean" in close else "; see timm.list_models() for the names"
        raise InputError(f"model.name: timm has no model {config.name!r}{close}")
    try:
        return timm.create_model(
            config.name, num_classes=classes, in_chans=channels, **_tuples(config.kwargs)
        )
    except Exception as error:
        # timm hands kwargs down to hundreds of constructors, which refuse them in their own ways.
        raise InputError(
            f"model: timm could not build {config.name!r} with kwargs {config.kwargs}: "
            f"{type(error).__name__}: {error}"
        ) from error


class _VisionClassifier(nn.Module):
    """An open_clip vision tower with a linear head on its (normalised) features.

    Tensors are named as in the public 72-model CLIP zoo (2203.05482): `model.visual.*` and
    `classification_head.*`.
    """

    def __init__(self, visual: nn.Module, features: int, classes: int, normalize: bool) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.visual = visual
        self.classification_head = nn.Linear(features, classes)
        self.normalize_features = normalize

    def forward(
        self, images: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows classes"]:
        features = self.model.visual(images)  # type: ignore[operator]
        if self.normalize_features:
            features = features / features.norm(dim=-1, keepdim=True)
        return self.classification_head(features)


def _open_clip(config: OpenClipModel, classes: int, channels: int, root: Path) -> nn.Module:
    import open_clip

    if channels != 3:
        raise InputError(
            f"model: open_clip vision towers take 3 channels, found data.channels: {channels}; "
            "set data.channels=3"
        )
    published = open_clip.get_model_config(config.name)
    if published is None:
        known = nearest(config.name, open_clip.list_models())
        raise InputError(f"model.name: open_clip has no model {config.name!r}{known}")
    settings = {
        "embed_dim": published["embed_dim"],
        "quick_gelu": published.get("quick_gelu", False),
        **config.kwargs,
        "vision_cfg": {
            **published["vision_cfg"],
            **config.kwargs.get("vision_cfg", {}),
            "output_tokens": False,
            "timm_model_pretrained": False,
        },
        # CLIP builds a text tower too; it is dropped, so let it be as small as it can.
        "text_cfg": {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1},
    }
    try:
        visual = open_clip.CLIP(**settings).visual
    except Exception as error:
        # The settings reach towers of many kinds, which refuse them in their own ways.
        raise InputError(
            f"model: open_clip could not build {config.name!r} with kwargs {config.kwargs}: "
            f"{type(error).__name__}: {error}"
        ) from error
    features = settings["embed_dim"]
    model = _VisionClassifier(visual, features, classes, config.normalize_features)
    if config.head_weights is not None:
        weight = _head_weights(root / config.head_weights, classes, features)
        with torch.no_grad():
            model.classification_head.weight.copy_(weight * config.logit_scale)
            model.classification_head.bias.zero_()
    return model


def _head_weights(path: Path, classes: int, features: int) -> Float[Tensor, "classes features"]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"model.head_weights: {path}: no such file") from error
    except OSError:
        raise
    except Exception as error:
        # torch.load raises by what it trips over: pickle, zip and runtime errors.
        raise InputError(
            f"model.head_weights: {path} cannot be read: {type(error).__name__}: {error}; wanted "
            "a .safetensors file, or a torch file of tensors alone"
        ) from error
    tensors = content if isinstance(content, Mapping) else {"": content}
    shapes = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)
    }
    for wanted in ((classes, features), (features, classes)):
        fitting = [name for name, shape in shapes.items() if shape == wanted]
        if len(fitting) == 1:
            weight = tensors[fitting[0]].float()
            # A square tensor is taken as [classes, features], as documented.
            return weight if wanted == (classes, features) else weight.T
    raise InputError(
        f"model.head_weights: {path} holds tensors of shapes {shapes}; wanted exactly one of "
        f"[classes, features] = [{classes}, {features}]"
    )


def describe_model(config: ModelConfig, root: Path) -> dict[str, Any]:
    """What decides the model, as JSON has it: the settings and, of a factory's file, its hash."""
    described = config.model_dump(mode="json")
    if isinstance(config, FactoryModel):
        file = root / config.factory.rpartition(":")[0]
        if file.is_file():
            described["code"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return described


def _factory(config: FactoryModel, classes: int, root: Path) -> nn.Module:
    _refuse(config, "num_classes")
    where, colon, name = config.factory.rpartition(":")
    if not colon or not where or not name:
        raise InputError(
            f"model.factory: found {config.factory!r}; wanted `path/to/file.py:function` or "
            "`package.module:function`"
        )
    module = _user_file(root / where) if where.endswith(".py") else _user_module(where)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        known = nearest(name, own) or "; it has none"
        raise InputError(f"model.factory: {where} has no function {name!r}{known}")
    model = _run_user_code(
        config.factory, lambda: function(num_classes=classes, **config.kwargs), "was called"
    )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model.factory: {config.factory} returned a {type(model).__name__}; wanted a "
            "torch.nn.Module"
        )
    return model


def _run_user_code(name: str, call: Callable[[], Any], doing: str) -> Any:
    try:
        return call()
    except Exception as error:
        # It is the user's code: anything may come out of it, and the cause stays chained.
        raise InputError(
            f"model.factory: {name} failed when it {doing}: {type(error).__name__}: {error}"
        ) from error


def _user_module(name: str) -> ModuleType:
    return _run_user_code(name, lambda: importlib.import_module(name), "was imported")


def _user_file(path: Path) -> ModuleType:
    if not path.is_file():
        known = sorted(str(other) for other in path.parent.glob("*.py"))
        raise InputError(f"model.factory: {path}: no such file{nearest(path, known)}")
    # Every model of a run shares one copy of the module, and with it the classes defined there.
    version = f"{path.resolve()}\0{path.stat().st_mtime_ns}"
    name = f"factory_{path.stem}_{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    # spec_from_file_location knows what loads a .py file.
    assert spec is not None
    assert spec.loader is not None
    load = spec.loader.exec_module
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        _run_user_code(str(path), lambda: load(module), "was imported")
    except InputError:
        del sys.modules[name]
        raise
    return module
