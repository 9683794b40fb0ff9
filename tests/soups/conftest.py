"""A small real zoo: a user's own network with BatchNorm, fine-tuned on digits."""

from pathlib import Path

import pytest
import torch

from inputs.data import load_learning_data
from merge.checkpoints import Checkpoint
from soups.config import LearnConfig
from soups.pipeline import open_run
from soups.session import Session
from soups.zoo import make_zoo

FACTORY = """
from torch import nn


def build(num_classes, width=12):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
"""


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory) -> Path:
    """A folder with `net.py` and a finished `zoo/` of five ingredients and their base."""
    return _furnished(tmp_path_factory.mktemp("kitchen"), seed=0)


@pytest.fixture(scope="session")
def second_kitchen(tmp_path_factory) -> Path:
    """The same with other recipes and weights: for bounds that are those of one certain zoo."""
    return _furnished(tmp_path_factory.mktemp("second_kitchen"), seed=3)


def _furnished(root: Path, seed: int) -> Path:
    (root / "net.py").write_text(FACTORY)
    (root / "seed").write_text(str(seed))
    config = make_config(root)
    torch.manual_seed(0)
    data = load_learning_data(config.data, memory_budget=config.memory_budget)
    make_zoo(config, data, root=root, progress=False)
    return root


def make_config(root: Path, **changes) -> LearnConfig:
    """The config of the small zoo; `changes` replace top-level keys."""
    seed = root / "seed"
    settings = {
        "name": "small",
        "output": root / "results",
        "model": {"source": "factory", "factory": "net.py:build"},
        "data": {
            "path": "digits",
            "channels": 1,
            "fit": {"from": "all", "fraction": 0.4},
            "tune": {"from": "all", "fraction": 0.1},
            "select": {"from": "all", "fraction": 0.25},
            "report": {"from": "all", "fraction": 0.25},
            "cache": root / "cache",
        },
        "zoo": {
            "path": root / "zoo",
            "finetune": {
                "base": {"lr": 3e-3, "epochs": 6, "batch_size": 32},
                "ingredients": 5,
                "seed": int(seed.read_text()) if seed.exists() else 0,
                "recipe": {
                    "lr": {"low": 1e-3, "high": 6e-3, "log": True},
                    "epochs": 2,
                    "batch_size": 32,
                    "noise": [0.0, 0.4],
                },
            },
        },
        "learners": {"uniform": {}},
        "references": {"ensembles": False, "finetuned": False},
        "out_of_fold": 2,
    }
    return LearnConfig.model_validate(settings | changes)


def open_session(kitchen: Path, folder: Path, **changes) -> Session:
    """The session of a run of the small zoo with its results in `folder`."""
    config = make_config(kitchen, output=folder, **changes)
    opened = open_run(
        config, folder, torch.device("cpu"), root=kitchen, fresh=False, progress=False
    )
    return opened.session


def load_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    """Give the session's model a checkpoint's own weights and buffers."""
    for name, tensor in session.model.state_dict().items():
        stored = session.zoo.stored(checkpoint, name)
        if stored and name not in session.zoo.preflight.carried:
            tensor.detach().copy_(checkpoint.read(stored))
