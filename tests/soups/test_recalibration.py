"""Running statistics of many models at once: what else must not change."""

import torch
from torch import nn

from soups.recalibration import recalibrate_group


def test_recalibration_leaves_the_callers_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stacked = {"0.weight": torch.ones(2, 3, 4).double()}
    statistics = recalibrate_group(model, stacked, {}, [torch.arange(20.0).double().view(5, 4)])
    assert set(statistics) == {"1.running_mean", "1.running_var"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
