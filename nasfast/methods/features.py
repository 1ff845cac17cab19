"""What searches on features of a frozen encoder share: their workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nasfast.evaluation.candidate import Evaluator
from nasfast.evaluation.frozen_encoder import Caches, FrozenEncoder
from nasfast.utils.errors import UserError
from nasfast.workers import Engine, WorkerConfig


class FeatureBuilder(Protocol):
    """Makes a worker's evaluator on a device. It is pickled, and opens all that it needs."""

    def __call__(self, device: str, *, caches: Caches | None = None) -> Evaluator[Any]:
        """``caches`` are the features that the search has put on the worker's GPU; without them it
        attaches the files."""


def start_workers(
    workers: WorkerConfig, build: FeatureBuilder, fill: Callable[[], FrozenEncoder]
) -> tuple[Engine[Any], FrozenEncoder]:
    """The workers, and the features, which they fill together with this process. On a GPU they
    share those that this process has put there."""
    if workers.shares_devices:
        features = fill()
        on_device = {
            name: functools.partial(build, caches=features.caches_on(torch.device(name)))
            for name in workers.devices[: workers.workers]
        }
        return workers.engine_for(build, on_device), features
    engine = workers.engine_for(build)
    try:
        return engine, fill()
    except BaseException:
        engine.close()
        raise


def check_placement(placement: str, workers: WorkerConfig) -> None:
    """Raise UserError where features are to be put on a device that is the CPU."""
    if placement == "device" and workers.devices[0] == "cpu":
        raise UserError(
            "placement: expected auto, file or ram on a CPU, got device; leave --placement out, or "
            "give --device cuda"
        )
