"""Statistics of BatchNorm that stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def freeze(model: nn.Module) -> None:
    """Every BatchNorm normalises by its running statistics and leaves them, whatever its model
    does, until `train` is called."""
    for norm in _norms(model):
        norm.eval()


@torch.no_grad()
def measure(model: nn.Module, forward: Callable[[], object], passes: int) -> None:
    """Running statistics become their mean over some batches, each of which counts the same. The
    moving averages of a training hold the latest ten or so, of weights that changed meanwhile.

    Args:
        model: in training mode.
        forward: runs the model on a batch.
        passes: how many batches.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    for _ in range(passes):
        forward()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    # with those that gather statistics of several processes
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
