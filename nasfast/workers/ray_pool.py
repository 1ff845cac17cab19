"""Workers as Ray actors, on this machine or many."""

from __future__ import annotations

import importlib
import os
import signal
import time
import warnings
from collections.abc import Mapping
from typing import Any, Generic

import torch

from nasfast.evaluation.candidate import G
from nasfast.workers.protocol import Answer, Builder, Job, Worker, WorkerDied
from nasfast.workers.watch import Activity

_OBJECT_STORE = 100_000_000
"""Bytes of a local cluster's object store: genotypes and evaluations pass through it, no arrays."""

_PATIENCE = 30.0  # seconds until a warning that no worker has a place


class RayPool(Generic[G]):
    """Each worker is an actor that asks for ``threads`` CPUs, and for one GPU where it needs one.

    ``RAY_ADDRESS`` names the cluster; without it a local one is started, and ended by `close`. The
    machines need the same files under the same paths; each has its own feature cache, or one that
    they share.

    Args:
        build: makes the evaluator of a worker.
        device: "cpu" or "cuda"; Ray decides which GPU that is.
        threads: that a worker computes with.
        cpus: that a local cluster hands out.
    """

    def __init__(self, build: Builder[G], device: str, threads: int, cpus: int) -> None:
        ray: Any = importlib.import_module("ray")  # installed on demand
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            handler = signal.getsignal(signal.SIGTERM)
            local = {
                "address": "local",
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE,
            }
            ray.init(
                **({} if "RAY_ADDRESS" in os.environ else local),
                log_to_driver=False,
                logging_level="ERROR",
            )
            signal.signal(signal.SIGTERM, handler)  # ray.init takes it
        self._wanted = {"CPU": threads, "GPU": 1 if device == "cuda" else 0}
        self._class = ray.remote(Worker).options(
            num_cpus=self._wanted["CPU"], num_gpus=self._wanted["GPU"]
        )
        self._arguments = build, device, threads, torch.are_deterministic_algorithms_enabled()
        self._placed: list[Any] = []  # references, ready as soon as the actor has a process
        self._patient_until: float | None = time.monotonic() + _PATIENCE
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}  # worker by the reference to its answer

    def start(self, worker: int) -> None:
        """Begin an actor, or begin it again."""
        actor = self._actors[worker] = self._class.remote(*self._arguments)
        if self._patient_until is not None:
            self._placed.append(actor.__ray_ready__.remote())
        self._pending[actor.start.remote()] = worker

    def send(self, worker: int, job: Job[G]) -> None:
        """Give an idle actor a candidate."""
        self._pending[self._actors[worker].run.remote(job)] = worker

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        """Answers so far, after at most ``seconds``."""
        ready, _ = self._ray.wait(list(self._pending), timeout=seconds)
        if self._patient_until is not None and time.monotonic() > self._patient_until:
            self._warn_if_none_is_placed()
        return [(self._pending.pop(reference), self._receive(reference)) for reference in ready]

    def _warn_if_none_is_placed(self) -> None:
        """Once: Ray waits without a word for resources that the cluster may never have."""
        self._patient_until = None
        placed, _ = self._ray.wait(self._placed, timeout=1)
        self._placed.clear()
        if not placed:
            has = self._ray.cluster_resources()
            warnings.warn(
                f"workers: Ray has found no place for any in {_PATIENCE:.0f} s; each needs "
                f"{_amounts(self._wanted)}, the cluster has {_amounts(has)} in all; add machines, "
                "wait until others have finished, or ask for less with --threads or --device cpu",
                stacklevel=2,
            )

    def _receive(self, reference: Any) -> Answer:
        errors = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(reference)
        except (errors.RayActorError, errors.OutOfMemoryError) as error:
            # its last line says why; the advice that follows is Ray's to system operators
            last = str(error).strip().splitlines()[-1]
            return WorkerDied(last.partition(" Some common causes")[0], working=True)
        return answer

    def activity(self, worker: int) -> Activity:
        """Ray does not tell."""
        return Activity()

    def close(self) -> None:
        """Kill all actors, and the local cluster."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
