"""What several processes do to a network, without a second process."""

import pytest
import torch
from torch import nn

from nasfast.encoders.resnet import FrozenBatchNorm2d
from nasfast.training import processes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_frozen_norms_stay_as_they_are(device, monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(FrozenBatchNorm2d(3)))
    processes.synchronize(model, torch.device(device))
    wanted = nn.SyncBatchNorm if device == "cuda" else processes.SummedBatchNorm
    assert type(model[0]) is wanted
    assert type(model[1][0]) is FrozenBatchNorm2d
